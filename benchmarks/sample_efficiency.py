"""How many rollouts PPO needs to learn "answer with words of a target set", against the trainer that TRL removed.

    OMP_NUM_THREADS=1 python benchmarks/sample_efficiency.py --trl_python trl112/bin/python \
        --output benchmarks/results/sample_efficiency.md

The reward is the share of a response's 32 tokens that belong to `--targets` of the 256 words. Both sides sample 32
episodes per rollout from the same random models and pass over them four times; the result is the first of three
rollouts in a row whose mean reward is 0.9 or more. Both have a separate value model. Ours runs with one setting on
all seeds; TRL's learning rate is the best of `--trl_learning_rates` by the median.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ppo import EPISODES, EPOCHS, build_tokenizer

VOCABULARY, PROMPT, RESPONSE, GOAL = 256, 8, 32, 0.9
OURS = {
    "learning_rate": 2e-3,
    "value_learning_rate": 2e-3,
    "num_mini_batches": 4,
    "per_device_train_batch_size": EPISODES // 4,
    "lr_scheduler_type": "constant",
    "vf_coef": 0.1,
    "lam": 0.95,
    "kl_coef": 0.0,
}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def policy_and_prompts(seed: int) -> tuple[Any, list[list[int]]]:
    import random

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    rng = random.Random(seed)
    prompts = [[rng.randrange(2, VOCABULARY) for _ in range(PROMPT)] for _ in range(512)]
    return LlamaForCausalLM(LlamaConfig(**SIZES)), prompts


def common(args: argparse.Namespace, output_dir: str) -> dict[str, Any]:
    return {
        "output_dir": output_dir,
        "num_ppo_epochs": EPOCHS,
        "response_length": RESPONSE,
        "total_episodes": EPISODES * args.rollouts,
        "temperature": 1.0,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": args.seed,
    }


def run_ours(args: argparse.Namespace, output_dir: str) -> list[float]:
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from hfllm import PPOConfig, PPOTrainer

    tokenizer, rewards = build_tokenizer(VOCABULARY), []
    policy, prompts = policy_and_prompts(args.seed)

    def share(prompts, completions, completion_ids, **columns):
        values = [sum(2 <= token < 2 + args.targets for token in ids) / RESPONSE for ids in completion_ids]
        rewards.append(statistics.mean(values))
        return values

    settings = {**common(args, output_dir), **OURS, **json.loads(args.override)}
    value_model = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1))
    trainer = PPOTrainer(
        model=policy,
        reward_funcs=share,
        # No end token: all responses have the same length, as with TRL's.
        args=PPOConfig(**settings, logging_steps=10_000, generation_kwargs={"suppress_tokens": [0, 1]}),
        train_dataset=Dataset.from_dict({"prompt": [tokenizer.decode(ids) for ids in prompts]}),
        processing_class=tokenizer,
        value_model=value_model,
    )
    trainer.train()
    return rewards


def run_trl(args: argparse.Namespace, output_dir: str) -> list[float]:
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    tokenizer, rewards = build_tokenizer(VOCABULARY), []
    policy, prompts = policy_and_prompts(args.seed)

    class Share(torch.nn.Module):
        """A classifier for TRL: its trunk returns the ids, its head the share of targets so far."""

        base_model_prefix = "trunk"

        def __init__(self):
            super().__init__()
            self.anything = torch.nn.Parameter(torch.zeros(1))
            self.trunk = lambda input_ids, **kwargs: argparse.Namespace(hidden_states=[input_ids])

        def score(self, ids):
            hits = ((ids >= 2) & (ids < 2 + args.targets))[:, PROMPT:].float().cumsum(1) / RESPONSE
            return torch.cat((torch.zeros(len(ids), PROMPT), hits), dim=1).unsqueeze(-1)

    trainer = PPOTrainer(
        args=PPOConfig(
            **common(args, output_dir),
            learning_rate=args.learning_rate,
            per_device_train_batch_size=EPISODES,
            kl_coef=0.0,
            lr_scheduler_type="constant",
            num_sample_generations=0,
            gradient_checkpointing=False,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=Share(),
        value_model=LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1)),
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        eval_dataset=Dataset.from_dict({"input_ids": prompts[:EPISODES]}),
    )
    generate = ppo_trainer.batch_generation

    def sample(*values: Any, **kwargs: Any) -> Any:
        sequences, logits = generate(*values, **kwargs)
        ids = sequences[:, PROMPT:]
        rewards.append(((ids >= 2) & (ids < 2 + args.targets)).float().mean().item())
        return sequences, logits

    ppo_trainer.batch_generation = sample
    trainer.train()
    return rewards


def steps_to_goal(rewards: list[float]) -> int | None:
    """Return the first of three consecutive rollouts at the goal, counted from 1, or `None`."""
    for at in range(len(rewards) - 2):
        if min(rewards[at : at + 3]) >= GOAL:
            return at + 1
    return None


def launch(python: str, side: str, args: argparse.Namespace, *options: str) -> list[float]:
    command = [
        python,
        __file__,
        "--side",
        side,
        "--rollouts",
        str(args.rollouts),
        "--targets",
        str(args.targets),
        *options,
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode and "probability tensor contains either" in result.stderr:
        return []  # The policy's logits are no longer finite.
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
    return json.loads(next(line for line in result.stdout.splitlines() if line.startswith("RESULT"))[7:])


def compare(args: argparse.Namespace) -> list[str]:
    head = ["", *(f"seed {seed}" for seed in args.seeds), "median", "mean reward of the last ten rollouts"]
    lines = ["| " + " | ".join(head) + " |", "|" + " - |" * len(head)]
    sides = [("hfllm", "ours", sys.executable, [])]
    for rate in args.trl_learning_rates if args.trl_python else []:
        sides.append((f"TRL 1.12, learning rate {rate:g}", "trl", args.trl_python, ["--learning_rate", str(rate)]))
    for label, side, python, options in sides:
        runs = [launch(python, side, args, "--seed", str(seed), *options) for seed in args.seeds]
        steps = [steps_to_goal(rewards) for rewards in runs]
        # A run that never reaches the goal counts as longer than all.
        median = statistics.median(args.rollouts + 1 if step is None else step for step in steps)
        shown = [str(step or f"over {args.rollouts}") for step in steps]
        shown.append(f"over {args.rollouts}" if median > args.rollouts else f"{median:g}")
        last = [f"{statistics.mean(rewards[-10:]):.3f}" if rewards else "not finite" for rewards in runs]
        lines.append(f"| {label} | " + " | ".join([*shown, ", ".join(last)]) + " |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl_python", help="A Python that has trl==1.12.*; without it only ours runs.")
    parser.add_argument("--trl_learning_rates", type=float, nargs="+", default=[3e-4, 1e-3, 2e-3, 3e-3])
    parser.add_argument("--rollouts", type=int, default=100)
    parser.add_argument("--targets", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--side", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--learning_rate", type=float, default=1e-3, help=argparse.SUPPRESS)
    parser.add_argument("--override", default="{}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        with tempfile.TemporaryDirectory() as folder:
            rewards = (run_ours if args.side == "ours" else run_trl)(args, folder)
        print("RESULT " + json.dumps(rewards), flush=True)
        return
    lines = compare(args)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
