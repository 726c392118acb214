"""Fit L(N, D) = E + A / N^alpha + B / D^beta to a table of runs, without its outliers (Chinchilla's approach 3).

The procedure is Hoffmann et al. 2022, arXiv:2203.15556, section 3.3 and appendix D.2: minimize the sum over runs of
Huber_delta(LSE(a - alpha log N, b - beta log D, e) - log L) from a grid of starts, with A = exp(a), B = exp(b),
E = exp(e). The sum, not the mean, is minimized to convergence: stopping early is the fault found by Besiroglu et al.
2024, arXiv:2404.10102, in the published coefficients.
"""

import csv
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

from hfllm.errors import InputError, refuse_if
from hfllm.scaling.laws import FLOPS_A_PARAMETER, ParametricLaw

# ---- minimize ----
#
# BFGS on many problems at once: all starts of a fit, or all resamples of a bootstrap, in one set of numpy arrays.


# Weak Wolfe conditions; the usual constants (Nocedal and Wright 2006, section 6.1).
DECREASE, CURVATURE = 1e-4, 0.9

Objective = Callable[[numpy.ndarray, numpy.ndarray], tuple[numpy.ndarray, numpy.ndarray]]


def minimize(
    objective: Objective, starts: numpy.ndarray, steps: int = 500, tolerance: float = 1e-9
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Minimize by BFGS with a line search by bisection, which also copes with kinks (Lewis and Overton 2013).

    Args:
        objective: takes points (P, K) and the indices (P,) of their problems; returns values (P,)
            and gradients (P, K).
        starts: one point per problem, (S, K).
        steps: maximum number of iterations.
        tolerance: a problem is solved when no component of its gradient is larger, or no step makes its value smaller.

    Returns:
        The points found, (S, K), and their values, (S,).
    """
    points = numpy.array(starts, dtype=float)
    count, size = points.shape
    values, gradients = objective(points, numpy.arange(count))
    inverse = numpy.tile(numpy.eye(size), (count, 1, 1))
    active = numpy.flatnonzero(numpy.isfinite(values) & (abs(gradients).max(1) > tolerance))
    for step in range(steps):
        if not len(active):
            break
        directions = -numpy.einsum("pij,pj->pi", inverse[active], gradients[active])
        uphill = (directions * gradients[active]).sum(1) >= 0
        if uphill.any():
            inverse[active[uphill]] = numpy.eye(size)
            directions[uphill] = -gradients[active[uphill]]
        if step == 0:
            # Without curvature yet, the first step is one of unit length.
            directions /= numpy.maximum(numpy.linalg.norm(directions, axis=1, keepdims=True), 1e-300)
        new_values, new_points, new_gradients = _line_search(
            objective, active, points[active], values[active], gradients[active], directions
        )
        moves, turns = new_points - points[active], new_gradients - gradients[active]
        better = new_values < values[active]
        _update(inverse, active[better], moves[better], turns[better], first=step == 0)
        points[active], values[active], gradients[active] = new_points, new_values, new_gradients
        active = active[better & (abs(new_gradients).max(1) > tolerance)]
    return points, values


def _line_search(
    objective: Objective,
    rows: numpy.ndarray,
    points: numpy.ndarray,
    values: numpy.ndarray,
    gradients: numpy.ndarray,
    directions: numpy.ndarray,
    halvings: int = 40,
) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Return a point on each ray within the weak Wolfe conditions, or the start if no smaller value is found."""
    slopes = (gradients * directions).sum(1)
    length, low, high = numpy.ones(len(rows)), numpy.zeros(len(rows)), numpy.full(len(rows), numpy.inf)
    best_values, best_points, best_gradients = values.copy(), points.copy(), gradients.copy()
    searching = numpy.arange(len(rows))
    for _ in range(halvings):
        if not len(searching):
            break
        tried = points[searching] + length[searching, None] * directions[searching]
        tried_values, tried_gradients = objective(tried, rows[searching])
        tried_values = numpy.where(numpy.isfinite(tried_values), tried_values, numpy.inf)
        falls = tried_values <= values[searching] + DECREASE * length[searching] * slopes[searching]
        flat = (tried_gradients * directions[searching]).sum(1) >= CURVATURE * slopes[searching]
        improved = falls & (tried_values < best_values[searching])
        improved_rows = searching[improved]
        best_values[improved_rows], best_points[improved_rows] = tried_values[improved], tried[improved]
        best_gradients[improved_rows] = tried_gradients[improved]
        high[searching[~falls]] = length[searching[~falls]]
        low[searching[falls & ~flat]] = length[searching[falls & ~flat]]
        searching = searching[~(falls & flat)]
        bounded = numpy.isfinite(high[searching])
        middle = (low[searching] + numpy.where(bounded, high[searching], 0)) / 2
        length[searching] = numpy.where(bounded, middle, 2 * length[searching])
    return best_values, best_points, best_gradients


def _update(
    inverse: numpy.ndarray, rows: numpy.ndarray, moves: numpy.ndarray, turns: numpy.ndarray, first: bool
) -> None:
    """Apply the BFGS update to the inverse Hessians in place (Nocedal and Wright 2006, equation 6.17)."""
    curvature = (moves * turns).sum(1)
    usable = curvature > 1e-300
    rows, moves, turns, curvature = rows[usable], moves[usable], turns[usable], curvature[usable]
    if first:
        scale = curvature / (turns * turns).sum(1)
        inverse[rows] *= scale[:, None, None]
    before = inverse[rows]
    turned = numpy.einsum("pij,pj->pi", before, turns)
    stretch = (1 + (turns * turned).sum(1) / curvature) / curvature
    cross = numpy.einsum("pi,pj->pij", turned, moves) / curvature[:, None, None]
    square = numpy.einsum("pi,pj->pij", moves, moves) * stretch[:, None, None]
    inverse[rows] = before + square - cross - cross.transpose(0, 2, 1)


# ---- runs ----
#
# A table of finished runs: parameters, tokens, final loss.


# Accepted names of columns, in lower case without spaces, dashes and underscores; the first is preferred.
PARAMETERS = ("n", "parameters", "params", "nparams", "numparams", "numparameters", "modelsize", "size")
TOKENS = ("d", "tokens", "ntokens", "numtokens", "trainingtokens", "traintokens", "tokenstrained", "datasetsize")
COMPUTE = ("c", "flops", "flop", "compute", "trainingflop", "trainingflops")
LOSSES = ("loss", "evalloss", "finalloss", "valloss", "validationloss", "testloss", "heldoutloss")


@dataclass(frozen=True)
class Runs:
    """Finished runs, (R,) each.

    Args:
        parameters: N.
        tokens: D, of the whole run.
        losses: nats per token of held-out text at its end.
        lines: of the runs in their file, if they come from one.

    Raises:
        InputError: for columns of different length, or a value other than a finite number above 0.
    """

    parameters: numpy.ndarray
    tokens: numpy.ndarray
    losses: numpy.ndarray
    lines: numpy.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("parameters", "tokens", "losses"):
            values = numpy.asarray(getattr(self, name), dtype=float)
            object.__setattr__(self, name, values)
            count = len(self.losses)
            refuse_if(values.shape != (count,), f"{name}: {values.size} value(s) for {count} loss(es)")
            bad = numpy.flatnonzero(~(numpy.isfinite(values) & (values > 0)))
            if len(bad):
                raise InputError(f"{name} of run {bad[0] + 1} is {values[bad[0]]}: expected a finite number above 0")

    def __len__(self) -> int:
        return len(self.losses)

    @property
    def columns(self) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        """Return N, D and losses."""
        return self.parameters, self.tokens, self.losses

    @property
    def compute(self) -> numpy.ndarray:
        """Return 6 N D per run, in FLOPs."""
        return FLOPS_A_PARAMETER * self.parameters * self.tokens

    def subset(self, rows: Sequence[int] | numpy.ndarray) -> "Runs":
        """Return the runs with these indices."""
        rows = numpy.asarray(rows, dtype=int)
        lines = None if self.lines is None else self.lines[rows]
        return Runs(self.parameters[rows], self.tokens[rows], self.losses[rows], lines)

    def split_by_compute(self, share: float) -> tuple["Runs", "Runs"]:
        """Split off the `share` of runs with the most compute (at least one), to be predicted by a law.

        Raises:
            InputError: for a share outside (0, 1).
        """
        refuse_if(not 0 < share < 1, f"the share of runs to hold out must lie between 0 and 1, got {share}")
        order = numpy.argsort(self.compute, kind="stable")
        count = min(max(1, round(share * len(self))), len(self) - 1)
        return self.subset(numpy.sort(order[:-count])), self.subset(numpy.sort(order[-count:]))


def read_runs(
    path: str | Path, parameters: str | None = None, tokens: str | None = None, losses: str | None = None
) -> Runs:
    """Read runs from a CSV file with a header.

    Args:
        path: the file.
        parameters, tokens, losses: names of the columns; by default common ones (`PARAMETERS`, `TOKENS`, `LOSSES`),
            in any case. Without tokens they are C / (6 N), from a column of FLOPs (`COMPUTE`).
    """
    file = Path(path)
    refuse_if(not file.is_file(), f"{file}: no such file; expected a CSV file of runs")
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            header = list(reader.fieldnames or [])
            rows = [(reader.line_num, row) for row in reader]
            for line, row in rows:
                # Cells beyond the header; empty ones come from a spreadsheet's trailing commas.
                if any(row.get(None, ())):
                    cells = len(header) + len(row[None])
                    raise InputError(
                        f"{file}, line {line}: {cells} cells under {len(header)} columns; decimals need a point, and "
                        "text with a comma quotes"
                    )
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file}: not a CSV file: {error}") from None
    columns = [
        _column(file, header, parameters, PARAMETERS, "parameters"),
        _column(file, header, losses, LOSSES, "losses"),
        _column(file, header, tokens, TOKENS, "tokens", optional=True),
    ]
    from_compute = columns[2] is None
    if from_compute:
        columns[2] = _column(file, header, None, COMPUTE, "tokens", others=TOKENS)
    refuse_if(not rows, f"{file}: no run below the header")
    sizes, final, data = ([_number(file, line, row, name) for line, row in rows] for name in columns)
    data = numpy.array(data) / (FLOPS_A_PARAMETER * numpy.array(sizes)) if from_compute else numpy.array(data)
    return Runs(numpy.array(sizes), data, numpy.array(final), numpy.array([line for line, _ in rows]))


