"""Chinchilla's approaches 1 and 2: the compute-optimal size from the runs themselves, without a formula for the loss.

Hoffmann et al. 2022, arXiv:2203.15556, sections 3.1 and 3.2.
"""

from dataclasses import dataclass

import numpy

from hfllm.errors import InputError
from hfllm.scaling.laws import PowerLaw
from hfllm.scaling.runs import Runs

FEWEST_SIZES = 4


@dataclass(frozen=True)
class IsoFlop:
    """Runs of one compute budget, and the parabola of their loss over log N.

    Args:
        compute: the budget (the geometric mean of the runs'), in FLOPs.
        runs: its runs.
        coefficients: of (log N)^2, log N and 1, with log N relative to `center`.
        center: mean log N of the runs.
    """

    compute: float
    runs: Runs
    coefficients: tuple[float, float, float]
    center: float

    @property
    def parameters(self) -> float:
        """Return the N with the lowest loss."""
        square, linear, _ = self.coefficients
        return float(numpy.exp(self.center - linear / (2 * square)))

    @property
    def least_loss(self) -> float:
        return float(self.loss(self.parameters))

    @property
    def is_inside(self) -> bool:
        """Return whether the lowest loss lies between the smallest and the largest run, not extrapolated."""
        return bool(self.runs.parameters.min() <= self.parameters <= self.runs.parameters.max())

    def loss(self, parameters: float | numpy.ndarray) -> float | numpy.ndarray:
        """Return the parabola's value at N."""
        return numpy.polyval(self.coefficients, numpy.log(parameters) - self.center)


def isoflops(runs: Runs, tolerance: float = 0.05) -> list[IsoFlop]:
    """Return the budgets with at least four different model sizes, each with its parabola, least compute first.

    The budget with the most sizes is taken first, then the one with the most remaining. A parabola that bends the
    other way has no minimum and is left out.

    Args:
        tolerance: how far the compute of a run may differ from its budget: a factor of 1 + tolerance up or down.
    """
    left, found = numpy.argsort(runs.compute, kind="stable"), []
    width = 2 * numpy.log1p(tolerance)
    while True:
        budgets = numpy.log(runs.compute[left])
        windows = [left[(budgets >= low) & (budgets <= low + width)] for low in budgets]
        sizes = [len(numpy.unique(numpy.round(numpy.log(runs.parameters[rows]), 3))) for rows in windows]
        if not sizes or max(sizes) < FEWEST_SIZES:
            return sorted(found, key=lambda budget: budget.compute)
        rows = windows[int(numpy.argmax(sizes))]
        left = left[~numpy.isin(left, rows)]
        budget = _parabola(runs.subset(rows))
        if budget.coefficients[0] > 0:
            found.append(budget)


def isoflop_law(budgets: list[IsoFlop]) -> PowerLaw:
    """Fit N = G C^a through the minima of budgets that lie inside their runs (approach 2).

    Raises:
        InputError: when there are fewer than two of them.
    """
    inside = [budget for budget in budgets if budget.is_inside]
    if len(inside) < 2:
        raise InputError(
            f"{len(inside)} compute budget(s) with {FEWEST_SIZES} model sizes around the best one: an IsoFLOP law "
            "needs at least 2"
        )
    return PowerLaw.through([budget.compute for budget in inside], [budget.parameters for budget in inside])


def frontier(runs: Runs) -> Runs:
    """Return the runs that no run of equal or less compute beats, least compute first: approach 1 on final losses."""
    # Rounded, since runs of one budget differ in their last digits.
    order = numpy.lexsort((runs.losses, numpy.log(runs.compute).round(6)))
    before = numpy.minimum.accumulate(runs.losses[order])
    better = numpy.concatenate([[True], before[1:] < before[:-1]])
    return runs.subset(order[better])


def frontier_law(runs: Runs) -> PowerLaw:
    """Fit N = G C^a through the frontier (approach 1). With a coarse grid of sizes it jumps: prefer the others.

    Raises:
        InputError: when the frontier has fewer than two budgets.
    """
    best = frontier(runs)
    return PowerLaw.through(best.compute, best.parameters)


def _parabola(runs: Runs) -> IsoFlop:
    logarithms = numpy.log(runs.parameters)
    center = float(logarithms.mean())
    coefficients = numpy.polyfit(logarithms - center, runs.losses, 2)
    return IsoFlop(float(numpy.exp(numpy.log(runs.compute).mean())), runs, tuple(map(float, coefficients)), center)
