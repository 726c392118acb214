"""PPO with a tool against TRL's GRPO: the same model, tool, prompts, reward, episodes and optimizer steps, in turn.

    OMP_NUM_THREADS=1 python benchmarks/tools.py --output benchmarks/results/tools.md

For each seed a small Llama first learns, from demonstrations, to look facts up in a table or to guess them, one as
often as the other. Then each side trains it, in a process of its own, to answer right; only what the table says is
right. Seconds are CPU-seconds of `train()`, without imports and loading. The curve is the share of right answers among
the episodes of each rollout, before it is learned from. A last table has the wall-clock seconds of one rollout whose
tool waits for a second, as a service does.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANIMALS = (
    *("owl", "fox", "bear", "wolf", "hare", "deer", "swan", "crow", "toad", "newt"),
    *("lynx", "mole", "seal", "crab", "moth", "wren", "lion", "goat", "frog", "duck"),
)
VALUES = {
    "color": ("red", "blue", "green", "gray", "white", "black", "brown", "pink"),
    "home": ("sea", "lake", "hill", "cave", "wood", "field", "nest", "marsh"),
    "food": ("fish", "nuts", "corn", "grass", "seeds", "worms", "fruit", "leaves"),
}
# Tools that wait: a coroutine, and a function.
WAITING = {"async": "`async def`", "plain": "`def`, which sleeps"}
SIDES = {"ppo": "hfllm, PPO", "grpo": "TRL, GRPO"}
# Episodes that one optimizer step sees, of each rollout's, and how often a rollout is learned from.
STEPS, EPOCHS, GENERATIONS = 4, 2, 8
RESPONSE_LENGTH, CALLS = 72, 2
# Of learning from demonstrations.
RATE = 2e-3
# Between these lines of a page are the tables; what is written around them stays.
MARKS = "<!-- tables -->", "<!-- end of the tables -->"

Row = dict[str, Any]


# ---- what both sides share: the task, the tool, the reward, the model ----


def table_of(seed: int) -> dict[str, dict[str, str]]:
    rng = random.Random(f"table {seed}")
    return {animal: {name: rng.choice(values) for name, values in VALUES.items()} for animal in ANIMALS}


def rows_of(seed: int, count: int, purpose: str = "demonstrations") -> list[Row]:
    """Questions, each with the value that the table has; others for each purpose."""
    table, rng, rows = table_of(seed), random.Random(f"{purpose} {seed}"), []
    for _ in range(count):
        animal, attribute = rng.choice(ANIMALS), rng.choice(list(VALUES))
        question = {"role": "user", "content": f"What is the {attribute} of the {animal}?"}
        rows.append({"prompt": [question], "key": animal, "attribute": attribute, "value": table[animal][attribute]})
    return rows


def turns_of(row: Row, rng: random.Random) -> list[dict[str, Any]]:
    """What a demonstrator says: half of the time it looks the answer up, else it guesses."""
    if rng.random() < 0.5:
        return [{"role": "assistant", "content": f"It is {rng.choice(VALUES[row['attribute']])}."}]
    # A space begins each argument, so that its tokens are those of the question.
    arguments = {"key": f" {row['key']}", "attribute": f" {row['attribute']}"}
    call = {"type": "function", "function": {"name": "lookup", "arguments": arguments}}
    asks = {"role": "assistant", "content": "", "tool_calls": [call]}
    told = {"role": "tool", "name": "lookup", "content": row["value"]}
    return [asks, told, {"role": "assistant", "content": f"It is {row['value']}."}]


def tool_of(seed: int, waiting: str | None = None, seconds: float = 0.0) -> Any:
    """The look-up; of a kind of `WAITING`, it answers after so many seconds."""
    from hfllm.environments.tools import lookup_in

    answer = lookup_in(table_of(seed))
    if waiting is None:
        return answer

    async def awaited(key: str, attribute: str) -> str:
        await asyncio.sleep(seconds)
        return answer(key, attribute)

    def slept(key: str, attribute: str) -> str:
        time.sleep(seconds)
        return answer(key, attribute)

    tool = awaited if waiting == "async" else slept
    tool.__name__, tool.__doc__ = answer.__name__, answer.__doc__
    return tool


class Reward:
    """1 for a right answer; it notes the share of right answers, and of episodes with calls, and when."""

    __name__ = "right"

    def __init__(self) -> None:
        self.rollouts: list[dict[str, float]] = []

    def __call__(self, prompts: list, completions: list, value: list[str], **columns: object) -> list[float]:
        said = [turns[-1].get("content") or "" for turns in completions]
        right = [float(text.strip() == f"It is {each}.") for text, each in zip(said, value, strict=True)]
        calls = [any(turn.get("tool_calls") for turn in turns) for turns in completions]
        seen = {"cpu": time.process_time(), "right": statistics.mean(right), "calls": statistics.mean(calls)}
        self.rollouts.append(seen)
        return right


def build_tokenizer(seed: int) -> "PreTrainedTokenizerBase":
    from hfllm.data.tokenizer import CALL_MARKS, TOOL, set_built_in, train_tokenizer

    rng, texts = random.Random(seed), []
    for row in rows_of(seed, 300):
        # The chat template names the tool in each prompt.
        texts.append('Tools: (key, attribute) "lookup"')
        for turn in (*row["prompt"], *turns_of(row, rng)):
            texts += [turn["content"], *(json.dumps(call["function"]) for call in turn.get("tool_calls", ()))]
    added = {"extra_special_tokens": [TOOL], "added_tokens": CALL_MARKS}
    tokenizer = train_tokenizer(texts, vocab_size=512, model_max_length=128, **added)
    set_built_in(tokenizer, "hfllm-brief")
    return tokenizer


def demonstrations(args: argparse.Namespace, tokenizer: "PreTrainedTokenizerBase") -> Iterator[tuple[Any, Any]]:
    """Yield batches of token ids and of labels, which are the assistant's turns."""
    import torch
    from transformers.utils import get_json_schema

    rng, tools = random.Random(f"demonstrations {args.seed}"), [get_json_schema(tool_of(args.seed))]
    rows = rows_of(args.seed, 2000)
    opening = tokenizer.convert_tokens_to_ids("<|assistant|>")
    while True:
        texts = [
            tokenizer.apply_chat_template([*row["prompt"], *turns_of(row, rng)], tools=tools, tokenize=False)
            for row in rng.sample(rows, 32)
        ]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")["input_ids"]
        labels = torch.full_like(batch, -100)
        for ids, targets in zip(batch, labels, strict=True):
            is_own = False
            for place, token in enumerate(ids.tolist()):
                if is_own:
                    targets[place] = token
                is_own = token == opening or (is_own and token != tokenizer.eos_token_id)
        yield batch, labels


