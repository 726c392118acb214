"""Scaling laws: the stage, and the study of a table of runs."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.errors import InputError
from hfllm.outputs.report import read_report
from hfllm.runs.command_line import say
from hfllm.runs.identity import finished_run
from hfllm.runs.stage import Stage
from hfllm.scaling.fitting import DROP, Fit, Outliers, Runs, bootstrap, find_outliers, fit_law, read_runs
from hfllm.scaling.report import Study
from hfllm.scaling.studies import Forecast, fit_kaplan
from hfllm.stages.scaling_laws.flags import PROBE_FLAGS, ScalingArguments

if TYPE_CHECKING:
    from hfllm.stages.scaling_laws.build import SmallGrid


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
