"""Distillation against TRL's DistillationTrainer: the same random teacher, student, tokens and divergence, in turn.

    OMP_NUM_THREADS=1 python benchmarks/distillation.py --output benchmarks/results/distillation.md

TRL's trainer lets the student generate; here it gets the same completions instead, so that the measured
step is the same: both forward passes, the divergence (forward KL at temperature 3, no cross-entropy), the
backward pass and AdamW. Each measurement is a separate process; the two sides take turns. Seconds are CPU-seconds of
the median step after the first; memory is the largest resident size, and the part that training added to the loaded
models and libraries. The loss of the first step is printed to show that both compute the same (ours over the squared
temperature, which TRL leaves out).

Sides: `trl`; `ours`, logits in chunks of `--loss_chunk_size` tokens; `whole`, ours without chunks; `cached`, ours from
the teacher's top 32 on disk, which is another divergence and saves the teacher's pass.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

PAD, EOS, FIRST_WORD = 0, 1, 2
PROMPT, TEMPERATURE, TOP_K = 8, 3.0, 32
LABELS = {"trl": "TRL 1.16", "ours": "hfllm", "whole": "hfllm, no chunks", "cached": f"hfllm, top {TOP_K} on disk"}


def build_model(args: argparse.Namespace, hidden: int, layers: int, seed: int) -> Any:
    """Build a random Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocab_size,
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            max_position_embeddings=PROMPT + args.completion_length,
            initializer_range=0.05,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=EOS,
        )
    )


def build_tokenizer(vocab_size: int) -> Any:
    """Build a tokenizer with words w2, w3, ... as tokens 2, 3, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(f"w{index}" for index in range(FIRST_WORD, vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def pairs(args: argparse.Namespace) -> list[tuple[list[int], list[int]]]:
    """Return random prompts and completions for one batch, which every step uses."""
    rng = random.Random(0)

    def draw(count: int) -> list[int]:
        return [rng.randrange(FIRST_WORD, args.vocab_size) for _ in range(count)]

    return [(draw(PROMPT), draw(args.completion_length)) for _ in range(args.batch_size)]


def shared_arguments(args: argparse.Namespace, output_dir: str) -> dict[str, Any]:
    return {
        "output_dir": output_dir,
        "per_device_train_batch_size": args.batch_size,
        "max_steps": args.steps,
        "learning_rate": 1e-4,
        "temperature": TEMPERATURE,
        "beta": 0.0,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def build_ours(args: argparse.Namespace, output_dir: str) -> Any:
    from hfllm import DistillationConfig, DistillationTrainer

    rows = [
        {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}
        for prompt, completion in pairs(args)
    ]
    return DistillationTrainer(
        model=build_model(args, args.student_hidden, args.student_layers, seed=0),
        teacher_model=build_model(args, args.teacher_hidden, args.teacher_layers, seed=1),
        args=DistillationConfig(
            **shared_arguments(args, output_dir),
            soft_weight=1.0,
            hard_weight=0.0,
            loss_chunk_size=0 if args.side == "whole" else args.loss_chunk_size,
            teacher_top_k=TOP_K if args.side == "cached" else None,
        ),
        train_dataset=rows,
        processing_class=build_tokenizer(args.vocab_size),
    )


def build_trl(args: argparse.Namespace, output_dir: str) -> Any:
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    tokenizer, written = build_tokenizer(args.vocab_size), {tuple(prompt): answer for prompt, answer in pairs(args)}

    class GivenCompletions(DistillationTrainer):
        """TRL's trainer with the data's completions in place of the student's."""

        def _generate_single_turn(self, prompt_ids: Any, *rest: Any, **kwargs: Any) -> list[list[int]]:
            return [written[tuple(ids)] for ids in prompt_ids]

    return GivenCompletions(
        model=build_model(args, args.student_hidden, args.student_layers, seed=0),
        teacher_model=build_model(args, args.teacher_hidden, args.teacher_layers, seed=1),
        args=DistillationConfig(
            **shared_arguments(args, output_dir),
            gradient_checkpointing=False,
            max_completion_length=args.completion_length,
        ),
        train_dataset=Dataset.from_dict({"prompt": [tokenizer.decode(list(prompt)) for prompt in written]}),
        processing_class=tokenizer,
    )


