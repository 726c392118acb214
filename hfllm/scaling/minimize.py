"""BFGS on many problems at once: all starts of a fit, or all resamples of a bootstrap, in one set of numpy arrays."""

from collections.abc import Callable

import numpy

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
    """Return a point on each ray that meets the weak Wolfe conditions, or the start if no smaller value is found."""
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
        kept = searching[improved]
        best_values[kept], best_points[kept] = tried_values[improved], tried[improved]
        best_gradients[kept] = tried_gradients[improved]
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
