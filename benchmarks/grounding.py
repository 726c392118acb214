"""Retrieval: seconds of index and queries against bm25s alone, recall on the documentation of Python, a large index.

    OMP_NUM_THREADS=1 python benchmarks/grounding.py
    OMP_NUM_THREADS=1 python benchmarks/grounding.py --vectors l2_supercat_256.safetensors --tokenizer tokenizer.json
    OMP_NUM_THREADS=1 python benchmarks/grounding.py --megabytes 100
    OMP_NUM_THREADS=1 python benchmarks/grounding.py --model NAME

Seconds are CPU-seconds. Both sides are measured in turns in one process, on the same texts, words and queries.
Questions are made of the documentation itself: the first sentence of a docstring is to find the rest of it, and so are
the words of its name. The control looks for the rest of another docstring. `--vectors` and `--tokenizer` name static
word vectors, such as those in WordLlama's wheel, to be joined with BM25. `--megabytes` indexes texts of drawn words
instead, read from a file, in a process of its own, and says what memory that takes. `--model` prints what semantic
entropy of a model's answers costs instead: the tokens of ten samples beside those of the answers.
"""

import argparse
import json
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

TOP_K, ROUNDS, QUERIES = 10, 5, 500
# Different words of drawn texts.
TYPES = 500_000
# A first sentence, and what follows it.
CLOZE = re.compile(r"(.{25,200}?[.!?])\s+(\S.{80,})", re.DOTALL)


def seconds(work: Callable[[], object]) -> tuple[float, object]:
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


# ---- recall on the documentation ----


def questions_of(count: int | None = None, seed: int = 0) -> tuple[list[str], list[int], dict[str, list[str]]]:
    """Bodies of docstrings, the places of all or some of them, and what is asked about each of these, by kind."""
    from hfllm.data.sources import pydoc_documents

    items = []
    for name, text in pydoc_documents():
        match = CLOZE.match(text)
        if match and not name.startswith("topics."):
            items.append((name, " ".join(match[1].split()), match[2]))
    gold = random.Random(seed).sample(range(len(items)), count or len(items))
    words = [" ".join(re.findall(r"[A-Z]?[a-z]+|[A-Z]+", items[place][0])) for place in gold]
    asked = {"first sentence": [items[place][1] for place in gold], "words of the name": words}
    return [body for *_, body in items], gold, asked


def recall_table(vectors: str | None, tokenizer: str | None) -> list[str]:
    from hfllm.grounding.passages import Passages
    from hfllm.grounding.retrieval import BM25Retriever, DenseRetriever, FusedRetriever, StaticVectors

    bodies, gold, asked = questions_of()
    index_cpu, retriever = seconds(lambda: BM25Retriever(Passages.from_texts(bodies)))
    retrievers = {"BM25": retriever}
    if vectors and tokenizer:
        dense = DenseRetriever(retriever.passages, StaticVectors.load(vectors, tokenizer))
        retrievers |= {"static vectors": dense, "BM25 and static vectors, fused": FusedRetriever([retriever, dense])}
    lines = ["| question | retriever | recall@1 | recall@10 | recall@10, shuffled control | CPU-s of 500 |"]
    lines.append("| - | - | - | - | - | - |")
    for kind, queries in asked.items():
        for name, each in retrievers.items():
            cpu, found = seconds(lambda queries=queries, each=each: each.retrieve(queries, TOP_K))
            other = random.Random(1).sample(gold, len(gold))
            shares = (recall(found, gold, 1), recall(found, gold, TOP_K), recall(found, other, TOP_K))
            cells = (kind, name, *(f"{share:.3f}" for share in shares), f"{cpu * QUERIES / len(gold):.2f}")
            lines.append(f"| {' | '.join(cells)} |")
    return [
        *lines,
        "",
        f"{len(bodies):,} passages and as many questions; BM25 took {index_cpu:.2f} CPU-seconds to index them.",
    ]


def recall(found: Sequence[Sequence], gold: Sequence[int], top_k: int) -> float:
    return statistics.mean(
        place in [each.place for each in ranking[:top_k]] for ranking, place in zip(found, gold, strict=True)
    )


# ---- seconds against bm25s alone ----


