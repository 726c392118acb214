"""Real text beyond the trained length: RoPE extensions, endless streams with and without sinks, memory of segments.

    OMP_NUM_THREADS=1 python benchmarks/context_texts.py extension --output extension.md
    OMP_NUM_THREADS=1 python benchmarks/context_texts.py streams --output streams.md
    OMP_NUM_THREADS=1 python benchmarks/context_texts.py memory --output memory.md

A small byte-level model of the family learns the source files of Python's standard library (`--text` takes another
file), a twentieth of which is held out. Bits per byte on one set of held-out rows for all arms, with standard errors
over rows; differences are paired. Times are CPU-seconds of one thread.
"""

import argparse
import copy
import math
import random
import sysconfig
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from hfllm.outputs.intervals import standard_error

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ORIGINAL, FACTOR = 256, 4
MEMORY_MIXES = {"full": "fff", "linear and full": "llf"}
TYPES = {"f": "full_attention", "l": "linear_attention"}


def texts_of(path: Path | None) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return bytes to learn from and held-out ones, (S,)."""
    import torch

    files = [path] if path else sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    random.Random(0).shuffle(files)
    data = b"\n".join(file.read_bytes() for file in files)
    cut = int(len(data) * 0.95)
    return tuple(torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in (data[:cut], data[cut:]))


def draw(text: "torch.Tensor", length: int, number: int, generator: "torch.Generator") -> "torch.Tensor":
    import torch

    places = torch.randint(0, len(text) - length, (number,), generator=generator)
    return torch.stack([text[place : place + length] for place in places.tolist()])


def build(layers: str = "fff", seed: int = 0) -> "PreTrainedModel":
    import torch

    import hfllm

    torch.manual_seed(seed)
    config = hfllm.HfllmConfig(
        vocab_size=256,
        hidden_size=96,
        num_hidden_layers=len(layers),
        num_attention_heads=3,
        layer_types=[TYPES[letter] for letter in layers],
        tie_word_embeddings=True,
        initializer_range=0.1,
        max_position_embeddings=ORIGINAL,
    )
    return hfllm.HfllmForCausalLM(config)


def fit(
    model: "PreTrainedModel", loss: Callable[[], "torch.Tensor"], seconds: float, learning_rate: float
) -> tuple[int, float]:
    """Train for so many CPU-seconds; return the steps and the last loss."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    steps, began, last = 0, time.process_time(), math.nan
    model.train()
    while (done := (time.process_time() - began) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (steps + 1) / 10) * max(0.05, 1 - done)
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps, last = steps + 1, value.item()
    model.eval()
    return steps, last


def windows(
    model: "PreTrainedModel", text: "torch.Tensor", length: int, number: int, seed: int, begin: bool = False
) -> Callable[[], "torch.Tensor"]:
    """Return a function that draws a batch and returns its loss; with `begin` each row begins with a byte of 0."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def loss() -> "torch.Tensor":
        ids = draw(text, length, number, generator)
        ids[:, :1] *= not begin
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    return loss


def figure(values: "torch.Tensor") -> str:
    """Return the mean of the rows' bits per byte, with its standard error."""
    rows = values.tolist()
    return f"{sum(rows) / len(rows):.3f} ± {standard_error(rows):.3f}"


def base_model(args: argparse.Namespace, train: "torch.Tensor", begin: bool = False) -> "PreTrainedModel":
    model = build(seed=args.seed)
    batches = windows(model, train, ORIGINAL, 16, 1 + 10 * args.seed, begin)
    steps, last = fit(model, batches, args.base_seconds, 4e-3)
    print(f"base: {steps} steps, last loss {last / math.log(2):.3f} bits per byte", flush=True)
    return model


def extension(args: argparse.Namespace, train: "torch.Tensor", test: "torch.Tensor") -> list[str]:
    """Return the table of extensions, untrained and trained, and of as much training without one."""
    import torch

    from hfllm.generation.scoring import nats_by_position
    from hfllm.models.extension import extend_model, extended_config

    length = ORIGINAL * FACTOR
    rows = draw(test, length, args.rows, torch.Generator().manual_seed(5)).tolist()
    ranges = [(1, ORIGINAL)] + [(ORIGINAL << n, ORIGINAL << n + 1) for n in range(int(math.log2(FACTOR)))]

    def bits(model: "PreTrainedModel", window: int | None = None) -> list["torch.Tensor"]:
        nats = nats_by_position(model, rows, window) / math.log(2)
        return [nats[:, first - 1 : last - 1].mean(1) for first, last in ranges]

    base = base_model(args, train)
    original = bits(base)
    lines = [
        f"Trained at {ORIGINAL} bytes for {args.base_seconds:g} CPU-s; extended {FACTOR} times; {args.rows} held-out "
        f"rows of {length}; trained further for {args.seconds:g} CPU-s on rows of {length}. Bits per byte.",
        "",
        f"| extension | trained | {' | '.join(f'{a} to {b}' for a, b in ranges)} | change to {ORIGINAL} |",
        "| - | - |" + " - |" * (len(ranges) + 1),
    ]

    def add(name: str, trained: str, found: list["torch.Tensor"]) -> None:
        lines.append(f"| {name} | {trained} | {' | '.join(map(figure, found))} | {figure(found[0] - original[0])} |")
        print(lines[-1], flush=True)

    add("none", "no", original)
    add(f"none, reading {ORIGINAL} at most", "no", bits(base, ORIGINAL))
    for kind in ("none", *args.extensions):
        model = copy.deepcopy(base)
        if kind != "none":
            extend_model(model, extended_config(model.config, kind, FACTOR))
            add(kind, "no", bits(model))
        fit(model, windows(model, train, length, 4, 2 + 10 * args.seed), args.seconds, 1e-3)
        add(kind, "yes", bits(model))
    return lines


