"""The verdict of a run: one corrected decision, one sentence with its interval, what got worse, the next command.

A stage is judged by its claims: figures that it changed, or figures beside their controls. A figure with an interval
[low, high] has a p-value (Altman and Bland 2011, BMJ 343:d2304), and the difference of two independent figures has
the interval of their squared distances (Zou and Donner 2008, Statistics in Medicine 27:1693). The p-values of all
claims and of all other changed figures are adjusted together (Holm 1979), so that a stage which changes nothing is
called better or worse in at most 5 of 100 runs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hfllm.outputs.figures import (
    ALPHA,
    BETTER,
    FEWEST,
    LARGE,
    LEVEL,
    NOISE,
    bounds_of,
    changes,
    items_of,
    label_of,
    plus_minus,
    readable,
    shown_bounds,
)
from hfllm.outputs.intervals import holm, student

# Decisions. A stage is better only where all of its claims are, and worse where one of them is.
IS_BETTER, IS_WORSE, IS_EQUAL = "better", "worse", "no difference"
IS_TOO_FEW, IS_NOT_COMPARED = "too few to tell", "not compared"
# The most figures that a sentence names.
MOST_NAMED = 3
# The share of responses without an end from which they are all said to be cut off.
ALL_CUT_OFF = 0.995


# ---- claims ----


@dataclass(frozen=True)
class Promise:
    """A capability promised by a stage, and the control to be surpassed by its figure.

    Args:
        what: the figure in words.
        metric: its name in report.json.
        control: the name of the control's figure, or a level such as the level of guessing.
        beside: the control in words.
        is_less: the figure must be below its control.
    """

    what: str
    metric: str
    control: str | float
    beside: str
    is_less: bool = False

    def warning(self, metrics: Mapping[str, float]) -> str | None:
        """Return the line about a broken promise; `None` if it is kept, or a figure was not measured.

        It is kept where the figure is better by more than `NOISE` standard errors of the difference, with the errors
        of both taken for independent.
        """
        level = self.level(metrics)
        if level is None or self.metric not in metrics:
            return None
        value, error = metrics[self.metric], metrics.get(f"{self.metric}_se", 0.0)
        other = metrics.get(f"{self.control}_se", 0.0) if isinstance(self.control, str) else 0.0
        gain = level - value if self.is_less else value - level
        if gain > NOISE * math.hypot(error, other):
            return None
        side = "below" if self.is_less else "above"
        return f"{self.what}: {plus_minus(value, error)}, not {side} {self.beside} ({plus_minus(level, other)})"

    def level(self, metrics: Mapping[str, float]) -> float | None:
        """Return the control's figure, `None` if it was not measured."""
        return metrics.get(self.control) if isinstance(self.control, str) else self.control


def broken_promises(promises: Sequence[Promise], metrics: Mapping[str, float]) -> list[str]:
    """Return a line per absent capability, only the first of several about the same figure."""
    result: dict[str, str] = {}
    for promise in promises:
        if (line := promise.warning(metrics)) is not None:
            result.setdefault(promise.metric, line)
    return list(result.values())


def change_claim(name: str, what: str | None = None) -> Promise:
    """Return the claim that a figure of `BETTER` has improved."""
    return Promise(what or label_of(name), f"{name}_change", 0.0, "no change", is_less=BETTER.get(name, 1) < 0)


# ---- decision ----


