"""Abstain above a threshold of uncertainty, chosen to keep a stated share of errors (conformal)."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path

import numpy as np

from hfllm.errors import InputError, check_positive, refuse_if
from hfllm.outputs.intervals import check_share, standard_error
from hfllm.outputs.report import write_atomically
from hfllm.outputs.statistics import as_numbers, as_pairs

# ---- the abstainer ----


UNKNOWN = "I do not know."
# JSON has no infinity.
_NAMED = {"never": -math.inf, "always": math.inf}


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return not math.isnan(value)
    except OverflowError:
        return False


@dataclass(frozen=True)
class Abstainer:
    """Answers where the uncertainty is below a threshold.

    Args:
        threshold: of the same measure of the same model as in calibration; `-inf` never answers, `inf` always.
        guarantee: the promise for new prompts, in words.
        rows: its number of calibration rows.
        measure: name of the uncertainty, for readers.
        alpha, delta: see `control_risk` and `learn_then_test`.

    Raises:
        InputError: for a threshold other than a number, and other values of an invalid type or size.
    """

    threshold: float
    guarantee: str = ""
    rows: int = 0
    measure: str = ""
    alpha: float | None = None
    delta: float | None = None

    def __post_init__(self):
        refuse_if(not _is_number(self.threshold), f"threshold must be a number, got {self.threshold!r:.40}")
        if not isinstance(self.rows, int) or self.rows < 0:
            raise InputError(f"rows must be a number of rows, got {self.rows!r:.40}")
        for name in ("guarantee", "measure"):
            value = getattr(self, name)
            refuse_if(not isinstance(value, str), f"{name} must be a text, got {value!r:.40}")
        for name in ("alpha", "delta"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value < 1):
                raise InputError(f"{name} must lie between 0 and 1, got {value!r:.40}")

    def answers(self, uncertainty: Sequence[float]) -> np.ndarray:
        """Return per row whether it is answered, (N,) bool.

        Raises:
            InputError: for a NaN uncertainty.
        """
        return as_numbers(uncertainty, "uncertainty") < self.threshold if len(uncertainty) else np.zeros(0, bool)

    def apply(self, answers: Sequence[str], uncertainty: Sequence[float]) -> list[str]:
        """Return the sure enough answers, and `UNKNOWN` in place of the others."""
        if len(answers) != len(uncertainty):
            raise InputError(f"there are {len(answers)} answers and {len(uncertainty)} uncertainties")
        is_sure = self.answers(uncertainty).tolist()
        return [text if sure else UNKNOWN for text, sure in zip(answers, is_sure, strict=True)]

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        named = next((name for name, value in _NAMED.items() if value == self.threshold), self.threshold)
        write_atomically(Path(path), json.dumps({**asdict(self), "threshold": named}, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Abstainer":
        """Read a file of `save`."""
        try:
            read = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or 'cannot be read'}") from None
        except (ValueError, RecursionError):
            raise InputError(f"{path}: not JSON") from None
        if not isinstance(read, dict) or "threshold" not in read:
            raise InputError(f"{path}: expected an object with a threshold, as Abstainer.save writes it")
        unknown = read.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise InputError(f"{path}: unknown field {min(unknown)!r}")
        value = read["threshold"]
        try:
            return cls(**{**read, "threshold": _NAMED.get(value, value) if isinstance(value, str) else value})
        except InputError as error:
            more = ", or 'never' or 'always'" if str(error).startswith("threshold") else ""
            raise InputError(f"{path}: {error}{more}") from None


# ---- conformal ----
#
# When to abstain, to keep a stated share of errors: by conformal risk control, or by learn-then-test.
#
# Both find a threshold of the uncertainty from calibration rows with judged answers; an answer is given where
# its uncertainty is below it. They promise different things:
#
# - `control_risk`: the risk of an answer that is **given and wrong**, over all prompts, is at most alpha **on
#   average** over calibration sets. Abstaining from everything has risk 0. A given answer may be wrong more often.
# - `learn_then_test`: the share of wrong answers **among the given ones** is at most alpha **with probability
#   1 - delta** over calibration sets. This risk need not fall with the threshold, so that the first method does not
#   apply to it.
#
# Both hold for prompts like the calibration rows (exchangeable, for learn-then-test independent). Neither holds for
# other kinds of prompts, such as new phrasings, or after the model or the measure has changed.


CORRECTIONS = ("fixed_sequence", "bonferroni")
P_VALUES = ("hoeffding_bentkus", "binomial")
# Without thresholds of the user's, this share of the rows places them and is not tested.
PLACING = 1 / 5
# Thresholds begin where this many times the fewest passing rows are answered.
ROOM = 2


def rows_needed(alpha: float) -> int:
    """Return the fewest calibration rows with which `control_risk` and `conformal_quantile` can promise `alpha`.

    Without a single wrong answer the bound is 1 / (n + 1).

    Raises:
        InputError: for an alpha not between 0 and 1.
    """
    check_share(alpha, "alpha")
    # One less than by exact numbers, since 1 / (n + 1) may round to alpha.
    rows = max(math.ceil(1 / Fraction(alpha)) - 2, 0)
    while 1 / (rows + 1) > alpha:
        rows += 1
    return rows


def rows_needed_to_test(alpha: float, delta: float, tests: int = 1) -> int:
    """Return the fewest answered rows, none of them wrong, for rejection at level `delta / tests`.

    This is the number tested by `learn_then_test`; where it places the thresholds itself, 1/`1 - PLACING` times as
    many rows are needed in all.

    Raises:
        InputError: for an alpha or delta not between 0 and 1.
    """
    check_share(alpha, "alpha")
    check_share(delta, "delta")
    check_positive(tests=tests)
    level = delta / tests
    rows = max(math.floor(math.log(level) / math.log1p(-alpha)) - 1, 1)
    while binomial_p(0, rows, alpha) > level:
        # By more where doubles do not distinguish neighbors.
        rows += 1 + (rows >> 52)
    return rows


def conformal_quantile(scores: Sequence[float], alpha: float) -> float:
    """Return the quantile of split conformal prediction: a new score is above it with probability at most `alpha`.

    It is the ceil((n + 1)(1 - alpha))-th smallest of n exchangeable scores (Vovk et al. 2005; Angelopoulos and Bates
    2021, arXiv:2107.07511, section 1).

    Raises:
        InputError: for NaN scores, a bad alpha, and fewer rows than `rows_needed(alpha)`.
    """
    numbers = np.sort(as_numbers(scores, "scores"))
    _check_rows(len(numbers), alpha)
    return float(numbers[len(numbers) - _most(len(numbers), alpha)])


def control_risk(uncertainty: Sequence[float], wrong: Sequence[bool], alpha: float, measure: str = "") -> Abstainer:
    """Return the abstainer with the most answers while given wrong answers stay below a share of all prompts.

    The loss of a prompt is 1 where its answer is given and wrong, and 0 else. It can only grow with the threshold, so
    that conformal risk control applies (Angelopoulos et al. 2022, arXiv:2208.02814, theorem 1, with B = 1): the
    largest of all thresholds up to which (n / (n + 1)) R + 1 / (n + 1) <= alpha, where R is the mean loss of the n
    rows.

    **Guarantee**: for a new prompt P(given and wrong) <= alpha, in expectation over the calibration rows and the
    prompt. It is no bound on the share of wrong answers among the given ones, nor one for every calibration set.

    Args:
        uncertainty: one number per calibration row, larger for less sure.
        wrong: whether the answer is wrong.
        alpha: largest risk, between 0 and 1.
        measure: the uncertainty's name, kept for readers.

    Raises:
        InputError: for NaN, a bad alpha, and fewer rows than `rows_needed(alpha)`.
    """
    numbers, labels = as_pairs(uncertainty, wrong)
    rows = len(numbers)
    _check_rows(rows, alpha)
    values, group = np.unique(numbers, return_inverse=True)
    wrong_up_to = np.cumsum(np.bincount(group, labels, minlength=len(values)))
    too_many = (wrong_up_to + 1) / (rows + 1) > alpha
    # Rows below the first value above the limit are answered; without such a value, all rows.
    threshold = float(values[too_many.argmax()]) if too_many.any() else math.inf
    guarantee = f"P(answered and wrong) <= {alpha:g} in expectation, for prompts like the {rows} calibration rows"
    return Abstainer(threshold, guarantee, rows, measure, alpha)


def binomial_p(wrong: float, rows: int, alpha: float) -> float:
    """Return the exact p-value of "the risk is above alpha": P(Bin(rows, alpha) <= wrong); for losses of 0 and 1."""
    return _binomial_cdf(math.floor(wrong), rows, alpha)


def hoeffding_bentkus_p(loss: float, rows: int, alpha: float) -> float:
    """Return the Hoeffding-Bentkus p-value of "the risk is above alpha", for losses in [0, 1].

    Angelopoulos et al. 2021 (arXiv:2110.01052, proposition 2; Bates et al. 2021, arXiv:2101.02703): the smaller of
    exp(-n h(min(R, alpha), alpha)) and e P(Bin(n, alpha) <= ceil(n R)), h the Kullback-Leibler divergence of coins.

    Args:
        loss: the sum n R of the losses.
        rows: n.
    """
    if not rows:
        return 1.0
    mean = min(loss / rows, alpha)
    parts = ((mean, alpha), (1 - mean, 1 - alpha))
    divergence = sum(one * math.log(one / other) for one, other in parts if one > 0)
    # Rounding of a sum of losses must not make a count of it the next one.
    bentkus = math.e * _binomial_cdf(math.ceil(loss - 1e-9), rows, alpha)
    return min(math.exp(-rows * divergence), bentkus, 1.0)


def learn_then_test(
    uncertainty: Sequence[float],
    wrong: Sequence[bool],
    alpha: float,
    delta: float = 0.1,
    thresholds: Sequence[float] | None = None,
    correction: str = "fixed_sequence",
    p_value: str = "hoeffding_bentkus",
    num_thresholds: int = 20,
    seed: int = 0,
    measure: str = "",
) -> Abstainer:
    """Return the abstainer with the most answers while wrong answers stay below a share of the given ones.

    Learn-then-test (Angelopoulos et al. 2021, arXiv:2110.01052): each threshold is a hypothesis "more than alpha of
    the answers given are wrong", tested on its answered rows. The largest rejected threshold is kept: in fixed order
    from the surest on until the first non-rejection (`fixed_sequence`), or each at delta over their number
    (`bonferroni`).

    **Guarantee**: P(wrong | given) <= alpha with probability at least 1 - delta over the calibration rows, if these
    are independent. Where nothing is rejected the abstainer never answers.

    Args:
        uncertainty, wrong, alpha, measure: as in `control_risk`.
        delta: how often the guarantee may fail, between 0 and 1.
        thresholds: to test; they must not come from these rows. By default a random fifth of the rows (`seed`) places
            `num_thresholds` of them by its quantiles, and the others are tested.
        correction: one of `CORRECTIONS`.
        p_value: one of `P_VALUES`; the binomial one is exact here and answers a little more.

    Raises:
        InputError: for NaN, a bad argument, and too few rows, with the necessary number.
    """
    numbers, labels = as_pairs(uncertainty, wrong)
    if correction not in CORRECTIONS or p_value not in P_VALUES:
        raise InputError(
            f"correction must be one of {', '.join(CORRECTIONS)} and p_value of {', '.join(P_VALUES)}, "
            f"got {correction!r} and {p_value!r}"
        )
    check_positive(num_thresholds=num_thresholds)
    tests = num_thresholds if thresholds is None else len(as_numbers(thresholds, "thresholds"))
    fewest = rows_needed_to_test(alpha, delta, tests if correction == "bonferroni" else 1)
    tested = np.arange(len(numbers))
    if thresholds is None:
        order, placing = np.random.default_rng(seed).permutation(len(numbers)), int(PLACING * len(numbers))
        tested = order[placing:]
        _check_tested(len(tested), len(numbers), fewest, math.ceil(fewest / (1 - PLACING)), alpha, delta)
        thresholds = _placed(numbers[order[:placing]], fewest / len(tested), num_thresholds)
    _check_tested(len(tested), len(numbers), fewest, fewest, alpha, delta)
    level = delta / len(thresholds) if correction == "bonferroni" else delta
    test, best = (hoeffding_bentkus_p if p_value == P_VALUES[0] else binomial_p), -math.inf
    for threshold in sorted(float(each) for each in thresholds):
        answered = numbers[tested] < threshold
        if test(float(labels[tested][answered].sum()), int(answered.sum()), alpha) <= level:
            best = threshold
        elif correction == "fixed_sequence":
            break
    guarantee = (
        f"P(wrong | answered) <= {alpha:g} with probability {1 - delta:g} over calibration sets, for prompts like the "
        f"{len(numbers)} calibration rows"
    )
    return Abstainer(best, guarantee, len(numbers), measure, alpha, delta)


def over_splits(
    uncertainty: Sequence[float],
    wrong: Sequence[bool],
    fit: Callable[[np.ndarray, np.ndarray], Abstainer],
    splits: int = 200,
    seed: int = 0,
) -> dict[str, float]:
    """Return a method's results on random halves: found on one, counted on the other, and the reverse.

    Args:
        fit: `(uncertainty, wrong) -> Abstainer`, such as `partial(control_risk, alpha=0.05)`.
        splits: how often; at least 2.

    Returns:
        `risk` (given and wrong, share of all) and `coverage` (share given), with `_se`; `selective_risk`, the share of
        wrong answers among the given ones, over the splits with any; for learn-then-test `exceeded`, the share of
        splits with a selective risk above alpha, including the chance of the second half.
    """
    numbers, labels = as_pairs(uncertainty, wrong)
    rows = len(numbers)
    refuse_if(splits < 2 or rows < 2, f"expected at least 2 splits and 2 rows, got {splits} and {rows}")
    rng, half, order = np.random.default_rng(seed), rows // 2, np.arange(rows)
    risks, coverages, among, exceeded = [], [], [], []
    for split in range(splits):
        # Each split in both directions: an excess in one half is missing in the other.
        order = np.roll(order, half) if split % 2 else rng.permutation(rows)
        result = fit(numbers[order[:half]], labels[order[:half]])
        answered = result.answers(numbers[order[half:]])
        errors = float((labels[order[half:]] * answered).sum())
        risks.append(errors / len(answered))
        coverages.append(float(answered.mean()))
        among += [errors / answered.sum()] if answered.any() else []
        exceeded += [bool(answered.any()) and among[-1] > result.alpha] if result.delta is not None else []
    figures = {"risk": risks, "coverage": coverages, "selective_risk": among, "exceeded": exceeded}
    means = {name: float(np.mean(values)) for name, values in figures.items() if values}
    return {**means, **{f"{name}_se": standard_error(figures[name]) for name in ("risk", "coverage")}}


def _check_rows(rows: int, alpha: float) -> None:
    if rows < (needed := rows_needed(alpha)):
        raise InputError(f"alpha={alpha:g} needs at least {needed} calibration rows, got {rows}")


def _check_tested(tested: int, rows: int, fewest: int, needed: int, alpha: float, delta: float) -> None:
    if tested < fewest:
        raise InputError(f"alpha={alpha:g} with delta={delta:g} needs at least {needed} calibration rows, got {rows}")


def _most(rows: int, alpha: float) -> int:
    """Return the most k with k / (rows + 1) <= alpha, as a division, so that 0.1 of 20 is 2 whatever its digits."""
    count = math.ceil(alpha * (rows + 1)) + 1
    while count / (rows + 1) > alpha:
        count -= 1
    return count


def _placed(scores: np.ndarray, fewest: float, count: int) -> list[float]:
    """Return thresholds by the quantiles of scores, from where enough rows are answered to all.

    They lie at the next higher score, so equal scores are answered together.
    """
    values = np.unique(scores)
    shares = np.linspace(min(ROOM * fewest, 1), 1, count)
    reached = np.quantile(scores, shares, method="inverted_cdf") if len(scores) else []
    above = np.append(values, math.inf)[np.searchsorted(values, reached, side="right")]
    return sorted({*above.tolist(), math.inf})


def _binomial_cdf(most: int, n: int, p: float) -> float:
    """Return P(Bin(n, p) <= most)."""
    if most >= n:
        return 1.0
    if most < 0:
        return 0.0
    k = np.arange(1, most + 1)
    # Of choosing k of n: each from the one before, so that the work does not grow with n.
    log_choices = np.concatenate([[0.0], np.cumsum(np.log((float(n) + 1 - k) / k))])
    k = np.arange(most + 1)
    logs = log_choices + k * math.log(p) + (float(n) - k) * math.log1p(-p)
    top = logs.max()
    return min(float(np.exp(logs - top).sum() * math.exp(top)), 1.0)