def ours(texts: Sequence[str], queries: Sequence[str]) -> dict[str, float]:
    from hfllm.grounding.passages import Passages
    from hfllm.grounding.retrieval import BM25Retriever

    passages = Passages.from_texts(texts)

    index_cpu, retriever = seconds(lambda: BM25Retriever(passages))
    return {"index": index_cpu, "queries": seconds(lambda: retriever.retrieve(queries, TOP_K))[0]}


def theirs(texts: Sequence[str], queries: Sequence[str]) -> dict[str, float]:
    """bm25s by its own functions, with the same words."""
    import bm25s

    def words(each: Sequence[str]) -> object:
        return bm25s.tokenize(list(each), token_pattern=r"\w+", stopwords=None, show_progress=False)

    def index() -> "bm25s.BM25":
        retriever = bm25s.BM25()
        retriever.index(words(texts), show_progress=False)
        return retriever

    index_cpu, retriever = seconds(index)
    # Without the choice bm25s imports and uses jax where that is installed.
    options = {"k": TOP_K, "show_progress": False, "backend_selection": "numpy"}

    def retrieve() -> list[list[str]]:
        # Given the texts, bm25s would copy them into an array in which each takes as much room as the longest.
        return [[texts[place] for place in row] for row in retriever.retrieve(words(queries), **options)[0]]

    return {"index": index_cpu, "queries": seconds(retrieve)[0]}


def speed_table() -> list[str]:
    from hfllm.data.sources import pydoc_documents

    texts = [text for _, text in pydoc_documents()]
    queries = questions_of(QUERIES)[2]["first sentence"]
    sides = {"hfllm": ours, "bm25s alone": theirs}
    for side in sides.values():
        side(texts[:100], queries[:10])
    rounds = []
    for number in range(ROUNDS):
        order = list(sides.items())[:: 1 if number % 2 else -1]
        rounds.append({name: side(texts, queries) for name, side in order})
    lines = ["| | hfllm, CPU-s | bm25s alone, CPU-s | ratio, median of rounds |", "| - | - | - | - |"]
    for what in ("index", "queries"):
        medians = [statistics.median(each[name][what] for each in rounds) for name in sides]
        ratio = statistics.median(each["hfllm"][what] / each["bm25s alone"][what] for each in rounds)
        lines.append(f"| {what} | {medians[0]:.2f} | {medians[1]:.2f} | {ratio:.2f} |")
    size = sum(map(len, texts)) / 1e6
    return [*lines, "", f"{len(texts):,} texts of {size:.1f} MB, {len(queries)} queries for {TOP_K}, {ROUNDS} rounds."]


# ---- a large index ----


