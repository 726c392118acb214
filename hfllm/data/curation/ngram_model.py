"""A byte n-gram model in a few numpy tables: a small, quick judge of how ordinary a text is, for any language."""

from collections.abc import Iterable

import numpy as np

from hfllm.data.curation.text import mix

ORDER = 5
TABLE_BITS = 20
LONGEST = 20_000  # bytes of a document that are scored; more would hardly change its mean


class ByteNgramModel:
    """Interpolated Witten-Bell smoothing (Witten and Bell 1991) over byte 1- to 5-grams.

    An n-gram's count stands at its hash in a table of 2**20 places. Distinct n-grams may share one, so the values are
    scores rather than exact probabilities, and training is a matter of seconds for a few megabytes. 12 MB an order.

    Args:
        texts: to count, held in memory while counting.
    """

    def __init__(self, texts: Iterable[str] = ()):
        data = np.frombuffer(b"\0".join(text.encode()[:LONGEST] for text in texts), np.uint8)
        self.tables: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for order in range(1, ORDER + 1):
            grams, contexts = _codes(data, order)
            places = _places(contexts)
            totals = np.bincount(places, minlength=1 << TABLE_BITS)
            _, first = np.unique(grams, return_index=True)
            kinds = np.bincount(places[first], minlength=1 << TABLE_BITS)
            counts = np.bincount(_places(grams), minlength=1 << TABLE_BITS)
            self.tables.append(tuple(table.astype(np.float32) for table in (counts, totals, kinds)))

    def bits_per_byte(self, text: str) -> float:
        """Mean surprise of a text's bytes, in bits; 2 to its power is the perplexity of a byte."""
        data = np.frombuffer(b"\0" + text.encode()[:LONGEST], np.uint8)
        if len(data) < 2:
            return 0.0
        chances = np.full(len(data) - 1, 1 / 256)
        for order, (counts, totals, kinds) in enumerate(self.tables, 1):
            grams, contexts = _codes(data, order)
            grams, contexts = (codes[1:] if order == 1 else codes for codes in (grams, contexts))
            total, kind = totals[_places(contexts)], kinds[_places(contexts)]
            # An order's n-grams end at bytes from its own length on; before, the lower order's chances stand.
            tail = chances[len(chances) - len(grams) :]
            known = total > 0
            mixed = (counts[_places(grams)] + kind * tail) / np.maximum(total + kind, 1)
            tail[known] = mixed[known]
        return float(-np.log2(np.maximum(chances, 1e-12)).mean())


def _codes(data: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Each n-gram and its context as a number; both of shape (bytes - order + 1,), uint64."""
    count = max(0, len(data) - order + 1)
    context = np.full(count, order, np.uint64)  # orders do not mix
    for offset in range(order - 1):
        context = (context << np.uint64(8)) | data[offset : offset + count]
    return (context << np.uint64(8)) | data[order - 1 : order - 1 + count], context


def _places(codes: np.ndarray) -> np.ndarray:
    return (mix(codes * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - TABLE_BITS)).astype(np.int64)