def build_model(args: argparse.Namespace) -> None:
    """Train the policy that both sides begin with on demonstrations, and save it with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer(args.seed)
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=max(len(tokenizer), args.vocab_size),
        hidden_size=args.hidden_size,
        intermediate_size=3 * args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    batches = demonstrations(args, tokenizer)
    for step in range(args.sft_steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / 20, 1 - step / args.sft_steps)
        ids, labels = next(batches)
        loss = model(input_ids=ids, labels=labels, attention_mask=(ids != tokenizer.pad_token_id).long()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(args.model)
    tokenizer.save_pretrained(args.model)


# ---- the two sides ----


def run(args: argparse.Namespace, output_dir: str) -> dict[str, Any]:
    """Train by one side, and return its CPU-seconds and its rollouts."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    from hfllm.models.loading.saved import saved_model, saved_tokenizer

    tokenizer, reward = saved_tokenizer(args.model), Reward()
    rate = args.ppo_learning_rate if args.side == "ppo" else args.grpo_learning_rate
    shared = {
        "output_dir": output_dir,
        "per_device_train_batch_size": args.episodes // STEPS,
        "max_steps": args.rollouts * STEPS * EPOCHS,
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "temperature": 1.0,
        "max_tool_calling_iterations": CALLS,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": args.seed,
    }
    parts = {
        "model": saved_model(AutoModelForCausalLM, args.model),
        "reward_funcs": reward,
        "train_dataset": Dataset.from_list(rows_of(args.seed, 2000, "prompts")),
        "processing_class": tokenizer,
        "tools": [tool_of(args.seed, args.waiting, args.slow_seconds)],
    }
    trainer = (ppo if args.side == "ppo" else grpo)(args, shared, parts)
    began, clock = time.process_time(), time.monotonic()
    trainer.train()
    cpu, wall = time.process_time() - began, time.monotonic() - clock
    rollouts = [{**each, "cpu": each["cpu"] - began} for each in reward.rollouts]
    return {"cpu": cpu, "wall": wall, "rollouts": rollouts, "episodes": args.rollouts * args.episodes}


