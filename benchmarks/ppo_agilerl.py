"""PPO with an adapter against AgileRL's: CPU-seconds to one reward, and the largest memory.

    python -m venv agile && agile/bin/pip install --no-compile 'agilerl[cpu-llm]==2.58.*'
    OMP_NUM_THREADS=1 python benchmarks/ppo_agilerl.py --agile_python agile/bin/python

Both train the same random Llama in float32 by a LoRA adapter of rank 16 on all linear layers, with the same prompts,
32 episodes in a rollout, and 16 optimizer steps on each. The reward is the share of a response's 32 tokens that belong
to a quarter of the words. A run has reached `--goal` at the first of three rollouts in a row with that mean. Each is a
process of its own, and the two sides take turns; importing is not counted. The rate of either side is the best of its
`--..._rates` on `--choice_seed`, judged on `--seeds`.

AgileRL replaces Llama's layers by kernels for GPUs wherever liger-kernel, which it requires, is installed: this is
switched off here, since they do not run on a CPU.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ppo import build_tokenizer

VOCABULARY, PROMPT, RESPONSE, EPISODES, EPOCHS, MINI_BATCHES, RANK = 256, 8, 32, 32, 4, 4, 16
PAD, EOS, FIRST_WORD, TARGETS = 0, 1, 2, 64
HEAD_STD = 0.15
SIDES = ("hfllm", "AgileRL")
# The mean reward and the CPU-seconds so far of each rollout; MiB.
Run = dict[str, list[float] | float]


# ---- what both sides share ----


def save_model(folder: str, seed: int) -> list[str]:
    """Save a random Llama that never ends a response, with its tokenizer, and return the prompts."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    rng = random.Random(seed)
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": EOS}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=128, **sizes, **special))
    # Of the size that training gives it: with the usual .02 no adapter below it could make a word likely.
    torch.nn.init.normal_(model.lm_head.weight, std=HEAD_STD)
    model.generation_config = GenerationConfig(
        pad_token_id=PAD, eos_token_id=EOS, suppress_tokens=[PAD, EOS], do_sample=True
    )
    model.save_pretrained(folder)
    tokenizer = build_tokenizer(VOCABULARY)
    tokenizer.save_pretrained(folder)
    ids = [[rng.randrange(FIRST_WORD, VOCABULARY) for _ in range(PROMPT)] for _ in range(512)]
    return [tokenizer.decode(row) for row in ids]


def share_of_targets(text: str) -> float:
    """Return the share of a response's words that are paid."""
    return sum(int(word[1:]) < FIRST_WORD + TARGETS for word in text.split()) / RESPONSE