def _column(
    file: Path,
    header: list[str],
    named: str | None,
    common: tuple[str, ...],
    what: str,
    optional: bool = False,
    others: tuple[str, ...] = (),
) -> str | None:
    """Return the column of the header for `what`."""
    present = ", ".join(map(repr, header))
    if named is not None:
        refuse_if(named not in header, f"{file}: no column {named!r} for {what}; it has {present}")
        refuse_if(header.count(named) > 1, f"{file}: column {named!r} for {what} comes {header.count(named)} times")
        return named
    plain: dict[str, list[str]] = {}
    for name in filter(None, header):
        plain.setdefault("".join(character for character in name.lower() if character.isalnum()), []).append(name)
    result, *others_found = next((plain[name] for name in common if name in plain), [None])
    if others_found:
        twice = ", ".join(map(repr, (result, *others_found)))
        raise InputError(f"{file}: several columns for {what}: {twice}; keep one, or give them different names")
    if result is None and not optional:
        there, accepted = present or "no header", ", ".join((*others, *common))
        raise InputError(f"{file}: no column for {what}; it has {there}; accepted names: {accepted}")
    return result


def _number(file: Path, line: int, row: dict[str, str], column: str) -> float:
    text = row.get(column)
    try:
        value = float(text)
    except (TypeError, ValueError):
        raise InputError(f"{file}, line {line}, column {column!r}: {text!r} is not a number") from None
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{file}, line {line}, column {column!r}: {text!r}; expected a finite number above 0")
    return value


