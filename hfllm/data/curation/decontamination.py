"""Overlap with evaluation sets: a training document must not hold what a model will be tested on.

As GPT-3 did (Brown et al. 2020, arXiv:2005.14165, appendix C): a document is contaminated when it shares a run of 13
words with an evaluation text, without case and punctuation. Evaluation texts of 8 to 12 words count as one run of
their own length; shorter ones are too common to tell anything, and are left out.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

from hfllm.data.curation.text import ngram_hashes, word_hashes
from hfllm.data.sources import load_source
from hfllm.errors import InputError

SHORTEST = 8


class DecontaminationFilter(BaseFilter):
    """Drops documents that share an n-gram with one of `texts`.

    Holds 8 bytes for each n-gram of the evaluation texts: GSM8K's training set takes 9 MB.

    Args:
        texts: of the evaluation sets.
        n: words in a row.
    """

    name = "decontamination"

    def __init__(self, texts: Iterable[str], n: int = 13, exclusion_writer=None):
        super().__init__(exclusion_writer)
        grams: dict[int, list[np.ndarray]] = {}
        for text in texts:
            hashes = word_hashes(text)
            size = min(n, len(hashes))
            if size >= min(n, SHORTEST):
                grams.setdefault(size, []).append(ngram_hashes(hashes, size))
        self.grams = {size: np.unique(np.concatenate(parts)) for size, parts in sorted(grams.items())}

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        hashes = word_hashes(doc.text)
        for size, known in self.grams.items():
            if _any_in(ngram_hashes(hashes, size), known):
                return False, "contaminated"
        return True


def _any_in(values: np.ndarray, known: np.ndarray) -> bool:
    """Whether any of `values` is in the sorted array `known`."""
    places = np.searchsorted(known, values)
    places[places == len(known)] = 0
    return bool((known[places] == values).any())


def evaluation_texts(names: Sequence[str]) -> list[str]:
    """The texts of evaluation sets: for each row its strings, one by one and joined in the order of the columns.

    Joined, a question and its answer are found also where the run of words crosses from one to the other.

    Args:
        names: files (jsonl, json, csv, tsv, parquet, txt, or jsonl.gz), folders or Hub ids.

    Raises:
        InputError: when one cannot be read, or holds no text of 8 words or more.
    """
    texts: list[str] = []
    for name in names:
        found: list[str] = []
        for row in load_source(name).rows:
            strings = list(_strings(row))
            found += [*strings, " ".join(strings)]
        if not any(len(word_hashes(text)) >= SHORTEST for text in found):
            raise InputError(f"--decontaminate {name}: holds no text of {SHORTEST} words or more")
        texts += found
    return texts


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)
