"""PPO on a reward for the first token of a long answer: how far the estimators of advantages reach back.

    OMP_NUM_THREADS=1 python benchmarks/long_answers.py --lengths 16 128 512 --arms default lam_95 shuffled

A random model of 50,000 parameters writes answers of a fixed length. The reward is 1 where the first token is one of
a half of the possible ones; every other token is noise. Chance is .5. Prints, for each length and arm, the mean reward
of the last quarter of the rollouts, and what the critic explains of the returns there.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence

import torch
from datasets import Dataset

from hfllm import HfllmConfig, HfllmForCausalLM, PPOConfig, PPOTrainer
from hfllm.data.tokenizer import train_tokenizer
from hfllm.outputs.intervals import standard_error

TEXTS = (
    "Ada has a gold cup and Ben has a gray lamp.",
    "What is it? Say yes or no, please.",
    "The fox is in the wood.",
)
# Tokens that an answer is made of: none of them ends it.
WORDS = range(40, 56)
ARMS: dict[str, dict[str, object]] = {
    "default": {},
    "lam_95": {"lam": 0.95},
    "lam_1": {"lam": 1.0},
    "value_lam": {"lam": 0.95, "value_lam": 1.0},
    "both": {"value_lam": 1.0},
    "clip_higher": {"cliprange_high": 0.28},
    "warm": {"critic_warmup_lam": 1.0, "critic_warmup_steps": 32},
    # The rewards of other answers: must not gain.
    "shuffled": {},
}


def first_is_even(
    prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence, **columns
) -> list[float]:
    """Pay for a first token with an even number."""
    return [1.0 - ids[0] % 2 for ids in completion_ids]


def shuffled(prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence, **columns) -> list[float]:
    """Pay each answer for the first token of the one before."""
    rewards = first_is_even(prompts, completions, completion_ids)
    return [rewards[-1], *rewards[:-1]]


def run(arm: str, length: int, seed: int, rollouts: int) -> dict[str, object]:
    """Train one random model; return its curve."""
    tokenizer = train_tokenizer([*TEXTS] * 20)
    torch.manual_seed(seed)
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    config = HfllmConfig(
        **{"vocab_size": len(tokenizer), "hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "max_position_embeddings": max(1024, 2 * length)},
        **special,
    )
    seen: list[float] = []

    def watch(completion_ids: Sequence, **columns) -> list[float]:
        seen.append(statistics.fmean(first_is_even((), (), completion_ids)))
        return (shuffled if arm == "shuffled" else first_is_even)((), (), completion_ids)

    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(
            folder,
            **{"response_length": length, "total_episodes": 64 * rollouts, "seed": seed, "logging_steps": 8},
            **{"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True},
            generation_kwargs={"suppress_tokens": [each for each in range(len(tokenizer)) if each not in WORDS]},
            **ARMS[arm],
        )
        prompts = Dataset.from_dict({"prompt": [*TEXTS] * 64})
        trainer = PPOTrainer(HfllmForCausalLM(config), watch, args, prompts, processing_class=tokenizer)
        began = time.process_time()
        trainer.train()
    explained = [row["explained_variance"] for row in trainer.state.log_history if "explained_variance" in row]
    last = max(1, rollouts // 4)
    return {
        **{"arm": arm, "length": length, "seed": seed, "cpu_seconds": round(time.process_time() - began, 1)},
        "reward": round(statistics.fmean(seen[-last:]), 3),
        "explained": round(statistics.fmean(explained[-last:]), 3),
        "curve": [round(each, 2) for each in seen],
    }


def main() -> None:
    """Run all, and print a table of means over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 128, 512])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rollouts", type=int, default=60, help="Of 64 answers, with eight optimizer steps each.")
    args = parser.parse_args()
    rows = []
    for length in args.lengths:
        for arm in args.arms:
            for seed in args.seeds:
                rows.append(run(arm, length, seed, args.rollouts))
                print(json.dumps(rows[-1]), flush=True)
    print("\n| tokens | arm | reward, last quarter | by seed | explained |\n| - | - | - | - | - |")
    for length in args.lengths:
        for arm in args.arms:
            own = [row for row in rows if (row["length"], row["arm"]) == (length, arm)]
            rewards = [row["reward"] for row in own]
            error = f" ± {standard_error(rewards):.3f}" if len(rewards) > 1 else ""
            explained = statistics.fmean(row["explained"] for row in own)
            by_seed = ", ".join(f"{each:.3f}" for each in rewards)
            print(f"| {length} | {arm} | {statistics.fmean(rewards):.3f}{error} | {by_seed} | {explained:.2f} |")


if __name__ == "__main__":
    main()