def write_texts(file: Path, megabytes: float, seed: int = 0) -> None:
    """Write texts of words that are drawn as often as Zipf's law has it, of 500,000, to a jsonl file."""
    import numpy as np

    rng = np.random.default_rng(seed)
    syllables = np.array([first + second for first in "bcdfghklmnprstvz" for second in "aeiou"])
    words = np.array(
        [
            "".join(syllables[number // 80**place % 80] for place in range(1 + number % 4))
            for number in range(1, TYPES + 1)
        ]
    )
    weights = 1 / np.arange(1, len(words) + 1)
    cumulated, written = np.cumsum(weights / weights.sum()), 0
    with file.open("w", encoding="utf-8") as stream:
        while written < megabytes * 10**6:
            drawn = words[np.minimum(np.searchsorted(cumulated, rng.random(200_000)), len(words) - 1)].tolist()
            for start in range(0, len(drawn), 1000):
                written += stream.write(json.dumps({"text": " ".join(drawn[start : start + 1000])}) + "\n")


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory_of_process() -> float:
    """Megabytes that are this process's alone: mapped files can be read again and do not count."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024


def large(side: str, file: Path) -> None:
    """Index a file, and print seconds and megabytes."""
    from hfllm.data.sources import iterate_source
    from hfllm.data.tokenizer import train_tokenizer
    from hfllm.grounding.passages import Passages
    from hfllm.grounding.retrieval import BM25Retriever

    texts = (row["text"] for _, row in iterate_source(str(file)))
    tokenizer = train_tokenizer((next(texts) for _ in range(200)), vocab_size=4096)
    before = memory_of_process()
    measured = {"before": before}
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        cut, passages = seconds(lambda: Passages.from_source(str(file), tokenizer, folder=folder))
        measured |= {"passages": len(passages), "cut": cut, "memory after cutting": memory_of_process()}
        query = next(passages.texts())
        if side == "hfllm":
            index, retriever = seconds(lambda: BM25Retriever(passages))
            measured |= {"index": index, "memory": memory_of_process()}
            measured["query"] = seconds(lambda: retriever.retrieve([" ".join(query.split()[:8])] * 20, TOP_K))[0] / 20
        else:
            # Its index is gone by the time that memory could be read; its peak stays.
            measured["index"] = theirs(list(passages.texts()), [query])["index"]
    print(json.dumps(measured | {"peak": peak_megabytes()}))


def large_table(megabytes: int, sides: Sequence[str]) -> list[str]:
    lines = ["| | cut to passages, CPU-s | index, CPU-s | memory afterwards, MB | at the most, MB | a query, CPU-ms |"]
    lines.append("| - | - | - | - | - | - |")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "texts.jsonl")
        write_texts(file, megabytes)
        for side in sides:
            command = [sys.executable, __file__, "--large", side, "--file", str(file)]
            found = json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )
            query = f"{1000 * found['query']:.1f}" if "query" in found else ""
            memory = [f"{found[name] - found['before']:.0f}" if name in found else "" for name in ("memory", "peak")]
            times = f"{found['cut']:.0f} | {found['index']:.0f}"
            lines.append(f"| {side} | {times} | {' | '.join(memory)} | {query} |")
    note = (
        f"{megabytes:,} MB of drawn words, {found['passages']:,} passages; memory is what the work adds to a process."
    )
    return [*lines, "", note]


# ---- what semantic entropy costs ----


def cost_table(name: str, prompts: int = 16, samples: int = 10, max_new_tokens: int = 24) -> list[str]:
    """The cost of sampling in tokens and CPU-seconds, for questions about the documentation of Python."""
    from transformers import AutoModelForCausalLM

    from hfllm.grounding.answers import as_prompt
    from hfllm.grounding.uncertainty import answer_with_samples, sample_with_scores, sampling_cost, semantic_entropy
    from hfllm.models.loading.saved import saved_model, saved_tokenizer

    model, tokenizer = saved_model(AutoModelForCausalLM, name, dtype="float32").eval(), saved_tokenizer(name)
    asked = questions_of(prompts)[2]["words of the name"]
    questions = [as_prompt(f"What is {words} in Python?", tokenizer) for words in asked]
    options = {"max_new_tokens": max_new_tokens}
    alone, _ = seconds(lambda: sample_with_scores(model, tokenizer, questions, 1, do_sample=False, **options))
    both, rows = seconds(lambda: answer_with_samples(model, tokenizer, questions, samples, **options))
    measured, _ = seconds(lambda: semantic_entropy(rows))
    cost = sampling_cost(rows)
    return [
        "| tokens of an answer | of its samples | all, times the answer | CPU-s, answers | with samples | entropies |",
        "| - | - | - | - | - | - |",
        f"| {cost['given_tokens']:.1f} | {cost['sampled_tokens']:.1f} | {cost['times_as_many']:.1f} | {alone:.1f} "
        f"| {both:.1f} | {measured:.2f} |",
        "",
        f"{name}: {prompts} prompts, {samples} samples each of at most {max_new_tokens} tokens.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", help="a safetensors file with a matrix of word vectors")
    parser.add_argument("--tokenizer", help="the tokenizer.json whose tokens are its rows")
    parser.add_argument("--megabytes", type=int, help="index so much text of drawn words instead")
    parser.add_argument("--sides", nargs="+", default=["hfllm"], choices=["hfllm", "bm25s"], help="of --megabytes")
    parser.add_argument("--model", help="a causal language model: print what its semantic entropy costs instead")
    parser.add_argument("--output", help="a file for the tables")
    parser.add_argument("--large", help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.large:
        large(args.large, Path(args.file))
        return
    if args.megabytes:
        lines = large_table(args.megabytes, args.sides)
    elif args.model:
        lines = cost_table(args.model)
    else:
        lines = [*speed_table(), "", *recall_table(args.vectors, args.tokenizer)]
    print("\n".join(lines))
    if args.output:
        Path(args.output).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
