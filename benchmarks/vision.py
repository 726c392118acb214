"""Training speed and memory of a vision-language decoder against Llava's class around transformers' Llama.

    OMP_NUM_THREADS=1 python benchmarks/vision.py --output benchmarks/results/vision.md

Both have the same tower, projector and sizes. Measurements alternate in one process, after warm-up; reported is the
median of the ratios within a round, with the smallest and the largest, and speed in tokens (those of pictures among
them) and pictures per CPU-second. Peak memory is the largest resident size of a fresh process after two steps.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from model import CHUNK, interleaved, sizes

IMAGE_TOKEN, PICTURE, PATCH = 5, 64, 8
VECTORS = (PICTURE // PATCH) ** 2
TEXT_TOKENS = 64
KINDS = {"llama": "Llava with Llama", "ours": "hfllm", "chunked": "hfllm, chunked loss"}


def build(kind: str, vocab_size: int):
    """Build `ours`, `chunked` (ours with the chunked loss) or `llama`."""
    import torch
    import transformers

    import hfllm

    torch.manual_seed(0)
    tower = transformers.SiglipVisionConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=PICTURE,
        patch_size=PATCH,
    )
    if kind == "llama":
        config = transformers.LlamaConfig(**sizes("10M", vocab_size), rms_norm_eps=1e-5)
        text = transformers.LlamaForCausalLM(config)
    else:
        chunk = CHUNK if kind == "chunked" else None
        text = hfllm.HfllmForCausalLM(hfllm.HfllmConfig(**sizes("10M", vocab_size), loss_chunk_size=chunk))
    return hfllm.with_vision(text, tower, image_token_id=IMAGE_TOKEN)


def training_step(model, vocab_size: int, batch: int, text_tokens: int):
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, vocab_size, (batch, VECTORS + text_tokens), generator=generator)
    ids[:, 1 : 1 + VECTORS] = IMAGE_TOKEN
    labels = ids.where(ids != IMAGE_TOKEN, -100)
    pixels = torch.randn(batch, 3, PICTURE, PICTURE, generator=generator)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        model(input_ids=ids, pixel_values=pixels, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare(vocab_size: int, rounds: int, batch: int) -> list[str]:
    """Return the rows of the table for one vocabulary."""
    runs = {kind: training_step(build(kind, vocab_size), vocab_size, batch, TEXT_TOKENS) for kind in KINDS}
    seconds, rows = interleaved(runs, rounds), []
    for kind, name in KINDS.items():
        # The runs of a round had the same machine load, so the ratio is taken within a round.
        ratios = [theirs / mine for theirs, mine in zip(seconds["llama"], seconds[kind], strict=True)]
        pictures = batch / statistics.median(seconds[kind])
        tokens = pictures * (VECTORS + TEXT_TOKENS)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append(f"| {vocab_size} | {name} | {tokens:.0f} | {pictures:.1f} | {spread} |")
        print(rows[-1], flush=True)
    return rows


def peak_memory(kind: str, vocab_size: int) -> float:
    """Return the peak memory of a fresh process, in MB."""
    command = [sys.executable, __file__, "--peak", kind, str(vocab_size)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_peak(kind: str, vocab_size: int) -> None:
    step = training_step(build(kind, vocab_size), vocab_size, 8, 256 - VECTORS)
    for _ in range(2):
        step()
    # Not getrusage, whose maximum includes the process that this one was forked from.
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=2, help="rows of a step of training")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        measure_peak(args.peak[0], int(args.peak[1]))
        return
    row = f"{VECTORS} vectors of a picture and {TEXT_TOKENS} tokens"
    lines = [
        f"Training, {args.batch} rows of {row}, {args.rounds} rounds.",
        "",
        "| vocabulary | model | tokens/CPU-s | pictures/CPU-s | times the first |",
        "| - | - | - | - | - |",
    ]
    for vocab_size in (8192, 32768):
        lines += compare(vocab_size, args.rounds, args.batch)
    peer, ours = (peak_memory(kind, 32768) for kind in ("llama", "chunked"))
    lines += [
        "",
        "| vocabulary | batch | Llava with Llama, MB | hfllm, chunked loss, MB | ratio |",
        "| - | - | - | - | - |",
        f"| 32768 | 8 x 256 | {peer:.0f} | {ours:.0f} | {ours / peer:.2f} |",
    ]
    print(lines[-1], flush=True)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
