"""Find the settings at which PPO moves a model: held-out reward by learning rate, critic's rate and KL weight.

    python benchmarks/learning_rates.py --model_name_or_path NAME --dataset_name prompts.jsonl \
        --reward_funcs my_rewards.py:score --learning_rates 1e-5 1e-4 1e-3 --output_dir outputs/learning_rates
    python benchmarks/learning_rates.py ... --lora_r 16 --value_learning_rates 1e-3 1e-2

Every combination of the values given is one run of the same number of episodes from the same model. A row per run is
printed and appended to `runs.jsonl` in the output folder, and the rewards over training are drawn to `rewards.png`.
The default rates of `PPOConfig` (hfllm/trainers/ppo/config.py) come from such tables; those measured are in
benchmarks/results/learning_rates.md. Choose on one seed, judge on others.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, set_seed

from hfllm.data.formats import as_completion
from hfllm.errors import InputError
from hfllm.generation.responses import sample_responses
from hfllm.models.loading.saved import saved_model
from hfllm.outputs.intervals import standard_error
from hfllm.outputs.report import Plot, markdown_table
from hfllm.rewards.functions import RewardFunction
from hfllm.runs.models import load_tokenizer
from hfllm.stages.rlhf import build as rlhf
from hfllm.stages.rlhf import flags as rlhf_flags
from hfllm.trainers.ppo.config import PPOConfig
from hfllm.trainers.ppo.trainer import PPOTrainer

SHOWN = (
    *("trained", "learning_rate", "value_learning_rate", "kl_coef", "seed", "before", "after", "change", "error"),
    *("kl", "clip_fraction", "explained_variance", "length", "seconds"),
)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--dataset_name", default="world")
    parser.add_argument("--reward_funcs", nargs="+", default=["gold"])
    parser.add_argument("--apply_chat_template", action="store_true")
    parser.add_argument("--learning_rates", type=float, nargs="+", required=True)
    parser.add_argument("--value_learning_rates", type=float, nargs="+", default=[None], help="by default the rule's")
    parser.add_argument("--kl_coefs", type=float, nargs="+", default=[0.05])
    parser.add_argument("--lora_r", type=int, default=0, help="train adapters of this rank")
    parser.add_argument("--num_ppo_epochs", type=int, default=2)
    parser.add_argument("--num_mini_batches", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=16, help="episodes of an optimizer step")
    parser.add_argument("--episodes", type=int, default=1280, help="of each run")
    parser.add_argument("--response_length", type=int, default=48)
    parser.add_argument("--num_eval_prompts", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--output_dir", default="outputs/learning_rates")
    return parser.parse_args()


def rewards_of(
    trainer: PPOTrainer, rows: Sequence[Mapping[str, object]], functions: Sequence[RewardFunction]
) -> list[float]:
    """Return the reward of one response to each held-out prompt, sampled with the same random numbers each time."""
    prompts = [row["prompt"] for row in rows]
    sampled = sample_responses(
        trainer.policy, trainer.processing_class, prompts, trainer.args.response_length, seed=trainer.args.seed
    )
    completions = [as_completion(prompt, texts[0]) for prompt, texts in zip(prompts, sampled, strict=True)]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    scores = [function(prompts=prompts, completions=completions, **columns) for function in functions]
    return [sum(each) for each in zip(*scores, strict=True)]


def paired_change(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """Return both means, their difference, and its standard error over the prompts."""
    differences = [late - early for early, late in zip(before, after, strict=True)]
    return {
        "before": statistics.fmean(before),
        "after": statistics.fmean(after),
        "change": statistics.fmean(differences),
        "error": standard_error(differences),
    }


def run(
    args: argparse.Namespace, learning_rate: float, value_learning_rate: float | None, kl_coef: float, seed: int
) -> dict[str, float | str | list[float]]:
    """Train once. Return its row, with its curve of rewards."""
    data = rlhf_flags.RlhfArguments(
        dataset_name=args.dataset_name,
        reward_funcs=args.reward_funcs,
        apply_chat_template=args.apply_chat_template,
        num_eval_prompts=args.num_eval_prompts,
        num_prompts=args.episodes,
    )
    functions = rlhf.checked_functions(data.reward_funcs)
    # The same held-out prompts for all seeds.
    train_rows, eval_rows = rlhf.prompt_data(data, 0, functions)
    set_seed(seed)
    model = saved_model(AutoModelForCausalLM, args.model_name_or_path, dtype=torch.float32)
    config = PPOConfig(
        args.output_dir,
        learning_rate=learning_rate,
        value_learning_rate=value_learning_rate,
        kl_coef=kl_coef,
        num_ppo_epochs=args.num_ppo_epochs,
        num_mini_batches=args.num_mini_batches,
        per_device_train_batch_size=args.batch_size,
        total_episodes=args.episodes,
        response_length=args.response_length,
        seed=seed,
        logging_steps=args.num_ppo_epochs * args.num_mini_batches,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
    )
    # The adapter that --use_peft stands for.
    adapter = LoraConfig(r=args.lora_r, lora_alpha=32, lora_dropout=0.05, task_type="CAUSAL_LM")
    trainer = PPOTrainer(
        model,
        functions,
        config,
        Dataset.from_list(train_rows),
        processing_class=load_tokenizer(args.model_name_or_path),
        peft_config=adapter if args.lora_r else None,
    )
    before = rewards_of(trainer, eval_rows, functions)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    change = paired_change(before, rewards_of(trainer, eval_rows, functions))
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    last = history[-max(1, len(history) // 4) :]
    return {
        "trained": sum(each.numel() for each in trainer.policy.parameters() if each.requires_grad),
        "lora_r": args.lora_r,
        "learning_rate": trainer.args.learning_rate,
        "value_learning_rate": trainer.args.value_learning_rate,
        "kl_coef": kl_coef,
        "seed": seed,
        **change,
        "kl": sum(entry["kl"] for entry in last) / len(last),
        "clip_fraction": sum(entry["clip_fraction"] for entry in last) / len(last),
        "explained_variance": sum(entry["explained_variance"] for entry in last) / len(last),
        "length": last[-1]["response_length"],
        "seconds": seconds,
        "rewards": [entry["reward"] for entry in history],
        "episodes": [entry["episode"] for entry in history],
    }


def label(row: Mapping[str, float | str | list[float]]) -> str:
    """Return the settings of a run for a legend."""
    critic = row["value_learning_rate"] or row["learning_rate"]
    return f"{row['learning_rate']:g}, critic {critic:g}, KL {row['kl_coef']:g}, seed {row['seed']}"


def main() -> None:
    """Run every combination."""
    args = parse()
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for settings in itertools.product(args.learning_rates, args.value_learning_rates, args.kl_coefs, args.seeds):
        rows.append(run(args, *settings))
        with (folder / "runs.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({**vars(args), **rows[-1]}) + "\n")
        print("\n".join(markdown_table([{name: rows[-1][name] for name in SHOWN}])), flush=True)
    print("\n".join(markdown_table([{name: row[name] for name in SHOWN} for row in rows])))
    curves(rows).draw(folder / "rewards.png")
    stored = (folder / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    rises(list(map(json.loads, stored))).draw(folder / "rates.png")


def curves(rows: Sequence[Mapping[str, Any]]) -> Plot:
    """Return the rewards of runs over their episodes."""
    return Plot(
        title="PPO by learning rate",
        xlabel="episodes",
        ylabel="reward per response",
        lines={label(row): (row["episodes"], row["rewards"]) for row in rows},
    )


def rises(rows: Sequence[Mapping[str, Any]], floor: float = -0.5) -> Plot:
    """Return the rise of what PPO maximizes by learning rate, a line per model and kind of training.

    That is the held-out reward less `kl_coef` times the KL. Rewards of different tasks have different scales: each
    line is divided by its highest point, and lower values than `floor` are drawn there.
    """
    groups: dict[str, dict[float, float]] = {}
    for row in rows:
        kind = f"LoRA, r={row['lora_r']}" if row["lora_r"] else "all weights"
        points = groups.setdefault(f"{Path(row['model_name_or_path']).name}, {kind}", {})
        rise = row["change"] - row["kl_coef"] * row["kl"]
        points[row["learning_rate"]] = max(points.get(row["learning_rate"], -math.inf), rise)
    lines = {}
    for name, points in groups.items():
        rates, highest = sorted(points), max(points.values())
        lines[name] = (rates, [max(points[rate] / highest, floor) for rate in rates])
    return Plot(
        title="Rise of the held-out reward, less the KL penalty",
        xlabel="learning rate",
        ylabel="share of the best",
        lines=lines,
        xscale="log",
    )


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
