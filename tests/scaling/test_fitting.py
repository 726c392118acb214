"""The fit of L(N, D): its gradient, its minimum, the truth that it finds again, and what it refuses."""

import csv
import math

import numpy
import pytest

from hfllm.errors import InputError
from hfllm.scaling.fitting import (
    COEFFICIENTS,
    DELTA,
    HuberObjective,
    Runs,
    bootstrap,
    fit_law,
    grid,
    minimize,
    read_runs,
)
from hfllm.scaling.laws import CHINCHILLA, EPOCH, ParametricLaw
from hfllm.scaling.studies import frontier, frontier_law, isoflop_law, isoflops


def made_runs(law, count, noise, seed=0, sizes=(3e7, 1e10), tokens=(3e8, 5e11)):
    """Runs of random size and length whose losses follow `law` up to a log-normal error."""
    rng = numpy.random.default_rng(seed)
    parameters = numpy.exp(rng.uniform(*numpy.log(sizes), count))
    data = numpy.exp(rng.uniform(*numpy.log(tokens), count))
    return Runs(parameters, data, law.loss(parameters, data) * numpy.exp(noise * rng.standard_normal(count)))


def papers_objective(point, runs, delta=DELTA):
    """Hoffmann et al. 2022, equation 3, written out run by run."""
    a, b, e, alpha, beta = point
    total = 0.0
    for size, data, loss in zip(runs.parameters, runs.tokens, runs.losses, strict=True):
        terms = math.exp(a - alpha * math.log(size)) + math.exp(b - beta * math.log(data)) + math.exp(e)
        residual = abs(math.log(terms) - math.log(loss))
        total += residual**2 / 2 if residual <= delta else delta * (residual - delta / 2)
    return total


def nelder_mead(function, start, steps=1500):
    """A minimizer without gradients (Nelder and Mead 1965), to check the one with them."""
    simplex = [numpy.array(start)] + [numpy.array(start) + 0.05 * row for row in numpy.eye(len(start))]
    values = [function(point) for point in simplex]
    for _ in range(steps):
        order = numpy.argsort(values)
        simplex, values = [simplex[i] for i in order], [values[i] for i in order]
        center, worst = numpy.mean(simplex[:-1], axis=0), simplex[-1]
        reflected = center + (center - worst)
        at_reflected = function(reflected)
        if at_reflected < values[0]:
            expanded = center + 2 * (center - worst)
            at_expanded = function(expanded)
            better = at_expanded < at_reflected
            simplex[-1], values[-1] = (expanded, at_expanded) if better else (reflected, at_reflected)
        elif at_reflected < values[-2]:
            simplex[-1], values[-1] = reflected, at_reflected
        else:
            contracted = center + (worst - center) / 2
            at_contracted = function(contracted)
            if at_contracted < values[-1]:
                simplex[-1], values[-1] = contracted, at_contracted
            else:
                simplex = [simplex[0], *(simplex[0] + (point - simplex[0]) / 2 for point in simplex[1:])]
                values = [values[0], *map(function, simplex[1:])]
    return min(values)


@pytest.mark.slow
def test_the_starts_that_are_given_up_early_would_not_have_been_better():
    for seed, count, noise in ((0, 14, 0.01), (1, 30, 0.003)):
        runs = made_runs(EPOCH, count, noise, seed=seed)
        objective = HuberObjective(runs)
        _, values = minimize(objective, objective.to_centered(grid()))
        assert fit_law(runs).objective == pytest.approx(values.min(), rel=1e-4)


def logarithms(law):
    return numpy.array([math.log(law.A), math.log(law.B), math.log(law.E), law.alpha, law.beta])


def test_the_objective_is_the_papers():
    runs = made_runs(EPOCH, 20, 3e-3)
    objective = HuberObjective(runs)
    points = numpy.array([logarithms(EPOCH), logarithms(CHINCHILLA), grid()[1234]])
    values, _ = objective(objective.to_centered(points), numpy.arange(3))
    assert values == pytest.approx([papers_objective(point, runs) for point in points], rel=1e-9)
    assert objective.from_centered(objective.to_centered(points)) == pytest.approx(points)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_is_that_of_the_value(weighted):
    runs, rng = made_runs(EPOCH, 12, 3e-3), numpy.random.default_rng(1)
    weights = rng.integers(0, 3, (6, 12)).astype(float) if weighted else None
    objective = HuberObjective(runs, 0.05, weights)
    points = objective.to_centered(logarithms(EPOCH) + 0.05 * rng.standard_normal((6, 5)))
    problems = numpy.arange(6)
    _, gradient = objective(points, problems)
    for column, step in enumerate(1e-6 * numpy.eye(5)):
        above, _ = objective(points + step, problems)
        below, _ = objective(points - step, problems)
        assert gradient[:, column] == pytest.approx((above - below) / 2e-6, rel=1e-4, abs=1e-8)


