"""`hfllm sft` on calls of two tools on a real model, and `hfllm evaluate` on held-out questions, over several seeds.

    python benchmarks/own_tools.py --model_name_or_path NAME

Questions are products and sums of large numbers, for `calculator`; what a table says of made-up people, for `lookup`;
and words to write in capitals, for which no tool is needed. In every sixth conversation the first call fails and is
made again. Held-out questions have other numbers, people and wordings, and their first calls fail with another error.
The control learns the same questions with their answers and without calls. Prints a table of the held-out answers of
each seed; finished runs stay.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from own_parts import claim, parsed, parser_of, run_recipe, table_of, with_config, write_lines
from transformers.utils import get_json_schema

from hfllm.data.tokenizer import set_chat_template
from hfllm.environments.tools import calculator, lookup_in
from hfllm.outputs.report import write_atomically
from hfllm.runs.models import NamedModel, load_policy

CALLS, DIRECT, BASE = "calls", "direct", "base"
PEOPLE, HELD_OUT_PEOPLE = 160, 40
DETAILS = {
    "city": ("Lyon", "Oslo", "Lima", "Cairo", "Porto", "Kyoto", "Quito", "Turin", "Ghent", "Leeds"),
    "job": ("baker", "pilot", "nurse", "tailor", "judge", "farmer", "potter", "dentist", "miner", "clerk"),
    "pet": ("parrot", "rabbit", "hamster", "goldfish", "lizard", "turtle", "canary", "beagle", "pony", "gecko"),
}
# Each list: the last two wordings are held out.
OF_NUMBERS = (
    *("What is {}?", "Work out {}.", "How much is {}?", "Calculate {} for me.", "Tell me the value of {}."),
    *("Can you compute {}?", "I need the result of {}.", "Please add this up: {}.", "{} = ?", "Find {}."),
    *("My bill says {}. What does that come to?", "Which number do I get from {}?"),
)
OF_PEOPLE = {
    "city": (
        *("Which city does {} live in?", "Where does {} live?", "In what city can I find {}?"),
        *("Name the city of {}.", "{} lives in which city?", "I look for the home city of {}."),
        *("I am writing to {}. To which city do I send it?", "What place is home to {}?"),
    ),
    "job": (
        *("What is the job of {}?", "What does {} do for work?", "Tell me the job of {}."),
        *("Which job does {} have?", "{} works as what?", "What does {} do all day at work?"),
        *("How does {} earn money?", "What profession does {} follow?"),
    ),
    "pet": (
        *("Which pet does {} have?", "What pet does {} keep?", "Name the pet of {}."),
        *("{} has what animal at home?", "Tell me what pet {} owns.", "What animal does {} keep?"),
        *("Which animal waits at home for {}?", "What does {} feed every morning as a pet?"),
    ),
}
OF_WORDS = (
    *("Write the word {} in capitals.", "Say {} in capital letters.", "Please put {} into capitals."),
    *("How does {} look in capital letters?", "Turn the word {} into capitals.", "Give me {} in capitals."),
    *("I want to read {} in large letters, all capitals.", "Spell {} with capital letters alone."),
)
ERRORS = ("TimeoutError: no answer in time", "RuntimeError: the tool is busy", "OSError: connection closed")
WORDS = ("lamp", "river", "stone", "paper", "window", "garden", "silver", "bread", "cloud", "chair", "music", "road")
Row = dict[str, object]


def people(seed: int) -> dict[str, dict[str, str]]:
    """Return what is known of people with made-up names."""
    rng = random.Random(f"own-tools-people-{seed}")
    part = lambda: rng.choice("BDFGKLMNPRSTV") + rng.choice("aeiou") + rng.choice("lmnrst") + rng.choice("aeio")  # noqa: E731
    names: dict[str, dict[str, str]] = {}
    while len(names) < PEOPLE + HELD_OUT_PEOPLE:
        names[f"{part()} {part()}{rng.choice('nrs')}"] = {name: rng.choice(of) for name, of in DETAILS.items()}
    return names


def asked(wordings: Sequence[str], is_held_out: bool, rng: random.Random, what: str) -> str:
    """Return a question in one of the wordings, the last two of which are held out."""
    return rng.choice(wordings[-2:] if is_held_out else wordings[:-2]).format(what)


def number_row(is_held_out: bool, rng: random.Random) -> Row:
    """Return a product or sum of numbers; held-out ones end with 7, and others never do."""
    first, second = (10 * rng.randrange(10, 1000) + (7 if is_held_out else rng.choice((1, 2, 3, 4, 5))) for _ in "ab")
    sign = rng.choice("+-*")
    second = second if sign != "*" else 10 * rng.randrange(1, 100) + (7 if is_held_out else 3)
    what = f"{first} {sign} {second}"
    arguments = {"expression": what}
    prompt = asked(OF_NUMBERS, is_held_out, rng, what)
    return {"prompt": prompt, "answer": calculator(what), "tool": "calculator", "arguments": arguments}


def person_row(table: dict[str, dict[str, str]], is_held_out: bool, rng: random.Random) -> Row:
    """Return a question about a person; the last people of the table are held out."""
    names = list(table)
    name = rng.choice(names[PEOPLE:] if is_held_out else names[:PEOPLE])
    detail = rng.choice(list(DETAILS))
    prompt = asked(OF_PEOPLE[detail], is_held_out, rng, name)
    arguments = {"key": name, "attribute": detail}
    return {"prompt": prompt, "answer": table[name][detail], "tool": "lookup", "arguments": arguments}


def word_row(is_held_out: bool, rng: random.Random) -> Row:
    """Return a question that needs no tool; the last words are held out."""
    word = rng.choice(WORDS[-4:] if is_held_out else WORDS[:-4])
    return {"prompt": asked(OF_WORDS, is_held_out, rng, word), "answer": word.upper(), "tool": None}


def conversation(row: Row, fails_first: bool) -> list[dict[str, object]]:
    """Return the messages of a question whose tool is called; the first call may fail, and is then made again."""
    messages: list[dict[str, object]] = [{"role": "user", "content": row["prompt"]}]
    if row["tool"]:
        call = {"type": "function", "function": {"name": row["tool"], "arguments": row["arguments"]}}
        results = [str({"error": fails_first}), row["answer"]] if fails_first else [row["answer"]]
        for result in results:
            messages.append({"role": "assistant", "tool_calls": [call]})
            messages.append({"role": "tool", "name": row["tool"], "content": result})
    return [*messages, {"role": "assistant", "content": row["answer"]}]


def write_rows(folder: Path, seed: int, count: int, questions: int) -> None:
    """Write the table, the conversations of both models and the held-out questions."""
    rng, table = random.Random(f"own-tools-{seed}"), people(seed)
    schemas = [get_json_schema(calculator), get_json_schema(lookup_in(table))]
    kinds: list[Callable[[bool, random.Random], Row]] = [number_row, partial(person_row, table), word_row]
    rows = [kinds[number % 3](False, rng) for number in range(count)]
    failed = [rng.choice(ERRORS) if rng.random() < 1 / 6 else "" for _ in rows]
    lines = {
        CALLS: [{"messages": conversation(*each), "tools": schemas} for each in zip(rows, failed, strict=True)],
        DIRECT: [{"messages": conversation({**each, "tool": None}, ""), "tools": schemas} for each in rows],
        "questions": [
            {name: row[name] for name in ("prompt", "answer", "tool")}
            for row in (kinds[number % 3](True, rng) for number in range(questions))
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "table.json", json.dumps(table, indent=1))
    for name, each in lines.items():
        write_lines(folder / f"{name}.jsonl", each)


def base_with_calls(args: argparse.Namespace) -> Path:
    """Return the model as it was, with the chat template that the others learn, which can write calls."""
    folder = Path(args.output_dir, BASE)
    # Written last.
    if not (folder / "tokenizer_config.json").is_file():
        policy, tokenizer = load_policy(NamedModel(args.model_name_or_path))
        set_chat_template(tokenizer, "own")
        policy.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def run(args: argparse.Namespace, seed: int) -> dict[str, float]:
    """Train both models of one seed, and return the figures of the three."""
    folder = Path(args.output_dir, f"seed_{seed}")
    if not (folder / "questions.jsonl").is_file():
        write_rows(folder, seed, args.rows, args.questions)
    for name in (CALLS, DIRECT):
        words = ["--model_name_or_path", args.model_name_or_path, "--dataset_name", folder / f"{name}.jsonl"]
        words += ["--chat_template_path", "own", "--seed", seed, "--output_dir", folder / name]
        run_recipe("sft", *words, *with_config(args.config))
    models = [folder / CALLS, folder / DIRECT, base_with_calls(args)]
    words = ["--dataset_name", folder / "questions.jsonl", "--tools", "calculator", f"lookup:{folder / 'table.json'}"]
    return run_recipe("evaluate", "--model_name_or_path", *models, *words, "--output_dir", folder / "evaluate")


def lines() -> Iterator[tuple[list[str], str]]:
    """Yield the lines of the table: each figure of each model."""
    figures = [
        *[("needs a tool", "called"), ("needs a tool", "right"), ("needs no tool", "called_needlessly")],
        *[("needs no tool", "right"), ("its first call fails", "right"), ("without tools (control)", "right")],
    ]
    for group, figure in figures:
        slug = group.replace(" ", "_").replace("(", "").replace(")", "")
        for model in (CALLS, DIRECT, BASE):
            yield [group, figure, model], f"tools/{slug}/{figure}/{model}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run all seeds, and print their table."""
    parser = parser_of(__doc__)
    parser.add_argument("--output_dir", default="outputs/own_tools")
    parser.add_argument("--rows", type=int, default=480, help="Conversations, a third of each kind.")
    parser.add_argument("--questions", type=int, default=120, help="Held-out questions, a third of each kind.")
    parser.add_argument("--config", help="YAML flags of both runs of fine-tuning.")
    args, _ = parsed(parser, argv)
    claim(args)
    results = {seed: run(args, seed) for seed in args.seeds}
    print(table_of(["asked", "figure", "model"], lines(), results))


if __name__ == "__main__":
    main()
