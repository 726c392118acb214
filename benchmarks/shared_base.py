"""Memory of PPO whose policy, critic, reference and reward model are adapters of one base, against separate models.

    OMP_NUM_THREADS=1 python benchmarks/shared_base.py --model_name_or_path NAME

Each side is a process of its own, in turn. Weights are the bytes of all different parameters of the four models, and
other columns the largest resident size of the process up to the end of loading, while it samples and scores, and while
it learns. The reward model is a random adapter for scores; on the separate side it is merged into a base of its own,
and the critic is a third model, all of whose weights are trained.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

SIDES = ("separate", "shared")
PHASES = ("weights", "loaded", "rollout", "update", "seconds")
PROMPTS = ("Name a color.", "What is 2 + 3?", "Tell me a short story about a fox.", "Say hello in French.")
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


def peak() -> float:
    """Return the largest resident size in MB since the last call (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    size = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    # Resets the largest size to the present one.
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return size / 1024


def save_scorer(name: str, folder: str) -> None:
    """Save a random adapter for scores of this model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    from hfllm.models.loading.saved import saved_model, saved_tokenizer

    torch.manual_seed(0)
    model = saved_model(AutoModelForSequenceClassification, name, num_labels=1, dtype=torch.float32)
    config = LoraConfig(**LORA, init_lora_weights=False, task_type="SEQ_CLS", modules_to_save=["score"])
    config.exclude_modules = ["score"]
    get_peft_model(model, config).save_pretrained(folder)
    saved_tokenizer(name).save_pretrained(folder)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Train for some rollouts; return the figures of `PHASES`."""
    from datasets import Dataset
    from peft import LoraConfig

    from hfllm import PPOConfig, PPOTrainer
    from hfllm.runs.models import NamedModel, load_policy

    policy, tokenizer = load_policy(NamedModel(args.model_name_or_path, settings={"dtype": "float32"}))
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            folder,
            **{"response_length": args.response_length, "per_device_train_batch_size": 4, "num_mini_batches": 4},
            **{"num_ppo_epochs": 1, "max_steps": 4 * args.rollouts, "use_cpu": True, "bf16": False},
            **{"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 4},
            shared_base=args.side == "shared",
        )
        prompts = Dataset.from_dict({"prompt": [*PROMPTS] * 16})
        adapter = LoraConfig(**LORA, task_type="CAUSAL_LM")
        trainer = PPOTrainer(
            *(policy, args.scorer, config, prompts),
            **{"processing_class": tokenizer, "value_model": args.scorer, "peft_config": adapter},
        )
        models = (trainer.policy, trainer.actor, *(each.model for each in trainer.scorer.rewards))
        found = {id(each): each.numel() * each.element_size() for model in models for each in model.parameters()}
        phases = {"weights": [sum(found.values()) / 2**20], "loaded": [peak()], "rollout": [], "update": []}
        collect = trainer.collect_rollout

        def timed(rows: list) -> object:
            phases["update"].append(peak())
            rollout = collect(rows)
            phases["rollout"].append(peak())
            return rollout

        trainer.collect_rollout = timed
        began = time.process_time()
        trainer.train()
        phases["update"].append(peak())
        # What came before the first rollout is no update.
        del phases["update"][0]
    seconds = (time.process_time() - began) / args.rollouts
    return {**{name: max(sizes) for name, sizes in phases.items()}, "seconds": seconds}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both sides in turn, and print their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--response_length", type=int, default=32)
    parser.add_argument("--rollouts", type=int, default=3, help="Of 16 answers, with four optimizer steps each.")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--scorer", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side:
        print(json.dumps(measure(args)))
        return
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        save_scorer(args.model_name_or_path, folder)
        words = [sys.executable, __file__, *(argv or sys.argv[1:]), "--scorer", folder]
        for _ in range(args.repeats):
            for side in SIDES:
                result = subprocess.run([*words, "--side", side], check=True, capture_output=True, text=True)
                found[side].append(json.loads(result.stdout.splitlines()[-1]))
    print(f"| | {' | '.join(SIDES)} | ratio |\n| - | - | - | - |")
    for phase in PHASES:
        separate, shared = (statistics.median(each[phase] for each in found[side]) for side in SIDES)
        unit = "CPU-seconds of a rollout" if phase == "seconds" else f"{phase}, MB"
        print(f"| {unit} | {separate:,.0f} | {shared:,.0f} | {shared / separate:.2f} |")


if __name__ == "__main__":
    main()
