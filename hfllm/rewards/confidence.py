"""Rewards for answers that say how sure they are: rightness, and how well the stated probability fits it.

An answer ends with its confidence, as `Confidence: 80%`, `(confidence 0.8)` or `<confidence>0.8</confidence>`. Source:
Damani et al. 2025, arXiv:2507.16806 (RLCR).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hfllm.data.formats import content_text
from hfllm.data.thoughts import CLOSE, OPEN, admits_unknown, answer_of
from hfllm.rewards.calls import is_async, taken
from hfllm.rewards.functions import (
    LOG_EXTRA,
    LOG_METRIC,
    STATE,
    RewardFunction,
    exact_match,
    reward_name,
    shuffled_exact_match,
)

if TYPE_CHECKING:
    from transformers import TrainerState

_STATED = re.compile(
    r"(?:<confidence>\s*|\bconfidence\b\s*(?:is|:|=|of)?\s*)(\d+(?:\.\d+)?|\.\d+)(?![\d.,/-]*\d)\s*(%)?\s*(?:</confidence>)?[)\].]*",
    re.I | re.ASCII,
)


def split_confidence(text: str) -> tuple[str, float | None]:
    """Return a text without the confidence that it states last, and that as a share, `None` if it states none.

    A number outside of [0, 1], or above 100 percent, states none.
    """
    every = [*_STATED.finditer(text)]
    if not every:
        return text, None
    found = every[-1]
    share = float(found[1]) / (100 if found[2] else 1)
    if share > 1:
        return text, None
    # An open bracket in front goes with it.
    return (text[: found.start()].rstrip(" \n\t([") + text[found.end() :]).strip(), share


def calibrated(rightness: RewardFunction, name: str = "") -> RewardFunction:
    """Return the reward `right - (confidence - right)^2` of answers that state their confidence (RLCR, equation 2).

    Its mean is highest where the stated confidence is the probability that the answer is right (Brier's rule is
    proper), and among answers where that is largest: it lies in [-1, 1]. An answer that admits that it does not know
    earns 0, as much as a wrong one with a confidence of 0. One that states nothing earns as if it were sure of the
    opposite, so that the format is learned too: 0 where it is right, and else -1.

    Args:
        rightness: a reward function that returns 1 or 0; it reads completions without their confidence.
        name: of the reward, as logged; by default that of the function behind `calibrated_`.

    Raises:
        ValueError: for an async function; in a call, for another number than 0 or 1.
    """
    if is_async(rightness):
        raise ValueError(f"calibrated: {reward_name(rightness)} is async; expected a plain function")

    def reward(
        prompts: Sequence,
        completions: Sequence,
        trainer_state: "TrainerState | None" = None,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, Sequence[object]], None] | None = None,
        **columns: Sequence[Any],
    ) -> list[float | None]:
        read = [_without_confidence(completion) for completion in completions]
        answers = [answer for answer, _ in read]
        given = {STATE: trainer_state, LOG_METRIC: log_metric, LOG_EXTRA: log_extra}
        given = {name: value for name, value in taken(rightness, given).items() if value is not None}
        rights, earned = rightness(prompts, answers, **{**columns, **given}), []
        for answer, (_, confidence), right in zip(answers, read, rights, strict=True):
            if right is None:
                # It judges not this one.
                earned.append(None)
                continue
            if right not in (0, 1):
                raise ValueError(f"{reward_name(rightness)} returned {right!r}: rightness is 0 or 1")
            if confidence is not None:
                earned.append(right - (confidence - right) ** 2)
            else:
                earned.append(0.0 if not right and admits_unknown(answer_of(answer)) else right - 1.0)
        if log_metric is not None:
            judged = [(each[1], right) for each, right in zip(read, rights, strict=True) if right is not None]
            _log(log_metric, judged)
        return earned

    reward.__name__ = reward.__qualname__ = name or f"calibrated_{reward_name(rightness)}"
    reward.__module__ = __name__
    return reward


def _without_confidence(
    completion: str | Sequence[Mapping[str, Any]],
) -> tuple[str | list[Mapping[str, Any]], float | None]:
    """Return a completion of either form without the confidence in its answer, and that."""
    if isinstance(completion, str):
        # What a thought says of it is no answer.
        thoughts, mark, answer = completion.rpartition(CLOSE)
        if not mark and OPEN in completion:
            return completion, None
        answer, confidence = split_confidence(answer)
        return thoughts + mark + answer, confidence
    messages, confidence = list(completion), None
    for at in reversed(range(len(messages))):
        if messages[at].get("role", "assistant") == "assistant":
            text, confidence = split_confidence(content_text(messages[at].get("content")))
            messages[at] = {**messages[at], "content": text}
            break
    return messages, confidence


def _log(log_metric: Callable[[str, float], None], judged: Sequence[tuple[float | None, float]]) -> None:
    for confidence, right in judged:
        log_metric("confidence/stated", float(confidence is not None))
        log_metric("confidence/right", float(right))
        if confidence is not None:
            log_metric("confidence/mean", confidence)
            log_metric("confidence/brier", (confidence - right) ** 2)


calibrated_match = calibrated(exact_match, "calibrated_match")
# A control: the same answers, and rightness dealt out to them by chance.
shuffled_calibrated_match = calibrated(shuffled_exact_match, "shuffled_calibrated_match")
