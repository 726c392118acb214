"""Scaling laws: the study of a table of runs with its metrics, tables and plots, and the stage."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from hfllm.errors import InputError
from hfllm.outputs.report import Plot, read_report
from hfllm.runs.command_line import say
from hfllm.runs.identity import finished_run
from hfllm.runs.stage import Stage
from hfllm.scaling import laws
from hfllm.scaling.fitting import (
    COEFFICIENTS,
    DROP,
    Bootstrap,
    Fit,
    Outliers,
    Runs,
    bootstrap,
    find_outliers,
    fit_law,
    outlier_tables,
    read_runs,
)
from hfllm.scaling.studies import (
    CHINCHILLA,
    KAPLAN,
    Forecast,
    IsoFlop,
    fit_kaplan,
    frontier_law,
    isoflop_law,
    isoflops,
)
from hfllm.stages.scaling_laws.flags import PROBE_FLAGS, ScalingArguments

if TYPE_CHECKING:
    from hfllm.stages.scaling_laws.build import SmallGrid

# ---- the study of runs: metrics, tables, plots ----

MOST_HELD_OUT, MOST_PARABOLAS = 30, 8


@dataclass(frozen=True)
class Study:
    """A law with a test on held-out runs.

    Args:
        forecast: fitted without the held-out runs, to predict their losses.
        held_out: runs with more compute.
        whole, whole_resampled: fitted to all runs.
        tolerance: see `isoflops`.
        outliers: runs far from the law of the others, in or left out of the fits; `None` if not searched.
    """

    forecast: Forecast
    held_out: Runs
    whole: Fit
    whole_resampled: Bootstrap
    tolerance: float
    outliers: Outliers | None = None

    @property
    def small(self) -> Fit:
        """Return Chinchilla's law, fitted without the held-out runs."""
        return self.forecast.fit

    @cached_property
    def budgets(self) -> list[IsoFlop]:
        """Return the IsoFLOP budgets among all runs."""
        return isoflops(self.whole.runs, self.tolerance)

    @property
    def largest(self) -> float:
        """Return the most compute of any run, in FLOPs."""
        return float(self.whole.runs.compute.max())

    def metrics(self) -> dict[str, float]:
        """Return the metrics, named as in docs/guides/scaling_laws.md."""
        errors = self.forecast.errors(self.held_out)
        by_form = {
            f"held_out_error_{form}": float(abs(self.forecast.errors(self.held_out, form)).mean())
            for form in (CHINCHILLA, KAPLAN)
        }
        metrics = {
            **vars(self.whole.law),
            "objective": self.whole.objective,
            "runs": len(self.whole.runs),
            "fit_error": float(abs(self.whole.relative_errors()).mean()),
            "parameters_exponent": self.whole.law.exponents[0],
            "tokens_per_parameter": self.whole.law.optimal(self.largest).tokens_per_parameter,
            "outliers": 0 if self.outliers is None else len(self.outliers),
            "held_out_runs": len(self.held_out),
            "held_out_error": float(abs(errors).mean()),
            "held_out_error_max": float(abs(errors).max()),
            **by_form,
            "objective_without_held_out_chinchilla": self.small.objective,
            "objective_without_held_out_kaplan": self.forecast.kaplan.objective,
            "held_out_compute_factor": self.largest / float(self.small.runs.compute.max()),
        }
        fall = float(self.small.runs.losses.min() - self.held_out.losses.min())
        if len(self.held_out) == 1 and fall > 0:
            # A nearly constant loss is easy to predict: compute the error relative to its change.
            metrics["held_out_error_of_the_fall"] = metrics["held_out_error"] * float(self.held_out.losses[0]) / fall
        return metrics

    def tables(self, budgets: Sequence[float] | None = None) -> dict[str, list[dict[str, Any]]]:
        """Return tables by title; `budgets` are FLOPs to divide, by default ten times the largest run's."""
        best, starts = self.whole.starts[1], self.whole.starts[0]
        return {
            f"Coefficients of Chinchilla's law (of the best {starts} starts, {best} end here)": self._coefficients(),
            "Compute-optimal size by approach, of Chinchilla's law": self._approaches(),
            f"Held-out runs, predicted by the better law ({self.forecast.form})": self._held_out(),
            "What a budget is best spent on, by Chinchilla's law": self._budgets(budgets or [10 * self.largest]),
            **outlier_tables(self.outliers),
        }

    def _coefficients(self) -> list[dict[str, Any]]:
        of: dict[str, Callable] = {name: (lambda law, name=name: getattr(law, name)) for name in COEFFICIENTS}
        of["exponent of N"] = lambda law: law.exponents[0]
        ratio = f"tokens per parameter at {self.largest:.3g} FLOPs"
        of[ratio] = lambda law: law.optimal(self.largest).tokens_per_parameter
        rows = []
        for name, function in of.items():
            low, high = self.whole_resampled.interval(function)
            published = {
                "Hoffmann et al. 2022": function(laws.CHINCHILLA),
                "Besiroglu et al. 2024": function(laws.EPOCH),
            }
            rows.append(
                {"coefficient": name, "fit": function(self.whole.law), "95% from": low, "to": high, **published}
            )
        return rows

    def _approaches(self) -> list[dict[str, Any]]:
        inside = sum(budget.is_inside for budget in self.budgets)
        approaches: dict[str, Callable] = {
            "1, runs that none of as little compute beats": lambda: frontier_law(self.whole.runs),
            f"2, {inside} IsoFLOP parabolas": lambda: isoflop_law(self.budgets),
            "3, the fit": lambda: self.whole.law,
        }
        rows = []
        for number, (name, law_of) in enumerate(approaches.items(), start=1):
            row = {"approach": name, "exponent of N": "", "Hoffmann et al. 2022": laws.CHINCHILLA_EXPONENTS[number][0]}
            try:
                law = law_of()
                exponent = law.exponents[0] if isinstance(law, laws.ParametricLaw) else law.exponent
                ratio = law.optimal(self.largest).tokens_per_parameter
                rows.append({**row, "exponent of N": exponent, "tokens per parameter": ratio})
            except InputError as error:
                rows.append({**row, "exponent of N": "none", "tokens per parameter": str(error)})
        return rows

    def _held_out(self) -> list[dict[str, Any]]:
        rows = []
        for row in self.held_out.compute.argsort()[-MOST_HELD_OUT:]:
            columns = self.held_out.parameters, self.held_out.tokens, self.held_out.losses
            parameters, tokens, loss = (float(values[row]) for values in columns)
            expected, (low, high) = self.forecast.loss(parameters, tokens), self.forecast.interval(parameters, tokens)
            other = CHINCHILLA if self.forecast.form == KAPLAN else KAPLAN
            rows.append(
                {
                    "N": f"{parameters:.4g}",
                    "D": f"{tokens:.4g}",
                    "FLOPs": f"{6 * parameters * tokens:.3g}",
                    "expected": f"{expected:.4f}",
                    "95% from": f"{low:.4f}",
                    "to": f"{high:.4f}",
                    "measured": f"{loss:.4f}",
                    "error": f"{expected / loss - 1:+.2%}",
                    f"by {other}": f"{self.forecast.loss(parameters, tokens, other):.4f}",
                }
            )
        return rows

    def _budgets(self, budgets: Sequence[float]) -> list[dict[str, Any]]:
        rows = []
        for compute in budgets:
            low, high = self.whole_resampled.interval(lambda law, compute=compute: law.optimal(compute).parameters)
            spent = {
                f"this fit (N from {low:.3g} to {high:.3g})": self.whole.law.optimal(compute),
                "D = 20 N": laws.optimal_by_ratio(compute),
                "Hoffmann et al. 2022, approach 1": laws.chinchilla_projection(1).optimal(compute),
                "Hoffmann et al. 2022, approach 2": laws.chinchilla_projection(2).optimal(compute),
                "Hoffmann et al. 2022, approach 3 as printed": laws.CHINCHILLA.optimal(compute),
                "Besiroglu et al. 2024": laws.EPOCH.optimal(compute),
                "Kaplan et al. 2020": laws.KAPLAN.optimal(compute),
            }
            for name, each in spent.items():
                numbers = {"N": each.parameters, "D": each.tokens, "tokens per parameter": each.tokens_per_parameter}
                formatted = {label: f"{number:.3g}" for label, number in numbers.items()}
                rows.append({"FLOPs": f"{compute:.3g}", "law": name, **formatted})
        return rows

    def plots(self) -> dict[str, Plot]:
        """Plot loss over compute, expected over measured losses, optimal sizes, and any IsoFLOP parabolas."""
        compute = numpy.geomspace(self.whole.runs.compute.min(), self.largest, 60)
        spent = [self.whole.law.optimal(each) for each in compute]
        groups = {"fitted runs": self.small.runs, "held-out runs": self.held_out}
        ends = [float(self.whole.runs.losses.min()), float(self.whole.runs.losses.max())]
        sizes = {
            "the fit": [each.parameters for each in spent],
            "D = 20 N": [laws.optimal_by_ratio(each).parameters for each in compute],
            "Kaplan et al. 2020": [laws.KAPLAN.optimal(each).parameters for each in compute],
        }
        minima = [budget.compute for budget in self.budgets], [budget.parameters for budget in self.budgets]
        return {
            "loss_by_compute": Plot(
                "Loss over compute",
                "FLOPs",
                "held-out loss, nats per token",
                {
                    "the fit at its best N and D": (
                        compute,
                        [self.whole.law.loss(each.parameters, each.tokens) for each in spent],
                    )
                },
                points={label: (runs.compute, runs.losses) for label, runs in groups.items()},
                xscale="log",
            ),
            "expected_and_measured": Plot(
                "What the fit without the held-out runs expects",
                "measured loss, nats per token",
                "expected loss",
                {"as expected": (ends, ends)},
                points={
                    label: (runs.losses, runs.losses * (1 + self.forecast.errors(runs)))
                    for label, runs in groups.items()
                },
            ),
            "optimal_size": Plot(
                "Compute-optimal size",
                "FLOPs",
                "parameters",
                {label: (compute, values) for label, values in sizes.items()},
                points={"IsoFLOP minima": minima},
                xscale="log",
                yscale="log",
            ),
            "isoflops": self._parabolas(),
        }

    def _parabolas(self) -> Plot:
        lines, points = {}, {}
        indices = numpy.linspace(0, len(self.budgets) - 1, min(MOST_PARABOLAS, len(self.budgets)))
        for budget in (self.budgets[round(index)] for index in indices):
            sizes = numpy.geomspace(budget.runs.parameters.min(), budget.runs.parameters.max(), 40)
            lines[f"{budget.compute:.2g} FLOPs"] = sizes, budget.loss(sizes)
            # A label with a leading underscore is not shown in the legend.
            points[f"_{budget.compute}"] = budget.runs.parameters, budget.runs.losses
        return Plot(
            "IsoFLOP parabolas", "parameters", "held-out loss, nats per token", lines, points=points, xscale="log"
        )


