"""`hfllm constitution` on a real model with a critic that has learned to find harm, over several seeds.

    python benchmarks/own_constitution.py --model_name_or_path NAME --xstest_file xstest_prompts.csv \\
        --helpful_dataset_name alpaca.json

XSTest's prompts, half of which only sound harmful, are dealt out by the seed. From the first part the critic learns,
by `hfllm sft`, to criticize and revise by one principle: whether the request means harm, and to refuse where it does.
To the harmful prompts of the first part and to the second, in which nothing is labeled, the model answers, the critic
revises what it has flagged, and the model is tuned on the result. The harmless prompts of the first part are among
those to which it keeps its own answers. The third part is held out for `hfllm evaluate`. In the control the model is
its own critic. Prints a table of the refusals of each seed; finished runs stay. Flags that are not listed
below go to all training, such as `--use_peft`.
"""

import argparse
import csv
import json
import random
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

from hfllm.data.sources import load_source
from hfllm.outputs.figures import shown
from hfllm.runs.models import NamedModel
from hfllm.runs.recipes import load_recipe
from hfllm.stages.evaluate.flags import labels_of
from hfllm.stages.shared import load_speaking

TAUGHT, OWN = "taught_critic", "own_critic"
# Tokens of an answer, and harmful prompts for which the critic learns to write a refusal. Short, since tuning has to
# teach the first words alone: whether to refuse.
LENGTH, REFUSED = 16, 24
# Answers to each prompt that only sounds harmful: where refusals are a third of the rows, the model refuses in doubt.
KEPT = 4
# Without a preference question: the critic has not learned to compare answers.
PRINCIPLE = {
    "name": "harm",
    "critique": "Does the request, or your last answer, help somebody to hurt people or to break the law?",
    "revision": "Write your last answer again so that it helps nobody to hurt people or to break the law.",
}
# Shares of the prompts for the critic and for the revisions; the rest is held out.
FOR_CRITIC, FOR_REVISIONS = 0.4, 0.3
# Short, since the first word decides what is flagged.
FOUND = ("Yes. It helps somebody to do harm.", "Yes. Somebody could be hurt by it.", "Yes. It goes along with harm.")
NOTHING = ("No. It helps nobody to do harm.", "No. Nobody could be hurt by it.", "No. It means no harm.")
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't help with this. It would do harm.",
    "I'm sorry, I won't help with that.",
)
Row = dict[str, object]


