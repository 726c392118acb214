"""Chinchilla's approaches 1 and 2, without a formula for the loss, and forecasts of a larger run's loss.

Hoffmann et al. 2022, arXiv:2203.15556, sections 3.1 and 3.2.
"""

import itertools
from dataclasses import dataclass

import numpy

from hfllm.errors import InputError
from hfllm.scaling.fitting import DELTA, Bootstrap, CenteredRuns, Fit, Runs, minimize, resampled_weights
from hfllm.scaling.laws import KaplanLaw, PowerLaw

# ---- approaches 1 and 2 ----


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
    left, result = numpy.argsort(runs.compute, kind="stable"), []
    width = 2 * numpy.log1p(tolerance)
    while True:
        budgets = numpy.log(runs.compute[left])
        windows = [left[(budgets >= low) & (budgets <= low + width)] for low in budgets]
        sizes = [len(numpy.unique(numpy.round(numpy.log(runs.parameters[rows]), 3))) for rows in windows]
        if not sizes or max(sizes) < FEWEST_SIZES:
            return sorted(result, key=lambda budget: budget.compute)
        rows = windows[int(numpy.argmax(sizes))]
        left = left[~numpy.isin(left, rows)]
        budget = _parabola(runs.subset(rows))
        if budget.coefficients[0] > 0:
            result.append(budget)


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
    """Return the runs unbeaten by runs of equal or less compute, least compute first: approach 1 on final losses."""
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


# ---- forecast ----
#
# Predict the loss of a larger run from finished runs, by the better of two laws.
#
# Chinchilla's law adds the losses from size and from data. Where a model is so small that more text no longer helps,
# the loss is nearer to the larger of the two terms, as in Kaplan et al. 2020, arXiv:2001.08361, equation 1.5:
# L = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D. Both are fitted by the same Huber loss, to
# the same runs; the one with the lower loss is used. Kaplan's has four coefficients, Chinchilla's five.


CHINCHILLA, KAPLAN = "chinchilla", "kaplan"
# Starts of a = alpha_N log N_c and b = alpha_D log D_c, N and D in units of the runs' geometric means, of alpha_N and
# alpha_D; and at how many of the points found from them each resample begins.
GRID = ((0, 0.5, 1, 1.5), (0, 0.5, 1, 1.5), (0.05, 0.1, 0.2, 0.4, 0.8), (0.05, 0.1, 0.2, 0.4, 0.8))
FOLLOWED = 4