def streams(args: argparse.Namespace, train: "torch.Tensor", test: "torch.Tensor") -> list[str]:
    """Return the table of a stream many times as long as the cache, with and without first tokens."""
    from hfllm.evaluation.long_texts import nats_by_segment
    from hfllm.generation.caches import SinkCache

    base, piece, sizes = base_model(args, train, begin=True), 16, ORIGINAL - 16
    total = args.rows * 2 * ORIGINAL
    rows = test[: len(test) // 8 * 8].view(8, -1)[:, :total].clone()
    rows[:, 0] = 0
    edges = [1, ORIGINAL, *(total * share // 4 for share in (1, 2, 3, 4))]
    lines = [
        f"A stream of {rows.shape[1]} bytes in pieces of {piece}; {len(rows)} rows; a cache of {sizes}. Bits "
        "per byte.",
        "",
        f"| first tokens kept | {' | '.join(f'{a} to {b}' for a, b in pairwise(edges))} |",
        "| - |" + " - |" * (len(edges) - 1),
    ]
    for sinks in (0, 1, 4):
        nats = nats_by_segment(base, rows, piece, cache=SinkCache(base, sizes, sinks)) / math.log(2)
        cells = [figure(nats[:, a - 1 : b - 1].mean(1)) for a, b in pairwise(edges)]
        lines.append(f"| {sinks} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def memory(args: argparse.Namespace, train: "torch.Tensor", test: "torch.Tensor") -> list[str]:
    """Return the table of models that learn and read in segments, with and without a memory."""
    from hfllm.evaluation.long_texts import nats_by_segment, streams
    from hfllm.generation.caches import SegmentMemory

    segment, kept, batch = 64, 192, 16
    rows = test[: len(test) // 16 * 16].view(16, -1)[:, : args.rows * ORIGINAL]
    lines = [
        f"Segments of {segment} bytes, a memory of {kept} bytes for full attention and the state for linear "
        f"attention; {args.base_seconds:g} CPU-s each; {len(rows)} held-out rows of {rows.shape[1]}. Bits per byte.",
        "",
        "| layers | trained | read with memory | read without | gain |",
        "| - | - | - | - | - |",
    ]
    for name, layers in MEMORY_MIXES.items():
        for with_memory in (True, False):
            model, batches = build(layers, args.seed), streams(train, batch, segment)
            state: dict[str, object] = {"step": 0}

            def loss(model=model, batches=batches, state=state, with_memory=with_memory) -> "torch.Tensor":
                place = state["step"] % len(batches)
                if place == 0:
                    state["memory"] = SegmentMemory(model, kept) if with_memory else None
                state["step"] += 1
                given = {"cache": state["memory"], "use_cache": True} if with_memory else {"use_cache": False}
                return model(input_ids=batches[place], labels=batches[place], **given).loss

            steps, _ = fit(model, loss, args.base_seconds, 4e-3)
            kept_bits, alone = (
                (nats_by_segment(model, rows, segment, size) / math.log(2)).mean(1) for size in (kept, None)
            )
            how = f"{'with' if with_memory else 'without'} memory, {steps} steps"
            lines.append(f"| {name} | {how} | {figure(kept_bits)} | {figure(alone)} | {figure(alone - kept_bits)} |")
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    import torch

    from hfllm.models.extension import ROPE_TYPES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("extension", "streams", "memory"))
    parser.add_argument("--text", type=Path, help="A file to read in place of the standard library.")
    parser.add_argument("--base_seconds", type=float, default=120)
    parser.add_argument("--seconds", type=float, default=300, help="CPU-seconds of training after an extension.")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0, help="Of the weights and of the order of the text.")
    parser.add_argument("--extensions", nargs="+", choices=ROPE_TYPES, default=list(ROPE_TYPES))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = {"extension": extension, "streams": streams, "memory": memory}[args.what](args, *texts_of(args.text))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