# ---- the stage ----


class ScalingStage(Stage):
    """A stage with its single runs kept: if its report is removed, only missing runs are trained.

    A finished stage without the requested probe counts as unfinished, and only the probe is made. A stage with the
    probe also serves a run without it.
    """

    redo = "remove report.json there to redo it"

    @cached_property
    def report(self) -> dict[str, Any] | None:
        """The report of the same run if it has already finished in the output folder, else `None`."""
        report = read_report(self.output_dir)
        if report is None:
            return None
        before = report["arguments"]
        if self.arguments["probe"] and before.get("probe"):
            return finished_run(self.output_dir, self.arguments)
        apart_from_probe = self.arguments | {name: before.get(name) for name in PROBE_FLAGS}
        done = finished_run(self.output_dir, apart_from_probe)
        return None if self.arguments["probe"] else done


def study_of(script_args: ScalingArguments, grid: "SmallGrid | None") -> Study:
    """Fit the smaller runs, measure how well they predict the losses of the larger, then fit all."""
    delta, sampling = script_args.huber_delta, (script_args.resamples, script_args.seed, script_args.huber_delta)
    outliers = None
    if grid is not None:
        forecast = forecast_of(grid.small_runs(), delta, sampling)
        held_out = grid.large_run(forecast)
        both = zip(forecast.fit.runs.columns, held_out.columns, strict=True)
        runs = Runs(*([*fitted, *predicted] for fitted, predicted in both))
    else:
        columns = script_args.parameters_column, script_args.tokens_column, script_args.loss_column
        runs = read_runs(script_args.runs, *columns)
        if script_args.outliers == DROP:
            outliers = outliers_of(script_args.runs, runs, delta, drops=True)
            runs = outliers.inliers
        fitted, held_out = runs.split_by_compute(script_args.held_out_share)
        try:
            forecast = forecast_of(fitted, delta, sampling)
        except InputError as error:
            raise InputError(f"{script_args.runs}, without its {len(held_out)} largest run(s): {error}") from None
    try:
        whole = fit_law(runs, delta)
    except InputError as error:
        raise InputError(f"{script_args.runs or Path(script_args.output_dir) / 'runs.csv'}: {error}") from None
    if grid is None and outliers is None:
        outliers = outliers_of(script_args.runs, runs, delta, drops=False, fit=whole)
    resampled = bootstrap(whole, *sampling)
    return Study(forecast, held_out, whole, resampled, script_args.isoflop_tolerance, outliers)


def outliers_of(file: str, runs: Runs, delta: float, drops: bool, fit: Fit | None = None) -> Outliers:
    """Return the file's runs far from the law of the others, after a warning with their names.

    Args:
        delta: error above which the Huber loss is linear.
        drops: whether they are left out.
        fit: of the law to all runs, if there is one.
    """
    try:
        outliers = find_outliers(runs, delta, fit)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    if len(outliers):
        say(f"scaling_laws: {outliers.warning(file, drops)}")
    return outliers


def forecast_of(runs: Runs, delta: float, sampling: tuple[int, int, float]) -> Forecast:
    """Return both laws, fitted to the runs not held out.

    Args:
        delta: error above which the Huber loss is linear.
        sampling: resamples of the bootstrap, their seed, and `delta`.
    """
    fit = fit_law(runs, delta)
    return Forecast(fit, bootstrap(fit, *sampling), fit_kaplan(runs, *sampling))
