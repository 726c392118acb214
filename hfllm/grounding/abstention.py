"""A threshold on uncertainty: the answer below it, and else "I do not know."."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from hfllm.errors import InputError
from hfllm.outputs.calibration import as_numbers
from hfllm.outputs.report import write_atomically

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
        threshold: of the same measure of the same model that it was found with; `-inf` never answers, `inf` always.
        guarantee: what holds for new prompts, in words.
        rows: how many calibration rows it was found with.
        measure: name of the uncertainty, for readers.
        alpha, delta: see `hfllm.grounding.conformal`.

    Raises:
        InputError: for a threshold that is no number, and other values of a type or size that they cannot have.
    """

    threshold: float
    guarantee: str = ""
    rows: int = 0
    measure: str = ""
    alpha: float | None = None
    delta: float | None = None

    def __post_init__(self):
        if not _is_number(self.threshold):
            raise InputError(f"threshold must be a number, got {self.threshold!r:.40}")
        if not isinstance(self.rows, int) or self.rows < 0:
            raise InputError(f"rows must be a number of rows, got {self.rows!r:.40}")
        for name in ("guarantee", "measure"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"{name} must be a text, got {getattr(self, name)!r:.40}")
        for name in ("alpha", "delta"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value < 1):
                raise InputError(f"{name} must lie between 0 and 1, got {value!r:.40}")

    def answers(self, uncertainty: Sequence[float]) -> np.ndarray:
        """Return for each row whether it is answered, (N,) bool.

        Raises:
            InputError: for an uncertainty that is NaN.
        """
        return as_numbers(uncertainty, "uncertainty") < self.threshold if len(uncertainty) else np.zeros(0, bool)

    def apply(self, answers: Sequence[str], uncertainty: Sequence[float]) -> list[str]:
        """Return the answers that are sure enough, and `UNKNOWN` in place of the others.

        Raises:
            InputError: as `answers`, and when there is not one uncertainty per answer.
        """
        if len(answers) != len(uncertainty):
            raise InputError(f"there are {len(answers)} answers and {len(uncertainty)} uncertainties")
        is_given = self.answers(uncertainty).tolist()
        return [text if given else UNKNOWN for text, given in zip(answers, is_given, strict=True)]

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        named = next((name for name, value in _NAMED.items() if value == self.threshold), self.threshold)
        write_atomically(Path(path), json.dumps({**asdict(self), "threshold": named}, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Abstainer":
        """Read what `save` wrote.

        Raises:
            InputError: naming the file and what is wrong with it.
        """
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
