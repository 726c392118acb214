"""Intervals of means over items, and intervals and tests of the difference of two models on the same items.

Means of any numbers have bootstrap intervals by item (Efron 1979), widened for few items as Student's t is (Hesterberg
2015, The American Statistician 69:371, section 5: "expanded percentile"). Resampling cannot show what no item has, so
that a share of 0 or 1 would have an interval of no width: shares have Wilson's interval (1927), and the difference of
two on the same items Newcombe's (1998, Statistics in Medicine 17:2635, method 10), which are about as cheap.

Whether two models differ at all is tested by exchanging their scores at random items (Fisher 1935), which for scores
of 0 and 1 is McNemar's exact test (1947). The p-values of several figures are adjusted by Holm's method (1979,
Scandinavian Journal of Statistics 6:65), so that at most a share `alpha` of comparisons of equal models finds any
difference.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from hfllm.errors import InputError
from hfllm.outputs.calibration import Interval, as_numbers, check_share
from hfllm.outputs.report import ratio_error, standard_error

NUM_RESAMPLES = 2000
# Numbers that are drawn at a time.
DRAWN = 2_000_000
# Random exchanges where not all are counted, and up to how many steps all are.
NUM_EXCHANGES, MOST_COUNTED = 50_000, 20_000_000
# Scores that are multiples of one of these shares of 1 are counted.
STEPS = (1, 2, 4, 10, 100)


def mean_interval(
    values: Sequence[float], level: float = 0.95, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Interval:
    """Return the mean of one number per item with its interval.

    Args:
        values: 0 and 1 alone are a share, which has Wilson's interval.
        level: share of samples whose interval holds the true mean.
        seed: of the resamples; the same, the same interval.

    Raises:
        InputError: for no numbers, NaN, and a level or number of resamples out of range.
    """
    check_share(level, "level")
    numbers = as_numbers(values, "values")
    mean, error = float(numbers.mean()), standard_error(numbers.tolist()) or 0.0
    if is_share(numbers):
        low, high = _wilson(float(numbers.sum()), len(numbers), level)
    else:
        low, high = bootstrap_bounds(numbers, level, num_resamples, seed)
    return Interval(mean, error, min(low, mean), max(high, mean))


def difference_interval(
    first: Sequence[float],
    second: Sequence[float],
    level: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the mean of `second - first` over the same items in the same order, with its interval.

    Raises:
        InputError: when the two are of different lengths, and as `mean_interval`.
    """
    check_share(level, "level")
    one, other = as_numbers(first, "first"), as_numbers(second, "second")
    if len(one) != len(other):
        raise InputError(f"a difference of {len(one)} and {len(other)} items: expected the same items")
    differences = other - one
    mean, error = float(differences.mean()), standard_error(differences.tolist()) or 0.0
    if is_share(one) and is_share(other):
        low, high = _newcombe(one, other, level)
    else:
        low, high = bootstrap_bounds(differences, level, num_resamples, seed)
    return Interval(mean, error, min(low, mean), max(high, mean))


def clustered_interval(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[object], level: float = 0.95
) -> Interval:
    """Return the mean of `second - first` over items, with an interval for items that come in clusters.

    Questions about one passage are alike, so that more of them say less than as many others. The mean is a ratio of
    sums over clusters, with its error by linearization and Student's t.

    Args:
        clusters: that each item belongs to.

    Raises:
        InputError: when the three are of different lengths, and for fewer than two clusters.
    """
    check_share(level, "level")
    sums = cluster_sums(first, second, clusters)
    if len(sums) < 2:
        raise InputError(f"an interval over {len(sums)} cluster: expected at least 2")
    counts: dict[object, int] = {}
    for cluster in clusters:
        counts[cluster] = counts.get(cluster, 0) + 1
    totals, sizes = list(sums.values()), [counts[cluster] for cluster in sums]
    mean, error = math.fsum(totals) / sum(sizes), ratio_error(totals, sizes) or 0.0
    half = _student((1 + level) / 2, len(sums) - 1) * error
    return Interval(mean, error, mean - half, mean + half)


