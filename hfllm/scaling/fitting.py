"""Fit L(N, D) = E + A / N^alpha + B / D^beta to a table of runs, as Chinchilla's approach 3 does.

The procedure is Hoffmann et al. 2022, arXiv:2203.15556, section 3.3 and appendix D.2: minimize the sum over runs of
Huber_delta(LSE(a - alpha log N, b - beta log D, e) - log L) from a grid of starts, with A = exp(a), B = exp(b),
E = exp(e). The sum, not the mean, is minimized to convergence: stopping early is the fault that Besiroglu et al. 2024,
arXiv:2404.10102, found in the published coefficients.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy

from hfllm.errors import InputError
from hfllm.scaling.laws import ParametricLaw
from hfllm.scaling.minimize import minimize
from hfllm.scaling.runs import Runs

DELTA = 1e-3
COEFFICIENTS = ("E", "A", "B", "alpha", "beta")
# Appendix D.2: starts of a, b, e, alpha, beta.
GRID = (
    (0, 5, 10, 15, 20, 25),
    (0, 5, 10, 15, 20, 25),
    (-1, -0.5, 0, 0.5, 1),
    (0, 0.5, 1, 1.5, 2),
    (0, 0.5, 1, 1.5, 2),
)
# Steps for all starts, and the number of best ones to follow to the end.
FIRST_STEPS, FOLLOWED = 20, 400
# At least one run more than coefficients is needed.
FEWEST_RUNS = 6


class CenteredRuns:
    """Data of every objective: logarithms of N and D minus their means, of the losses, and the runs' weights.

    Args:
        runs: the table.
        delta: where the Huber loss turns from square to linear.
        weights: weight of each run in each problem, (P, runs); 1 by default.
    """

    def __init__(self, runs: Runs, delta: float = DELTA, weights: numpy.ndarray | None = None):
        size, data = numpy.log(runs.parameters), numpy.log(runs.tokens)
        self.centers = float(size.mean()), float(data.mean())
        self.size, self.data, self.target = size - self.centers[0], data - self.centers[1], numpy.log(runs.losses)
        self.delta, self.weights = delta, weights


class HuberObjective(CenteredRuns):
    """The objective of a fit and its gradient, for many points and run weights at once.

    N and D are centered in logarithms, so that a and alpha (b and beta) hardly depend on each other; `to_centered` and
    `from_centered` convert between the papers' (a, b, e, alpha, beta) and the minimized coordinates.

    Args: those of `CenteredRuns`.
    """

    def __call__(self, points: numpy.ndarray, problems: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Return values (P,) and gradients (P, 5) at centered points (P, 5) of these problems (P,)."""
        with numpy.errstate(over="ignore", under="ignore", invalid="ignore"):
            value, slope, shares = self._terms(points)
            if self.weights is not None:
                value, slope = value * self.weights[problems], slope * self.weights[problems]
            by_size, by_data, by_floor = (slope * share for share in shares)
            columns = by_size.sum(1), by_data.sum(1), by_floor.sum(1), -(by_size @ self.size), -(by_data @ self.data)
        return value.sum(1), numpy.stack(columns, axis=1)

    def of_each_run(self, points: numpy.ndarray) -> numpy.ndarray:
        """Return the Huber loss of each run at centered points, (P, R)."""
        return self._terms(points)[0]

    def _terms(self, points: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray, list[numpy.ndarray]]:
        """Return Huber losses, their slopes over the sum of the terms, and the three terms, (P, R) each."""
        a, b, e, alpha, beta = points.T[:, :, None]
        size_term, data_term = a - alpha * self.size, b - beta * self.data
        # The largest term is taken out of the sum, so that no exponential overflows.
        top = numpy.maximum(numpy.maximum(size_term, data_term), e)
        shares = [numpy.exp(term - top) for term in (size_term, data_term, e)]
        total = shares[0] + shares[1] + shares[2]
        residual = top + numpy.log(total) - self.target
        # The clipped residual is the slope of the Huber loss, and slope * (residual - slope / 2) its value.
        inside = numpy.clip(residual, -self.delta, self.delta)
        return inside * (residual - inside / 2), inside / total, shares

    def to_centered(self, points: numpy.ndarray) -> numpy.ndarray:
        """Convert from the papers' coordinates, (P, 5)."""
        moved = numpy.array(points, dtype=float)
        moved[:, 0] -= moved[:, 3] * self.centers[0]
        moved[:, 1] -= moved[:, 4] * self.centers[1]
        return moved

    def from_centered(self, points: numpy.ndarray) -> numpy.ndarray:
        """Convert to the papers' coordinates, (P, 5)."""
        moved = numpy.array(points, dtype=float)
        moved[:, 0] += moved[:, 3] * self.centers[0]
        moved[:, 1] += moved[:, 4] * self.centers[1]
        return moved


@dataclass(frozen=True)
class Fit:
    """The best fit of the law to a table of runs.

    Args:
        law: its coefficients.
        objective: the sum of Huber losses at it.
        starts: number of starts followed to the end, and how many of them ended within a thousandth of the best.
        runs: the table.
        point: a, b, e, alpha and beta; where the runs show no floor, e keeps falling although exp(e) is already 0.
    """

    law: ParametricLaw
    objective: float
    starts: tuple[int, int]
    runs: Runs
    point: numpy.ndarray

    def relative_errors(self, runs: Runs | None = None) -> numpy.ndarray:
        """Return predicted / measured loss - 1 of other runs (by default the fitted ones), (R,)."""
        runs = runs or self.runs
        return self.law.loss(runs.parameters, runs.tokens) / runs.losses - 1