def test_far_starts_neither_overflow_nor_end_in_nothing():
    runs = made_runs(EPOCH, 12, 0)
    objective = HuberObjective(runs)
    values, gradients = objective(objective.to_centered(grid()), numpy.arange(4500))
    assert numpy.isfinite(values).all() and numpy.isfinite(gradients).all()


def test_many_problems_are_minimized_at_once():
    def rosenbrock_and_kink(points, problems):
        x, y = points.T
        smooth = 100 * (y - x * x) ** 2 + (1 - x) ** 2
        smooth_slope = numpy.stack([-400 * x * (y - x * x) - 2 * (1 - x), 200 * (y - x * x)], axis=1)
        kinked = abs(x - 3) + 2 * abs(y + 1) + (x - 3) ** 2
        kinked_slope = numpy.stack([numpy.sign(x - 3) + 2 * (x - 3), 2 * numpy.sign(y + 1)], axis=1)
        odd = problems % 2 == 1
        return numpy.where(odd, kinked, smooth), numpy.where(odd[:, None], kinked_slope, smooth_slope)

    starts = numpy.random.default_rng(0).uniform(-3, 3, (40, 2))
    points, values = minimize(rosenbrock_and_kink, starts)
    assert points[::2] == pytest.approx(numpy.ones((20, 2)), abs=1e-5)
    assert points[1::2] == pytest.approx(numpy.tile([3.0, -1.0], (20, 1)), abs=1e-3)
    assert values.shape == (40,)


