"""Cut documents into passages of a number of tokens that overlap, between words where that can be."""

import hashlib
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from numbers import Integral
from typing import TYPE_CHECKING

from hfllm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a passage may end with: a word with the space before it. What is longer than any word may be cut.
_PIECE = re.compile(r"\s*\S{1,64}")
# Characters of a document that are looked at together, and lengths of words that are remembered: limits of the memory.
SEGMENT, MOST_KNOWN = 1 << 20, 1 << 20


@dataclass(frozen=True)
class Cut:
    """How documents were cut.

    Args:
        max_tokens: the most tokens of a passage.
        overlap: the most tokens at its beginning that the passage before it has too.
        tokenizer: the name of the tokenizer, empty where words were counted.
        digest: of the tokenizer's vocabulary.
        vocab_size: how many tokens that has.
    """

    max_tokens: int
    overlap: int
    tokenizer: str = field(default="", compare=False)
    digest: str = ""
    vocab_size: int = field(default=0, compare=False)

    def __str__(self) -> str:
        name = f"tokens of {self.tokenizer or 'a tokenizer'} ({self.vocab_size:,} tokens)" if self.digest else "words"
        return f"{self.max_tokens} {name}, {self.overlap} of them overlapping"

    def as_json(self) -> str:
        """Return it as JSON text."""
        return json.dumps(asdict(self))


def vocabulary_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a digest of a tokenizer's vocabulary, without tokens that were added to it."""
    added = tokenizer.get_added_vocab()
    pairs = sorted((number, token) for token, number in tokenizer.get_vocab().items() if token not in added)
    return hashlib.blake2b(json.dumps(pairs).encode(), digest_size=16).hexdigest()


class Chunker:
    """Cuts documents.

    Tokens are counted word by word, each with a space before it, as a passage stands in a prompt. That is exact where
    no token spans two words, which is so for nearly all tokenizers, and several times faster than tokenizing all text.

    Args:
        tokenizer: counts tokens; without one, words are counted.
        max_tokens: the most tokens of a passage; at least 1.
        overlap: the most tokens at its beginning that the passage before it has too; less than `max_tokens`.

    Raises:
        InputError: for other numbers.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase | None" = None, max_tokens: int = 200, overlap: int = 20):
        for name, number in (("max_tokens", max_tokens), ("overlap", overlap)):
            if not isinstance(number, Integral):
                raise InputError(f"{name}={number!r:.40}: expected a whole number")
        if max_tokens < 1:
            raise InputError(f"max_tokens={max_tokens}: a passage has at least 1 token")
        if not 0 <= overlap < max_tokens:
            raise InputError(f"overlap={overlap}: expected 0 to {max_tokens - 1}, less than max_tokens={max_tokens}")
        self.tokenizer, self.max_tokens, self.overlap = tokenizer, max_tokens, overlap
        self._known: dict[str, int] = {}
        self._before = 0 if tokenizer is None else len(tokenizer("a", add_special_tokens=False)["input_ids"])

    @property
    def cut(self) -> Cut:
        """How it cuts."""
        if self.tokenizer is None:
            return Cut(self.max_tokens, self.overlap)
        name, digest = str(self.tokenizer.name_or_path), vocabulary_digest(self.tokenizer)
        return Cut(self.max_tokens, self.overlap, name, digest, len(self.tokenizer))

    def chunks(self, text: str) -> Iterator[tuple[int, str]]:
        """Yield the passages of a document, each with the place of its first character; none of a blank one.

        They are parts of the document as they are, without the space around them. Each ends after the last one.
        """
        start, length = 0, SEGMENT
        while start < len(text):
            segment = text[start : start + length]
            spans = self._spans(segment)
            is_last = start + length >= len(text)
            # What follows may belong to the last passage of a segment, and moves its beginning: both are done again.
            for first, end in spans if is_last else spans[:-2]:
                passage = segment[first:end].lstrip()
                yield start + end - len(passage), passage
            if is_last:
                return
            if len(spans) < 3:
                length *= 2
            else:
                start, length = start + spans[-2][0], SEGMENT

    def _spans(self, text: str) -> list[tuple[int, int]]:
        """Return beginnings and ends of the passages of a text, in characters."""
        # Spaces at the end are no piece, and looked for from each of them they would take the square of their number.
        pieces = _PIECE.findall(text.rstrip())
        if not pieces:
            return []
        sizes = self._sizes(pieces)
        if max(sizes) > self.max_tokens:
            pieces = [part for piece, size in zip(pieces, sizes, strict=True) for part in self._broken(piece, size)]
            sizes = self._sizes(pieces)
        ends, totals = [0, *accumulate(map(len, pieces))], [0, *accumulate(sizes)]
        spans, first = [], 0
        while True:
            last = max(bisect_right(totals, totals[first] + self.max_tokens) - 1, first + 1)
            spans.append((ends[first], ends[last]))
            if last >= len(pieces):
                return spans
            # The next passage has room for at least one more piece.
            begins = bisect_left(totals, max(totals[last] - self.overlap, totals[last + 1] - self.max_tokens, 0))
            first = min(max(begins, first + 1), last)

    def _sizes(self, pieces: list[str]) -> list[int]:
        """Return how many tokens each piece has."""
        if self.tokenizer is None:
            return [1] * len(pieces)
        sizes = list(map(self._known.get, pieces))
        if None in sizes:
            new = list({piece for piece, size in zip(pieces, sizes, strict=True) if size is None})
            # After another word, since some tokenizers begin every text with a space of their own.
            tokens = self.tokenizer([f"a {piece.lstrip()}" for piece in new], add_special_tokens=False)["input_ids"]
            if len(self._known) > MOST_KNOWN:
                self._known = {}
            known = dict(zip(new, (len(each) - self._before for each in tokens), strict=True))
            sizes = [known[piece] if size is None else size for piece, size in zip(pieces, sizes, strict=True)]
            self._known |= known
        return sizes

    def _broken(self, piece: str, size: int) -> list[str]:
        """Return a piece as parts of at most `max_tokens`, or single characters."""
        if size <= self.max_tokens or len(piece.lstrip()) < 2:
            return [piece]
        middle = len(piece) - len(piece.lstrip()) + len(piece.lstrip()) // 2
        parts = [piece[:middle], piece[middle:]]
        return [
            each for part, size in zip(parts, self._sizes(parts), strict=True) for each in self._broken(part, size)
        ]
