"""Rows that know where they were read, and the rows that are left out: why, how many, and which came first."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from hfllm.data.messages import doubled_turn, is_empty
from hfllm.errors import InputError

NO_QUESTION = "without a question"
NO_ANSWER, DOUBLED, EQUAL, TIE = "without an answer", "with doubled turns", "with equal answers", "with a tie"
UNDESIRED = "with the label false, answers that are not wanted"


class OriginRow(dict[str, Any]):
    """A row of a dataset, with its origin, such as `pairs.jsonl, line 3`."""

    def __init__(self, columns: Mapping[str, Any], origin: str):
        super().__init__(columns)
        self.origin = origin


def origin_of(row: Mapping[str, Any], otherwise: str) -> str:
    """Return where a row was read, or `otherwise` if it does not know."""
    return getattr(row, "origin", otherwise)


class BadRow(InputError):
    """A row that can be read but not learned from.

    Args:
        message: what is wrong, with the row's origin.
        kind: the same as it is counted, such as `without an answer`.
    """

    def __init__(self, message: str, kind: str):
        super().__init__(message)
        self.kind = kind


class Dropped:
    """Counts of rows by the reason why they are left out.

    Attributes:
        total: how many rows there were.
        reasons: counts by reason.
    """

    def __init__(self, total: int = 0):
        self.total, self.reasons = total, Counter()
        self._first: dict[str, str] = {}

    def add(self, reason: str, origin: str = "") -> None:
        """Count a row."""
        self.reasons[reason] += 1
        self._first.setdefault(reason, origin)

    @property
    def count(self) -> int:
        """How many rows are left out."""
        return self.reasons.total()

    def __str__(self) -> str:
        reasons = []
        for reason, count in self.reasons.most_common():
            first = f" ({'first: ' * (count > 1)}{self._first[reason]})" if self._first[reason] else ""
            reasons.append(f"{count:,} {reason}{first}")
        return f"{self.count:,} of {self.total:,} rows dropped: {', '.join(reasons)}"


def flaw_of(row: Mapping[str, Any]) -> str | None:
    """Return why answers or comparisons should not be learned from, in words to count them by, or `None`.

    Args:
        row: as `formats.to_sft` and `formats.to_preference` give it.
    """
    sides = [row[side] for side in ("completion", "chosen", "rejected") if side in row]
    for side in sides:
        if any(is_empty(message) for message in side if message["role"] == "assistant"):
            return NO_ANSWER
    if all(message["role"] == "assistant" for message in [*row["prompt"], *sides[0]]):
        return NO_QUESTION
    if any(doubled_turn([*row["prompt"], *side]) for side in sides):
        return DOUBLED
    return EQUAL if "chosen" in row and row["chosen"] == row["rejected"] else None


def flaw_of_prompt(row: Mapping[str, Any]) -> str | None:
    """Return why a prompt should not be answered, in words to count it by, or `None`; see `formats.to_prompt`."""
    return DOUBLED if isinstance(row["prompt"], list) and doubled_turn(row["prompt"]) else None
