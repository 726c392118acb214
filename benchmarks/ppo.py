"""PPO against the trainer that TRL removed: the same random models, prompts, batch and optimizer steps, in turn.

    python -m venv trl112 && trl112/bin/pip install 'trl==1.12.*' torch
    OMP_NUM_THREADS=1 python benchmarks/ppo.py --trl_python trl112/bin/python --output benchmarks/results/ppo.md

Without `--trl_python` only ours runs. Each measurement is a separate process with a few rollouts after one to
warm up; the two sides take turns. Seconds are CPU-seconds of the median rollout, and memory is the largest resident
size. Two cases: every response has `--response_length` tokens and every prompt 32; or prompts have 8 to 32 tokens and
responses end after 20 on average.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

PHASES = ("generate", "score", "optimize")
EPISODES, PROMPT, EPOCHS = 32, 32, 4
PAD, EOS, FIRST_WORD = 0, 1, 2


# ---- what both sides share ----


def build_model(args: argparse.Namespace, kind: str) -> Any:
    """Build a random Llama whose end token has the same probability everywhere: 1/20 if lengths vary, else 0."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
        num_labels=1,
    )
    torch.manual_seed({"policy": 0, "reward": 1, "value": 2}[kind])
    if kind != "policy":
        return LlamaForSequenceClassification(config)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # One direction that all hidden states share replaces a bias of the head.
        model.model.embed_tokens.weight[:, 0] = 1.0
        shared = model.model(torch.tensor([[5, 6, 7]])).last_hidden_state[..., 0].mean()
        model.lm_head.weight[:, 0] = 0.0
        logit = torch.tensor((args.vocab_size - 1) / 19.0).log() if args.case == "variable" else -30.0
        model.lm_head.weight[EOS] = 0.0
        model.lm_head.weight[EOS, 0] = logit / shared
        # Responses of both sides never contain padding.
        model.lm_head.weight[PAD] = 0.0
        model.lm_head.weight[PAD, 0] = -30.0 / shared
    return model


