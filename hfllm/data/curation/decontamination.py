"""Overlap with evaluation sets: a training document must not contain test data.

As GPT-3 did (Brown et al. 2020, arXiv:2005.14165, appendix C): a document is contaminated when it shares a run of 13
words with an evaluation text, without case and punctuation; `normalized` says what else is no difference. Evaluation
texts of 8 to 12 words count as one run of their own length; shorter ones are too common, and are left out.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

from hfllm.data.curation.text import ngram_hashes, word_hashes
from hfllm.data.sources import load_source
from hfllm.errors import InputError

SHORTEST = 8
_UNSEEN = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")
_CALCULATION = re.compile(r"<<[^<>\n]{0,200}>>")
_FINAL_ANSWER = re.compile(r"####\s{0,9}[-$\d.,]{1,30}[ \t]{0,9}(?=\n|$)")
_SPLIT_NUMBER = re.compile(r"(?<=\d) ?@([.,])@ ?(?=\d)")
_SPLIT_PARTS = (" '", " ’", " n'", " n’", " N'", " N’")
_SPLIT_WORD = re.compile(r"(?<=\w) ((?:n['’]t|['’](?:s|t|re|ve|ll|d|m))\b)", re.IGNORECASE)


def normalized(text: str) -> str:
    """Return a text without what copies of evaluation sets often lack, or have besides.

    Letters in Unicode's compatible form (NFKC, so that `ﬁ` is `fi`) and without case, no characters that cannot be
    seen, no calculator marks (`<<48/2=24>>`) and final answers (`#### 72`) of gsm8k, and what tokenizers split joined
    again: `Jason 's`, `do n't`, `1 @,@ 000`. Spaces and punctuation do not count anyway.
    """
    if not text.isascii():
        text = _UNSEEN.sub("", unicodedata.normalize("NFKC", text)).casefold()
    if "<<" in text:
        text = _CALCULATION.sub("", text)
    if "####" in text:
        text = _FINAL_ANSWER.sub("", text)
    if "@" in text:
        text = _SPLIT_NUMBER.sub(r"\1", text)
    return _SPLIT_WORD.sub(r"\1", text) if any(part in text for part in _SPLIT_PARTS) else text


class DecontaminationFilter(BaseFilter):
    """Drops documents that share an n-gram with one of `texts`.

    It takes 8 bytes per n-gram of the evaluation texts and 8 MB per length: gsm8k's training set takes 60 MB.

    Args:
        texts: texts of the evaluation sets.
        n: words per n-gram.
    """

    name = "decontamination"

    def __init__(self, texts: Iterable[str], n: int = 13, exclusion_writer=None):
        super().__init__(exclusion_writer)
        grams: dict[int, list[np.ndarray]] = {}
        for text in texts:
            hashes = word_hashes(normalized(text))
            size = min(n, len(hashes))
            if size >= min(n, SHORTEST):
                grams.setdefault(size, []).append(ngram_hashes(hashes, size))
        self.known = {size: _HashSet(np.concatenate(parts)) for size, parts in sorted(grams.items())}

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        hashes = word_hashes(normalized(doc.text))
        if any(known.has_any(ngram_hashes(hashes, size)) for size, known in self.known.items()):
            return False, "contaminated"
        return True


class _HashSet:
    """Set of uint64 values as a sorted array, with a table of their low bits that answers most look-ups at once."""

    MASK = np.uint64((1 << 23) - 1)

    def __init__(self, values: np.ndarray):
        self.values = np.unique(values)
        self.table = np.zeros(int(self.MASK) + 1, bool)
        self.table[self.values & self.MASK] = True

    def has_any(self, values: np.ndarray) -> bool:
        values = values[self.table[values & self.MASK]]
        places = np.searchsorted(self.values, values)
        places[places == len(self.values)] = 0
        return bool((self.values[places] == values).any())


def evaluation_texts(names: Sequence[str]) -> list[str]:
    """Return the texts of evaluation sets: the strings of each row, one by one and joined in column order.

    Joining finds also a run of words that crosses from a question to its answer.

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


def _strings(value: object) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)
