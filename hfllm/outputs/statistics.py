"""How an uncertainty compares with the truth (ranking, risk, calibration), and intervals and tests over items.

`uncertainty` is one number per answer, larger for less sure; `wrong` says for each whether it is. Equal uncertainties
are ties, whose order never counts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from hfllm.errors import InputError, check_positive, refuse_if
from hfllm.outputs.intervals import Interval, check_share, newcombe, ratio_error, standard_error, student, wilson
from hfllm.outputs.report import Plot

# ---- uncertainty and truth ----


@dataclass(frozen=True)
class Bin:
    """The answers of like confidence: its mean, the share of right ones, and their number."""

    confidence: float
    accuracy: float
    n: int


def as_pairs(uncertainty: Sequence[float], wrong: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return uncertainties and labels as (N,) float64; the labels are 0 or 1."""
    numbers, labels = as_numbers(uncertainty, "uncertainty"), as_numbers(wrong, "wrong")
    ours, theirs = len(numbers), len(labels)
    refuse_if(ours != theirs, f"there are {ours} uncertainties and {theirs} labels: expected one of each per row")
    bad = np.flatnonzero(~np.isin(labels, (0, 1)))
    if len(bad):
        raise InputError(f"wrong of row {bad[0] + 1} is {labels[bad[0]]:g}; expected true or false (1 or 0)")
    return numbers, labels


def auroc(uncertainty: Sequence[float], wrong: Sequence[bool]) -> float:
    """Return the probability of a wrong answer being less sure than a right one; ties count half.

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
    interval is Newcombe's by the score method (2006, Statistics in Medicine 25:559, method 5), and the error is
    derived from its width.

    Args:
        level: share of samples whose interval holds the true value, between 0 and 1.
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
    """Return the mean AUROC inside groups with right and wrong answers, such as families of questions.

    A measure may only distinguish families, some of them harder. `None` where no group holds both.
    """
    numbers, labels = as_pairs(uncertainty, wrong)
    if len(groups) != len(numbers):
        raise InputError(f"there are {len(groups)} groups and {len(numbers)} rows: expected one per row")
    rows_of: dict[object, list[int]] = {}
    for row, group in enumerate(groups):
        rows_of.setdefault(group, []).append(row)
    result = [auroc(numbers[rows], labels[rows]) for rows in rows_of.values() if len(set(labels[rows])) == 2]
    return sum(result) / len(result) if result else None


def shuffled_auroc(
    uncertainty: Sequence[float], wrong: Sequence[bool], rounds: int = 200, seed: int = 0
) -> tuple[float, float]:
    """Return the mean AUROC with shuffled labels, which must be 1/2, and its standard deviation over the rounds.

    It is the control: an AUROC within two deviations of it says nothing.
    """
    numbers, labels = as_pairs(uncertainty, wrong)
    check_positive(rounds=rounds)
    rng = np.random.default_rng(seed)
    result = [auroc(numbers, rng.permutation(labels)) for _ in range(rounds)]
    return float(np.mean(result)), float(np.std(result))


def risk_coverage(uncertainty: Sequence[float], wrong: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    """Return coverage and risk, (N,) each: the share of answers given, surest first, and how many of these are wrong.

    Where answers are equally sure, it is the mean over all their orders.
    """
    numbers, labels = as_pairs(uncertainty, wrong)
    values, group = np.unique(numbers, return_inverse=True)
    ends = np.cumsum(np.bincount(group, minlength=len(values)))
    wrong_below = np.cumsum(np.bincount(group, labels, minlength=len(values)))
    num_answered = np.arange(1, len(numbers) + 1)
    return num_answered / len(numbers), np.interp(num_answered, [0, *ends], [0, *wrong_below]) / num_answered


def aurc(uncertainty: Sequence[float], wrong: Sequence[bool]) -> float:
    """Return the area under the risk-coverage curve: the mean risk over all coverages; lower is better.

    An uninformative uncertainty has the share of wrong answers (Geifman et al. 2019, arXiv:1805.08206).
    """
    return float(risk_coverage(uncertainty, wrong)[1].mean())


def excess_aurc(uncertainty: Sequence[float], wrong: Sequence[bool]) -> float:
    """Return the area in excess of an ideal uncertainty, with all wrong answers last: 0 for an ideal one."""
    labels = as_pairs(uncertainty, wrong)[1]
    num_answered = np.arange(1, len(labels) + 1)
    return aurc(uncertainty, wrong) - float((np.maximum(num_answered - (labels == 0).sum(), 0) / num_answered).mean())


def reliability(
    confidence: Sequence[float], right: Sequence[bool], num_bins: int = 10, equal: str = "width"
) -> list[Bin]:
    """Return the reliability curve: bins of like confidence, only bins with answers, from low to high.

    Args:
        confidence: probabilities of answers to be right, in [0, 1].
        equal: `"width"`, or `"mass"` for bins between quantiles, with about the same number of answers each.

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
    index = np.searchsorted(edges[1:-1], numbers)
    counts = np.bincount(index, minlength=num_bins)
    sums = (np.bincount(index, each, minlength=num_bins) for each in (numbers, labels))
    rows = zip(*sums, counts.tolist(), strict=True)
    return [Bin(float(sure / n), float(correct / n), n) for sure, correct, n in rows if n]


