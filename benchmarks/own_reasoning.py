"""`hfllm reason` on a real model and word problems with solutions, such as gsm8k's, over several seeds.

    python benchmarks/own_reasoning.py --model_name_or_path NAME --problems gsm8k_train.jsonl

Problems whose question and solution are short are dealt out by the seed into those that are learned and held-out ones.
`hfllm reason` fine-tunes the model on the solutions, and on the answers alone as a control; PPO on exact match goes on
from the first, and a control of it learns from the same rewards dealt out by chance. Prints a table of the held-out
answers of each seed; finished runs stay. Flags that are not listed below go to `hfllm reason`, such as `--use_peft`.
"""

import argparse
import json
import random
import re
from collections.abc import Sequence
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
}
# gsm8k's notes for a calculator, <<48/2=24>>: nobody computes them here, and they double the length.
NOTE = re.compile(r"<<[^>]*>>")
Row = dict[str, str]


def problems_of(path: str, longest: int) -> list[Row]:
    """Return the problems of at most `longest` characters, question and solution together, without the notes."""
    rows = [{"prompt": row["question"], "answer": NOTE.sub("", row["answer"])} for row in load_source(path).rows]
    return [row for row in rows if len(row["prompt"]) + len(row["answer"]) <= longest]


def write_rows(folder: Path, rows: Sequence[Row], seed: int, count: int, questions: int) -> None:
    """Write problems to learn and held-out ones, drawn by the seed."""
    drawn = random.Random(f"own-reasoning-{seed}").sample(rows, count + questions)
    folder.mkdir(parents=True, exist_ok=True)
    # The held-out ones are written last: they say that all is there.
    for name, part in (("problems", drawn[:count]), ("held_out", drawn[count:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")


def run(args: argparse.Namespace, flags: Sequence[str], rows: Sequence[Row], seed: int) -> dict[str, float]:
    """Return the metrics of one seed; `flags` are those of `hfllm reason`."""
    folder = Path(args.output_dir, f"seed_{seed}")
    if not (folder / "held_out.jsonl").is_file():
        write_rows(folder, rows, seed, args.rows, args.questions)
    recipe = load_recipe("reason")
    words = ["--model_name_or_path", args.model_name_or_path, "--dataset_name", str(folder / "problems.jsonl")]
    words += ["--eval_dataset_name", str(folder / "held_out.jsonl"), "--num_eval_prompts", str(args.questions)]
    words += ["--seed", str(seed), "--output_dir", str(folder / "reason")]
    for name in ("sft", "rlhf"):
        file = getattr(args, f"{name}_config")
        words += [f"--{name}_config", file] if file else []
    return recipe.main(*recipe.parse([*words, *flags]))


def table(results: dict[int, dict[str, float]]) -> str:
    """Return a table of right answers, a row for each model and a column for each seed."""
    lines = [f"| model | {' | '.join(f'seed {seed}' for seed in results)} |", "| - " * (1 + len(results)) + "|"]
    for model, title in MODELS.items():
        name = f"{model}_right"
        cells = [shown(metrics, name) if name in metrics else "-" for metrics in results.values()]
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
    parser.add_argument("--questions", type=int, default=256, help="Held-out problems.")
    parser.add_argument("--sft_config", help="YAML flags of fine-tuning.")
    parser.add_argument("--rlhf_config", help="YAML flags of PPO.")
    args, flags = parser.parse_known_args(argv)
    rows = problems_of(args.problems, args.longest)
    print(table({seed: run(args, flags, rows, seed) for seed in args.seeds}))


if __name__ == "__main__":
    main()