class KaplanObjective(CenteredRuns):
    """The Huber loss of log L and its gradient, at many points (a, b, alpha_N, alpha_D) at once.

    Args: those of `CenteredRuns`.
    """

    def __call__(self, points: numpy.ndarray, problems: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Return values (P,) and gradients (P, 4) at points (P, 4); infinite where an exponent is not positive."""
        with numpy.errstate(all="ignore"):
            logs, slopes = log_losses(points, self.size, self.data)
            residual = logs - self.target
            inside = numpy.clip(residual, -self.delta, self.delta)
            value = inside * (residual - inside / 2)
            if self.weights is not None:
                value, inside = value * self.weights[problems], inside * self.weights[problems]
            gradient = numpy.stack([(inside * slope).sum(1) for slope in slopes], axis=1)
            value = value.sum(1)
        return numpy.where((points[:, 2:] > 0).all(1), value, numpy.inf), gradient


def log_losses(
    points: numpy.ndarray, size: numpy.ndarray, data: numpy.ndarray
) -> tuple[numpy.ndarray, tuple[numpy.ndarray, ...]]:
    """Return log L (P, R) at points (P, 4), and its derivatives by a, b, alpha_N and alpha_D."""
    a, b, of_size, of_data = points.T[:, :, None]
    size_term, data_term = (a - of_size * size) / of_data, (b - of_data * data) / of_data
    total = numpy.logaddexp(size_term, data_term)
    share = numpy.exp(size_term - total)
    by_data_exponent = total - share * size_term - (1 - share) * (data + data_term)
    return of_data * total, (share, 1 - share, -share * size, by_data_exponent)


@dataclass(frozen=True)
class KaplanFit:
    """A fit of Kaplan's law.

    Args:
        point: a, b, alpha_N and alpha_D, (4,).
        resampled: the same for tables drawn with replacement, (S, 4).
        objective: the sum of Huber losses at `point`.
        centers: means of log N and log D.
    """

    point: numpy.ndarray
    resampled: numpy.ndarray
    objective: float
    centers: tuple[float, float]

    @property
    def law(self) -> KaplanLaw:
        """Return its coefficients, for display; use `losses` to predict.

        If the runs lack a term, N_c or D_c is zero or infinite. Its optimal size is the paper's.
        """
        a, b, of_size, of_data = map(float, self.point)
        with numpy.errstate(over="ignore"):
            critical = numpy.exp(a / of_size + self.centers[0]), numpy.exp(b / of_data + self.centers[1])
        return KaplanLaw(*map(float, critical), of_size, of_data)

    def losses(self, parameters: float, tokens: float) -> numpy.ndarray:
        """Return the losses by the fit and by the resamples, (1 + S,)."""
        at = numpy.array([numpy.log(parameters) - self.centers[0]]), numpy.array([numpy.log(tokens) - self.centers[1]])
        with numpy.errstate(all="ignore"):
            return numpy.exp(log_losses(numpy.concatenate([self.point[None], self.resampled]), *at)[0][:, 0])


def fit_kaplan(runs: Runs, resamples: int = 1000, seed: int = 0, delta: float = DELTA) -> KaplanFit:
    """Fit Kaplan's law with the least Huber loss over `runs`, from a grid of starts.

    Resamples begin at the best point found, and at some others with different values.
    """
    objective = KaplanObjective(runs, delta)
    points, values = minimize(objective, numpy.array(list(itertools.product(*GRID)), dtype=float))
    order = numpy.argsort(values, kind="stable")
    _, different = numpy.unique(values[order].round(9), return_index=True)
    starts = points[order[different[:FOLLOWED]]]
    weights = resampled_weights(runs, resamples, seed)
    weighted = KaplanObjective(runs, delta, numpy.tile(weights, (len(starts), 1)))
    result, losses = minimize(weighted, starts.repeat(resamples, axis=0))
    best = losses.reshape(len(starts), resamples).argmin(0) * resamples + numpy.arange(resamples)
    return KaplanFit(starts[0], result[best], float(values[order[0]]), objective.centers)


@dataclass(frozen=True)
class Forecast:
    """Two laws fitted to the same runs.

    Args:
        fit, resampled: Chinchilla's.
        kaplan: Kaplan's.
    """

    fit: Fit
    resampled: Bootstrap
    kaplan: KaplanFit

    @property
    def form(self) -> str:
        """Return the name of the better fitting law."""
        return KAPLAN if self.kaplan.objective < self.fit.objective else CHINCHILLA

    def loss(self, parameters: float, tokens: float, form: str | None = None) -> float:
        """Return the expected loss, in nats per token, by the better law or by `form`."""
        if (form or self.form) == KAPLAN:
            return float(self.kaplan.losses(parameters, tokens)[0])
        return float(self.fit.law.loss(parameters, tokens))

    def interval(self, parameters: float, tokens: float, level: float = 0.95) -> tuple[float, float]:
        """Return the range of the better law's resamples."""
        if self.form == CHINCHILLA:
            return self.resampled.interval(lambda law: law.loss(parameters, tokens), level)
        values = self.kaplan.losses(parameters, tokens)[1:]
        low, high = numpy.quantile(values[numpy.isfinite(values)], [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def errors(self, runs: Runs, form: str | None = None) -> numpy.ndarray:
        """Return expected / measured loss - 1 per run, (R,)."""
        rows = zip(runs.parameters, runs.tokens, strict=True)
        return numpy.array([self.loss(*row, form) for row in rows]) / runs.losses - 1
