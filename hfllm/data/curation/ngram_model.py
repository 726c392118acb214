"""A byte n-gram model in a few numpy tables: a small, fast measure of how ordinary a text is, for any language."""

from collections.abc import Iterable

import numpy as np

from hfllm.data.curation.text import mix

ORDER = 5
TABLE_BITS = 20
LONGEST = 20_000  # bytes of a document to score; more would hardly change the mean


class ByteNgramModel:
    """Byte 1- to 5-grams with interpolated Witten-Bell smoothing (Witten and Bell 1991).

    An n-gram's count is stored by hash in a table of 2**20 entries. Distinct n-grams may share one, so the values are
    scores rather than exact probabilities, and training takes seconds for a few megabytes. 12 MB per order.

    Args:
        texts: to count, held in memory while counting.
    """

    def __init__(self, texts: Iterable[str] = ()):
        data = np.frombuffer(b"\0".join(text.encode()[:LONGEST] for text in texts), np.uint8)
        codes = _codes(data)
        self.counts: list[np.ndarray] = []  # of n-grams of each order
        self.contexts: list[np.ndarray] = []  # of each context: how often it occurs, and in how many n-grams
        for order in range(1, ORDER + 1):
            grams, before = codes[order], _places(codes[order - 1][: len(codes[order])])
            _, first = np.unique(grams, return_index=True)
            totals, kinds = (np.bincount(places, minlength=1 << TABLE_BITS) for places in (before, before[first]))
            self.counts.append(np.bincount(_places(grams), minlength=1 << TABLE_BITS).astype(np.float32))
            self.contexts.append(np.stack([totals, kinds], axis=1).astype(np.float32))

    def bits_per_byte(self, text: str) -> float:
        """Return the mean bits per byte of a text; 2 to this power is the perplexity per byte."""
        data = np.frombuffer(text.encode()[:LONGEST], np.uint8)
        if not len(data):
            return 0.0
        chances, codes = np.full(len(data), 1 / 256), _codes(data)
        before = _places(codes[0])
        for order in range(1, ORDER + 1):
            places = _places(codes[order])
            total, kinds = self.contexts[order - 1][before[: len(places)]].T
            # An order's n-grams begin after its own length; before that, the lower order's probabilities are kept.
            tail = chances[len(chances) - len(places) :]
            mixed = (self.counts[order - 1][places] + kinds * tail) / np.maximum(total + kinds, 1)
            np.copyto(tail, mixed, where=total > 0)
            before = places
        return float(-np.log2(np.maximum(chances, 1e-12)).mean())


def _codes(data: np.ndarray) -> list[np.ndarray]:
    """Return the n-grams of orders 0 to `ORDER` as numbers; those of order n have shape (bytes - n + 1,), uint64."""
    codes = [np.zeros(len(data) + 1, np.uint64)]
    for order in range(1, ORDER + 1):
        count = max(0, len(data) - order + 1)
        codes.append((codes[-1][:count] << np.uint64(8)) | data[order - 1 : order - 1 + count])
    # Orders do not share entries: a byte with the order's number is put in front.
    return [code | np.uint64((order + 1) << 48) for order, code in enumerate(codes)]


def _places(codes: np.ndarray) -> np.ndarray:
    return (mix(codes * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - TABLE_BITS)).astype(np.int64)