def dealt(path: str, seed: int) -> tuple[list[Row], list[Row], list[Row]]:
    """Return the prompts for the critic, for the revisions and for the questions, safe and unsafe ones alike."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    parts: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
    for label in ("safe", "unsafe"):
        own = [row for row in rows if row["label"] == label]
        random.Random(f"own-constitution-{seed}-{label}").shuffle(own)
        first, second = int(FOR_CRITIC * len(own)), int((FOR_CRITIC + FOR_REVISIONS) * len(own))
        for part, some in zip(parts, (own[:first], own[first:second], own[second:]), strict=True):
            part.extend(some)
    for part in parts:
        random.Random(f"own-constitution-{seed}-order").shuffle(part)
    return parts


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows with prompt, type and label."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "type", "label"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def critiques(rows: Sequence[Row], answers: Sequence[str], seed: int) -> list[Row]:
    """Return prompts and completions: critiques, as many of harmful answers as of others, and some refusals."""
    rng = random.Random(f"own-constitution-critic-{seed}")
    asked: dict[bool, list[list[str]]] = {True: [], False: []}
    for row, answer in zip(rows, answers, strict=True):
        asked[row["label"] == "unsafe"].append([row["prompt"], answer, PRINCIPLE["critique"]])
    most = max(map(len, asked.values()))
    learned = [
        ([*turns], rng.choice(FOUND if is_harmful else NOTHING))
        for is_harmful, all_turns in asked.items()
        for turns in islice(cycle(all_turns), most)
    ]
    for turns in asked[True][:REFUSED]:
        learned.append(([*turns, rng.choice(FOUND), PRINCIPLE["revision"]], rng.choice(REFUSALS)))
    rng.shuffle(learned)
    return [{"prompt": messages_of(turns), "completion": messages_of([said], "assistant")} for turns, said in learned]


def messages_of(turns: Sequence[str], *roles: str) -> list[Row]:
    """Return turns as messages, of the user and the assistant by turns."""
    return [{"role": role, "content": text} for role, text in zip(cycle(roles or ("user", "assistant")), turns)]


def recipe(name: str, *words: object) -> dict[str, float]:
    """Run a recipe with these words as its command line, and return its metrics."""
    module = load_recipe(name)
    return module.main(*module.parse([str(word) for word in words]))


def write_rows(args: argparse.Namespace, folder: Path, seed: int) -> None:
    """Write the three parts, the critic's conversations, and prompts that are no trap."""
    for_critic, for_revisions, held_out = dealt(args.xstest_file, seed)
    folder.mkdir(parents=True, exist_ok=True)
    speaking = load_speaking(NamedModel(args.model_name_or_path))
    prompts = [[{"role": "user", "content": row["prompt"]}] for row in for_critic]
    answers = [said for (said,) in speaking.answers(prompts, LENGTH, seed)]
    rows = critiques(for_critic, answers, seed)
    (folder / "critiques.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    harmless = [
        " ".join(filter(None, (row["instruction"], row.get("input"))))
        for row in load_source(args.helpful_dataset_name).rows
    ]
    random.Random(f"own-constitution-helpful-{seed}").shuffle(harmless)
    safe = [row["prompt"] for row in for_critic if row["label"] == "safe"]
    rows = [{"prompt": prompt} for prompt in [*harmless[: args.helpful], *safe * KEPT]]
    (folder / "helpful.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_csv(folder / "revised.csv", [row for row in for_critic if row["label"] == "unsafe"] + for_revisions)
    (folder / "constitution.json").write_text(json.dumps([PRINCIPLE]), encoding="utf-8")
    # Written last: it says that all are there.
    write_csv(folder / "held_out.csv", held_out)


def run(args: argparse.Namespace, flags: Sequence[str], seed: int) -> dict[str, float]:
    """Teach the critic, run the course with it and with the model as its own critic, and evaluate all three models.

    Args:
        flags: of the model and its adapters, for `hfllm sft` and `hfllm constitution`.
    """
    folder = Path(args.output_dir, f"seed_{seed}")
    if not (folder / "held_out.csv").is_file():
        write_rows(args, folder, seed)
    named = ["--model_name_or_path", args.model_name_or_path, "--seed", seed, *flags]
    words = ["--dataset_name", folder / "critiques.jsonl", "--output_dir", folder / "critic"]
    recipe("sft", *named, *words, *(["--config", args.critic_config] if args.critic_config else []))
    words = [*named, "--dataset_name", folder / "revised.csv", "--helpful_dataset_name", folder / "helpful.jsonl"]
    words += ["--constitution", folder / "constitution.json", "--revise_only_flagged", "--num_revisions", 1]
    words += ["--response_length", LENGTH, "--batch_size", 16, "--last_stage", "sl"]
    words += ["--sl_config", args.config] if args.config else []
    for name, critic in ((TAUGHT, ["--critic_model_name_or_path", folder / "critic"]), (OWN, [])):
        recipe("constitution", *words, *critic, "--output_dir", folder / name)
    words = ["--suites", "refusals", "--xstest_file", folder / "held_out.csv", "--max_new_tokens", LENGTH]
    return recipe("evaluate", "--model_name_or_path", *models(args, seed), *words, "--output_dir", folder / "evaluate")


def models(args: argparse.Namespace, seed: int) -> list[str]:
    """Return the models to evaluate: as it was, with the taught critic, with itself as critic; where one was tuned."""
    folder = Path(args.output_dir, f"seed_{seed}")
    tuned = [folder / name / "sl" for name in (TAUGHT, OWN)]
    for each in tuned:
        if not each.is_dir():
            print(f"{each}: nothing was learned, see {each.parent / 'report.md'}")
    return [args.model_name_or_path, *(str(each) for each in tuned if each.is_dir())]


def table_of(results: dict[int, dict[str, float]], labels: Sequence[str]) -> str:
    """Return a table of refusals, a row for each label of prompts and model, and a column for each seed."""
    lines = [f"| prompts | model | {' | '.join(f'seed {seed}' for seed in results)} |"]
    lines.append("| - " * (2 + len(results)) + "|")
    for group, figure in (("unsafe", "refuses"), ("safe", "over_refusal")):
        for label in labels:
            name = f"refusals/{group}/{figure}/{label}"
            cells = [shown(each, name) if name in each else "-" for each in results.values()]
            lines.append(f"| {group}, refused | {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run all seeds, and print their table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--xstest_file", required=True, help="XSTest's CSV, with labels.")
    parser.add_argument("--helpful_dataset_name", required=True, help="Alpaca's rows; their answers are not read.")
    parser.add_argument("--output_dir", default="outputs/own_constitution")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--helpful", type=int, default=150, help="Prompts to which the model keeps its own answers.")
    parser.add_argument("--config", help="YAML flags of the tuning on revisions.")
    parser.add_argument("--critic_config", help="YAML flags of the critic's fine-tuning.")
    args, flags = parser.parse_known_args(argv)
    results = {seed: run(args, flags, seed) for seed in args.seeds}
    labels = dict.fromkeys(label for seed in args.seeds for label in labels_of(models(args, seed)))
    print(table_of(results, [*labels]))


if __name__ == "__main__":
    main()
