"""Speed and cache of attention by length: full, within a window under a mask and banded, and sparse by blocks.

    OMP_NUM_THREADS=1 python benchmarks/context.py --output benchmarks/results/context.md
    OMP_NUM_THREADS=1 python benchmarks/context.py --lengths 256 1024 --rounds 2 --window 64

All kinds have the same weights and take turns in one process, after a run to warm up; the order changes from round to
round. Speeds are medians in tokens per CPU-second, ratios are medians over the rounds. A training step is forward and
backward on one row. Decoding starts from a cache of the whole length, whose size is that of its keys and values.
Sparse attention looks at an eighth of the blocks.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

KINDS = ("full", "masked", "banded", "sparse")
VOCABULARY = 512
SHARE = 8  # sparse attention looks at one block of so many


def build(kind: str, length: int, window: int, hidden: int, layers: int) -> "PreTrainedModel":
    """Return a model of the family with the attention of a kind, for texts of a length."""
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    import hfllm

    # Our own SDPA is banded where it has a window.
    AttentionInterface.register("masked", sdpa_attention_forward)
    AttentionMaskInterface.register("masked", sdpa_mask)
    block = max(16, min(256, length // 32))
    torch.manual_seed(0)
    config = hfllm.HfllmConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=2 * length,
        tie_word_embeddings=True,
        loss_chunk_size=1024,
        sliding_window=window if kind in ("masked", "banded") else None,
        sparse_block_size=block,
        sparse_num_blocks=max(1, length // (SHARE * block)),
        attn_implementation="sdpa" if kind == "full" else kind,
    )
    return hfllm.HfllmForCausalLM(config)


def training_step(model: "PreTrainedModel", ids: "torch.Tensor") -> Callable[[], None]:
    """Return a forward and a backward pass."""

    def step() -> None:
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    return step


def decoding(model: "PreTrainedModel", ids: "torch.Tensor", tokens: int) -> tuple[Callable[[], None], int]:
    """Return a run that adds tokens one by one to the cache of a text, and the bytes of that cache."""
    import torch

    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).cache
    size = sum(each.nbytes for layer in cache.layers for each in (layer.keys, layer.values))

    @torch.no_grad()
    def run() -> None:
        for index in range(tokens):
            model(input_ids=ids[:, index : index + 1], cache=cache, use_cache=True)

    return run, size


def interleaved(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Return the CPU-seconds of each run in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for index in range(rounds):
        for name in list(runs) if index % 2 else list(runs)[::-1]:
            began = time.process_time()
            runs[name]()
            seconds[name].append(time.process_time() - began)
    return seconds


def ratio(peer: Sequence[float] | None, mine: Sequence[float]) -> str:
    """Return how many times as fast a run is as a peer, or a dash where the peer did not run."""
    if peer is None:
        return "-"
    return f"{statistics.median(theirs / ours for theirs, ours in zip(peer, mine, strict=True)):.2f}"


def compare(length: int, kinds: Sequence[str], args: argparse.Namespace) -> list[str]:
    """Return the rows of the table for one length."""
    import torch

    ids = torch.randint(0, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))
    models = {kind: build(kind, length, args.window, args.hidden_size, args.layers) for kind in kinds}
    steps = interleaved({kind: training_step(model, ids) for kind, model in models.items()}, args.rounds)
    decoders = {kind: decoding(model.eval(), ids, args.new_tokens) for kind, model in models.items()}
    turns = interleaved({kind: run for kind, (run, _) in decoders.items()}, args.rounds)
    rows = []
    for kind in kinds:
        size = decoders[kind][1]
        cells = [
            *(kind, f"{length / statistics.median(steps[kind]):.0f}"),
            *(ratio(steps.get(peer), steps[kind]) for peer in ("full", "masked")),
            *(f"{args.new_tokens / statistics.median(turns[kind]):.0f}", ratio(turns.get("full"), turns[kind])),
            *(f"{size / 1e6:.2f}", f"{size / decoders['full'][1]:.2f}" if "full" in decoders else "-"),
        ]
        rows.append(f"| {length} | {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--longest_masked", type=int, default=4096, help="No masks of the whole width above this length."
    )
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--new_tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    lines = [
        f"Window {args.window}, hidden size {args.hidden_size}, {args.layers} layers, 4 heads, {args.rounds} rounds.",
        "",
        "| length | attention | training, tokens/CPU-s | to full | to masked | decoding, tokens/CPU-s | to full "
        "| cache, MB | to full |",
        "| - | - | - | - | - | - | - | - | - |",
    ]
    for length in args.lengths:
        kinds = [kind for kind in args.kinds if kind != "masked" or length <= args.longest_masked]
        lines += compare(length, kinds, args)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