def ece(confidence: Sequence[float], right: Sequence[bool], num_bins: int = 10, equal: str = "width") -> float:
    """Return the expected calibration error: the mean distance of confidence and accuracy over the bins, by answers.

    Guo et al. 2017 (arXiv:1706.04599, equation 3). It is biased upward where bins hold few answers.
    """
    bins = reliability(confidence, right, num_bins, equal)
    return sum(each.n * abs(each.accuracy - each.confidence) for each in bins) / sum(each.n for each in bins)


def uncertainty_metrics(
    uncertainties: Mapping[str, Sequence[float]], wrong: Sequence[bool], seed: int = 0
) -> dict[str, float]:
    """Return a report's metrics per measure: `NAME_auroc` with `_se`, `_n` and `_shuffled`, and `NAME_aurc`.

    `wrong` is the share of wrong answers, also the AURC of an uninformative measure. Where all answers are
    right, or all wrong, there is no AUROC.
    """
    metrics: dict[str, float] = {}
    for name, numbers in uncertainties.items():
        labels = as_pairs(numbers, wrong)[1]
        metrics["wrong"] = float(labels.mean())
        if len(set(labels)) == 2:
            result = auroc_interval(numbers, labels)
            metrics |= {
                f"{name}_auroc": result.value,
                f"{name}_auroc_se": result.error,
                f"{name}_auroc_n": len(labels),
            }
            metrics[f"{name}_auroc_shuffled"] = shuffled_auroc(numbers, labels, seed=seed)[0]
        metrics |= {f"{name}_aurc": aurc(numbers, labels), f"{name}_excess_aurc": excess_aurc(numbers, labels)}
    return metrics


def risk_coverage_plot(uncertainties: Mapping[str, Sequence[float]], wrong: Sequence[bool], title: str) -> Plot:
    """Return the plot of the measures' risk over coverage."""
    curves = {name: risk_coverage(numbers, wrong) for name, numbers in uncertainties.items()}
    lines = {name: (coverage.tolist(), risk.tolist()) for name, (coverage, risk) in curves.items()}
    return Plot(title, "coverage (share of prompts answered, surest first)", "risk (share of them wrong)", lines)


def reliability_plot(
    confidences: Mapping[str, Sequence[float]], right: Sequence[bool], title: str, equal: str = "mass"
) -> Plot:
    """Return the plot of accuracy over confidence, with the diagonal of perfect calibration."""
    lines = {"calibrated": ([0.0, 1.0], [0.0, 1.0])}
    for name, numbers in confidences.items():
        bins = reliability(numbers, right, equal=equal)
        lines[name] = ([each.confidence for each in bins], [each.accuracy for each in bins])
    return Plot(title, "confidence", "accuracy (share that is right)", lines)


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


# ---- intervals and tests ----
#
# Means of any numbers have bootstrap intervals by item (Efron 1979), widened for few items as Student's t is
# (Hesterberg 2015, The American Statistician 69:371, section 5: "expanded percentile"). Resampling cannot show values
# absent from all items, so shares have the intervals of `hfllm.outputs.intervals`.
#
# Whether two models differ at all is tested by exchanging their scores at random items (Fisher 1935), which for scores
# of 0 and 1 is McNemar's exact test (1947).


