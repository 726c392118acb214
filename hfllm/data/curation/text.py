"""Words of a text and hashes of their n-grams: shared by several filters for the same document."""

import re
from functools import lru_cache
from hashlib import blake2b

import numpy as np

# Scripts without spaces, where each character counts as a word: kana, Han, Thai, Lao, Burmese, Khmer.
UNSPACED = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
WORD = re.compile(rf"\d+(?:[.,]\d+)+|[{UNSPACED}]|[^\W{UNSPACED}]+(?:['’][^\W{UNSPACED}]+)*")
_UNSAID = str.maketrans("", "", ".,'’")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio
_MIXER = np.uint64(0xFF51AFD7ED558CCD)  # of MurmurHash3's finalizer (Austin Appleby, public domain)


# Filters run one after the other on one document, so a cache of two entries saves the work for all but one.
@lru_cache(maxsize=2)
def words_of(text: str) -> tuple[str, ...]:
    """Return the words of `text`: runs of letters and digits, with apostrophes and number marks in them."""
    return tuple(WORD.findall(text))


@lru_cache(maxsize=2)
def word_hashes(text: str) -> np.ndarray:
    """Return 64-bit hashes of the words, without case, so that `1,000` is `1000` and `don't` is `dont`.

    uint64 of shape (words,). They are the same on every machine.
    """
    words = words_of(text.lower())
    return np.fromiter(map(_hash_word, words), np.uint64, len(words))


@lru_cache(maxsize=1 << 16)
def _hash_word(word: str) -> int:
    return int.from_bytes(blake2b(word.translate(_UNSAID).encode(), digest_size=8).digest(), "little")


def hash_text(text: str, seed: int = 0) -> int:
    """Return a 64-bit hash of a whole text."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8, salt=seed.to_bytes(8, "little")).digest(), "little")


def hash_words(hashes: np.ndarray) -> np.ndarray:
    """Return one hash of all words in their order. (words,) -> (1,), or (0,) for no words."""
    return np.frombuffer(blake2b(hashes.tobytes(), digest_size=8).digest(), "<u8")[: len(hashes)]


def ngram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """Return hashes of all runs of `n` words. (words,) -> (max(0, words - n + 1),), uint64."""
    count = max(0, len(hashes) - n + 1)
    combined = np.zeros(count, np.uint64)
    for offset in range(n):
        combined = combined * _MULTIPLIER + hashes[offset : offset + count]
    return mix(combined)


def mix(values: np.ndarray) -> np.ndarray:
    """Mix the bits of uint64 values, so that all bits are equally random."""
    values = (values ^ (values >> np.uint64(33))) * _MIXER
    return values ^ (values >> np.uint64(33))