# ---- fitting ----


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
        weights: weights of the runs per problem, (P, runs); 1 by default.
    """

    def __init__(self, runs: Runs, delta: float = DELTA, weights: numpy.ndarray | None = None):
        size, data = numpy.log(runs.parameters), numpy.log(runs.tokens)
        self.centers = float(size.mean()), float(data.mean())
        self.size, self.data, self.target = size - self.centers[0], data - self.centers[1], numpy.log(runs.losses)
        self.delta, self.weights = delta, weights


class HuberObjective(CenteredRuns):
    """The objective of a fit and its gradient, for many points and run weights at once.

    N and D are centered in logarithms, so a and alpha (b and beta) hardly depend on each other; `to_centered` and
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
        """Return the Huber losses of the runs at centered points, (P, R)."""
        return self._terms(points)[0]

    def _terms(self, points: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray, list[numpy.ndarray]]:
        """Return Huber losses, their slopes over the sum of the terms, and the three terms, (P, R) each."""
        a, b, e, alpha, beta = points.T[:, :, None]
        size_term, data_term = a - alpha * self.size, b - beta * self.data
        # The largest term is taken out of the sum, to keep exponentials from overflowing.
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
        coefficients: E, A, B, alpha and beta per fit, (S, 5).
    """

    coefficients: numpy.ndarray

    def interval(self, of: str | Callable[[ParametricLaw], float], level: float = 0.95) -> tuple[float, float]:
        """Return the range of the middle `level` of the resamples' values.

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
    with fewer than six different runs, or without three different N and D, is drawn again; of the others, tables
    without falling losses are left out.
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
    refuse_if(not falls.any(), f"none of {resamples} resamples of the runs could be fitted: more runs are needed")
    return Bootstrap(coefficients[falls])