NUM_RESAMPLES = 2000
# Numbers drawn at a time.
DRAWN = 2_000_000
# Random exchanges where not all are counted, and up to how many steps all are.
NUM_EXCHANGES, MOST_COUNTED = 50_000, 20_000_000
# Scores in multiples of one of these shares of 1 are counted.
STEPS = (1, 2, 4, 10, 100)


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
    refuse_if(not len(numbers), f"{name} has no rows: at least 1 is needed")
    if np.isnan(numbers).any():
        raise InputError(f"{name} of row {int(np.isnan(numbers).argmax()) + 1} is NaN: expected a number")
    return numbers


def mean_interval(
    values: Sequence[float], level: float = 0.95, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Interval:
    """Return the mean of one number per item with its interval.

    Args:
        values: with only 0 and 1 they are a share, with Wilson's interval.
        level: share of samples whose interval holds the true mean.
        seed: of the resamples; the same, the same interval.

    Raises:
        InputError: for no numbers, NaN, and a level or number of resamples out of range.
    """
    check_share(level, "level")
    numbers = as_numbers(values, "values")
    mean, error = float(numbers.mean()), standard_error(numbers.tolist()) or 0.0
    if is_share(numbers):
        low, high = wilson(float(numbers.sum()), len(numbers), level)
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
    refuse_if(len(one) != len(other), f"a difference of {len(one)} and {len(other)} items: expected the same items")
    differences = other - one
    mean, error = float(differences.mean()), standard_error(differences.tolist()) or 0.0
    if is_share(one) and is_share(other):
        low, high = newcombe(one.tolist(), other.tolist(), level)
    else:
        low, high = bootstrap_bounds(differences, level, num_resamples, seed)
    return Interval(mean, error, min(low, mean), max(high, mean))


def clustered_interval(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[object], level: float = 0.95
) -> Interval:
    """Return the mean of `second - first` over items, with an interval for items in clusters.

    Questions about one passage are alike, so more of them carry less information than as many others. The mean is a
    ratio of sums over clusters, with its error by linearization and Student's t.

    Args:
        clusters: the cluster of each item.

    Raises:
        InputError: when the three are of different lengths, and for fewer than two clusters.
    """
    check_share(level, "level")
    sums = cluster_sums(first, second, clusters)
    refuse_if(len(sums) < 2, f"an interval over {len(sums)} cluster: expected at least 2")
    counts: dict[object, int] = {}
    for cluster in clusters:
        counts[cluster] = counts.get(cluster, 0) + 1
    totals, sizes = list(sums.values()), [counts[cluster] for cluster in sums]
    mean, error = math.fsum(totals) / sum(sizes), ratio_error(totals, sizes) or 0.0
    half = student((1 + level) / 2, len(sums) - 1) * error
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
        clusters: the cluster of each item; the items of one are exchanged together. By default each is its own.
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
        # Before conversion to integers, impossible for very large scores.
        if is_whole and len(whole) * float(np.abs(whole).sum()) <= MOST_COUNTED:
            return _counted_p_value(np.abs(whole).astype(int), abs(int(whole.sum())))
    return _drawn_p_value(differences, seed)


def _counted_p_value(sizes: np.ndarray, total: int) -> float:
    """Return the share of all signs of whole numbers with which their sum is at least `total` from 0."""
    most = int(sizes.sum())
    # The probabilities of the sums from -most to most.
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


def is_share(numbers: np.ndarray) -> bool:
    """Return whether numbers say yes or no, 1 or 0."""
    return bool(np.isin(numbers, (0.0, 1.0)).all())


def bootstrap_bounds(numbers: np.ndarray, level: float, num_resamples: int, seed: int) -> tuple[float, float]:
    """Return the bounds of the expanded percentile bootstrap of a mean; for a single number, the number itself."""
    refuse_if(num_resamples < 100, f"num_resamples must be at least 100, got {num_resamples}")
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
    wide = math.sqrt(count / (count - 1)) * student((1 + level) / 2, count - 1)
    tail = NormalDist().cdf(-wide)
    low, high = np.quantile(means, (tail, 1 - tail))
    return float(low), float(high)
