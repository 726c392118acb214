"""Speed and memory of the family against transformers' LlamaForCausalLM of the same config, side by side.

    OMP_NUM_THREADS=1 python benchmarks/model.py --output benchmarks/results/model.md

Every measurement alternates between the two models in one process, after warm-up, and the ratio of medians is
reported; speeds are tokens per CPU-second. Peak memory is the largest resident size of a fresh process that takes
three training steps.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

# name: (hidden_size, intermediate_size, layers, heads); parameters of the body without embeddings and head.
BODIES = {"10M": (256, 704, 12, 8), "60M": (640, 1728, 12, 10)}
VOCABULARIES = (8192, 32768)
CHUNK = 128


def sizes(body: str, vocab_size: int) -> dict:
    hidden, intermediate, layers, heads = BODIES[body]
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    }


def build(kind: str, body: str, vocab_size: int):
    """Build `ours`, `chunked` (ours with the chunked loss) or `llama`, with the same weights."""
    import torch
    import transformers

    import hfllm

    torch.manual_seed(0)
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes(body, vocab_size), rms_norm_eps=1e-5))
    chunk = CHUNK if kind == "chunked" else None
    return hfllm.HfllmForCausalLM(hfllm.HfllmConfig(**sizes(body, vocab_size), loss_chunk_size=chunk))


def tokens(vocab_size: int, batch: int, length: int):
    import torch

    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))


def training_step(model, ids) -> Callable[[], None]:
    import torch

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def prefill(model, ids) -> Callable[[], None]:
    import torch

    model.eval()

    @torch.no_grad()
    def run() -> None:
        model(input_ids=ids, use_cache=True, logits_to_keep=1)

    return run


def decode(model, ids, new_tokens: int = 48) -> Callable[[], None]:
    model.eval()
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}

    def run() -> None:
        model.generate(ids, **settings)

    return run


def interleaved(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Return the CPU-seconds of each run in each round; the order changes between rounds."""
    seconds = {name: [] for name in runs}
    for run in runs.values():
        run()
    for index in range(rounds):
        names = list(runs) if index % 2 else list(runs)[::-1]
        for name in names:
            began = time.process_time()
            runs[name]()
            seconds[name].append(time.process_time() - began)
    return seconds


def compare(body: str, vocab_size: int, rounds: int) -> list[str]:
    """Return the rows of the table for one size."""
    models = {kind: build(kind, body, vocab_size) for kind in ("llama", "ours", "chunked")}
    batch, length = (4, 256) if body == "10M" else (2, 256)
    ids, one = tokens(vocab_size, batch, length), tokens(vocab_size, 1, 32)
    tasks = {
        "training": {name: training_step(model, ids) for name, model in models.items()},
        "prefill": {name: prefill(models[name], ids) for name in ("llama", "ours")},
        "decode, batch 1": {name: decode(models[name], one) for name in ("llama", "ours")},
        "decode, batch 8": {name: decode(models[name], tokens(vocab_size, 8, 32)) for name in ("llama", "ours")},
    }
    amount = {
        "training": batch * length,
        "prefill": batch * length,
        "decode, batch 1": 48,
        "decode, batch 8": 8 * 48,
    }
    rows = []
    for task, runs in tasks.items():
        seconds = interleaved(runs, rounds)
        peer = seconds.pop("llama")
        for name, ours in seconds.items():
            # The two runs of a round had the same machine load, so the ratio is taken within a round.
            ratio = statistics.median(theirs / mine for theirs, mine in zip(peer, ours, strict=True))
            speeds = [amount[task] / statistics.median(values) for values in (peer, ours)]
            label = f"{task}, chunked loss" if name == "chunked" else task
            rows.append(f"| {body} | {vocab_size} | {label} | {speeds[0]:.0f} | {speeds[1]:.0f} | {ratio:.2f} |")
            print(rows[-1], flush=True)
    return rows


def peak_memory(kind: str, body: str, vocab_size: int, batch: int) -> float:
    """Return the peak memory of a fresh process, in MB."""
    command = [sys.executable, __file__, "--peak", kind, body, str(vocab_size), str(batch)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_peak(kind: str, body: str, vocab_size: str, batch: str) -> None:
    step = training_step(build(kind, body, int(vocab_size)), tokens(int(vocab_size), int(batch), 256))
    for _ in range(3):
        step()
    # Not getrusage, whose maximum includes the process that this one was forked from.
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        measure_peak(*args.peak)
        return
    lines = [
        "| body | vocabulary | task | Llama, tokens/CPU-s | hfllm, tokens/CPU-s | ratio |",
        "| - | - | - | - | - | - |",
    ]
    for body in BODIES:
        for vocab_size in VOCABULARIES:
            lines += compare(body, vocab_size, args.rounds)
    lines += [
        "",
        "| body | vocabulary | batch | Llama, MB | hfllm, chunked loss, MB | ratio |",
        "| - | - | - | - | - | - |",
    ]
    for body, batch in (("10M", 16), ("60M", 16)):
        peer, ours = (peak_memory(kind, body, 32768, batch) for kind in ("llama", "chunked"))
        lines.append(f"| {body} | 32768 | {batch} x 256 | {peer:.0f} | {ours:.0f} | {ours / peer:.2f} |")
        print(lines[-1], flush=True)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