def check_runs(runs: Runs) -> None:
    """Refuse a table unfit for any law."""
    if len(runs) < FEWEST_RUNS:
        raise InputError(f"{len(runs)} run(s): a law of {len(COEFFICIENTS)} coefficients needs at least {FEWEST_RUNS}")
    for name, values in (("N", runs.parameters), ("D", runs.tokens)):
        different = len(numpy.unique(values))
        refuse_if(different < 3, f"the runs have {different} different {name}: at least 3 are needed")


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


# ---- outliers ----
#
# Runs whose losses lie far from a fitted law, and whether to leave them out.
#
# A few such rows can move the coefficients of a fit far more than its loss: on the 245 runs that Besiroglu et al. 2024
# (arXiv:2404.10102) read off a figure, B is six times as large as on the 240 runs they kept.


KEEP, DROP = "keep", "drop"
# Robust standard deviations from which on a run is an outlier, and errors of the loss that are none in any case.
THRESHOLD, LEAST = 6.0, 0.01
# Scale of a normal distribution whose median absolute deviation is 1.
_NORMAL = 1.4826
MOST_ROUNDS = 5


@dataclass(frozen=True)
class Outliers:
    """Runs far from the law of the others.

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
    def inliers(self) -> Runs:
        """Return the other runs."""
        return self.without.runs

    def rows(self) -> list[dict[str, str]]:
        """Return one row of the report per outlier, the largest error first."""
        lines = []
        for position in numpy.argsort(-abs(self.errors), kind="stable"):
            index, error = self.indices[position], self.errors[position]
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
        """Return the line of a run in its file, or its index in the table."""
        return str(index + 1 if self.runs.lines is None else int(self.runs.lines[index]))

    def warning(self, source: str, dropped: bool) -> str:
        """Return a sentence or two about the rows and their effect."""
        names = ", ".join(self.name(index) for index in self.indices[:10])
        more = f" and {len(self) - 10} more" if len(self) > 10 else ""
        many = "line" if len(self) == 1 else "lines"
        result = (
            f"{source}: {len(self)} of {len(self.runs)} runs ({many} {names}{more}) are more than {THRESHOLD:g} "
            "robust standard deviations off the law of the others"
        )
        before, after = self.with_them.law, self.without.law
        moved = f"A {before.A:.4g}, B {before.B:.4g} with them, A {after.A:.4g}, B {after.B:.4g} without"
        return f"{result}; {moved}. {'They are left out.' if dropped else 'They are kept: --outliers drop does not.'}"


def find_outliers(runs: Runs, delta: float = DELTA, fit: Fit | None = None) -> Outliers:
    """Return the runs more than `THRESHOLD` robust standard deviations, and 1%, off the law of the others.

    The law is fitted, runs too far off it are left out, and so on until they stay the same. The scale is the
    median absolute deviation of the inliers' log losses from the law, times 1.4826.

    Args:
        fit: the fit to all `runs`, if there is one.
    """
    whole = fit or fit_law(runs, delta)
    current, inliers = whole, numpy.ones(len(runs), dtype=bool)
    for _ in range(MOST_ROUNDS):
        logs = numpy.log1p(current.relative_errors(runs))
        center = numpy.median(logs[inliers])
        scale = _NORMAL * float(numpy.median(abs(logs[inliers] - center)))
        now = abs(logs - center) <= max(THRESHOLD * scale, LEAST)
        if (now == inliers).all():
            break
        inliers = now
        current = fit_law(runs.subset(numpy.flatnonzero(inliers)), delta)
    indices = numpy.flatnonzero(~inliers)
    return Outliers(runs, indices, current.relative_errors(runs)[indices], scale, whole, current)


def outlier_tables(outliers: Outliers | None) -> dict[str, Sequence[dict[str, str]]]:
    """Return the table of the report, none without outliers."""
    if outliers is None or not len(outliers):
        return {}
    return {"Runs far from the law of the others": outliers.rows()}
