"""Does a model know when it is wrong? Figures of an uncertainty beside the truth, with their errors and a control.

`uncertainty` is one number per answer, larger for less sure; `wrong` says for each whether it is. Equal uncertainties
are ties, whose order never counts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from statistics import NormalDist

import numpy as np

from hfllm.errors import InputError
from hfllm.outputs.report import Plot


@dataclass(frozen=True)
class Interval:
    """A figure with its standard error and its interval at a level."""

    value: float
    error: float
    low: float
    high: float


@dataclass(frozen=True)
class Bin:
    """The answers of like confidence: its mean, the share that is right, and their number."""

    confidence: float
    accuracy: float
    n: int


def as_numbers(values: Sequence[float] | np.ndarray, name: str) -> np.ndarray:
    """Return numbers, such as a list, an array or a tensor of any type, as (N,) float64.

    Raises:
        InputError: when there are none, they are not one number per row, or a row's is NaN.
    """
    try:
        values = values.tolist() if hasattr(values, "tolist") else list(values)
        numbers = np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        numbers = np.zeros((0, 0))
    if numbers.ndim != 1:
        raise InputError(f"{name} must be one number per row, got {str(values)[:60]}")
    if not len(numbers):
        raise InputError(f"{name} has no rows: at least 1 is needed")
    if np.isnan(numbers).any():
        raise InputError(f"{name} of row {int(np.isnan(numbers).argmax()) + 1} is NaN: expected a number")
    return numbers


def as_pairs(uncertainty: Sequence[float], wrong: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return uncertainties and labels as (N,) float64; the labels are 0 or 1.

    Raises:
        InputError: as `as_numbers`, when they are of different lengths, or a label is another number.
    """
    numbers, labels = as_numbers(uncertainty, "uncertainty"), as_numbers(wrong, "wrong")
    if len(numbers) != len(labels):
        raise InputError(
            f"there are {len(numbers)} uncertainties and {len(labels)} labels: expected one of each per row"
        )
    bad = ~np.isin(labels, (0, 1))
    if bad.any():
        raise InputError(
            f"wrong of row {int(bad.argmax()) + 1} is {labels[bad][0]:g}; expected true or false (1 or 0)"
        )
    return numbers, labels


def auroc(uncertainty: Sequence[float], wrong: Sequence[bool]) -> float:
    """Return the probability that a wrong answer is less sure than a right one; ties count half.

    It is 1 where uncertainty separates them, and 1/2 where it says nothing (Mann and Whitney's statistic).

    Raises:
        InputError: when all answers are right, or all are wrong, and as `as_pairs`.
    """
    numbers, labels = as_pairs(uncertainty, wrong)
    bad, good = _both(numbers, labels)
    ranks = _midranks(np.concatenate([bad, good]))[: len(bad)]
    return float((ranks.sum() - len(bad) * (len(bad) + 1) / 2) / (len(bad) * len(good)))


def auroc_interval(uncertainty: Sequence[float], wrong: Sequence[bool], level: float = 0.95) -> Interval:
    """Return the AUROC of being wrong with its interval (DeLong et al. 1988, Biometrics 44:837).

    DeLong's variance is 0 where the two are separated, and unknown for a single wrong or right answer. There the
    interval is Newcombe's by the score method (2006, Statistics in Medicine 25:559, method 5), and the error the one
    that fits its width.

    Args:
        level: share of samples whose interval holds the true value, between 0 and 1.

    Raises:
        InputError: as `auroc`, and for another level.
    """
    check_share(level, "level")
    numbers, labels = as_pairs(uncertainty, wrong)
    bad, good = _both(numbers, labels)
    m, n = len(bad), len(good)
    together = _midranks(np.concatenate([bad, good]))
    # For each wrong answer the share of right ones below it, and the reverse.
    of_bad = (together[:m] - _midranks(bad)) / n
    of_good = 1 - (together[m:] - _midranks(good)) / m
    value, z = auroc(numbers, labels), NormalDist().inv_cdf((1 + level) / 2)
    if min(m, n) > 1 and (variance := of_bad.var(ddof=1) / m + of_good.var(ddof=1) / n) > 0:
        error = math.sqrt(variance)
        return Interval(value, error, max(value - z * error, 0.0), min(value + z * error, 1.0))
    low, high = (_score_bound(value, m, n, z, end) for end in (0.0, 1.0))
    return Interval(value, (high - low) / (2 * z), low, high)


