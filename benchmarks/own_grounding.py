"""`hfllm ground` on a real model and texts: questions about how sentences go on, over several seeds.

    python benchmarks/own_grounding.py --model_name_or_path NAME --texts articles.txt

Each passage is some sentences of a text. The question is the beginning of one of them and asks for the name or number
that comes next, which stands once in the passage. Rows and their held-out part are drawn by the seed; `hfllm ground`
trains the model with passages and, as a control, without. Prints a table of the held-out answers of each seed;
finished runs stay. Flags that are not listed below go to `hfllm ground`, such as `--use_peft`.
"""

import argparse
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from own_parts import claim, parsed, parser_of, run_recipe, table_of, with_config, write_lines

from hfllm.data.sources import load_source

# Sentences and characters of a passage, and characters of the beginning of a sentence.
SENTENCES, LONGEST, SHORTEST, BEGINNING = 3, 400, 120, 24
# A name inside of a sentence, or a number.
NAME = re.compile(r"(?<=[a-z,] )(?:[A-Z][a-z]+(?: [A-Z][a-z]+)*|\d[\d,.]*\d)")
KINDS = ("alone", "among", "absent", "injected", "disagreeing")
MODELS = ("base", "sft", "grounded")
Row = dict[str, str]


def next_rows(texts: Sequence[str], seed: int) -> Iterator[Row]:
    """Yield a row for each passage of which a sentence has a name or number to ask for."""
    rng = random.Random(f"own-grounding-{seed}")
    for text in texts:
        sentences = re.split(r"(?<=[.!?])\s+", text)
        for start in range(0, len(sentences) - SENTENCES + 1, SENTENCES):
            part = sentences[start : start + SENTENCES]
            passage, sentence = " ".join(part), rng.choice(part)
            if SHORTEST < len(passage) < LONGEST and (nexts := list(asked_for(sentence, passage))):
                beginning, answer = rng.choice(nexts)
                yield {"prompt": f'What comes next: "{beginning} ..."?', "answer": answer, "passage": passage}


def asked_for(sentence: str, passage: str) -> Iterator[tuple[str, str]]:
    """Yield beginnings of a sentence and the name or number that comes next, where both stand once in the passage."""
    for found in NAME.finditer(sentence):
        beginning = sentence[: found.start()].strip()
        stands_once = passage.count(found[0]) == 1 and passage.count(beginning) == 1
        if len(found[0]) > 2 and len(beginning) >= BEGINNING and stands_once:
            yield beginning, found[0]


def run(args: argparse.Namespace, flags: Sequence[str], texts: Sequence[str], seed: int) -> dict[str, float]:
    """Return the metrics of one seed; `flags` are those of `hfllm ground`."""
    folder = Path(args.output_dir, f"seed_{seed}")
    rows = list(next_rows(texts, seed))
    random.Random(seed).shuffle(rows)
    file = folder / "rows.jsonl"
    if not file.is_file():
        write_lines(file, rows[: args.rows])
    words = ["--model_name_or_path", args.model_name_or_path, "--dataset_name", file, "--seed", seed]
    words += ["--output_dir", folder / "ground", "--num_questions", args.questions]
    words += with_config(args.config, "--sft_config") + with_config(args.config, "--grounded_config")
    return run_recipe("ground", *words, *flags)


def lines() -> Iterator[tuple[list[str], str]]:
    """Yield the lines of the table: what is right, cited or followed, by kind of question and model."""
    from hfllm.stages.ground.own import UNIONS

    for kind in (*KINDS, *UNIONS.values()):
        for figure in ("right", "cites", "follows"):
            for model in MODELS:
                yield [kind, figure, model], f"{model}_{kind}_{figure}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run all seeds, and print their table."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "--texts", required=True, nargs="+", help="Files or folders of texts, each a document, or pydoc."
    )
    parser.add_argument("--output_dir", default="outputs/own_grounding")
    parser.add_argument("--rows", type=int, default=384, help="Rows at most, the held-out tenth included.")
    parser.add_argument("--questions", type=int, default=40, help="Held-out questions at most.")
    parser.add_argument("--config", help="YAML flags of both runs of fine-tuning.")
    args, flags = parsed(parser, argv, takes_others=True)
    texts = [row["text"] for source in args.texts for row in load_source(source).rows]
    claim(args)
    results = {seed: run(args, flags, texts, seed) for seed in args.seeds}
    print(table_of(["asked with", "figure", "model"], lines(), results))


if __name__ == "__main__":
    main()
