"""Speed and memory by length: full, sliding, sparse and linear attention, and layers of several kinds.

    OMP_NUM_THREADS=1 python benchmarks/context.py --output benchmarks/results/context.md
    OMP_NUM_THREADS=1 python benchmarks/context.py --lengths 256 1024 --rounds 2 --window 64 --memory_length 512

All models have four layers and the same seed, and take turns in one process: `full`; windows under a mask of the
whole width (`masked`) and in blocks (`banded`); three windows and full attention (`sssf`); `sparse`, which looks at an
eighth of the blocks; three layers of linear attention and full attention (`lllf`); and `native`, the weights of `lllf`
in transformers' OLMo Hybrid with its formulas in torch. A training step is forward and backward on one row. Decoding
starts from a cache of the whole length. Speeds are medians in tokens per CPU-second, ratios are medians over the
rounds.
"""

import argparse
import statistics
from pathlib import Path

from context_parts import (
    KINDS,
    VOCABULARY,
    build,
    decoding,
    interleaved,
    median_ratio,
    peak_bytes,
    rules,
    saved_bytes,
    training_step,
)

PEERS = ("full", "masked", "native")
# Sizes of a head's keys and values: of the models here with 128 channels, and a square one.
HEADS = ((24, 48), (64, 64))


def ratio(seconds: dict[str, list[float]], peer: str, kind: str) -> str:
    """Return how many times as fast a kind is as a peer, or a dash where the peer did not run."""
    return f"{median_ratio(seconds[peer], seconds[kind]):.2f}" if peer in seconds else "-"


def table(*names: str) -> list[str]:
    """Return the first two lines of a table."""
    return ["", f"| {' | '.join(names)} |", f"| {' | '.join('-' for _ in names)} |"]


def compare(length: int, kinds: list[str], args: argparse.Namespace) -> list[str]:
    """Return the rows of the table of models for one length."""
    import torch

    ids = torch.randint(0, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))
    models = {kind: build(kind, length, args.window, args.hidden_size) for kind in kinds}
    rounds = args.long_rounds if length > args.longest_masked else args.rounds
    for model in models.values():
        training_step(model, ids[:, : max(length // 8, 128)])()
    steps = interleaved({kind: training_step(model, ids) for kind, model in models.items()}, rounds)
    decoders = {kind: decoding(model.eval(), ids, args.new_tokens) for kind, model in models.items()}
    turns = interleaved({kind: run for kind, (run, _) in decoders.items()}, args.rounds)
    rows = []
    for kind in kinds:
        size = decoders[kind][1]
        cells = [
            *(kind, f"{length / statistics.median(steps[kind]):.0f}"),
            *(ratio(steps, peer, kind) for peer in PEERS),
            *(f"{args.new_tokens / statistics.median(turns[kind]):.0f}", ratio(turns, "full", kind)),
            *(f"{size / 1e6:.2f}", f"{size / decoders['full'][1]:.2f}" if "full" in decoders else "-"),
        ]
        rows.append(f"| {length} | {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    return rows


def compare_rules(length: int, rounds: int) -> list[str]:
    """Return the rows of the table of the rule alone for one length."""
    rows = []
    for sizes in HEADS:
        runs = rules(length, *sizes)
        runs["hfllm"]()
        seconds = interleaved(runs, rounds)
        times = (f"{1e3 * statistics.median(seconds[name]):.0f}" for name in ("transformers", "hfllm"))
        rows.append(
            f"| {length} | 4 of {sizes[0]} and {sizes[1]} | {' | '.join(times)} "
            f"| {median_ratio(seconds['transformers'], seconds['hfllm']):.1f} |"
        )
        print(rows[-1], flush=True)
    return rows


def compare_memory(length: int, args: argparse.Namespace) -> list[str]:
    """Return the rows of the table of memory: of one layer, by what two more add, and of a step of four layers."""
    import torch

    ids = torch.randint(0, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))
    rows, full = [], None
    for name, kind, letter in (("full", "full", "f"), ("linear", "lllf", "l"), ("linear, native", "native", "l")):
        sizes = length, args.window, args.hidden_size
        kept = [saved_bytes(build(kind, *sizes, layers), ids) for layers in (3 * letter + "f", letter + "f")]
        layer = (kept[0] - kept[1]) / 2
        peak = peak_bytes(training_step(build(kind, *sizes), ids))
        full = full or (layer, peak)
        rows.append(
            f"| {name} | {layer / length:.0f} | {layer / full[0]:.2f} | {peak / 1e6:.0f} | {peak / full[1]:.2f} |"
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument(
        "--longest_masked", type=int, default=4096, help="No masks of the whole width above this length."
    )
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--long_rounds", type=int, default=3, help="Rounds of training above --longest_masked.")
    parser.add_argument("--memory_length", type=int, default=4096, help="Tokens for the table of memory; 0: no table.")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    lines = [
        "# Long texts: speed and memory by kind of attention",
        "",
        "`OMP_NUM_THREADS=1 python benchmarks/context.py --output ...`: one thread of an AMD EPYC that other work",
        "shared, Python 3.11, torch 2.13 (CPU build), transformers 5.24, fp32. Ratios are within a round; repeated,",
        "they moved by a tenth on this machine.",
        f"Hidden size {args.hidden_size}, 4 layers with 4 heads, window {args.window}, sparse attention to an eighth",
        "of the blocks; `native` is `lllf` in transformers' OLMo Hybrid. Speeds are so many times as high as those of",
        "the model in the heading, sizes so many times as large.",
        "",
        "## Models",
        *table(
            *("length", "layers", "training, tokens/CPU-s", "to full", "to masked", "to native"),
            *("decoding, tokens/CPU-s", "to full", "cache, MB", "to full"),
        ),
    ]
    for length in args.lengths:
        kinds = [kind for kind in args.kinds if kind != "masked" or length <= args.longest_masked]
        lines += compare(length, kinds, args)
    lines += ["", "## The gated delta rule alone, forward and backward"]
    lines += table("length", "heads, keys and values", "transformers, CPU-ms", "hfllm, CPU-ms", "times as fast")
    for length in args.lengths:
        lines += compare_rules(length, args.long_rounds)
    if args.memory_length:
        lines += ["", f"## Memory in training, at {args.memory_length} tokens"]
        lines += table(
            *(
                "layer",
                "kept per token, bytes",
                "to full",
                "peak of a step of four layers (linear: lllf), MB",
                "to full",
            )
        )
        lines += compare_memory(args.memory_length, args)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