def build_tokenizer(vocab_size: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(f"w{index}" for index in range(FIRST_WORD, vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def prompts(args: argparse.Namespace) -> list[list[int]]:
    import random

    rng = random.Random(0)
    lengths = [PROMPT if args.case == "fixed" else rng.randint(8, PROMPT) for _ in range(EPISODES * args.rollouts)]
    return [[rng.randrange(FIRST_WORD, args.vocab_size) for _ in range(length)] for length in lengths]


class Clock:
    """CPU- and wall-seconds by phase, one entry per rollout; time outside of all phases is optimization."""

    def __init__(self) -> None:
        self.rollouts: list[dict[str, tuple[float, float]]] = []
        self.current: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.began = self.now()

    @staticmethod
    def now() -> tuple[float, float]:
        return time.process_time(), time.perf_counter()

    def timed(self, phase: str, function: Callable) -> Callable:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            cpu, wall = self.now()
            claimed = [list(value) for name, value in self.current.items() if name != phase]
            result = function(*args, **kwargs)
            # Without the time of inner phases.
            inner = [list(value) for name, value in self.current.items() if name != phase]
            nested = [sum(entry[at] for entry in inner) - sum(entry[at] for entry in claimed) for at in (0, 1)]
            cpu_end, wall_end = self.now()
            self.current[phase][0] += cpu_end - cpu - nested[0]
            self.current[phase][1] += wall_end - wall - nested[1]
            return result

        return wrapper

    def end_rollout(self) -> None:
        cpu, wall = self.now()
        total = cpu - self.began[0], wall - self.began[1]
        phases = {name: tuple(self.current[name]) for name in ("generate", "score")}
        phases["optimize"] = tuple(total[at] - sum(phase[at] for phase in phases.values()) for at in (0, 1))
        self.rollouts.append(phases)
        self.current.clear()
        self.began = self.now()

    def medians(self) -> dict[str, list[float]]:
        """Return per phase the CPU- and wall-seconds of the median rollout, without the first one."""
        kept = self.rollouts[1:]
        return {name: [statistics.median(rollout[name][at] for rollout in kept) for at in (0, 1)] for name in PHASES}


def shared_arguments(args: argparse.Namespace, output_dir: str) -> dict[str, Any]:
    return {
        "output_dir": output_dir,
        "per_device_train_batch_size": EPISODES,
        "num_ppo_epochs": EPOCHS,
        "num_mini_batches": 1,
        "response_length": args.response_length,
        "total_episodes": EPISODES * args.rollouts,
        "learning_rate": 1e-6,
        "temperature": 1.0,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


# ---- the two sides ----


def run_ours(args: argparse.Namespace, output_dir: str) -> tuple[Clock, float]:
    from datasets import Dataset
    from transformers import TrainerCallback

    from hfllm import PPOConfig, PPOTrainer
    from hfllm.trainers.precision import with_fast_products

    tokenizer, clock, policy = build_tokenizer(args.vocab_size), Clock(), build_model(args, "policy")
    texts = [tokenizer.decode(ids) for ids in prompts(args)]
    config = PPOConfig(**shared_arguments(args, output_dir), logging_steps=EPOCHS)
    trainer = PPOTrainer(
        model=policy,
        reward_funcs=build_model(args, "reward"),
        args=config if args.dtype == "float32" else with_fast_products(config, policy),
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
        reward_processing_classes=tokenizer,
        value_model=None if args.value == "head" else build_model(args, "value"),
    )

    class EndOfRollout(TrainerCallback):
        def on_step_end(self, arguments, state, control, **kwargs):
            if state.global_step % EPOCHS == 0:
                clock.end_rollout()

    trainer.add_callback(EndOfRollout())
    trainer.sample = clock.timed("generate", trainer.sample)
    trainer.collect_rollout = clock.timed("score", trainer.collect_rollout)
    clock.began = clock.now()
    trainer.train()
    lengths = [entry["response_length"] for entry in trainer.state.log_history if "response_length" in entry]
    return clock, statistics.mean(lengths)


def run_trl(args: argparse.Namespace, output_dir: str) -> tuple[Clock, float]:
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    tokenizer, clock, lengths = build_tokenizer(args.vocab_size), Clock(), []
    trainer = PPOTrainer(
        args=PPOConfig(
            **shared_arguments(args, output_dir),
            stop_token="eos",
            num_sample_generations=0,
            gradient_checkpointing=False,
        ),
        processing_class=tokenizer,
        model=build_model(args, "policy"),
        ref_model=None,
        reward_model=build_model(args, "reward"),
        value_model=build_model(args, "value"),
        train_dataset=Dataset.from_dict({"input_ids": prompts(args)}),
        eval_dataset=Dataset.from_dict({"input_ids": prompts(args)[:EPISODES]}),
    )
    generate = clock.timed("generate", ppo_trainer.batch_generation)

    def sample(*values: Any, **kwargs: Any) -> Any:
        sequences, logits = generate(*values, **kwargs)
        lengths.append(1 + (sequences[:, PROMPT:] > EOS).sum(1).float().mean().item())
        return sequences, logits

    ppo_trainer.batch_generation = sample
    scored = clock.timed("score", ppo_trainer.forward)
    plain = ppo_trainer.forward
    ppo_trainer.forward = lambda *values: (plain if torch.is_grad_enabled() else scored)(*values)
    ppo_trainer.get_reward = clock.timed("score", ppo_trainer.get_reward)

    class EndOfRollout(TrainerCallback):
        def on_step_end(self, arguments, state, control, **kwargs):
            clock.end_rollout()

    trainer.add_callback(EndOfRollout())
    clock.began = clock.now()
    trainer.train()
    return clock, statistics.mean(lengths)


def measure(args: argparse.Namespace) -> None:
    """Run one side and print its figures as a line of JSON."""
    with tempfile.TemporaryDirectory() as folder:
        clock, length = (run_ours if args.side == "ours" else run_trl)(args, folder)
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    print("RESULT " + json.dumps({**clock.medians(), "peak": peak, "length": length}), flush=True)


# ---- the comparison ----


def launch(python: str, side: str, args: argparse.Namespace, **options: Any) -> dict[str, Any]:
    command = [python, __file__, "--side", side, "--rollouts", str(args.rollouts)]
    command += ["--response_length", str(args.response_length), "--dtype", args.dtype]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    environment |= {"TRL_EXPERIMENTAL_SILENCE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
    return json.loads(next(line for line in result.stdout.splitlines() if line.startswith("RESULT"))[7:])


def median_of(results: list[dict[str, Any]]) -> dict[str, Any]:
    merged = {name: [statistics.median(r[name][at] for r in results) for at in (0, 1)] for name in PHASES}
    return {**merged, **{name: statistics.median(r[name] for r in results) for name in ("peak", "length")}}


def total(result: dict[str, Any], at: int = 0) -> float:
    return sum(result[name][at] for name in PHASES)


def row(label: str, result: dict[str, Any], peer: dict[str, Any] | None) -> str:
    cells = [label, f"{result['length']:.1f}", *(f"{result[name][0]:.2f}" for name in PHASES)]
    cells += [f"{total(result):.2f}", f"{total(result, 1):.2f}", f"{result['peak']:.0f}"]
    cells += [f"{total(peer) / total(result):.2f}", f"{result['peak'] / peer['peak']:.2f}"] if peer else ["", ""]
    return "| " + " | ".join(cells) + " |"


def compare(args: argparse.Namespace) -> list[str]:
    head = ["", "length", *PHASES, "CPU-s", "wall-s", "MB", "speed, times TRL", "memory, share of TRL"]
    lines = ["| " + " | ".join(head) + " |", "|" + " - |" * len(head)]
    for case, vocab_size in (("variable", 2048), ("fixed", 2048), ("variable", 8192), ("fixed", 8192)):
        if args.cases and f"{case}-{vocab_size}" not in args.cases:
            continue
        options = {"case": case, "vocab_size": vocab_size}
        runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for _ in range(args.rounds):
            if args.trl_python:
                runs["trl"].append(launch(args.trl_python, "trl", args, **options))
            for value in ("head", "model"):
                runs[value].append(launch(sys.executable, "ours", args, **options, value=value))
        peer = median_of(runs["trl"]) if args.trl_python else None
        labels = {"trl": "TRL 1.12", "head": "hfllm, value head", "model": "hfllm, value model"}
        for side, results in runs.items():
            label = f"{case}, vocabulary {vocab_size}: {labels[side]}"
            lines.append(row(label, median_of(results), peer if side != "trl" else None))
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl_python", help="A Python that has trl==1.12.*; without it only ours is measured.")
    parser.add_argument("--rounds", type=int, default=3, help="Processes of each side and case.")
    parser.add_argument("--rollouts", type=int, default=4, help="Rollouts a process; the first is not counted.")
    parser.add_argument("--response_length", type=int, default=64)
    parser.add_argument("--cases", nargs="+", help="Only these, such as variable-2048.")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--side", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--case", choices=["variable", "fixed"], default="variable", help=argparse.SUPPRESS)
    parser.add_argument("--vocab_size", type=int, default=2048, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=["auto", "float32"], default="auto", help="Of hfllm's products.")
    parser.add_argument("--value", choices=["head", "model"], default="head", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        measure(args)
        return
    lines = compare(args)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