def cluster_sums(first: Sequence[float], second: Sequence[float], clusters: Sequence[object]) -> dict[object, float]:
    """Return the sum of `second - first` of each cluster.

    Raises:
        InputError: when the three are of different lengths.
    """
    one, other = as_numbers(first, "first"), as_numbers(second, "second")
    if not len(one) == len(other) == len(clusters):
        raise InputError(f"{len(one)} and {len(other)} items of {len(clusters)} clusters: expected as many of each")
    sums: dict[object, float] = {}
    for cluster, difference in zip(clusters, (other - one).tolist(), strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + difference
    return sums


def paired_p_value(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[object] | None = None, seed: int = 0
) -> float:
    """Return the two-sided p-value of the two models being equal: of a difference at least as large by exchanges.

    All exchanges are counted where scores are multiples of a hundredth or larger and not too many; for scores of 0 and
    1 this is McNemar's exact test. Otherwise `NUM_EXCHANGES` are drawn, so that no p-value is below their share.

    Args:
        first, second: scores of the same items in the same order.
        clusters: that each item belongs to; the items of one are exchanged together. By default each is its own.
        seed: of the random exchanges; the same, the same p-value.

    Raises:
        InputError: when the scores are of different lengths, or not numbers.
    """
    differences = np.array(list(cluster_sums(first, second, clusters or range(len(first))).values()))
    differences = differences[np.abs(differences) > 1e-12]
    if not len(differences):
        return 1.0
    for steps in STEPS:
        whole = np.rint(differences * steps)
        is_whole = np.abs(differences * steps - whole).max() < 1e-9
        # Before they are integers, which very large scores would not be.
        if is_whole and len(whole) * float(np.abs(whole).sum()) <= MOST_COUNTED:
            return _counted_p_value(np.abs(whole).astype(int), abs(int(whole.sum())))
    return _drawn_p_value(differences, seed)


def _counted_p_value(sizes: np.ndarray, total: int) -> float:
    """Return the share of all signs of whole numbers with which their sum is at least `total` from 0."""
    most = int(sizes.sum())
    # The probability of each sum from -most to most.
    chances = np.zeros(2 * most + 1)
    chances[most] = 1.0
    for size in sizes.tolist():
        spread = np.zeros_like(chances)
        spread[size:] += chances[: len(chances) - size] / 2
        spread[: len(chances) - size] += chances[size:] / 2
        chances = spread
    sums = np.abs(np.arange(-most, most + 1))
    return min(float(chances[sums >= total].sum()), 1.0)


def _drawn_p_value(differences: np.ndarray, seed: int) -> float:
    """Return the share of random signs with which the sum is as far from 0, the given ones among them."""
    rng, total, hits = np.random.default_rng(seed), abs(float(differences.sum())), 1
    step = max(1, DRAWN // len(differences))
    for start in range(0, NUM_EXCHANGES, step):
        shape = (min(step, NUM_EXCHANGES - start), len(differences))
        signs = rng.integers(0, 2, shape, dtype=np.int8) * np.int8(2) - np.int8(1)
        hits += int((np.abs(signs @ differences) >= total * (1 - 1e-12)).sum())
    return hits / (NUM_EXCHANGES + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for how many there are (Holm 1979): those up to alpha are beyond chance together."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        least = max(least, min((len(p_values) - rank) * p_values[place], 1.0))
        adjusted[place] = least
    return adjusted


def is_share(numbers: np.ndarray) -> bool:
    """Return whether numbers say yes or no, 1 or 0."""
    return bool(np.isin(numbers, (0.0, 1.0)).all())


def bootstrap_bounds(numbers: np.ndarray, level: float, num_resamples: int, seed: int) -> tuple[float, float]:
    """Return the bounds of the expanded percentile bootstrap of a mean; those of a single number are itself."""
    if num_resamples < 100:
        raise InputError(f"num_resamples must be at least 100, got {num_resamples}")
    count = len(numbers)
    if count < 2:
        return float(numbers[0]), float(numbers[0])
    rng = np.random.default_rng(seed)
    step = max(1, DRAWN // count)
    means = np.concatenate(
        [
            numbers[rng.integers(0, count, (min(step, num_resamples - start), count))].mean(1)
            for start in range(0, num_resamples, step)
        ]
    )
    # The variance of resamples is that of n, not n - 1, and theirs is normal where Student's is wider.
    wide = math.sqrt(count / (count - 1)) * _student((1 + level) / 2, count - 1)
    tail = NormalDist().cdf(-wide)
    low, high = np.quantile(means, (tail, 1 - tail))
    return float(low), float(high)


def _wilson(hits: float, count: int, level: float) -> tuple[float, float]:
    """Return the score interval of a share (Wilson 1927)."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, weight = hits / count, 1 + z * z / count
    middle = (share + z * z / (2 * count)) / weight
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / weight
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _newcombe(first: np.ndarray, second: np.ndarray, level: float) -> tuple[float, float]:
    """Return the interval of the difference of two paired shares (Newcombe 1998, method 10)."""
    count = len(first)
    (low1, high1), (low2, high2) = (_wilson(float(each.sum()), count, level) for each in (first, second))
    p1, p2 = float(first.mean()), float(second.mean())
    both, neither = float((first * second).sum()), float(((1 - first) * (1 - second)).sum())
    only1, only2 = float((first * (1 - second)).sum()), float(((1 - first) * second).sum())
    product = (both + only1) * (only2 + neither) * (both + only2) * (only1 + neither)
    # With the correction of the association that the method adds where it is positive.
    cross = both * neither - only1 * only2
    cross = max(cross - count / 2, 0.0) if cross > 0 else cross
    phi = cross / math.sqrt(product) if product else 0.0
    down2, up1, up2, down1 = p2 - low2, high1 - p1, high2 - p2, p1 - low1
    down = math.sqrt(max(down2**2 - 2 * phi * down2 * up1 + up1**2, 0.0))
    up = math.sqrt(max(up2**2 - 2 * phi * up2 * down1 + down1**2, 0.0))
    return p2 - p1 - down, p2 - p1 + up


def _student(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t by its expansion about the normal one; exact for 1 and 2 degrees of freedom.

    Abramowitz and Stegun 1964, 26.7.5; from 4 degrees on it is right to a hundredth at the usual levels.
    """
    if freedom == 1:
        return math.tan(math.pi * (probability - 0.5))
    if freedom == 2:
        return (2 * probability - 1) * math.sqrt(2 / (4 * probability * (1 - probability)))
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))
