"""Best of n: the value, by another measure, of keeping the response that a reward model scores highest among n."""

import math
from collections.abc import Sequence
from functools import cache

from hfllm.errors import InputError


def best_of_n(scores: Sequence[Sequence[float]], values: Sequence[Sequence[float]], n: int) -> float:
    """Return the mean over prompts of `best_of_n_each`."""
    means = best_of_n_each(scores, values, n)
    return math.fsum(means) / len(means)


def best_of_n_each(scores: Sequence[Sequence[float]], values: Sequence[Sequence[float]], n: int) -> list[float]:
    """Return per prompt the mean value of the best-scored response among n, over all choices of n samples.

    The unbiased estimator of Nakano et al. 2021 (WebGPT, arXiv:2112.09332, appendix I): of N samples, the one with k
    lower scores is the best of n in C(k, n - 1) of C(N, n) choices. Of equal scores the later one counts as higher.

    Args:
        scores: the scores to choose by, N numbers per prompt.
        values: the values to average, in the same order.
        n: from 1 to N.

    Raises:
        InputError: when there are no prompts, the two do not match, or a prompt has fewer than n samples.
    """
    if not scores or [len(row) for row in scores] != [len(row) for row in values]:
        raise InputError("best of n: there must be as many values as scores for each prompt, and at least one prompt")
    if not 1 <= n <= min(map(len, scores)):
        raise InputError(f"n={n}: expected at least 1 and at most {min(map(len, scores))}, the samples per prompt")
    means = []
    for row, own in zip(scores, values, strict=True):
        order = sorted(range(len(row)), key=row.__getitem__)
        means.append(math.fsum(share * own[place] for share, place in zip(_shares(len(row), n), order, strict=True)))
    return means


@cache
def _shares(samples: int, n: int) -> tuple[float, ...]:
    """Return the share of all choices of n in which the sample with 0, 1, 2 ... lower scores is the best."""
    choices = math.comb(samples, n)
    return tuple(math.comb(below, n - 1) / choices for below in range(samples))
