"""Runs whose losses lie far from a fitted law, and whether to leave them out.

A few such rows can move the coefficients of a fit far more than its loss: on the 245 runs that Besiroglu et al. 2024
(arXiv:2404.10102) read off a figure, B is six times as large as on the 240 that they kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from hfllm.scaling.fitting import DELTA, Fit, fit_law
from hfllm.scaling.runs import Runs

KEEP, DROP = "keep", "drop"
# Robust standard deviations from which on a run is an outlier, and errors of the loss that are none in any case.
THRESHOLD, LEAST = 6.0, 0.01
# Scale of a normal distribution whose median absolute deviation is 1.
_NORMAL = 1.4826
MOST_ROUNDS = 5


@dataclass(frozen=True)
class Outliers:
    """Runs far from the law that the others follow.

    Args:
        runs: the whole table.
        indices: of these runs in it, (K,).
        errors: predicted / measured loss - 1 of each, by the law without them, (K,).
        scale: robust standard deviation of the other runs' errors.
        with_them, without: fits to the whole table, and without these runs; the same where there are none.
    """

    runs: Runs
    indices: numpy.ndarray
    errors: numpy.ndarray
    scale: float
    with_them: Fit
    without: Fit

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def kept(self) -> Runs:
        """Return the other runs."""
        return self.without.runs

    def rows(self) -> list[dict[str, str]]:
        """Return a row of the report for each, the largest error first."""
        lines = []
        for place in numpy.argsort(-abs(self.errors), kind="stable"):
            index, error = self.indices[place], self.errors[place]
            size, tokens, loss = (float(column[index]) for column in self.runs.columns)
            lines.append(
                {
                    "line": self.name(index),
                    "N": f"{size:.4g}",
                    "D": f"{tokens:.4g}",
                    "loss": f"{loss:.4f}",
                    "expected": f"{loss * (1 + error):.4f}",
                    "error": f"{error:+.1%}",
                }
            )
        return lines

    def name(self, index: int) -> str:
        """Return the line of a run in its file, or its place in the table."""
        return str(index + 1 if self.runs.lines is None else int(self.runs.lines[index]))

    def warning(self, source: str, dropped: bool) -> str:
        """Return a sentence or two that name the rows, and say what they change."""
        names = ", ".join(self.name(index) for index in self.indices[:10])
        more = f" and {len(self) - 10} more" if len(self) > 10 else ""
        many = "line" if len(self) == 1 else "lines"
        found = (
            f"{source}: {len(self)} of {len(self.runs)} runs ({many} {names}{more}) are more than {THRESHOLD:g} "
            "robust standard deviations off the law of the others"
        )
        before, after = self.with_them.law, self.without.law
        moved = f"A {before.A:.4g}, B {before.B:.4g} with them, A {after.A:.4g}, B {after.B:.4g} without"
        return f"{found}; {moved}. {'They are left out.' if dropped else 'They are kept: --outliers drop does not.'}"


def find_outliers(runs: Runs, delta: float = DELTA, fit: Fit | None = None) -> Outliers:
    """Return the runs that are more than `THRESHOLD` robust standard deviations, and 1%, off the law of the others.

    The law is fitted, runs that are too far off it are left out, and so on until they stay the same. The scale is the
    median absolute deviation of the kept runs' log losses from the law, times 1.4826.

    Args:
        fit: the fit to all `runs`, if there is one.
    """
    whole = fit or fit_law(runs, delta)
    current, kept = whole, numpy.ones(len(runs), dtype=bool)
    for _ in range(MOST_ROUNDS):
        logs = numpy.log1p(current.relative_errors(runs))
        center = numpy.median(logs[kept])
        scale = _NORMAL * float(numpy.median(abs(logs[kept] - center)))
        now = abs(logs - center) <= max(THRESHOLD * scale, LEAST)
        if (now == kept).all():
            break
        kept = now
        current = fit_law(runs.subset(numpy.flatnonzero(kept)), delta)
    indices = numpy.flatnonzero(~kept)
    return Outliers(runs, indices, current.relative_errors(runs)[indices], scale, whole, current)


def outlier_tables(outliers: Outliers | None) -> dict[str, Sequence[dict[str, str]]]:
    """Return the table of the report, none without outliers."""
    if outliers is None or not len(outliers):
        return {}
    return {"Runs far from the law of the others": outliers.rows()}
