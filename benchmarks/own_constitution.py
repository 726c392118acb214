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
import io
import json
import random
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

from own_parts import claim, columns_of, parsed, parser_of, run_recipe, table_of, with_config, write_lines

from hfllm.data.sources import load_source
from hfllm.outputs.report import write_atomically
from hfllm.runs.models import NamedModel
from hfllm.stages.evaluate.flags import labels_of
from hfllm.stages.shared import load_speaking

TAUGHT, OWN = "taught_critic", "own_critic"
# The share of refusals, by the prompts' label.
FIGURES = {"unsafe": "refusals/unsafe/refuses", "safe": "refusals/safe/over_refusal"}
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
    for row in rows:
        columns_of(row, path, "prompt", "type", "label")
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
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["prompt", "type", "label"], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


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


def write_rows(args: argparse.Namespace, folder: Path, seed: int) -> None:
    """Write the three parts, the critic's conversations, and prompts that are no trap."""
    for_critic, for_revisions, held_out = dealt(args.xstest_file, seed)
    folder.mkdir(parents=True, exist_ok=True)
    speaking = load_speaking(NamedModel(args.model_name_or_path))
    prompts = [[{"role": "user", "content": row["prompt"]}] for row in for_critic]
    answers = [said for (said,) in speaking.answers(prompts, LENGTH, seed)]
    write_lines(folder / "critiques.jsonl", critiques(for_critic, answers, seed))
    harmless = [
        " ".join(filter(None, (row["instruction"], row.get("input"))))
        for row in load_source(args.helpful_dataset_name).rows
    ]
    random.Random(f"own-constitution-helpful-{seed}").shuffle(harmless)
    safe = [row["prompt"] for row in for_critic if row["label"] == "safe"]
    write_lines(folder / "helpful.jsonl", ({"prompt": prompt} for prompt in [*harmless[: args.helpful], *safe * KEPT]))
    write_csv(folder / "revised.csv", [row for row in for_critic if row["label"] == "unsafe"] + for_revisions)
    write_atomically(folder / "constitution.json", json.dumps([PRINCIPLE]))
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
    run_recipe("sft", *named, *words, *with_config(args.critic_config))
    words = [*named, "--dataset_name", folder / "revised.csv", "--helpful_dataset_name", folder / "helpful.jsonl"]
    words += ["--constitution", folder / "constitution.json", "--revise_only_flagged", "--num_revisions", 1]
    words += ["--response_length", LENGTH, "--batch_size", 16, "--last_stage", "sl"]
    words += with_config(args.config, "--sl_config")
    for name, critic in ((TAUGHT, ["--critic_model_name_or_path", folder / "critic"]), (OWN, [])):
        run_recipe("constitution", *words, *critic, "--output_dir", folder / name)
    words = ["--suites", "refusals", "--xstest_file", folder / "held_out.csv", "--max_new_tokens", LENGTH]
    asked = models(args, seed)
    words += ["--output_dir", folder / "evaluate"]
    metrics = run_recipe("evaluate", "--model_name_or_path", *asked.values(), *words)
    labels = labels_of([*asked.values()])
    return {
        f"{figure}/{name}{error}": metrics[f"{figure}/{label}{error}"]
        for name, label in zip(asked, labels, strict=True)
        for figure in FIGURES.values()
        for error in ("", "_se", "_low", "_high", "_n")
        if f"{figure}/{label}{error}" in metrics
    }


def models(args: argparse.Namespace, seed: int) -> dict[str, str]:
    """Return the models to evaluate, by name: as it was, with the taught critic, with itself as critic."""
    folder, asked = Path(args.output_dir, f"seed_{seed}"), {"as it was": args.model_name_or_path}
    for name in (TAUGHT, OWN):
        tuned = folder / name / "sl"
        if tuned.is_dir():
            asked[name] = str(tuned)
        else:
            print(f"{tuned}: nothing was learned, see {tuned.parent / 'report.md'}")
    return asked


def main(argv: Sequence[str] | None = None) -> None:
    """Run all seeds, and print their table."""
    parser = parser_of(__doc__)
    parser.add_argument("--xstest_file", required=True, help="XSTest's CSV, with labels.")
    parser.add_argument("--helpful_dataset_name", required=True, help="Alpaca's rows; their answers are not read.")
    parser.add_argument("--output_dir", default="outputs/own_constitution")
    parser.add_argument("--helpful", type=int, default=150, help="Prompts to which the model keeps its own answers.")
    parser.add_argument("--config", help="YAML flags of the tuning on revisions.")
    parser.add_argument("--critic_config", help="YAML flags of the critic's fine-tuning.")
    args, flags = parsed(parser, argv, takes_others=True)
    claim(args)
    results = {seed: run(args, flags, seed) for seed in args.seeds}
    lines = (
        ([f"{group}, refused", model], f"{figure}/{model}")
        for group, figure in FIGURES.items()
        for model in ("as it was", TAUGHT, OWN)
    )
    print(table_of(["prompts", "model"], lines, results))


if __name__ == "__main__":
    main()
