"""Batches of like length."""

import random

import pytest

from hfllm.data.padding import length_grouped


@pytest.mark.parametrize("as_text", [False, True])
def test_batches_hold_like_lengths_and_nothing_is_lost(as_text):
    rng = random.Random(0)
    sizes = [rng.choice((5, 6, 7, 30, 31, 60)) for _ in range(400)]
    pieces = [{"text": f"{number:03}" + "x" * size} for number, size in enumerate(sizes)]
    measure = {"length": lambda piece: len(piece["text"])} if as_text else {}
    pieces = pieces if as_text else [list(piece["text"]) for piece in pieces]

    def padded(order):
        length = measure.get("length", len)
        return sum(8 * max(map(length, order[at : at + 8])) for at in range(0, len(order), 8))

    order = length_grouped(pieces, 8, seed=1, **measure)
    assert sorted(map(str, order)) == sorted(map(str, pieces))
    assert order == length_grouped(pieces, 8, seed=1, **measure) != length_grouped(pieces, 8, seed=2, **measure)
    content = sum(map(measure.get("length", len), pieces))
    # Nearly no padding, where batches at random are padded to more than twice their content.
    assert padded(order) < 1.1 * content < 2 * content < padded(pieces)
    # Short and long batches alternate: no half of the order holds all that is long.
    firsts = [measure.get("length", len)(order[at]) for at in range(0, len(order), 8)]
    assert min(firsts[:25]) < 12 and max(firsts[:25]) > 60 and min(firsts[25:]) < 12 and max(firsts[25:]) > 60