def auroc_within(uncertainty: Sequence[float], wrong: Sequence[bool], groups: Sequence[object]) -> float | None:
    """Return the mean AUROC inside groups, such as families of questions, that hold right and wrong answers.

    A measure may only tell families apart, of which some are harder. `None` where no group holds both.

    Raises:
        InputError: as `as_pairs`, and when there is not one group per row.
    """
    numbers, labels = as_pairs(uncertainty, wrong)
    if len(groups) != len(numbers):
        raise InputError(f"there are {len(groups)} groups and {len(numbers)} rows: expected one per row")
    rows_of: dict[object, list[int]] = {}
    for row, group in enumerate(groups):
        rows_of.setdefault(group, []).append(row)
    found = [auroc(numbers[rows], labels[rows]) for rows in rows_of.values() if len(set(labels[rows])) == 2]
    return sum(found) / len(found) if found else None


def shuffled_auroc(
    uncertainty: Sequence[float], wrong: Sequence[bool], rounds: int = 200, seed: int = 0
) -> tuple[float, float]:
    """Return the mean AUROC with shuffled labels, which must be 1/2, and its standard deviation over the rounds.

    It is the control: an AUROC within two deviations of it says nothing.

    Raises:
        InputError: as `auroc`, and for no rounds.
    """
    numbers, labels = as_pairs(uncertainty, wrong)
    if rounds < 1:
        raise InputError(f"rounds must be at least 1, got {rounds}")
    rng = np.random.default_rng(seed)
    found = [auroc(numbers, rng.permutation(labels)) for _ in range(rounds)]
    return float(np.mean(found)), float(np.std(found))


