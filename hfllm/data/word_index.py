"""Rank texts by the words that they share with a query (BM25). Every search by words of the package is done here."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING
from unicodedata import normalize

from hfllm import durable
from hfllm.errors import InputError, first_line, refuse_if

if TYPE_CHECKING:
    import bm25s
    import numpy as np
    from numpy.typing import NDArray

FILE = "words.safetensors"
FORMAT = "hfllm words 1"
# Arrays of a stored index, and their types.
ARRAYS = {
    "words": ("uint8",),
    "texts_of_word": ("int32", "int64"),
    "places": ("int32",),
    "counts": ("uint8", "uint16", "uint32", "int32"),
    "lengths": ("int32",),
}
K1, B = 1.5, 0.75
# Words counted at a time: about 150 MB of memory.
BLOCK = 1 << 22
_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """Return the words of a text: runs of letters, digits and underscores, without letter case.

    A letter with an accent is one whether a text has it as one character or as two.
    """
    folded = text.casefold()
    return _WORD.findall(folded if folded.isascii() else normalize("NFC", folded))


def import_bm25s(needed_by: str, extra: str = "grounding") -> ModuleType:
    """Return the module bm25s.

    Raises:
        InputError: when it is not installed, with the extra of this package for it.
    """
    try:
        import bm25s
    except ImportError:
        raise InputError(f"{needed_by} needs bm25s: pip install 'hfllm[{extra}]'") from None
    return bm25s


def best_indices(scores: "NDArray[np.floating]", top_k: int, above: float = -math.inf) -> "NDArray[np.intp]":
    """Return the indices of the `top_k` largest scores, the largest first; of equal ones the earlier comes first.

    Args:
        scores: the scores (texts).
        top_k: the most indices.
        above: leave out scores that are not larger.
    """
    import numpy as np

    least, rows = above, min(32, len(scores) // (4 * top_k))
    if rows > 1:
        # Groups of which so many have a score of at least this one: all of the best have it too, and few others.
        largest = scores[: len(scores) // rows * rows].reshape(rows, -1).max(0)
        least = np.partition(largest, -top_k)[-top_k]
    indices = np.flatnonzero(scores >= least if least > above else scores > above)
    return indices[np.argsort(-scores[indices], kind="stable")][:top_k]


def read_arrays(
    file: Path, names: Iterable[str], contents: str
) -> "tuple[dict[str, str], dict[str, NDArray[np.generic]]]":
    """Return the metadata and the named arrays of a safetensors file.

    Args:
        file: the file.
        names: of the arrays.
        contents: what it should be, in words.

    Raises:
        InputError: when it is damaged or lacks an array.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import safe_open

    try:
        with safe_open(file, "numpy") as stored:
            return stored.metadata() or {}, {name: stored.get_tensor(name) for name in names}
    # Of the last two for types missing in numpy.
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: no {contents}, or damaged: {first_line(error, 80)}") from None


class _Numbers(dict[str, int]):
    """Numbers of words; a new word gets the next one."""

    def __missing__(self, word: str) -> int:
        self[word] = number = len(self)
        return number


@dataclass(frozen=True)
class _Postings:
    """The texts with each word, and its counts: the first word's texts, then the second's, and so on.

    Args:
        texts_of_word: the number of texts with each word (words).
        indices: their indices, in order (postings).
        counts: the word's count in each (postings).
    """

    texts_of_word: "NDArray[np.integer]"
    indices: "NDArray[np.int32]"
    counts: "NDArray[np.integer]"


