"""Best of n, against every choice of n samples."""

import random
from itertools import combinations

import pytest

from hfllm.errors import InputError
from hfllm.evaluation.alignment import best_of_n


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_it_is_the_mean_over_all_choices(n):
    rng = random.Random(0)
    scores = [[rng.random() for _ in range(6)] for _ in range(3)]
    values = [[rng.choice([-1.0, 0.5, 1.0]) for _ in range(6)] for _ in range(3)]
    chosen = [
        own[max(choice, key=row.__getitem__)]
        for row, own in zip(scores, values, strict=True)
        for choice in combinations(range(6), n)
    ]
    assert best_of_n(scores, values, n) == pytest.approx(sum(chosen) / len(chosen))


def test_many_samples_do_not_overflow():
    scores = [list(map(float, range(3000)))]
    assert best_of_n(scores, scores, 3000) == 2999
    assert best_of_n(scores, scores, 1500) == pytest.approx(3001 * 1500 / 1501 - 1)


@pytest.mark.parametrize(
    ("scores", "values", "n"), [([], [], 1), ([[1.0]], [[1.0, 2.0]], 1), ([[1.0]], [[1.0]], 2), ([[1.0]], [[1.0]], 0)]
)
def test_what_has_no_best_is_refused(scores, values, n):
    with pytest.raises(InputError, match=r"best of n|n=\d: expected"):
        best_of_n(scores, values, n)
