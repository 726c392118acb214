"""What a judge's replies are worth, and pairs that are labeled by them."""

import math
import random
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from hfllm.data.formats import as_messages
from hfllm.errors import InputError
from hfllm.outputs.report import share_error, standard_error
from hfllm.rewards.functions import completion_text
from hfllm.rewards.judges import PreferenceJudge, Said


@dataclass(frozen=True)
class BiasReport:
    """How far a judge's replies follow the place of an answer, and how far the answer.

    Args:
        position_bias: mean log-odds, in nats, for what is shown first, whatever it is; negative for the second.
        signal: mean size, in nats, of the log-odds that do not depend on the place.
        consistent: share of pairs of which the same answer is preferred in both orders.
        n: pairs.
        position_bias_se, signal_se, consistent_se: standard errors over pairs; `None` for a single one.
    """

    position_bias: float
    signal: float
    consistent: float
    n: int
    position_bias_se: float | None
    signal_se: float | None
    consistent_se: float | None

    def as_metrics(self, prefix: str = "judge_") -> dict[str, float]:
        """Return it as a report's figures, with errors and counts beside them (`_se`, `_n`)."""
        values = {name: value for name, value in asdict(self).items() if value is not None and name != "n"}
        counts = {f"{name}_n": self.n for name in ("position_bias", "signal", "consistent")}
        return {f"{prefix}{name}": value for name, value in {**values, **counts}.items()}


def measure_bias(
    judge: PreferenceJudge, prompts: Sequence[Said], first: Sequence[Said], second: Sequence[Said]
) -> BiasReport:
    """Measure a judge's position bias on the pairs at hand; pairs of equal answers are left out.

    Raises:
        InputError: when no pair has two different answers, or as `PreferenceJudge.compare`.
    """
    pairs = [pair for pair in zip(prompts, first, second, strict=True) if _differ(*pair[1:])]
    if not pairs:
        raise InputError(
            f"the judge's bias cannot be measured: none of {len(prompts)} pairs has two different answers"
        )
    bias, signal, agrees = [], [], []
    for orders in judge.in_both_orders(*map(list, zip(*pairs, strict=True))):
        shown_first, shown_second = (sum(each) / len(orders) for each in zip(*orders, strict=True))
        bias.append((shown_first - shown_second) / 2)
        signal.append(abs(shown_first + shown_second) / 2)
        agrees.append(shown_first * shown_second > 0)
    share = sum(agrees) / len(agrees)
    return BiasReport(
        *(sum(bias) / len(bias), sum(signal) / len(signal), share, len(pairs)),
        *(standard_error(bias), standard_error(signal), share_error(share, len(pairs))),
    )


def check_bias(report: BiasReport, allow: bool = False) -> None:
    """Refuse a judge whose position bias exceeds its signal.

    Args:
        allow: warn instead.

    Raises:
        InputError: with both figures.
    """
    # So that NaN is refused too.
    if abs(report.position_bias) <= report.signal and report.signal > 0:
        return
    message = (
        f"the judge favors the {'first' if report.position_bias >= 0 else 'second'} place by "
        f"{abs(report.position_bias):.2f} nats and tells answers apart by {report.signal:.2f} ({report.n} pairs, "
        f"{report.consistent:.0%} judged alike in both orders): its labels would be noise"
    )
    if not allow:
        raise InputError(f"{message}; take a larger judge, or clearer preference questions")
    warnings.warn(f"{message}; going on as asked", stacklevel=2)


@dataclass(frozen=True)
class LabelFigures:
    """What became of pairs: `num_pairs` given, `ties` and `too_long` left out, `flipped` of the labels that remain."""

    num_pairs: int
    ties: int
    too_long: int
    flipped: int


class LabeledPairs(NamedTuple):
    """The rows of `preference_rows`, in the order of their pairs, and what became of the others."""

    rows: list[dict[str, Any]]
    figures: LabelFigures


def preference_rows(
    judge: PreferenceJudge,
    prompts: Sequence[Said],
    first: Sequence[Said],
    second: Sequence[Said],
    *,
    label_noise: float = 0.0,
    min_log_odds: float = 0.0,
    seed: int = 0,
) -> LabeledPairs:
    """Return pairs with the judge's labels, as `hfllm reward` and TRL's reward and DPO trainers take them.

    Args:
        label_noise: probability of the wrong label; 0.5 makes the labels random, as a control experiment.
        min_log_odds: pairs with log-odds of this size in nats or less are ties and left out; 0 leaves out equal ones.
        seed: seed of the noise.

    Returns:
        Rows with `prompt`, `chosen` and `rejected` (messages), `probability`, which the judge gives to the chosen
        answer (below .5 where noise has flipped the label), and `judge`, its name; and the figures.

    Raises:
        InputError: when no pair is left.
    """
    if not 0 <= label_noise <= 1:
        raise InputError(f"label_noise must lie in [0, 1], got {label_noise}")
    pairs = list(zip(prompts, first, second, strict=True))
    fits = judge.has_room(prompts, first, second)
    kept = [pair for pair, has_room in zip(pairs, fits, strict=True) if has_room]
    odds = judge.compare(*map(list, zip(*kept, strict=True))) if kept else []
    rng, rows, flipped = random.Random(f"judge-labels-{seed}"), [], 0
    for (prompt, one, other), preference in zip(kept, odds, strict=True):
        # Drawn for ties too, so that one more of them does not change the others' noise.
        is_flipped = rng.random() < label_noise
        if not abs(preference) > min_log_odds:
            continue
        flipped += is_flipped
        chosen, rejected = (one, other) if (preference > 0) != is_flipped else (other, one)
        rows.append(
            {
                "prompt": as_messages(prompt),
                "chosen": [{"role": "assistant", "content": completion_text(chosen)}],
                "rejected": [{"role": "assistant", "content": completion_text(rejected)}],
                "probability": (1 + math.tanh((-1 if is_flipped else 1) * abs(preference) / 2)) / 2,
                "judge": judge.__name__,
            }
        )
    ties = len(kept) - len(rows)
    if not rows:
        raise InputError(
            f"no labels: of {len(pairs)} pairs {ties} are ties and {len(pairs) - len(kept)} longer than the context"
        )
    return LabeledPairs(rows, LabelFigures(len(pairs), ties, len(pairs) - len(kept), flipped))


def _differ(first: Said, second: Said) -> bool:
    return completion_text(first) != completion_text(second)