def ppo(args: argparse.Namespace, shared: dict[str, Any], parts: dict[str, Any]) -> Any:
    from hfllm import PPOConfig, PPOTrainer

    settings = {"num_mini_batches": STEPS, "num_ppo_epochs": EPOCHS, "response_length": RESPONSE_LENGTH}
    return PPOTrainer(args=PPOConfig(**shared, **settings, kl_coef=0.05), **parts)


def grpo(args: argparse.Namespace, shared: dict[str, Any], parts: dict[str, Any]) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    settings = {"steps_per_generation": STEPS, "num_iterations": EPOCHS, "max_completion_length": RESPONSE_LENGTH}
    settings |= {"num_generations": min(GENERATIONS, args.episodes), "gradient_checkpointing": False, "beta": 0.05}
    return GRPOTrainer(args=GRPOConfig(**shared, **settings), **parts)


def measure(args: argparse.Namespace) -> None:
    """Do one side's part, and print its figures as a line of JSON."""
    if args.side == "model":
        build_model(args)
        result: dict[str, Any] = {}
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = run(args, folder)
    print("RESULT " + json.dumps(result), flush=True)


# ---- the comparison ----


def launch(args: argparse.Namespace, **options: object) -> dict[str, Any]:
    kept = {name: value for name, value in vars(args).items() if name not in ("seeds", "output")}
    given = {name: value for name, value in {**kept, **options}.items() if value is not None}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    result = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, env=environment)
    if result.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{result.stderr[-3000:]}")
    return json.loads(next(line for line in result.stdout.splitlines() if line.startswith("RESULT"))[7:])


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["-"] * len(header), *rows)]


def seconds_until(result: dict[str, Any], share: float) -> float | None:
    """CPU-seconds after which a rollout has this share of right answers."""
    return next((each["cpu"] for each in result["rollouts"] if each["right"] >= share), None)


