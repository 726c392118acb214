"""Figures of likelihoods of choices: which is chosen, and how probability is shared among them.

All of them take natural logarithms and subtract the largest one before they exponentiate, so that choices of very
small probability, whose exponential is 0, still have shares.
"""

import math
from collections.abc import Sequence


def shares(logprobs: Sequence[float]) -> list[float]:
    """Return the probability of each choice if one of them is said: they add up to 1."""
    most = max(logprobs)
    weights = [math.exp(each - most) for each in logprobs]
    total = math.fsum(weights)
    return [each / total for each in weights]


def mc1(best: float, wrong: Sequence[float]) -> float:
    """Return whether the best answer is likelier than every wrong one, 1 or 0 (Lin et al. 2022, arXiv:2109.07958)."""
    return float(best > max(wrong))


def mc2(true: Sequence[float], false: Sequence[float]) -> float:
    """Return the share of probability on the true answers: all answers are normalized together, by one maximum."""
    return math.fsum(shares([*true, *false])[: len(true)])


def mc3(true: Sequence[float], false: Sequence[float]) -> float:
    """Return the share of true answers that are likelier than every false one."""
    return sum(each > max(false) for each in true) / len(true)


def chosen(scores: Sequence[float]) -> int:
    """Return the place of the largest score, the first of equal ones."""
    return max(range(len(scores)), key=scores.__getitem__)