def risk_coverage(uncertainty: Sequence[float], wrong: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    """Return coverage and risk, (N,) each: the share of answers given, surest first, and how many of these are wrong.

    Where answers are equally sure, it is the mean over all their orders.

    Raises:
        InputError: as `as_pairs`.
    """
    numbers, labels = as_pairs(uncertainty, wrong)
    values, group = np.unique(numbers, return_inverse=True)
    ends = np.cumsum(np.bincount(group, minlength=len(values)))
    wrong_below = np.cumsum(np.bincount(group, labels, minlength=len(values)))
    given = np.arange(1, len(numbers) + 1)
    return given / len(numbers), np.interp(given, [0, *ends], [0, *wrong_below]) / given


def aurc(uncertainty: Sequence[float], wrong: Sequence[bool]) -> float:
    """Return the area under the risk-coverage curve: the mean risk over all coverages; lower is better.

    An uncertainty that says nothing has the share of wrong answers (Geifman et al. 2019, arXiv:1805.08206).

    Raises:
        InputError: as `as_pairs`.
    """
    return float(risk_coverage(uncertainty, wrong)[1].mean())


def excess_aurc(uncertainty: Sequence[float], wrong: Sequence[bool]) -> float:
    """Return the area beyond that of an uncertainty which puts all wrong answers last: 0 for one that knows all.

    Raises:
        InputError: as `as_pairs`.
    """
    labels = as_pairs(uncertainty, wrong)[1]
    given = np.arange(1, len(labels) + 1)
    return aurc(uncertainty, wrong) - float((np.maximum(given - (labels == 0).sum(), 0) / given).mean())


def reliability(
    confidence: Sequence[float], right: Sequence[bool], num_bins: int = 10, equal: str = "width"
) -> list[Bin]:
    """Return the reliability curve: bins of like confidence, those with answers only, from low to high.

    Args:
        confidence: probability of each answer to be right, in [0, 1].
        equal: `"width"`, or `"mass"` for bins between quantiles, which hold about as many answers each.

    Raises:
        InputError: for a confidence outside [0, 1], a bad number of bins, another `equal`, and as `as_pairs`.
    """
    numbers, labels = as_pairs(confidence, right)
    outside = (numbers < 0) | (numbers > 1)
    if outside.any():
        raise InputError(f"confidence of row {int(outside.argmax()) + 1} is {numbers[outside][0]:g}; expected 0 to 1")
    if equal not in ("width", "mass") or num_bins < 1:
        raise InputError(f"expected at least 1 bin of equal 'width' or 'mass', got {num_bins} of equal {equal!r}")
    shares = np.linspace(0, 1, num_bins + 1)
    edges = shares if equal == "width" else np.quantile(numbers, shares)
    # As scikit-learn's: an edge belongs to the bin below it.
    place = np.searchsorted(edges[1:-1], numbers)
    counts = np.bincount(place, minlength=num_bins)
    sums = (np.bincount(place, each, minlength=num_bins) for each in (numbers, labels))
    rows = zip(*sums, counts.tolist(), strict=True)
    return [Bin(float(sure / n), float(correct / n), n) for sure, correct, n in rows if n]


def ece(confidence: Sequence[float], right: Sequence[bool], num_bins: int = 10, equal: str = "width") -> float:
    """Return the expected calibration error: the mean distance of confidence and accuracy over the bins, by answers.

    Guo et al. 2017 (arXiv:1706.04599, equation 3). It is biased upward where bins hold few answers.

    Raises:
        InputError: as `reliability`.
    """
    bins = reliability(confidence, right, num_bins, equal)
    return sum(each.n * abs(each.accuracy - each.confidence) for each in bins) / sum(each.n for each in bins)


def uncertainty_metrics(
    uncertainties: Mapping[str, Sequence[float]], wrong: Sequence[bool], seed: int = 0
) -> dict[str, float]:
    """Return a report's metrics of each measure: `NAME_auroc` with `_se`, `_n` and `_shuffled`, and `NAME_aurc`.

    `wrong` is the share of wrong answers, which is the AURC of a measure that says nothing. Where all answers are
    right, or all wrong, there is no AUROC.

    Raises:
        InputError: as `as_pairs`.
    """
    metrics: dict[str, float] = {}
    for name, numbers in uncertainties.items():
        labels = as_pairs(numbers, wrong)[1]
        metrics["wrong"] = float(labels.mean())
        if len(set(labels)) == 2:
            found = auroc_interval(numbers, labels)
            metrics |= {f"{name}_auroc": found.value, f"{name}_auroc_se": found.error, f"{name}_auroc_n": len(labels)}
            metrics[f"{name}_auroc_shuffled"] = shuffled_auroc(numbers, labels, seed=seed)[0]
        metrics |= {f"{name}_aurc": aurc(numbers, labels), f"{name}_excess_aurc": excess_aurc(numbers, labels)}
    return metrics


def risk_coverage_plot(uncertainties: Mapping[str, Sequence[float]], wrong: Sequence[bool], title: str) -> Plot:
    """Return the plot of each measure's risk over coverage."""
    curves = {name: risk_coverage(numbers, wrong) for name, numbers in uncertainties.items()}
    lines = {name: (coverage.tolist(), risk.tolist()) for name, (coverage, risk) in curves.items()}
    return Plot(title, "coverage (share of prompts answered, surest first)", "risk (share of them wrong)", lines)


def reliability_plot(
    confidences: Mapping[str, Sequence[float]], right: Sequence[bool], title: str, equal: str = "mass"
) -> Plot:
    """Return the plot of accuracy over confidence, with the diagonal of one that is calibrated."""
    lines = {"calibrated": ([0.0, 1.0], [0.0, 1.0])}
    for name, numbers in confidences.items():
        bins = reliability(numbers, right, equal=equal)
        lines[name] = ([each.confidence for each in bins], [each.accuracy for each in bins])
    return Plot(title, "confidence", "accuracy (share that is right)", lines)


def check_share(value: float, name: str) -> None:
    """Refuse a number that is not strictly between 0 and 1.

    Raises:
        InputError: naming it.
    """
    if not isinstance(value, Real) or not 0 < value < 1:
        raise InputError(f"{name} must lie between 0 and 1, got {value!r}")


def _both(numbers: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(set(labels)) < 2:
        kind = "wrong" if labels[0] else "right"
        raise InputError(f"all {len(labels)} answers are {kind}: AUROC needs right and wrong ones")
    return numbers[labels == 1], numbers[labels == 0]


def _midranks(numbers: np.ndarray) -> np.ndarray:
    """Return ranks from 1, the mean rank for equal numbers."""
    _, group, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]


def _score_bound(value: float, m: int, n: int, z: float, end: float) -> float:
    """Return where, between an AUROC and 0 or 1, it lies `z` errors of the true value away."""
    typical = (m + n) / 2 - 1
    inside, outside = value, end
    for _ in range(60):
        true = (inside + outside) / 2
        spread = 1 + typical * (1 - true) / (2 - true) + typical * true / (1 + true)
        if abs(value - true) <= z * math.sqrt(true * (1 - true) * spread / (m * n)):
            inside = true
        else:
            outside = true
    return end if value == end else inside