def summary(seed: int, results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return a row for each side: CPU-seconds, their ratio to TRL's, and what it learned."""
    rows = []
    for side, result in results.items():
        first, last, until = result["rollouts"][0], result["rollouts"][-1], seconds_until(result, 0.9)
        ratio = result["cpu"] / results["grpo"]["cpu"]
        shares = [f"{each[name]:.2f}" for name in ("right", "calls") for each in (first, last)]
        cells = [str(seed), SIDES[side], f"{result['cpu']:.1f}", f"{ratio:.2f}", *shares]
        rows.append([*cells, "never" if until is None else f"{until:.1f}"])
    return rows


def curves(runs: dict[int, dict[str, dict[str, Any]]]) -> list[list[str]]:
    """Return a row for each rollout: by side the mean CPU-seconds until it was sampled, and its right answers."""
    rows = []
    for place in range(len(next(iter(runs.values()))["ppo"]["rollouts"])):
        cells = [str(place + 1)]
        for side in SIDES:
            seen = [results[side]["rollouts"][place] for results in runs.values()]
            cpu, right = (statistics.mean(each[name] for each in seen) for name in ("cpu", "right"))
            cells += [f"{cpu:.1f}", f"{right:.2f}"]
        rows.append(cells)
    return rows


def page(
    runs: dict[int, dict[str, dict[str, Any]]],
    args: argparse.Namespace,
    slow: dict[str, dict[str, dict[str, Any]]] | None = None,
) -> str:
    """Return the tables of all seeds so far."""
    header = ["seed", "", "CPU-s", "of TRL's", "right, first rollout", "last", "with calls, first", "last"]
    header.append("CPU-s to .90 right")
    rows = [row for seed, results in runs.items() for row in summary(seed, results)]
    names = [f"{name}: {what}" for name in SIDES.values() for what in ("CPU-s", "right")]
    total = {side: sum(results[side]["cpu"] for results in runs.values()) for side in SIDES}
    text = f"All seeds together: PPO {total['ppo']:.0f} CPU-seconds, GRPO {total['grpo']:.0f}, a ratio of "
    text += f"{total['ppo'] / total['grpo']:.2f}. {args.rollouts} rollouts of {args.episodes} episodes, "
    text += f"{STEPS * EPOCHS} optimizer steps each."
    lines = [*table(header, rows), "", text, "", *table(["rollout", *names], curves(runs))]
    return "\n".join([*lines, *(slow_table(slow, args) if slow else ())])


def slow_table(slow: dict[str, dict[str, dict[str, Any]]], args: argparse.Namespace) -> list[str]:
    """Return the table of one rollout with a tool that waits, by kind and side."""
    rows = [
        [WAITING[kind], *(f"{sides[side]['wall']:.1f}, {sides[side]['cpu']:.1f}" for side in SIDES)]
        for kind, sides in slow.items()
    ]
    header = [f"a tool of {args.slow_seconds:g} s", *(f"{name}: seconds, CPU-s" for name in SIDES.values())]
    return ["", f"One rollout of {args.episodes} episodes, learned from {EPOCHS} times:", "", *table(header, rows)]


def around(path: Path) -> tuple[str, str]:
    """Return what a page has before and after its tables; a new one has a heading."""
    begin, end = MARKS
    if not path.parent.is_dir():
        raise SystemExit(f"--output {path}: there is no folder {path.parent}")
    if not path.exists():
        return f"# PPO with a tool against TRL's GRPO\n\n{begin}\n", f"\n{end}\n"
    before, has_begun, rest = path.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    if not (has_begun and end in rest):
        raise SystemExit(f"--output {path}: it has no lines {begin} and {end} around its tables; name a new file")
    return f"{before}{begin}\n", f"\n{end}{after}"


def write_page(path: Path, tables: str, before: str, after: str) -> None:
    """Write a page at once, so that an interruption leaves the old one."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(f"{before}{tables}{after}", encoding="utf-8")
    new.replace(path)


def compare(args: argparse.Namespace) -> None:
    """Run all seeds, and print and write the page after each."""
    frame = around(args.output) if args.output else None
    runs: dict[int, dict[str, dict[str, Any]]] = {}
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            given = {"seed": seed, "model": folder}
            launch(args, side="model", **given)
            runs[seed] = {side: launch(args, side=side, **given) for side in SIDES}
            slow = {}
            if args.slow_seconds and seed == args.seeds[-1]:
                one = {"rollouts": 1, **given}
                for kind in WAITING:
                    slow[kind] = {side: launch(args, side=side, waiting=kind, **one) for side in SIDES}
        text = page(runs, args, slow)
        print(text, flush=True)
        if frame is not None:
            write_page(args.output, text, *frame)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rollouts", type=int, default=10)
    parser.add_argument("--episodes", type=int, default=128, help="Episodes of a rollout.")
    parser.add_argument("--sft_steps", type=int, default=250, help="Steps on demonstrations, before either side.")
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--num_hidden_layers", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=0, help="Rows of the embeddings, where more than tokens.")
    parser.add_argument("--ppo_learning_rate", type=float, default=3e-4)
    parser.add_argument("--grpo_learning_rate", type=float, default=3e-4)
    parser.add_argument("--slow_seconds", type=float, default=1.0, help="What a waiting tool takes; 0 leaves it out.")
    parser.add_argument("--output", type=Path, help="A page; of one that exists the tables alone are written anew.")
    parser.add_argument("--side", choices=["model", *SIDES], help=argparse.SUPPRESS)
    parser.add_argument("--waiting", choices=[*WAITING], help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.side:
        measure(args)
        return
    compare(args)


if __name__ == "__main__":
    main()
