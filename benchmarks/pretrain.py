"""Pretraining against the stock Trainer: useful tokens per second, and seconds to the same held-out loss.

    python benchmarks/pretrain.py --dataset_name tinystories.jsonl
    python benchmarks/pretrain.py --dataset_name ... --variants plain curriculum ramp both muon --seeds 1 2 3

The peer is `Trainer` with `LlamaForCausalLM` of the same size on the same documents, tokenizer and learning rate, with
about as many tokens per step, each batch padded to its longest document. Sides take turns, each in its own process.
Ours chooses the precision of its products as `hfllm pretrain` does; the variant `fp32` keeps fp32, as the peer does.
Seconds are CPU-seconds of training; the held-out loss, in nats per byte, is taken in the same way on both sides.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SIZE = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "tie_word_embeddings": True}
INTERMEDIATE, VOCABULARY, LENGTH, ROWS, EVALUATIONS = 688, 4096, 512, 4, 8
VARIANTS = {
    "plain": {},
    "fp32": {},
    "curriculum": {"lengths": "0:128,0.2:256,0.5:512"},
    "ramp": {"batch_tokens": "0:512,0.25:1024,0.5:2048"},
    "both": {"lengths": "0:128,0.2:256,0.5:512", "batch_tokens": "0:512,0.25:1024,0.5:2048"},
    # At AdamW's rate it does worse: its steps are a fifth of that rate in every direction.
    "muon": {"use_muon": True, "learning_rate": 1e-2},
    "adamw_fast": {"learning_rate": 5e-3},
}


def trainer_of(args: argparse.Namespace, texts: list[str], tokenizer: Any, folder: str) -> tuple[Any, Any]:
    """Return the trainer of one side, and a function for the predicted tokens of a step."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    import hfllm
    from hfllm.data.packing import IGNORE, pack, token_ids
    from hfllm.flags import changed
    from hfllm.trainers.precision import with_fast_products
    from hfllm.trainers.pretraining.trainer import BatchPlan, PretrainTrainer, Schedule, optimizer_of

    special = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    special |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config_class = LlamaConfig if args.side == "stock" else hfllm.HfllmConfig
    model_class = LlamaForCausalLM if args.side == "stock" else hfllm.HfllmForCausalLM
    torch.manual_seed(args.seed)
    shape = {**SIZE, "intermediate_size": INTERMEDIATE, "initializer_range": 0.0625}
    model = model_class(config_class(**shape, **special, max_position_embeddings=1024))
    settings = TrainingArguments(
        folder,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        seed=args.seed,
        per_device_train_batch_size=ROWS if args.side == "ours" else args.documents,
        num_train_epochs=args.epochs,
        learning_rate=VARIANTS[args.variant].get("learning_rate", args.learning_rate),
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=0.03,
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=1000,
    )
    if args.side == "stock":
        from datasets import Dataset
        from transformers import DataCollatorForLanguageModeling

        pieces = [ids[at : at + LENGTH] for ids in token_ids(texts, tokenizer) for at in range(0, len(ids), LENGTH)]
        collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        trainer = Trainer(model, settings, collate, Dataset.from_dict({"input_ids": pieces}))
        return trainer, lambda batch: (batch["labels"][:, 1:] != IGNORE).sum()
    rows = pack(texts, tokenizer, LENGTH)
    variant = VARIANTS[args.variant]
    plan = BatchPlan(
        [rows],
        LENGTH,
        int(len(rows) * args.epochs),
        Schedule.parse(variant.get("batch_tokens", ROWS * LENGTH), "batch_tokens"),
        Schedule.parse(variant.get("lengths", LENGTH), "lengths"),
        pad_token_id=tokenizer.pad_token_id,
        seed=args.seed,
    )
    plan_settings = changed(settings, num_train_epochs=1)
    if args.variant != "fp32":
        plan_settings = with_fast_products(plan_settings, model)
    optimizer = optimizer_of("use_muon" in variant, plan_settings)
    chunks = {"loss_chunk_size": 1024}
    trainer = PretrainTrainer(
        plan=plan, settings=chunks, model=model, args=plan_settings, optimizer_cls_and_kwargs=optimizer
    )
    return trainer, lambda batch: (batch["labels"][:, 1:] != IGNORE).sum()


