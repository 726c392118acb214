"""What a language model has to beat on held-out text, in bits per byte: gzip, and a byte n-gram model.

Bits per byte compare models whatever their tokenizers are. All of them here say what a text's bytes cost, coded as
UTF-8, lower is better; texts without any bytes are refused (`ValueError`).
"""

import math
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

# The symbol after a text's last byte. It is also what stands before its first one.
END = 256
SYMBOLS = 257
BITS = 9
# As many symbols as an int64 holds.
MAX_ORDER = 63 // BITS
CHUNK = 1 << 19
SMALLEST_DISCOUNT = 0.1


def bits_per_byte(nats_per_token: float, num_tokens: int, num_bytes: int) -> float:
    """A mean loss over tokens as bits per byte.

    Args:
        nats_per_token: the mean cross-entropy, as trainers report it.
        num_tokens: how many tokens that is the mean of: those that were predicted.
        num_bytes: of the same text, as UTF-8.
    """
    _check_bytes(num_bytes)
    return nats_per_token * num_tokens / math.log(2) / num_bytes


def gzip_bits_per_byte(texts: Iterable[str]) -> float:
    """What the texts take compressed as one gzip file at its best level, one text after the other."""
    packer, packed, num_bytes = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS), 0, 0
    for text in map(_encode, texts):
        packed += len(packer.compress(text))
        num_bytes += len(text)
    _check_bytes(num_bytes)
    return 8 * (packed + len(packer.flush())) / num_bytes


def ngram_bits_per_byte(train_texts: Iterable[str], test_texts: Iterable[str], order: int = 5) -> float:
    """What the held-out texts cost under an `NgramModel` of the training texts, their ends left out."""
    return NgramModel(train_texts, order).bits_per_byte(test_texts, with_ends=False)


class NgramModel:
    """An n-gram model of bytes with interpolated, modified Kneser-Ney smoothing (Chen and Goodman 1999, section 3).

    The highest order counts what was seen; each lower one counts after how many different symbols it was seen, down to
    single symbols, which are interpolated with the uniform distribution. Each order has three discounts, from how many
    of its n-grams have counts of 1 to 4 (their equation 17). A text is followed by an end symbol and preceded by as
    many of them as the order looks back.

    Every order is a sorted array of n-grams, packed 9 bits a symbol into int64, so that training is sorting and a
    look-up is a binary search.

    Args:
        texts: the training texts; each of their bytes takes about 25 of memory at the peak (English, order 5).
        order: symbols of an n-gram, the predicted one among them, from 1 to 7.

    Raises:
        ValueError: when `order` is outside that range, or the texts are empty.
    """

    def __init__(self, texts: Iterable[str], order: int = 5):
        if not 1 <= order <= MAX_ORDER:
            raise ValueError(f"order={order}; expected 1 to {MAX_ORDER}")
        self.order = order
        encoded = [_encode(text) for text in texts]
        _check_bytes(sum(map(len, encoded)))
        grams, counts = np.unique(_windows(encoded, order), return_counts=True)
        tables = [_Order(grams, counts)]
        for length in range(order - 1, 0, -1):
            # Every n-gram has a symbol before it, if only an end: the distinct longer ones hold all shorter ones.
            grams, counts = np.unique(grams & _mask(length), return_counts=True)
            tables.append(_Order(grams, counts))
        self.tables = tables[::-1]

    def probabilities(self, context: bytes) -> np.ndarray:
        """The distribution of the symbol after `context`, the start of a text: (257,), the 256 bytes and the end."""
        window = ([END] * (self.order - 1) + list(context))[len(context) :]
        packed = sum(symbol << BITS * place for place, symbol in enumerate(reversed(window), start=1))
        return self._probabilities(np.int64(packed) + np.arange(SYMBOLS, dtype=np.int64))

    def bits_per_byte(self, texts: Iterable[str], with_ends: bool = True) -> float:
        """What the texts cost under the model, per byte of them; the end of each too, or not."""
        encoded = [_encode(text) for text in texts]
        num_bytes = sum(map(len, encoded))
        _check_bytes(num_bytes)
        windows = _windows(encoded, self.order)
        if not with_ends:
            windows = windows[(windows & _mask(1)) != END]
        parts = (windows[at : at + CHUNK] for at in range(0, len(windows), CHUNK))
        return -float(sum(np.log2(self._probabilities(part)).sum() for part in parts)) / num_bytes

    def _probabilities(self, windows: np.ndarray) -> np.ndarray:
        """The probability of the last symbol of each packed window given those before it: (N,) to (N,)."""
        probabilities = np.full(len(windows), 1 / SYMBOLS)
        for length, table in enumerate(self.tables, start=1):
            probabilities = table.interpolate(windows & _mask(length), probabilities)
        return probabilities