@dataclass(frozen=True)
class Tested:
    """A claim's difference to its control.

    Args:
        claim: the claim.
        difference: of the figure and its control.
        bounds: of the difference, 95%; `None` where no error is known.
        items: the smallest number of items of both; `None` if it is not known.
        p_value: two-sided, unadjusted.
    """

    claim: Promise
    difference: float
    bounds: tuple[float, float] | None
    items: int | None
    p_value: float

    @property
    def is_testable(self) -> bool:
        """Whether so many items could show a difference."""
        return self.bounds is not None and (self.items is None or self.items >= FEWEST)

    def word(self, adjusted: float) -> str:
        """Return the decision on this claim, from its adjusted p-value."""
        if not self.is_testable:
            return IS_TOO_FEW
        if adjusted > ALPHA or not self.difference:
            return IS_EQUAL
        return IS_BETTER if (self.difference < 0) == self.claim.is_less else IS_WORSE

    def sentence(self, metrics: Mapping[str, float]) -> str:
        """Return the figure, its control and their difference with its interval."""
        claim, bounds = self.claim, shown_bounds(self.bounds)
        of = "" if self.items is None else f", n {self.items:,}"
        interval = f" {bounds}" if bounds else ""
        sign = "+" if self.difference > 0 else ""
        change = claim.metric.removesuffix("_change")
        if f"{change}_before" in metrics:
            sides = " to ".join(readable(metrics[f"{change}_{side}"]) for side in ("before", "after"))
            return f"{label_of(change)} {sides}, {sign}{readable(self.difference)}{interval}{of}"
        beside = f"{claim.beside} {readable(claim.level(metrics))}" if claim.control else claim.beside
        value = readable(metrics[claim.metric])
        return f"{claim.what} {value}, {beside}: {sign}{readable(self.difference)}{interval}{of}"


@dataclass(frozen=True)
class Verdict:
    """Whether a stage did what it is for.

    Args:
        decision: `better`, `worse`, `no difference`, `too few to tell` or `not compared`.
        sentence: the decision with its figures and their intervals, after what makes them meaningless.
        worse: the names of the figures that got worse, in report.json.
        tested: the number of tested figures, for all of which the decision is corrected.
        next_command: what to run now, as one would type it.
        cautions: what makes the figures meaningless.
        alpha: of the tests.
    """

    decision: str
    sentence: str
    worse: Sequence[str] = ()
    tested: int = 0
    next_command: str = ""
    cautions: Sequence[str] = ()
    alpha: float = ALPHA

    def as_dict(self) -> dict[str, object]:
        """Return the verdict for report.json."""
        return {
            "decision": self.decision,
            "sentence": self.sentence,
            "cautions": list(self.cautions),
            "worse": list(self.worse),
            "tested": self.tested,
            "alpha": self.alpha,
            "next": self.next_command,
        }


def lines_of(verdict: Mapping[str, object]) -> list[str]:
    """Return the lines of a verdict in report.json: its sentence, and the next command."""
    parts = {"verdict": verdict.get("sentence"), "next": verdict.get("next")}
    return [f"{name}: {text}" for name, text in parts.items() if text]


def decide(metrics: Mapping[str, float], claims: Sequence[Promise] = (), cautions: Sequence[str] = ()) -> Verdict:
    """Return the verdict on a stage.

    Args:
        metrics: of its report.
        claims: what it is for; by default the first of its changed figures with a better direction.
        cautions: what a reader must know before the figures, of the stage's own.
    """
    cautions = [*cautions, *cautions_of(metrics)]
    changed = [change_claim(name) for name in changes(metrics) if name in BETTER]
    claims = [claim for claim in claims or changed[:1] if claim.metric in metrics and claim.level(metrics) is not None]
    if not claims:
        return Verdict(IS_NOT_COMPARED, _joined(cautions), cautions=cautions)
    claimed = {claim.metric for claim in claims}
    family = [_tested(claim, metrics) for claim in claims]
    watched = [_tested(claim, metrics) for claim in changed if claim.metric not in claimed]
    testable = [each for each in (*family, *watched) if each.is_testable]
    adjusted = dict(zip(map(id, testable), holm([each.p_value for each in testable]), strict=True))
    words = {id(each): each.word(adjusted.get(id(each), 1.0)) for each in (*family, *watched)}
    decision = _decision([words[id(each)] for each in family])
    worse = [each for each in watched if words[id(each)] == IS_WORSE]
    deciding = [each for each in family if words[id(each)] == decision]
    sentence = _joined([*cautions, f"{decision}: {_listed(deciding, metrics)}", _count_of(deciding, family, decision)])
    sentence += f"; worse: {_listed(worse, metrics)}" if worse else ""
    of_claims = [each for each in family if words[id(each)] == IS_WORSE]
    names = [each.claim.metric.removesuffix("_change") for each in (*of_claims, *worse)]
    return Verdict(decision, sentence, names, len(testable), cautions=cautions)