@pytest.mark.slow
def test_the_fit_is_a_minimum_that_another_minimizer_does_not_beat():
    runs = made_runs(EPOCH, 40, 5e-3)
    fit = fit_law(runs)
    found = logarithms(fit.law)
    assert fit.objective == pytest.approx(papers_objective(found, runs), rel=1e-6)
    objective = HuberObjective(runs)
    centered = objective.to_centered(found[None])[0]

    def value(point):
        return objective(point[None], numpy.zeros(1, dtype=int))[0][0]

    for start in (centered, objective.to_centered(logarithms(EPOCH)[None])[0], centered + 0.2):
        assert nelder_mead(value, start) >= fit.objective * (1 - 1e-6)
    assert fit.objective <= papers_objective(logarithms(EPOCH), runs)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Chinchilla-like runs with two parts in ten thousand of noise, as a CSV file."""
    path = tmp_path_factory.mktemp("runs") / "runs.csv"
    runs = made_runs(EPOCH, 200, 2e-4, seed=3)
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["name", "Parameters", "Training tokens", "eval_loss"])
        for row, values in enumerate(zip(runs.parameters, runs.tokens, runs.losses, strict=True)):
            writer.writerow([f"run {row}", *map(repr, map(float, values))])
    return path


@pytest.mark.slow
def test_the_truth_is_found_to_two_percent_with_intervals_that_cover_it(table):
    fit = fit_law(read_runs(table))
    resamples = bootstrap(fit, 300)
    for name in COEFFICIENTS:
        truth, found = getattr(EPOCH, name), getattr(fit.law, name)
        low, high = resamples.interval(name)
        assert found == pytest.approx(truth, rel=0.02), name
        assert low < truth < high and low < found < high, name
        assert (high - low) / truth < 0.05, name
    low, high = resamples.interval(lambda law: law.optimal(5.76e23).tokens_per_parameter)
    assert low < EPOCH.optimal(5.76e23).tokens_per_parameter < high
    assert abs(fit.relative_errors()).mean() < 3e-4


@pytest.mark.slow
def test_intervals_widen_with_noise():
    widths = []
    for noise in (2e-4, 4e-3):
        fit = fit_law(made_runs(EPOCH, 60, noise))
        low, high = bootstrap(fit, 100).interval("alpha")
        widths.append(high - low)
        assert low < EPOCH.alpha < high
    assert widths[1] > 3 * widths[0]


@pytest.mark.slow
def test_outliers_hardly_move_the_fit():
    runs = made_runs(EPOCH, 100, 2e-4)
    losses = runs.losses.copy()
    losses[[3, 50, 77]] *= 1.3
    fit = fit_law(Runs(runs.parameters, runs.tokens, losses))
    found, truth = (fit.law.E, fit.law.alpha), (EPOCH.E, EPOCH.alpha)
    assert found == pytest.approx(truth, rel=0.01)


@pytest.mark.slow
def test_larger_runs_are_predicted_from_smaller_ones():
    fitted, held_out = made_runs(EPOCH, 120, 5e-4, seed=5).split_by_compute(0.2)
    assert len(held_out) == 24 and held_out.compute.min() >= fitted.compute.max()
    assert abs(fit_law(fitted).relative_errors(held_out)).max() < 0.01


def test_isoflops_and_the_frontier_find_the_optimal_exponent():
    budgets = numpy.logspace(18, 21, 7)
    sizes = numpy.concatenate([EPOCH.optimal(c).parameters * numpy.logspace(-0.5, 0.5, 9) for c in budgets])
    compute = numpy.repeat(budgets, 9)
    runs = Runs(sizes, compute / 6 / sizes, EPOCH.loss(sizes, compute / 6 / sizes))
    found = isoflops(runs)
    assert [budget.compute for budget in found] == pytest.approx(budgets)
    assert all(budget.is_inside and len(budget.runs) == 9 for budget in found)
    for budget, compute in zip(found, budgets, strict=True):
        assert budget.parameters == pytest.approx(EPOCH.optimal(compute).parameters, rel=0.1)
        assert budget.least_loss <= budget.runs.losses.min() * 1.001
    assert isoflop_law(found).exponent == pytest.approx(EPOCH.exponents[0], abs=0.01)
    best = frontier(runs)
    assert len(best) == 7 and (numpy.diff(best.losses) < 0).all()
    assert frontier_law(runs).exponent == pytest.approx(EPOCH.exponents[0], abs=0.01)


def test_a_parabola_without_a_least_loss_is_no_budget():
    sizes = numpy.array([1e7, 2e7, 4e7, 8e7])
    runs = Runs(sizes, 1e18 / 6 / sizes, numpy.array([3.0, 3.2, 3.2, 3.0]))
    assert isoflops(runs) == []
    with pytest.raises(InputError, match=r"0 compute budget\(s\) with 4 model sizes"):
        isoflop_law([])


HEADER = "N,D,loss\n"
ROWS = "1e6,1e8,4.0\n2e6,2e8,3.5\n4e6,4e8,3.2\n8e6,8e8,3.0\n1e7,1e9,2.9\n2e7,2e9,2.8\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column for parameters; it has no header"),
        (HEADER, "no run below the header"),
        ("N,loss\n1,2\n", "no column for tokens; it has 'N', 'loss'; accepted names: d, tokens"),
        ("N,D\n1,2\n", "no column for losses"),
        ("D,loss\n1,2\n", "no column for parameters"),
        (HEADER + ROWS + "1e6,1e8,-2\n", r"line 8, column 'loss': '-2'; expected a finite number above 0"),
        (HEADER + ROWS + "1e6,1e8,nan\n", r"line 8, column 'loss': 'nan'; expected a finite number"),
        (HEADER + "1e6,1e8,4\nbig,1,4\n", r"line 3, column 'N': 'big' is not a number"),
        (HEADER + "1e6,1e8\n", r"line 2, column 'loss': None is not a number"),
    ],
)
def test_bad_tables_are_refused(tmp_path, text, message):
    path = tmp_path / "runs.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        read_runs(path)
    assert str(path) in str(error.value)


def test_tables_under_other_names(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("Model Size,Training FLOP,loss\n1e6,6e14,4.0\n\n2e6,2.4e15,3.5\n")
    runs = read_runs(path)
    assert runs.tokens == pytest.approx([1e8, 2e8]) and runs.compute == pytest.approx([6e14, 2.4e15])
    path.write_text("width,N,tokens,final\n1,2,3,4\n")
    assert read_runs(path, parameters="width", losses="final").parameters == pytest.approx([1])
    with pytest.raises(InputError, match="no column 'wide' for parameters; it has 'width', 'N', 'tokens', 'final'"):
        read_runs(path, parameters="wide", losses="final")
    with pytest.raises(InputError, match="no such file"):
        read_runs(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (made_runs(EPOCH, 5, 0), r"5 run\(s\): a law of 5 coefficients needs at least 6"),
        (Runs(numpy.full(8, 1e6), numpy.logspace(6, 9, 8), numpy.linspace(4, 3, 8)), "the runs have 1 different N"),
        (Runs(numpy.logspace(6, 9, 8), [1e8, 2e8] * 4, numpy.linspace(4, 3, 8)), "the runs have 2 different D"),
    ],
)
def test_tables_that_determine_nothing_are_refused(runs, message):
    with pytest.raises(InputError, match=message):
        fit_law(runs)


@pytest.mark.slow
def test_losses_that_rise_are_no_law():
    runs = made_runs(EPOCH, 30, 0)
    rising = runs.losses * (runs.parameters / 1e8) ** 0.3
    with pytest.raises(InputError, match="do not fall with N"):
        fit_law(Runs(runs.parameters, runs.tokens, rising))
    with pytest.raises(InputError, match="tokens of run 2 is -1"):
        Runs([1, 2], [1, -1], [3, 3])
    with pytest.raises(InputError, match=r"tokens: 1 value\(s\) for 2 loss"):
        Runs([1, 2], [1], [3, 3])
    with pytest.raises(InputError, match="between 0 and 1, got 1"):
        runs.split_by_compute(1)


@pytest.mark.slow
def test_intervals_take_any_number_of_a_law():
    fit = fit_law(made_runs(ParametricLaw(2.0, 50, 80, 0.3, 0.3), 30, 1e-3, sizes=(1e4, 1e6), tokens=(1e5, 1e7)))
    low, high = bootstrap(fit, 60, seed=1).interval(lambda law: float(law.loss(4e6, 4e7)), level=0.8)
    assert low < high < low * 1.05
