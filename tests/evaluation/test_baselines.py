"""The n-gram model against a direct implementation of its formulas, and as a distribution; gzip against gzip."""

import gzip
import math
import random
from collections import Counter, defaultdict

import numpy as np
import pytest

from hfllm.evaluation.perplexity import (
    END,
    SYMBOLS,
    NgramModel,
    bits_per_byte,
    gzip_bits_per_byte,
    ngram_bits_per_byte,
)

TRAIN = ["the cat sat on the mat", "the dog sat on the log", "naïve cats and dogs", "", "a hat on a cat on a mat"]
TEST = ["the cat on the log", "zebras, naïvely"]


class SlowKneserNey:
    """Modified Kneser-Ney by the book, with dictionaries and a recursion (Chen and Goodman 1999, equations 16, 17)."""

    def __init__(self, texts, order):
        self.order = order
        grams = [Counter() for _ in range(order + 1)]
        left = defaultdict(set)
        for text in texts:
            symbols = [END] * (order - 1) + list(text.encode()) + [END]
            for at in range(order - 1, len(symbols)):
                for length in range(1, order + 1):
                    gram = tuple(symbols[at - length + 1 : at + 1])
                    grams[length][gram] += 1
                    if length < order:
                        left[gram].add(symbols[at - length])
        continued = [{gram: len(left[gram]) for gram in counter} for counter in grams[1:order]]
        self.counts = [None, *continued, grams[order]]
        self.discounts = [None] + [self.discounts_of(counts) for counts in self.counts[1:]]

    @staticmethod
    def discounts_of(counts):
        n1, n2, n3, n4 = (sum(count == c for count in counts.values()) for c in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2) if n1 else 0.5
        raw = {
            1: 1 - 2 * y * n2 / n1 if n1 else 1,
            2: 2 - 3 * y * n3 / n2 if n2 else 2,
            3: 3 - 4 * y * n4 / n3 if n3 else 3,
        }
        return {count: min(max(value, 0.1), count) for count, value in raw.items()}

    def probability(self, context, symbol):
        if context is None:
            return 1 / SYMBOLS
        length = len(context) + 1
        following = {gram[-1]: c for gram, c in self.counts[length].items() if gram[:-1] == context}
        shorter = self.probability(context[1:] if context else None, symbol)
        if not following:
            return shorter
        total, taken = sum(following.values()), self.discounts[length]
        left_over = sum(taken[min(count, 3)] for count in following.values()) / total
        own = following.get(symbol, 0)
        return (own - taken[min(own, 3)] if own else 0) / total + left_over * shorter


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_the_ngram_model_is_kneser_ney(order):
    slow, model = SlowKneserNey(TRAIN, order), NgramModel(TRAIN, order)
    bits, ends = 0.0, 0.0
    for text in TEST:
        symbols = [END] * (order - 1) + list(text.encode()) + [END]
        for at in range(order - 1, len(symbols)):
            surprise = -math.log2(slow.probability(tuple(symbols[at - order + 1 : at]), symbols[at]))
            bits += surprise
            ends += surprise if symbols[at] == END else 0.0
    size = sum(len(text.encode()) for text in TEST)
    assert model.bits_per_byte(TEST) == pytest.approx(bits / size, rel=1e-12)
    assert ngram_bits_per_byte(TRAIN, TEST, order) == pytest.approx((bits - ends) / size, rel=1e-12)


@pytest.mark.parametrize("order", [1, 4, 7])
def test_every_context_has_a_distribution(order):
    model = NgramModel(TRAIN, order)
    for context in (b"", b"t", b"the c", b"on a mat", b"\x00\xff", b"cat zz", "naï".encode()):
        probabilities = model.probabilities(context)
        assert probabilities.shape == (SYMBOLS,) and (probabilities > 0).all()
        assert probabilities.sum() == pytest.approx(1, abs=1e-12)


def test_documents_met_several_times_leave_something_to_the_unseen():
    model = NgramModel(["the cat"] * 3 + ["a dog"] * 4 + ["an owl"] * 4, 3)
    for context in (b"the c", b"a d", b"an"):
        probabilities = model.probabilities(context)
        assert (probabilities > 0).all() and probabilities.sum() == pytest.approx(1, abs=1e-12)


def test_the_bits_of_a_text_are_those_of_its_symbols_in_turn():
    model, text = NgramModel(TRAIN, 4), b"the hat"
    costs = [-np.log2(model.probabilities(text[:at])[symbol]) for at, symbol in enumerate([*text, END])]
    assert model.bits_per_byte([text.decode()]) == pytest.approx(sum(costs) / len(text), rel=1e-12)


def test_the_model_learns_structure_and_cannot_learn_noise():
    rng = random.Random(0)
    words = ["owl ", "river ", "stone ", "lantern "]
    train, test = ("".join(rng.choices(words, k=2000)) for _ in range(2))
    # Each word is two bits, and nothing inside it is left open.
    entropy = 2 * 2000 / len(test)
    assert entropy < ngram_bits_per_byte([train], [test]) < 1.1 * entropy
    noise, other = ("".join(rng.choices("01", k=20000)) for _ in range(2))
    assert 1 <= ngram_bits_per_byte([noise], [other]) < 1.02


def test_texts_do_not_reach_into_each_other():
    whole = ngram_bits_per_byte(TRAIN, TEST)
    assert ngram_bits_per_byte(TRAIN[::-1], TEST[::-1]) == pytest.approx(whole, rel=1e-12)


def test_gzip_is_what_gzip_takes():
    texts = ["The owl lives by the river. " * 20, "Ünïcode"]
    data = "".join(texts).encode()
    assert gzip_bits_per_byte(iter(texts)) == 8 * len(gzip.compress(data, 9)) / len(data)


def test_a_loss_in_bits_per_byte():
    # A uniform guess among 256 tokens of two bytes each is four bits per byte.
    assert bits_per_byte(math.log(256), num_tokens=50, num_bytes=100) == pytest.approx(4)


@pytest.mark.parametrize("order", [0, 8])
def test_orders_that_do_not_fit_are_refused(order):
    with pytest.raises(ValueError, match="expected 1 to 7"):
        NgramModel(TRAIN, order)


def test_nothing_to_measure_is_refused():
    for measure in (gzip_bits_per_byte, NgramModel, NgramModel(TRAIN).bits_per_byte):
        with pytest.raises(ValueError, match="at least one byte"):
            measure(["", ""])
    with pytest.raises(ValueError, match="at least one byte"):
        bits_per_byte(1.0, 1, 0)