class WordIndex:
    """An index of texts by their words, which grows by `add` and answers by `search`.

    A text d scores sum over the words w of a query, each as often as it is there, of
    ln(1 + (N - n_w + 1/2) / (n_w + 1/2)) f / (f + k1 (1 - b + b |d| / mean)): of N texts, n_w have the word; it is f
    times among the |d| words of this one, and the mean text has `mean` words (Robertson and Zaragoza 2009, in the
    variant of Lucene; k1 = 1.5, b = 0.75). bm25s adds the scores up.

    Texts may be a stream: they are counted block by block and not kept. A finished index takes 9 to 10 bytes for each
    different word of each text.

    Raises:
        InputError: when bm25s is not installed.
    """

    def __init__(self) -> None:
        self._module = import_bm25s("an index of words")
        self._numbers = _Numbers()
        self._lengths: list[NDArray[np.int32]] = []
        self._open: list[NDArray[np.int32]] = []
        self._open_words, self._size = 0, 0
        self._blocks: list[_Postings] = []
        self._scored: bm25s.BM25 | None = None

    def __len__(self) -> int:
        """How many texts it holds."""
        return self._size

    @property
    def num_words(self) -> int:
        """How many different words they have."""
        return len(self._numbers)

    def add(self, texts: Iterable[str]) -> None:
        """Add texts; their indices follow those of the present texts. Rarities are counted again by `finish`."""
        import numpy as np

        for text in texts:
            words = words_of(text)
            self._open.append(np.fromiter(map(self._numbers.__getitem__, words), np.int32, len(words)))
            self._open_words += len(words)
            self._size += 1
            self._scored = None
            if self._open_words >= BLOCK:
                self._close_block()

    def search(self, query: str, top_k: int) -> list[tuple[int, float]]:
        """Return index and score of the `top_k` best texts, the best first; texts without a word of it are left out.

        Of equal scores the earlier text comes first.
        """
        numbers = [number for number in map(self._numbers.get, words_of(query)) if number is not None]
        if not numbers:
            return []
        scores = self.finish().get_scores_from_ids(numbers)
        indices = best_indices(scores, top_k, above=0.0)
        return list(zip(indices.tolist(), scores[indices].tolist(), strict=True))

    def save(self, file: Path, passages: str) -> None:
        """Write the index as safetensors.

        Args:
            file: where to.
            passages: a digest of the texts, which `load` compares.
        """
        import numpy as np
        from safetensors.numpy import save_file

        postings = self._postings()
        # No word has a line break.
        words = np.frombuffer("\n".join(self._numbers).encode(), np.uint8)
        lengths = np.concatenate(self._lengths)
        values = (words, postings.texts_of_word, postings.indices, postings.counts, lengths)
        with durable.written_whole(file) as unfinished:
            save_file(dict(zip(ARRAYS, values, strict=True)), unfinished, {"format": FORMAT, "passages": passages})

    @classmethod
    def load(cls, file: Path, passages: str) -> "WordIndex":
        """Read the file written by `save`.

        Raises:
            InputError: when the file is missing, damaged, or of texts with another digest than `passages`.
        """
        refuse_if(not file.is_file(), f"{file}: no such index of words")
        metadata, arrays = read_arrays(file, ARRAYS, "index of words")
        refuse_if(metadata.get("format") != FORMAT, f"{file}: format {metadata.get('format')!r}; expected {FORMAT!r}")
        if metadata.get("passages") != passages:
            raise InputError(f"{file}: an index of other passages than those given: make it anew")
        index = cls()
        if (flaw := index._fill(arrays)) is not None:
            raise InputError(f"{file}: damaged: {flaw}")
        return index

    def _fill(self, arrays: "dict[str, NDArray[np.integer]]") -> str | None:
        """Take over stored arrays, or return the fault in them."""
        import numpy as np

        if any(array.ndim != 1 or array.dtype.name not in ARRAYS[name] for name, array in arrays.items()):
            return "its arrays are not lists of whole numbers of the types that save writes"
        words, texts_of_word, indices, counts, lengths = (arrays[name] for name in ARRAYS)
        try:
            self._numbers |= {word: index for index, word in enumerate(words.tobytes().decode().split("\n"))}
        except UnicodeDecodeError:
            return "its words are not UTF-8"
        is_whole = len(self._numbers) == len(texts_of_word) and texts_of_word.sum() == len(indices) > 0
        if not is_whole or texts_of_word.min() < 0:
            return f"{len(indices)} postings of {len(self._numbers)} words, and other numbers of texts"
        if len(indices) != len(counts) or indices.min(initial=0) < 0 or indices.max(initial=0) >= len(lengths):
            return f"its postings are not of {len(lengths)} texts"
        # Each word of each text is in a posting.
        if counts.min() < 1 or not np.array_equal(np.bincount(indices, counts, len(lengths)), lengths):
            return "its counts are not those of its texts"
        self._lengths, self._size = [lengths], len(lengths)
        self._blocks = [_Postings(texts_of_word, indices, counts)]
        return None

    def _close_block(self) -> None:
        """Count the words of the texts added last."""
        import numpy as np

        if not self._open:
            return
        lengths = np.fromiter(map(len, self._open), np.int32, len(self._open))
        first = self._size - len(lengths)
        # Word and text in one number, so that equal pairs are together once sorted.
        keys = np.concatenate(self._open).astype(np.int64) << 32
        keys |= np.repeat(np.arange(first, self._size), lengths)
        self._open, self._open_words = [], 0
        keys, counts = np.unique(keys, return_counts=True)
        texts_of_word = np.bincount(keys >> 32, minlength=len(self._numbers)).astype(np.int32)
        smallest = np.min_scalar_type(int(counts.max(initial=0)))
        self._blocks.append(_Postings(texts_of_word, (keys & 0xFFFFFFFF).astype(np.int32), counts.astype(smallest)))
        self._lengths.append(lengths)

    def _postings(self) -> _Postings:
        """Return the postings of all texts, joined."""
        import numpy as np

        self._close_block()
        if len(self._blocks) == 1 or not self._blocks:
            return self._blocks[0] if self._blocks else _Postings(*(np.zeros(0, np.int32) for _ in range(3)))
        texts_of_word = np.zeros(len(self._numbers), np.int64)
        for block in self._blocks:
            texts_of_word[: len(block.texts_of_word)] += block.texts_of_word
        indices = np.empty(texts_of_word.sum(), np.int32)
        counts = np.empty(len(indices), np.result_type(*(block.counts.dtype for block in self._blocks)))
        # Where the next posting of each word goes; blocks come in the order of their texts.
        heads = np.cumsum(texts_of_word) - texts_of_word
        while self._blocks:
            block = self._blocks.pop(0)
            num_block_words = len(block.texts_of_word)
            ends = np.cumsum(block.texts_of_word)
            targets = np.repeat(heads[:num_block_words] - ends + block.texts_of_word, block.texts_of_word)
            targets += np.arange(len(block.indices))
            indices[targets], counts[targets] = block.indices, block.counts
            heads[:num_block_words] += block.texts_of_word
        self._blocks = [_Postings(texts_of_word, indices, counts)]
        return self._blocks[0]

    def finish(self) -> "bm25s.BM25":
        """Return the index of bm25s: the part of each word in the score of each text. Then any thread may search.

        Without it the first search after `add` does this.
        """
        import numpy as np

        if self._scored is None:
            postings, lengths = self._postings(), np.concatenate(self._lengths)
            having = postings.texts_of_word
            rarity = np.log1p((self._size - having + 0.5) / (having + 0.5)).astype(np.float32)
            saturation = (K1 * (1 - B + B * lengths / lengths.mean())).astype(np.float32)
            scores = np.repeat(rarity, having)
            for start in range(0, len(scores), BLOCK):
                part = slice(start, start + BLOCK)
                counts = postings.counts[part].astype(np.float32)
                scores[part] *= counts / (counts + saturation[postings.indices[part]])
            self._scored = self._module.BM25(k1=K1, b=B, method="lucene", backend="numpy")
            starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(having)])
            self._scored.nonoccurrence_array = None
            self._scored.scores = {
                **{"data": scores, "indices": postings.indices, "indptr": starts},
                "num_docs": self._size,
            }
        return self._scored