def run_ours(args: argparse.Namespace, folder: str) -> Run:
    from datasets import Dataset
    from peft import LoraConfig

    from hfllm import PPOConfig, PPOTrainer
    from hfllm.models.loading.saved import saved_tokenizer

    began, rewards, seconds = time.process_time(), [], []
    prompts = save_model(folder, args.seed)

    def share(prompts, completions, **columns):
        values = [share_of_targets(text) for text in completions]
        rewards.append(statistics.fmean(values))
        seconds.append(time.process_time() - began)
        return values

    settings = PPOConfig(
        os.path.join(folder, "out"),
        **{"learning_rate": args.learning_rate, "lr_scheduler_type": "constant", "seed": args.seed},
        **{"num_ppo_epochs": EPOCHS, "num_mini_batches": MINI_BATCHES, "kl_coef": 0.001},
        **{"per_device_train_batch_size": EPISODES // MINI_BATCHES, "total_episodes": EPISODES * args.rollouts},
        **{"response_length": RESPONSE, "use_cpu": True, "bf16": False, "report_to": "none"},
        **{"save_strategy": "no", "disable_tqdm": True, "logging_steps": 10_000, "shared_base": args.shared_base},
        generation_kwargs={"suppress_tokens": [PAD, EOS]},
    )
    trainer = PPOTrainer(
        folder,
        share,
        settings,
        Dataset.from_dict({"prompt": prompts}),
        processing_class=saved_tokenizer(folder),
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    return {"rewards": rewards, "seconds": seconds}


def run_agile(args: argparse.Namespace, folder: str) -> Run:
    import agilerl.algorithms.core.base as base
    import torch
    from agilerl.algorithms import LLMPPO
    from agilerl.llm_envs import RolloutHarness
    from agilerl.llm_envs.qa_dataset import QADatasetEnv  # noqa: F401  (imported before the clock starts)
    from agilerl.llm_envs.rubrics import reward_fn_to_rubric
    from agilerl.training.llm.rollout import train_llm_rollout
    from peft import LoraConfig

    base.HAS_LIGER_KERNEL = False
    began, rewards, seconds = time.process_time(), [], []
    rows = [{"question": prompt, "answer": ""} for prompt in save_model(folder, args.seed)]
    tokenizer = build_tokenizer(VOCABULARY)

    def share(completion: str, answer: object, question: object) -> float:
        return share_of_targets(completion)

    agent = LLMPPO(
        **{"pad_token_id": PAD, "pad_token": "<pad>", "model_name": folder, "device": "cpu", "seed": args.seed},
        model_config={"torch_dtype": torch.float32},
        **{"batch_size": EPISODES, "mini_batch_size": EPISODES // MINI_BATCHES, "update_epochs": EPOCHS},
        **{"lr_actor": args.learning_rate, "lr_critic": args.learning_rate, "top_k": 0, "use_liger_loss": False},
        **{"max_output_tokens": RESPONSE, "min_output_tokens": RESPONSE, "max_model_len": 128},
        lora_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    learn = agent.learn

    def watched(experiences: tuple, **options: object) -> object:
        rewards.append(float(torch.as_tensor(experiences[2]).float().mean()))
        seconds.append(time.process_time() - began)
        return learn(experiences, **options)

    agent.learn = watched
    rubric = reward_fn_to_rubric(share)
    train_llm_rollout(
        [agent],
        max_turns=1,
        env_factory=lambda: RolloutHarness.from_dataset(rows, rubric, tokenizer, apply_chat_template=False),
        max_steps=EPISODES * args.rollouts,
        evaluation_interval=10**9,
        verbose=False,
    )
    return {"rewards": rewards, "seconds": seconds}


# ---- the comparison ----


def launch(args: argparse.Namespace, side: str, rate: float, seed: int, *flags: str) -> Run:
    """Run one side in a process of its own."""
    python = sys.executable if side == "hfllm" else args.agile_python
    words = ["--side", side, "--learning_rate", str(rate), "--seed", str(seed), "--rollouts", str(args.rollouts)]
    quiet = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [python, __file__, *words, *flags]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **quiet})
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
    return json.loads(next(line for line in result.stdout.splitlines() if line.startswith("RESULT"))[7:])


def seconds_to(goal: float, run: Run) -> float | None:
    """Return the CPU-seconds at the first of three rollouts in a row at the goal, or `None`."""
    rewards = run["rewards"]
    for at in range(len(rewards) - 2):
        if min(rewards[at : at + 3]) >= goal:
            return run["seconds"][at]
    return None


def best_rate(args: argparse.Namespace, side: str, rates: list[float]) -> float:
    """Return the rate that is at the goal first, or else ends highest, on the seed of the choice."""
    runs = {rate: launch(args, side, rate, args.choice_seed) for rate in rates}
    for rate, run in runs.items():
        end = statistics.fmean(run["rewards"][-5:])
        print(f"{side}, rate {rate:g}: goal at {seconds_to(args.goal, run)} CPU-s, end {end:.3f}", flush=True)

    def order(rate: float) -> tuple[float, float]:
        return seconds_to(args.goal, runs[rate]) or float("inf"), -statistics.fmean(runs[rate]["rewards"][-5:])

    return min(rates, key=order)


def compare(args: argparse.Namespace) -> list[str]:
    """Return the table of both sides."""
    rates = {"hfllm": args.our_rates, "AgileRL": args.agile_rates}
    sides = [side for side in SIDES if side == "hfllm" or args.agile_python]
    chosen = {side: best_rate(args, side, rates[side]) for side in sides}
    runs: dict[str, list[Run]] = {side: [] for side in [*sides, "hfllm, shared_base"]}
    for seed in args.seeds:
        for name in runs:
            side, _, shared = name.partition(", ")
            runs[name].append(launch(args, side, chosen[side], seed, *(["--shared_base"] if shared else [])))
            print(json.dumps({"side": name, "seed": seed, **runs[name][-1]}), flush=True)
    lines = [
        f"| | rate | CPU-seconds to {args.goal} | in a rollout | rollouts to it | reward at the end | MiB |",
        "| - " * 7 + "|",
    ]
    for name, of_side in runs.items():
        times = [seconds_to(args.goal, run) for run in of_side]
        steps = [
            None if time is None else run["seconds"].index(time) + 1 for time, run in zip(times, of_side, strict=True)
        ]
        cells = [
            f"{chosen[name.partition(', ')[0]]:g}",
            ", ".join("never" if each is None else f"{each:.0f}" for each in times),
            ", ".join(f"{(run['seconds'][-1] - run['seconds'][0]) / (args.rollouts - 1):.2f}" for run in of_side),
            ", ".join("never" if each is None else str(each) for each in steps),
            ", ".join(f"{statistics.fmean(run['rewards'][-5:]):.3f}" for run in of_side),
            ", ".join(f"{run['mib']:.0f}" for run in of_side),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agile_python", help="A Python that has agilerl; without it only ours runs.")
    parser.add_argument("--our_rates", type=float, nargs="+", default=[3e-3, 6e-3])
    parser.add_argument("--agile_rates", type=float, nargs="+", default=[3e-3, 6e-3])
    parser.add_argument("--rollouts", type=int, default=40)
    parser.add_argument("--goal", type=float, default=0.5)
    parser.add_argument("--choice_seed", type=int, default=11)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--learning_rate", type=float, default=3e-3, help=argparse.SUPPRESS)
    parser.add_argument("--shared_base", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        with tempfile.TemporaryDirectory() as folder:
            run = (run_ours if args.side == "hfllm" else run_agile)(args, folder)
        run["mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print("RESULT " + json.dumps(run), flush=True)
        return
    lines = compare(args)
    print("\n".join(lines))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
