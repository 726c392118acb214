"""Word problems with solutions, such as gsm8k's, on a real model, by PPO or by expert iteration, over several seeds.

    python benchmarks/own_reasoning.py --model_name_or_path NAME --problems gsm8k_train.jsonl

Problems whose question and solution are short are dealt out by the seed. `hfllm reason` fine-tunes the model on the
solutions, and on the answers alone as a control; PPO on exact match starts from the first, and a control of it learns
from the same rewards dealt out by chance. With `--expert_config` the model is fine-tuned on the same solutions, and
`hfllm expert_iteration` learns its right responses to other problems, of which it is told no solution; the control
learns as many responses drawn by chance. Prints a table of the held-out answers of each seed, greedy ones of PPO and
sampled ones of expert iteration; finished runs stay. Other flags go to `hfllm reason`, such as `--use_peft`.
"""

import argparse
import json
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from hfllm.data.sources import load_source
from hfllm.outputs.figures import shown
from hfllm.runs.recipes import load_recipe

MODELS = {
    "base": "as it was",
    "direct": "tuned on answers alone (control)",
    "thoughts": "tuned on solutions",
    "rl": "and PPO on exact match",
    "shuffled": "and PPO on shuffled rewards (control)",
    "sampled": "tuned on solutions",
    "iterated": "and expert iteration",
    "drawn": "and expert iteration on responses drawn by chance (control)",
}
# gsm8k's notes for a calculator, <<48/2=24>>: nobody computes them here, and they double the length.
NOTE = re.compile(r"<<[^>]*>>")
Row = dict[str, str]


def problems_of(path: str, longest: int) -> list[Row]:
    """Return the problems of at most `longest` characters, question and solution together, without the notes."""
    rows = [(row["question"], NOTE.sub("", row["answer"])) for row in load_source(path).rows]
    # Fine-tuning reads the completion; the others compare with the answer.
    return [
        {"prompt": question, "answer": solution, "completion": solution}
        for question, solution in rows
        if len(question) + len(solution) <= longest
    ]


def write_rows(folder: Path, rows: Sequence[Row], seed: int, counts: Mapping[str, int]) -> None:
    """Write a file for each part, of as many problems as `counts` says, drawn by the seed; none is in two parts."""
    drawn = random.Random(f"own-reasoning-{seed}").sample(rows, sum(counts.values()))
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in counts.items():
        part, drawn = drawn[:count], drawn[count:]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")


def run(args: argparse.Namespace, flags: Sequence[str], rows: Sequence[Row], seed: int) -> dict[str, float]:
    """Return the metrics of one seed; `flags` are those of `hfllm reason`."""
    folder = Path(args.output_dir, f"seed_{seed}")
    counts = {"problems": args.rows, "answered": args.answered} if args.expert_config else {"problems": args.rows}
    # The held-out ones are written last: they say that all is there.
    if not (folder / "held_out.jsonl").is_file():
        write_rows(folder, rows, seed, counts | {"held_out": args.questions})
    return iterate(args, folder, seed) if args.expert_config else reason(args, flags, folder, seed)


def reason(args: argparse.Namespace, flags: Sequence[str], folder: Path, seed: int) -> dict[str, float]:
    """Return the metrics of `hfllm reason`."""
    recipe = load_recipe("reason")
    words = ["--model_name_or_path", args.model_name_or_path, "--dataset_name", str(folder / "problems.jsonl")]
    words += ["--eval_dataset_name", str(folder / "held_out.jsonl"), "--num_eval_prompts", str(args.questions)]
    words += ["--seed", str(seed), "--output_dir", str(folder / "reason")]
    for name in ("sft", "rlhf"):
        file = getattr(args, f"{name}_config")
        words += [f"--{name}_config", file] if file else []
    return recipe.main(*recipe.parse([*words, *flags]))


def iterate(args: argparse.Namespace, folder: Path, seed: int) -> dict[str, float]:
    """Return the metrics of expert iteration and its control, both from the model tuned on solutions."""
    tuned, metrics = str(folder / "tuned"), {}
    if not Path(tuned, "config.json").is_file():
        sft = load_recipe("sft")
        words = ["--model_name_or_path", args.model_name_or_path, "--dataset_name", str(folder / "problems.jsonl")]
        words += ["--seed", str(seed), "--output_dir", tuned]
        sft.main(*sft.parse([*words, *(["--config", args.sft_config] if args.sft_config else [])]))
    recipe = load_recipe("expert_iteration")
    words = ["--model_name_or_path", tuned, "--reward_funcs", "exact_match", "--seed", str(seed)]
    words += ["--dataset_name", str(folder / "answered.jsonl"), "--eval_dataset_name", str(folder / "held_out.jsonl")]
    words += ["--num_eval_prompts", str(args.questions), "--config", args.expert_config]
    for name, flags in (("iterated", []), ("drawn", ["--shuffle_rewards"])):
        share_responses(folder / "iterated", folder / name)
        found = recipe.main(*recipe.parse([*words, *flags, "--output_dir", str(folder / name)]))
        for start, model in (("right_before", "sampled_right"), ("right_after", f"{name}_right")):
            metrics |= {model + key.removeprefix(start): found[key] for key in found if key.startswith(start)}
    return metrics


def share_responses(source: Path, target: Path) -> None:
    """Let a run choose among the responses of another's first round, which the same model would give again."""
    responses = Path("data", "round_1_responses.json")
    if (source / responses).is_file() and not (target / responses).exists():
        (target / responses).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / responses, target / responses)


def table(results: dict[int, dict[str, float]]) -> str:
    """Return a table of right answers, a row for each model and a column for each seed."""
    lines = [f"| model | {' | '.join(f'seed {seed}' for seed in results)} |", "| - " * (1 + len(results)) + "|"]
    for model, title in MODELS.items():
        name = f"{model}_right"
        cells = [shown(metrics, name) if name in metrics else "" for metrics in results.values()]
        if not any(cells):
            continue
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run all seeds, and print their table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--problems", required=True, help="Rows of question and answer, which ends in '#### 42'.")
    parser.add_argument("--output_dir", default="outputs/own_reasoning")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--longest", type=int, default=300, help="Characters of question and solution at most.")
    parser.add_argument("--rows", type=int, default=512, help="Problems to learn.")
    parser.add_argument("--answered", type=int, default=400, help="Problems to sample from in expert iteration.")
    parser.add_argument("--questions", type=int, default=256, help="Held-out problems.")
    parser.add_argument("--sft_config", help="YAML flags of fine-tuning.")
    parser.add_argument("--rlhf_config", help="YAML flags of PPO.")
    parser.add_argument("--expert_config", help="YAML flags of expert iteration, in place of PPO.")
    args, flags = parser.parse_known_args(argv)
    if args.expert_config and flags:
        parser.error(f"unknown beside --expert_config: {' '.join(flags)}; flags of it stand in its YAML")
    rows = problems_of(args.problems, args.longest)
    print(table({seed: run(args, flags, rows, seed) for seed in args.seeds}))


if __name__ == "__main__":
    main()