def memory(field: str) -> float:
    """Return this process's memory in MB: `VmRSS` now, `VmHWM` at its peak."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024


def measure(args: argparse.Namespace) -> None:
    """Run one side and print its figures as a line of JSON."""
    from transformers import TrainerCallback

    moments = []

    class Clock(TrainerCallback):
        def on_step_end(self, arguments: Any, state: Any, control: Any, **kwargs: Any) -> None:
            moments.append((time.process_time(), time.perf_counter()))

    with tempfile.TemporaryDirectory() as folder:
        trainer = (build_trl if args.side == "trl" else build_ours)(args, folder)
        trainer.add_callback(Clock())
        before = memory("VmRSS")
        trainer.train()
    steps = [[end - begin for begin, end in zip(*pair, strict=True)] for pair in itertools.pairwise(moments)]
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    result = {
        "cpu": statistics.median(step[0] for step in steps),
        "wall": statistics.median(step[1] for step in steps),
        "peak": memory("VmHWM"),
        "added": memory("VmHWM") - before,
        "loss": loss if args.side == "trl" else loss / TEMPERATURE**2,
    }
    print("RESULT " + json.dumps(result), flush=True)


# ---- the comparison ----


def launch(side: str, args: argparse.Namespace) -> dict[str, float]:
    """Run one measurement in a separate process."""
    command = [sys.executable, __file__, "--side", side]
    for name in ("vocab_size", "batch_size", "completion_length", "steps", "loss_chunk_size", *SIZES):
        command += [f"--{name}", str(getattr(args, name))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
    return json.loads(next(line for line in result.stdout.splitlines() if line.startswith("RESULT"))[7:])


def row(side: str, results: list[dict[str, float]], peer: list[dict[str, float]] | None) -> str:
    """Return a line of the table; ratios are medians over rounds, in each of which the sides took turns."""
    median = {name: statistics.median(result[name] for result in results) for name in results[0]}
    cells = [LABELS[side], f"{1 / median['cpu']:.2f}", f"{1 / median['wall']:.2f}", f"{median['peak']:.0f}"]
    cells += [f"{median['added']:.0f}", f"{median['loss']:.5f}"]
    for name in ("cpu", "peak", "added"):
        if peer is None:
            cells.append("")
            continue
        ratios = [one[name] / other[name] for one, other in zip(results, peer, strict=True)]
        cells.append(f"{1 / statistics.median(ratios) if name == 'cpu' else statistics.median(ratios):.2f}")
    return "| " + " | ".join(cells) + " |"


def compare(args: argparse.Namespace) -> list[str]:
    head = ["", "steps per CPU-second", "steps per second", "MB at most", "MB added by training", "first loss"]
    head += ["speed, times TRL", "memory, share of TRL", "added memory, share of TRL"]
    runs: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(args.rounds):
        for side in args.sides:
            runs[side].append(launch(side, args))
    setting = (
        f"vocabulary {args.vocab_size:,}, {args.batch_size} rows of {PROMPT} + {args.completion_length} tokens; "
        f"teacher {args.teacher_hidden} x {args.teacher_layers}, "
        f"student {args.student_hidden} x {args.student_layers}; {args.rounds} rounds"
    )
    lines = [setting, "", "| " + " | ".join(head) + " |", "|" + " - |" * len(head)]
    peer = runs.get("trl")
    return [*lines, *(row(side, results, None if side == "trl" else peer) for side, results in runs.items())]


SIZES = ("teacher_hidden", "teacher_layers", "student_hidden", "student_layers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=list(LABELS), default=list(LABELS))
    parser.add_argument("--rounds", type=int, default=3, help="Processes of each side.")
    parser.add_argument("--steps", type=int, default=5, help="Steps of a process; the first is not counted.")
    parser.add_argument("--vocab_size", type=int, default=32000)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--completion_length", type=int, default=128)
    parser.add_argument("--loss_chunk_size", type=int, default=128)
    for name, default in zip(SIZES, (256, 6, 128, 3), strict=True):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--side", choices=list(LABELS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        measure(args)
        return
    lines = compare(args)
    print("\n".join(lines))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
