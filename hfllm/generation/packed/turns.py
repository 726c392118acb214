"""Ragged caches over the turns of texts: the next turn reads only the tokens that nobody has read before.

Shapes: B rows of a turn, S tokens of the longest text, C columns of a cache, F numbers of a token's keys and values.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from hfllm.generation.packed.decoding import Continuations
from hfllm.generation.packed.model import RaggedCache


class Layer(NamedTuple):
    """One layer's memory: its states (B, C, F), and the number and size of the heads of keys and of values."""

    states: torch.Tensor
    sizes: tuple[tuple[int, int], tuple[int, int]]


class Read(NamedTuple):
    """A text whose keys and values are known.

    Args:
        tokens: the text, up to the last token that the model is sure to have read.
        part: the number of its cache among the kept ones.
        row: its row there.
    """

    tokens: list[int]
    part: int
    row: int


class Turns:
    """The keys and values of texts after a turn of each, for the next turn of some of them.

    The memory of a cache is kept as it is when rows leave it; only what the next turn needs is copied.
    """

    def __init__(self) -> None:
        self._read: dict[int, Read] = {}
        self._parts: list[list[Layer]] = []
        self._origins: list[Read | None] = []
        self._left: dict[int, tuple[int, int]] = {}
        self.texts: list[int] = []

    def begin(self, texts: Sequence[int]) -> None:
        """Let the next prompts be continuations of the texts with these numbers."""
        self.texts = list(texts)

    def known(self, prompts: torch.Tensor, sizes: Sequence[int]) -> list[int] | None:
        """Return how many first tokens of each prompt are known, at most all but the last; `None` without any.

        Args:
            prompts: (B, S), padded on the right.
            sizes: tokens of each prompt.
        """
        self._origins = [self._read.get(text) for text in self.texts]
        rows = zip(prompts.tolist(), sizes, self._origins, strict=True)
        counts = [0 if origin is None else shared(origin.tokens, row[:size]) for row, size, origin in rows]
        return counts if any(counts) else None

    def fill(self, cache: RaggedCache, width: int) -> None:
        """Put the first `width` columns of the prompts' keys and values into a new cache, and forget all others."""
        for index, layer in enumerate(cache.layers if width else ()):
            parts = [part[index] for part in self._parts]
            layer.allocate(parts[0].states, len(self._origins), *parts[0].sizes)
            for number, part in enumerate(parts):
                own = [(row, each.row) for row, each in enumerate(self._origins) if each and each.part == number]
                rows, sources = ([pair[side] for pair in own] for side in (0, 1))
                columns = min(width, part.states.shape[1])
                layer.states[rows, :columns] = part.states[sources, :columns]
        self._read, self._parts, self._origins, self._left = {}, [], [], {}

    def leave(self, rows: torch.Tensor, cache: RaggedCache) -> None:
        """Note where a cache has these prompts, some of which leave it now, and its memory."""
        for at, row in enumerate(rows.tolist()):
            self._left[row] = len(self._parts), at
        # The memory itself, since a cache takes new memory when it drops rows.
        self._parts.append([Layer(layer.states, layer.sizes) for layer in cache.layers])

    def end(self, prompts: torch.Tensor, sizes: Sequence[int], new: Continuations) -> None:
        """Note which tokens of each text have been read, once all prompts are done."""
        rows = zip(prompts.tolist(), sizes, new.tokens.tolist(), new.lengths.tolist(), strict=True)
        for row, (prompt, size, tokens, length) in enumerate(rows):
            # The last token was drawn, and perhaps not read.
            self._read[self.texts[row]] = Read([*prompt[:size], *tokens[: length - 1]], *self._left[row])


def shared(known: Sequence[int], tokens: Sequence[int]) -> int:
    """Return the number of known tokens of a text, at most all but its last, which has to be read."""
    most = min(len(known), len(tokens) - 1)
    if known[:most] == tokens[:most]:
        return most
    return next(at for at in range(most) if known[at] != tokens[at])