def measure(args: argparse.Namespace) -> None:
    """Train one side and print, as JSON, its held-out losses by seconds of training, and its speed."""
    from transformers import TrainerCallback
    from transformers.utils import logging

    from hfllm.data.loading import split_rows
    from hfllm.data.tokenizer import train_tokenizer
    from hfllm.evaluation.perplexity import text_likelihood

    logging.set_verbosity_error()
    texts, held_out = split_rows(texts_of(args.dataset_name), seed=0, share=0.05, most=40)
    tokenizer = train_tokenizer(texts, VOCABULARY, 1024)
    points, spent, useful = [], [0.0], [0]
    with tempfile.TemporaryDirectory() as folder:
        trainer, count = trainer_of(args, texts, tokenizer, folder)
        steps = -(-len(trainer.get_train_dataloader()) * (args.epochs if args.side == "stock" else 1) // 1)
        every = max(int(steps) // EVALUATIONS, 1)
        plain = trainer.training_step

        def counted(model: Any, inputs: Any, *rest: Any) -> Any:
            useful[0] += int(count(inputs))
            return plain(model, inputs, *rest)

        class Watch(TrainerCallback):
            def on_step_begin(self, arguments, state, control, **kwargs):
                self.began = time.process_time()

            def on_step_end(self, arguments, state, control, **kwargs):
                spent[0] += time.process_time() - self.began
                if state.global_step % every == 0 or state.global_step == state.max_steps:
                    fit = text_likelihood(trainer.model, tokenizer, held_out, LENGTH)
                    points.append((spent[0], fit.nats / fit.bytes))

        trainer.training_step = counted
        trainer.add_callback(Watch())
        trainer.train()
    print("RESULT " + json.dumps({"points": points, "tokens_per_second": useful[0] / spent[0]}), flush=True)


def texts_of(name: str) -> list[str]:
    from hfllm.data import formats
    from hfllm.data.sources import load_source

    return [text for text in (formats.to_text(*row) for row in load_source(name)) if text.strip()]


# ---- the comparison ----


def launch(args: argparse.Namespace, side: str, seed: int, variant: str = "plain") -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", side, "--variant", variant, "--seeds", str(seed)]
    for name in ("dataset_name", "epochs", "documents", "learning_rate"):
        command += [f"--{name}", str(getattr(args, name))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
    return json.loads(next(line for line in result.stdout.splitlines() if line.startswith("RESULT"))[7:])


def seconds_to(points: list[tuple[float, float]], loss: float) -> float | None:
    """Return the seconds of training to a held-out loss, interpolated between two measurements."""
    before = None
    for seconds, value in points:
        if value <= loss:
            if before is None:
                return seconds
            share = (before[1] - loss) / (before[1] - value)
            return before[0] + share * (seconds - before[0])
        before = seconds, value
    return None


def compare(args: argparse.Namespace) -> list[str]:
    """Return a row per variant: medians over seeds of speed, final loss, time to the stock trainer's final loss."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ("stock", *args.variants)}
    for seed in args.seeds:
        for name in runs:
            side = "stock" if name == "stock" else "ours"
            runs[name].append(launch(args, side, seed, "plain" if name == "stock" else name))
            print(name, seed, runs[name][-1]["tokens_per_second"], runs[name][-1]["points"][-1], flush=True)
    head = ["", "useful tokens/s", "times stock", "seconds", "final nats/byte", "time to stock's final loss, share"]
    lines = ["| " + " | ".join(head) + " |", "|" + " - |" * len(head)]
    for name, results in runs.items():
        pairs = list(zip(results, runs["stock"], strict=True))
        speed = statistics.median(result["tokens_per_second"] for result in results)
        ratio = statistics.median(one["tokens_per_second"] / peer["tokens_per_second"] for one, peer in pairs)
        reached = [
            (seconds_to(one["points"], peer["points"][-1][1]), seconds_to(peer["points"], peer["points"][-1][1]))
            for one, peer in pairs
        ]
        shares = [own / its for own, its in reached if own is not None]
        share = f"{statistics.median(shares):.2f}" if len(shares) == len(pairs) else f"{len(shares)} of {len(pairs)}"
        seconds, loss = (statistics.median(result["points"][-1][at] for result in results) for at in (0, 1))
        label = "stock Trainer, padded" if name == "stock" else f"hfllm, {name}"
        lines.append(f"| {label} | {speed:.0f} | {ratio:.2f} | {seconds:.0f} | {loss:.4f} | {share} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="Documents: a file or folder.")
    parser.add_argument("--variants", nargs="+", default=["plain"], choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--documents", type=int, default=8, help="Documents of the stock trainer's batch.")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--side", choices=["ours", "stock"], help=argparse.SUPPRESS)
    parser.add_argument("--variant", choices=list(VARIANTS), default="plain", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        args.seed = args.seeds[0]
        measure(args)
        return
    lines = compare(args)
    print("\n".join(lines))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