class _Order:
    """The n-grams of one length: what they are worth, and what each context leaves to the shorter ones.

    Args:
        grams: (N,) packed, sorted and distinct.
        counts: (N,) positive.
    """

    def __init__(self, grams: np.ndarray, counts: np.ndarray):
        contexts = grams >> BITS
        starts = np.flatnonzero(np.diff(contexts, prepend=-1))
        discounts = _discounts(counts)[np.minimum(counts, 3)]
        totals = np.add.reduceat(counts, starts)
        owners = np.repeat(totals, np.diff(starts, append=len(grams)))
        self.grams, self.contexts = grams, contexts[starts]
        self.shares = (counts - discounts) / owners
        self.left_over = np.add.reduceat(discounts, starts) / totals

    def interpolate(self, windows: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        """This order's probabilities from those of the next shorter one, (N,); an unseen context leaves them as is."""
        left_over = _look_up(self.contexts, self.left_over, windows >> BITS, missing=1.0)
        return _look_up(self.grams, self.shares, windows, missing=0.0) + left_over * shorter


def _discounts(counts: np.ndarray) -> np.ndarray:
    """What is taken from a count of 0, 1, 2 and of 3 or more: (4,)."""
    seen = [int((counts == count).sum()) for count in range(1, 5)]
    # A text too small or too regular to have any n-gram once tells nothing: half a count is what is usual.
    base = seen[0] / (seen[0] + 2 * seen[1]) if seen[0] else 0.5
    discounts = [0.0]
    for count in (1, 2, 3):
        ratio = seen[count] / seen[count - 1] if seen[count - 1] else 0.0
        # Text that holds its documents several times breaks the estimate. Something must be left to unseen symbols,
        # and no more taken than was counted.
        discounts.append(min(max(count - (count + 1) * base * ratio, SMALLEST_DISCOUNT), float(count)))
    return np.array(discounts)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, missing: float) -> np.ndarray:
    """The values at the wanted keys, `missing` where there is no such key; `keys` are sorted."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], missing)


def _windows(texts: Sequence[bytes], order: int) -> np.ndarray:
    """Each symbol of the texts and each end, packed with the `order - 1` symbols before it: (bytes + texts,)."""
    # So many ends before each text that no window reaches into the one before it.
    pad = np.full(order - 1, END, dtype=np.int16)
    end = np.array([END], dtype=np.int16)
    pieces, wanted = [], []
    for text in texts:
        pieces += [pad, np.frombuffer(text, dtype=np.uint8).astype(np.int16), end]
        wanted += [np.zeros(len(pad), dtype=bool), np.ones(len(text) + 1, dtype=bool)]
    symbols, wanted = np.concatenate(pieces), np.concatenate(wanted)
    windows = symbols.astype(np.int64)
    for place in range(1, order):
        windows[place:] |= symbols[:-place].astype(np.int64) << BITS * place
    return windows[wanted]


def _mask(length: int) -> np.int64:
    return np.int64((1 << BITS * length) - 1)


def _encode(text: str) -> bytes:
    # Lone surrogates, which only broken input has, cost their three bytes too.
    return text.encode("utf-8", "surrogatepass")


def _check_bytes(num_bytes: int) -> None:
    if num_bytes <= 0:
        raise ValueError("the texts are empty: bits per byte need at least one byte")
