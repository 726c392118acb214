"""Passages in the rows of fine-tuning: flags, what they refuse, and which rows get which passages."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hfllm.data.packing import IGNORE
from hfllm.data.rows import OriginRow, origin_of
from hfllm.data.sources import PYDOC, source_files
from hfllm.errors import InputError, refuse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hfllm.data.formats import Row
    from hfllm.grounding.passages import Passages
    from hfllm.grounding.retrieval import BM25Retriever, Found

TOP_K, FRACTION = 3, 0.5


class GroundedRow(OriginRow):
    """A row that was given passages."""


@dataclass(frozen=True)
class RetrievalArguments:
    """Passages before the questions of some rows, so that a model learns to answer from what it is given."""

    retrieval_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Passages that are found for a row's last question and put before it: a folder of saved passages, "
            "or texts, named as --dataset_name, which are cut (docs/grounding.md)."
        },
    )
    # None, and not their values, since without the first flag they mean nothing.
    retrieval_top_k: int | None = field(
        default=None, metadata={"help": f"The most passages of a row; {TOP_K} by default."}
    )
    retrieval_min_score: float | None = field(
        default=None, metadata={"help": "Passages with a lower BM25 score are not put there; by default all are."}
    )
    grounded_fraction: float | None = field(
        default=None,
        metadata={"help": f"Share of the rows that get passages; the others stay as they are. {FRACTION} by default."},
    )


def check(script_args: RetrievalArguments) -> None:
    """Refuse flags that have no effect, and passages that are not there.

    Raises:
        InputError: naming the flag.
    """
    from hfllm.data.word_index import import_bm25s

    name = script_args.retrieval_dataset_name
    for flag in ("retrieval_top_k", "retrieval_min_score", "grounded_fraction"):
        refuse(
            name is None and getattr(script_args, flag) is not None, f"--{flag}", "it needs --retrieval_dataset_name"
        )
    if name is None:
        return
    refuse(script_args.grounded_fraction == 0, "--grounded_fraction 0", "no row gets passages: leave out the flags")
    import_bm25s("--retrieval_dataset_name")
    try:
        _files(name)
    except InputError as error:
        raise InputError(f"--retrieval_dataset_name: {error}") from None


def contents(script_args: RetrievalArguments) -> dict[str, str]:
    """Return a hash of the local files that the passages come from, by name, for what tells runs apart."""
    from hfllm.fingerprint import file_fingerprint

    name = script_args.retrieval_dataset_name
    files = _files(name) if name else []
    # Where a folder is does not matter, which names its files have does.
    named = [(str(file.relative_to(name)) if Path(name).is_dir() else "", file) for file in files]
    return {"retrieval content": file_fingerprint(named)} if files else {}


def with_passages(
    rows: Sequence["Row"],
    eval_rows: Sequence["Row"],
    script_args: RetrievalArguments,
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
) -> tuple[list["Row"], list["Row"], dict[str, int]]:
    """Return training and held-out rows, a share of which has passages, and how many have, by metric.

    Args:
        rows: with `prompt` and `completion` messages; they are not changed.
        eval_rows: the same, held out.
        script_args: where the passages come from, and how many rows get them.
        tokenizer: cuts texts to passages.
        seed: of the rows that get them.

    Raises:
        InputError: when there are fewer passages than are asked for, or no row gets any.
    """
    from hfllm.data.tokenizer import plain_text
    from hfllm.grounding.retrieval import BM25Retriever
    from hfllm.runs.command_line import say

    name = script_args.retrieval_dataset_name
    if name is None:
        return list(rows), list(eval_rows), {}
    passages = _passages(name, tokenizer)
    if (top_k := script_args.retrieval_top_k or TOP_K) > len(passages):
        raise InputError(f"--retrieval_top_k {top_k}: {name} has {len(passages)} passages")
    retriever, results, metrics, plain = BM25Retriever(passages), [], {}, plain_text(tokenizer)
    share = FRACTION if script_args.grounded_fraction is None else script_args.grounded_fraction
    for metric, what, each in (
        ("grounded_rows", "training rows", rows),
        ("grounded_eval_rows", "held-out rows", eval_rows),
    ):
        chosen = random.Random(f"{metric} {seed}").sample(range(len(each)), round(share * len(each)))
        if each is rows and not chosen:
            raise InputError(
                f"--grounded_fraction {share:g}: none of {len(rows):,} rows gets passages; expected more than "
                f"{0.5 / max(len(rows), 1):.3g}"
            )
        asked = [each[place] for place in chosen]
        found = _found(retriever, asked, top_k, script_args.retrieval_min_score, each is rows)
        given = dict(zip(chosen, found, strict=True))
        results.append([_grounded(row, given.get(place, []), plain) for place, row in enumerate(each)])
        metrics[metric] = sum(map(bool, found))
        missing = len(chosen) - metrics[metric]
        others = f"; for {missing:,} more none was found" if missing else ""
        say(f"{what}: {metrics[metric]:,} of {len(each):,} have passages of {name}{others}")
    return results[0], results[1], metrics


def _files(name: str) -> list[Path]:
    """Return the local files of texts or of saved passages; none of what is not local."""
    from hfllm.grounding.passages import ABOUT, FILE

    if name == PYDOC:
        return []
    saved = [Path(name, file) for file in (FILE, ABOUT)]
    if not saved[0].is_file():
        return source_files(name) or []
    if not saved[1].is_file():
        raise InputError(f"{saved[1]}: missing, beside saved passages: save them again")
    return saved


def _passages(name: str, tokenizer: "PreTrainedTokenizerBase") -> "Passages":
    from hfllm.grounding.passages import FILE, Passages

    if name != PYDOC and Path(name, FILE).is_file():
        return Passages.load(name, tokenizer)
    return Passages.from_source(name, tokenizer)


def _found(
    retriever: "BM25Retriever", rows: Sequence["Row"], top_k: int, min_score: float | None, is_training: bool
) -> list[list["Found"]]:
    """Return the passages of each row; none of one that asks nothing.

    Args:
        is_training: whether the rows are learned from, so that some must have passages.

    Raises:
        InputError: when no training row gets any.
    """
    from hfllm.grounding.answers import last_question
    from hfllm.grounding.retrieval import scoring_enough

    queries = []
    for row in rows:
        messages = [*row["prompt"], *row["completion"]]
        place = last_question(messages)
        queries.append("" if place is None else messages[place]["content"])
    found = retriever.retrieve(queries, top_k)
    kept = found if min_score is None else scoring_enough(found, min_score)
    if is_training and rows and not any(kept):
        best = max((each.score for ranking in found for each in ranking), default=None)
        if best is None:
            raise InputError(f"--retrieval_dataset_name: no passage has a word of {len(rows):,} questions")
        raise InputError(f"--retrieval_min_score {min_score}: no row gets a passage; the best score is {best:.3g}")
    return kept


def lacking_room(labels: Sequence[int], longest: int) -> list[int]:
    """Return the length of a row with passages whose last answer begins where it is cut off; nothing of another row.

    Args:
        labels: of the row; what is not learned is `IGNORE`.
        longest: the tokens that are kept, from the first on.
    """
    learned = [place for place, label in enumerate(labels) if label != IGNORE]
    # The answer to the question with the passages is the last one: tokens that are learned, next to each other.
    begins = next((place for place in reversed(learned) if labels[place - 1] == IGNORE), 0)
    return [len(labels)] if learned and begins >= longest else []


def crowded_out(sizes: Sequence[int], longest: int, of: int) -> str:
    """Return what to say about rows whose passages leave no room for the answer.

    Args:
        sizes: how many tokens each has.
        longest: the most that a row may have.
        of: how many rows there are.
    """
    return (
        f"{len(sizes):,} of {of:,} rows have passages that leave no room for the answer within --max_length "
        f"{longest}, which is not learned: --max_length {max(sizes)} holds all, if the model's context does, or take "
        "a smaller --retrieval_top_k, or passages that are cut shorter (docs/grounding.md)"
    )


def _grounded(row: "Row", found: Sequence["Found"], plain: Callable[[str], str]) -> "Row":
    """Return a row with passages before its last question, which may be a later one than that of its prompt.

    Args:
        plain: breaks what would open or end a turn in a passage.
    """
    from hfllm.grounding.answers import grounded

    if not found:
        return row
    size = len(row["prompt"])
    messages = grounded([*row["prompt"], *row["completion"]], [plain(each.passage.text) for each in found])
    return GroundedRow({**row, "prompt": messages[:size], "completion": messages[size:]}, origin_of(row, "a row"))
