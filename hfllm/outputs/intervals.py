"""Standard errors, intervals and tests of figures: means and shares over items, and differences on the same items."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from statistics import NormalDist

from hfllm.errors import refuse_if

# Shares have Wilson's interval (1927), which has a width where all items say the same, and the difference of two
# shares of the same items Newcombe's (1998, Statistics in Medicine 17:2635, method 10). The p-values of several
# figures are adjusted by Holm's method (1979, Scandinavian Journal of Statistics 6:65), so that at most a share alpha
# of comparisons of equal models finds any difference. Plain Python: planning imports no NumPy.


@dataclass(frozen=True)
class Interval:
    """A figure with its standard error and its interval at a level."""

    value: float
    error: float
    low: float
    high: float


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean of independent values; `None` for fewer than two."""
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def share_error(share: float, n: int) -> float | None:
    """Return the standard error of a share of `n` independent trials (binomial); `None` for none."""
    return math.sqrt(max(share * (1 - share), 0.0) / n) if n else None


def ratio_error(sums: Sequence[float], counts: Sequence[float]) -> float | None:
    """Return the standard error of `sum(sums) / sum(counts)` over independent rows, such as nats over tokens.

    By linearization (the delta method): rows differ in both. `None` for fewer than two rows.
    """
    if len(sums) < 2 or not sum(counts):
        return None
    ratio, n = sum(sums) / sum(counts), len(sums)
    squares = sum((total - ratio * count) ** 2 for total, count in zip(sums, counts, strict=True))
    return math.sqrt(squares * n / (n - 1)) / sum(counts)


def check_share(value: float, name: str) -> None:
    """Refuse a number not strictly between 0 and 1."""
    refuse_if(not isinstance(value, Real) or not 0 < value < 1, f"{name} must lie between 0 and 1, got {value!r}")


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number (Holm 1979): values up to alpha are beyond chance together."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        least = max(least, min((len(p_values) - rank) * p_values[index], 1.0))
        adjusted[index] = least
    return adjusted


def wilson(hits: float, count: int, level: float) -> tuple[float, float]:
    """Return the score interval of a share (Wilson 1927)."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, weight = hits / count, 1 + z * z / count
    middle = (share + z * z / (2 * count)) / weight
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / weight
    return max(middle - half, 0.0), min(middle + half, 1.0)


def newcombe(first: Sequence[float], second: Sequence[float], level: float) -> tuple[float, float]:
    """Return the interval of the difference of two paired shares (Newcombe 1998, method 10), of zeros and ones."""
    count = len(first)
    (low1, high1), (low2, high2) = (wilson(sum(each), count, level) for each in (first, second))
    p1, p2 = sum(first) / count, sum(second) / count
    both = sum(one * other for one, other in zip(first, second, strict=True))
    only1, only2 = sum(first) - both, sum(second) - both
    neither = count - both - only1 - only2
    product = (both + only1) * (only2 + neither) * (both + only2) * (only1 + neither)
    # With the correction of the association that the method adds where it is positive.
    cross = both * neither - only1 * only2
    cross = max(cross - count / 2, 0.0) if cross > 0 else cross
    phi = cross / math.sqrt(product) if product else 0.0
    down2, up1, up2, down1 = p2 - low2, high1 - p1, high2 - p2, p1 - low1
    down = math.sqrt(max(down2**2 - 2 * phi * down2 * up1 + up1**2, 0.0))
    up = math.sqrt(max(up2**2 - 2 * phi * up2 * down1 + down1**2, 0.0))
    return p2 - p1 - down, p2 - p1 + up


def student(probability: float, freedom: int) -> float:
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