def cautions_of(metrics: Mapping[str, float]) -> list[str]:
    """Return what makes the figures of any stage with responses meaningless."""
    result = []
    if metrics.get("unfinished_after", 0.0) >= ALL_CUT_OFF:
        result.append("every response was cut off at its longest length, so none of them is whole")
    errors = [metrics.get(f"proxy_reward_{side}_se") for side in ("before", "after")]
    numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
    broken = [label_of(name) for name, value in numbers.items() if not math.isfinite(value)]
    if broken:
        result.append(f"{', '.join(broken[:MOST_NAMED])} is no finite number: the training diverged")
    if errors == [0.0, 0.0] and not metrics.get("proxy_reward_change"):
        result.append(f"every response got the same reward, {readable(metrics['proxy_reward_after'])}")
    return result


def _tested(claim: Promise, metrics: Mapping[str, float]) -> Tested:
    control = claim.control if isinstance(claim.control, str) else ""
    value, level = metrics[claim.metric], float(claim.level(metrics))
    bounds, others = bounds_of(claim.metric, metrics), bounds_of(control, metrics) or (level, level)
    counts = [items_of(name, metrics) for name in (claim.metric, control) if name]
    known = [count for count in counts if count is not None]
    difference = value - level
    if bounds is None:
        return Tested(claim, difference, None, min(known, default=None), 1.0)
    (low, high), (other_low, other_high) = bounds, others
    interval = (
        difference - math.hypot(value - low, other_high - level),
        difference + math.hypot(high - value, level - other_low),
    )
    items = min(known, default=None)
    is_share = f"{claim.metric}_low" in metrics
    freedom = LARGE if is_share or items is None else max(items - 1, 1)
    return Tested(claim, difference, interval, items, _p_value(difference, interval, freedom))


def _p_value(difference: float, bounds: tuple[float, float], freedom: int) -> float:
    """Return the p-value of a difference from the side of its interval toward 0, by Student's t.

    Args:
        freedom: degrees of freedom; those of an interval of shares are many.
    """
    if not difference or not math.isfinite(difference):
        return 1.0
    half = difference - bounds[0] if difference > 0 else bounds[1] - difference
    if not half:
        return 0.0
    errors = student((1 + LEVEL) / 2, freedom) * abs(difference) / half
    # The quantile grows with its probability: the one of so many errors lies between.
    low, high = 0.5, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if middle < 1 and student(middle, freedom) < errors else (low, middle)
    return 2 * (1 - high)


def _decision(words: Sequence[str]) -> str:
    """Return the decision on all claims: the least favorable of theirs."""
    return next(word for word in (IS_WORSE, IS_TOO_FEW, IS_EQUAL, IS_BETTER) if word in words)


def _listed(tested: Sequence[Tested], metrics: Mapping[str, float]) -> str:
    more = f"; and {len(tested) - MOST_NAMED} more" if len(tested) > MOST_NAMED else ""
    return "; ".join(each.sentence(metrics) for each in tested[:MOST_NAMED]) + more


def _count_of(deciding: Sequence[Tested], family: Sequence[Tested], decision: str) -> str:
    """Return how many of several claims the decision does not rest on; nothing where all are alike."""
    others = len(family) - len(deciding)
    return f"{others} of its {len(family)} claims aside" if others and decision != IS_BETTER else ""


def _joined(parts: Sequence[str]) -> str:
    return "; ".join(part for part in parts if part)