@dataclass(frozen=True)
class Bootstrap:
    """Fits to resampled runs.

    Args:
        coefficients: E, A, B, alpha and beta of each fit, (S, 5).
    """

    coefficients: numpy.ndarray

    def interval(self, of: str | Callable[[ParametricLaw], float], level: float = 0.95) -> tuple[float, float]:
        """Return the range that holds the middle `level` of the resamples' values.

        Args:
            of: the name of a coefficient, or a function of a law.
        """
        if isinstance(of, str):
            values = self.coefficients[:, COEFFICIENTS.index(of)]
        else:
            values = numpy.array([of(ParametricLaw(*row)) for row in self.coefficients])
        low, high = numpy.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


def fit_law(runs: Runs, delta: float = DELTA) -> Fit:
    """Fit the law with the least Huber loss over `runs`, from the 4,500 starts of the papers' grid.

    After a few steps only the best continue: on the runs of Hoffmann et al. nearly half end in the same minimum.

    Raises:
        InputError: for fewer than six runs, fewer than three different N or D, or losses that do not fall with them.
    """
    check_runs(runs)
    objective = HuberObjective(runs, delta)
    points, values = minimize(objective, objective.to_centered(grid()), FIRST_STEPS)
    points, values = minimize(objective, points[numpy.argsort(values, kind="stable")[:FOLLOWED]])
    best = int(values.argmin())
    point = objective.from_centered(points[[best]])
    coefficients = coefficients_of(point)[0]
    for name, what in (("alpha", "N"), ("beta", "D")):
        if not coefficients[COEFFICIENTS.index(name)] > 0:
            value = coefficients[COEFFICIENTS.index(name)]
            raise InputError(f"the fit gives {name}={value:.3g}: the losses of these runs do not fall with {what}")
    at_best = int((values <= values[best] * 1.001).sum())
    return Fit(ParametricLaw(*map(float, coefficients)), float(values[best]), (len(values), at_best), runs, point[0])


def bootstrap(fit: Fit, resamples: int = 1000, seed: int = 0, delta: float = DELTA) -> Bootstrap:
    """Fit `resamples` tables of as many runs, drawn from the fitted ones with replacement.

    Each is fitted from the whole table's law and from the three best starts of the grid. A table
    with fewer than six different runs, or without three different N and D, is drawn again; of the others, those whose
    losses do not fall are left out.
    """
    runs, weights = fit.runs, resampled_weights(fit.runs, resamples, seed)
    each = HuberObjective(runs, delta)
    starts = each.to_centered(grid())
    best_starts = _best_starts(each, starts, weights, count=3)
    own = numpy.tile(each.to_centered(fit.point[None]), (resamples, 1))
    weighted = HuberObjective(runs, delta, numpy.tile(weights, (4, 1)))
    points, values = minimize(weighted, numpy.concatenate([own, *best_starts]))
    best = values.reshape(4, resamples).argmin(0) * resamples + numpy.arange(resamples)
    coefficients = coefficients_of(each.from_centered(points[best]))
    with numpy.errstate(invalid="ignore"):
        falls = numpy.isfinite(coefficients).all(1) & (coefficients[:, 1:] > 0).all(1)
    if not falls.any():
        raise InputError(f"none of {resamples} resamples of the runs could be fitted: more runs are needed")
    return Bootstrap(coefficients[falls])


def check_runs(runs: Runs) -> None:
    """Refuse a table to which no law can be fitted.

    Raises:
        InputError: with the number of runs, N and D, and the number needed.
    """
    if len(runs) < FEWEST_RUNS:
        raise InputError(f"{len(runs)} run(s): a law of {len(COEFFICIENTS)} coefficients needs at least {FEWEST_RUNS}")
    for name, values in (("N", runs.parameters), ("D", runs.tokens)):
        different = len(numpy.unique(values))
        if different < 3:
            raise InputError(f"the runs have {different} different {name}: at least 3 are needed")


def grid() -> numpy.ndarray:
    """Return the papers' starts, (4500, 5)."""
    return numpy.array(list(itertools.product(*GRID)), dtype=float)


def coefficients_of(points: numpy.ndarray) -> numpy.ndarray:
    """Return E, A, B, alpha and beta from the papers' a, b, e, alpha and beta, (P, 5) each."""
    with numpy.errstate(over="ignore"):
        a, b, e = numpy.exp(points[:, :3]).T
    return numpy.stack([e, a, b, points[:, 3], points[:, 4]], axis=1)


def resampled_weights(runs: Runs, resamples: int, seed: int) -> numpy.ndarray:
    """Return how often each run is drawn in each table with replacement, (S, R)."""
    rng = numpy.random.default_rng(seed)
    return numpy.array([_resample(rng, runs) for _ in range(resamples)], dtype=float)


def _resample(rng: numpy.random.Generator, runs: Runs) -> numpy.ndarray:
    """Return how often each run is drawn."""
    while True:
        counts = numpy.bincount(rng.integers(len(runs), size=len(runs)), minlength=len(runs))
        drawn = counts > 0
        varied = min(len(numpy.unique(runs.parameters[drawn])), len(numpy.unique(runs.tokens[drawn])))
        if drawn.sum() >= FEWEST_RUNS and varied >= 3:
            return counts


def _best_starts(
    objective: HuberObjective, starts: numpy.ndarray, weights: numpy.ndarray, count: int
) -> list[numpy.ndarray]:
    """Return for each table the starts with the lowest values, best first: `count` arrays (S, 5)."""
    values = objective.of_each_run(starts) @ weights.T
    order = numpy.argpartition(values, count, axis=0)[:count]
    return [starts[rows] for rows in order]
