"""Fit a scaling law to runs, predict a larger one, say how to divide compute between model and data.

    python recipes/scaling_laws.py --runs runs.csv                       # columns N, D, loss, under common names
    accelerate launch recipes/scaling_laws.py                            # train a small grid on Python's documentation
    accelerate launch recipes/scaling_laws.py --dataset_name my_texts.jsonl
    accelerate launch recipes/scaling_laws.py --dataset_name world --probe true   # also: what the sizes can do

Without `--runs` a grid of small models is trained (runs that runs.csv holds already are taken from there), two laws
are fitted, a larger run is predicted by the better one, and then trained. docs/scaling_laws.md explains all of it.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hfllm.data.loading import DataArguments
from hfllm.data.sources import PYDOC, WORLD
from hfllm.errors import InputError
from hfllm.runs.command_line import finished_run, main_process, parse_recipe, run, run_arguments

PRETRAIN_CONFIG = Path(__file__).parent / "configs" / "pretrain" / "grid.yaml"
GRID = tuple(f"{width}x2:400000,800000,1600000" for width in (16, 24, 32, 48))
COUNTS = {"total": "parameters", "non_embedding": "parameters_non_embedding"}
TABLE_FLAGS = ("parameters_column", "tokens_column", "loss_column", "held_out_share")
GRID_FLAGS = ("grid", "held_out_run", "count_parameters", "pretrain_config", "probe")
GRID_FLAGS += tuple(item.name for item in fields(DataArguments))
LARGEST_SEED = 2**32 - 1  # numpy's, which transformers seeds
PROBE_FLAGS = ("probe", "probe_questions", "probe_shots")


@dataclass
class ScalingArguments(DataArguments):
    """Runs to fit, or a grid of runs to train."""

    dataset_name: str = field(
        default=PYDOC,
        metadata={
            "help": "Texts of the grid: 'pydoc', the documentation of this Python, 'world' (embedded), a local file "
            "or folder, or a dataset id on the Hub."
        },
    )
    runs: str | None = field(
        default=None, metadata={"help": "CSV file of finished runs; without it a grid is trained."}
    )
    parameters_column: str | None = field(default=None, metadata={"help": "Its column of N, if not a common name."})
    tokens_column: str | None = field(default=None, metadata={"help": "Its column of D, if not a common name."})
    loss_column: str | None = field(default=None, metadata={"help": "Its column of losses, if not a common name."})
    held_out_share: float = field(
        default=0.1, metadata={"help": "Share of the file's runs, those of most compute, that are predicted."}
    )
    resamples: int = field(default=1000, metadata={"help": "Bootstrap resamples behind the 95%% intervals."})
    huber_delta: float = field(
        default=1e-3, metadata={"help": "Error in log loss from which on Huber's loss is linear."}
    )
    isoflop_tolerance: float = field(
        default=0.05, metadata={"help": "How far, up and down, the compute of one IsoFLOP budget's runs may differ."}
    )
    budgets: list[float] | None = field(
        default=None,
        metadata={"help": "FLOPs to divide between N and D in the report; by default ten times the largest run's."},
    )
    grid: list[str] = field(
        default_factory=lambda: [*GRID],
        metadata={"help": "Models and the tokens that each is trained on, WIDTHxLAYERS:TOKENS,... once a model."},
    )
    held_out_run: str = field(
        default="64x3:2400000",
        metadata={"help": "The run that is predicted, WIDTHxLAYERS:TOKENS; of more compute than all of the grid."},
    )
    count_parameters: str = field(
        default="total",
        metadata={
            "help": "N of the grid: 'total', Chinchilla's, or 'non_embedding', Kaplan's. runs.csv has both.",
            "choices": list(COUNTS),
        },
    )
    pretrain_config: str | None = field(
        default=None, metadata={"help": "YAML flags of recipes/pretrain.py for all runs of the grid."}
    )
    probe: bool = field(
        default=False,
        metadata={"help": "Ask each size the world's questions, and draw exact match beside log-likelihood."},
    )
    probe_questions: int = field(default=50, metadata={"help": "Questions of each task family."})
    probe_shots: int = field(default=1, metadata={"help": "Solved examples before a few-shot question."})
    seed: int = field(default=42, metadata={"help": "Of the grid's data and weights, and of the bootstrap."})
    output_dir: str = field(default="outputs/scaling_laws", metadata={"help": "Where runs, models and report go."})


def parse(argv: Sequence[str]) -> tuple:
    return parse_recipe((ScalingArguments,), argv, None, __doc__)


def main(script_args: ScalingArguments) -> dict[str, float]:
    """Train the grid if there is no file of runs, fit, predict, write the report. Returns the metrics."""
    check(script_args)
    began, folder = time.perf_counter(), Path(script_args.output_dir)
    arguments = run_arguments(script_args)
    for flag in ("runs", "dataset_name", "pretrain_config"):
        path = Path(getattr(script_args, flag) or "")
        if path.is_file():
            arguments[f"{flag} changed at"] = path.stat().st_mtime_ns
    done = earlier_report(folder, arguments)
    if done is not None:
        if main_process():
            print(f"scaling_laws: already done in {folder} (remove report.json there to redo it)", flush=True)
        return done["metrics"]
    grid = None if script_args.runs else SmallGrid(script_args)
    study = study_of(script_args, grid)
    metrics, tables, curves = study.metrics(), study.tables(script_args.budgets), study.plots()
    if grid is not None:
        tables["Runs"] = grid.table()
    if script_args.probe:
        probed = grid.probe()
        metrics, tables, curves = metrics | probed.metrics(), tables | probed.tables(), curves | probed.plots()
    if main_process():
        write_report(script_args, arguments, metrics, tables, curves, time.perf_counter() - began)
    return metrics


def study_of(script_args: ScalingArguments, grid: "SmallGrid | None") -> Any:
    """Fit the smaller runs, see how well they tell the losses of the larger, then fit all.

    Raises:
        InputError: for a table that cannot be fitted, naming its file.
    """
    from hfllm.scaling.fitting import bootstrap, fit_law
    from hfllm.scaling.report import Study
    from hfllm.scaling.runs import Runs, read_runs

    delta, sampling = script_args.huber_delta, (script_args.resamples, script_args.seed, script_args.huber_delta)
    if grid is not None:
        forecast = forecast_of(grid.small_runs(), delta, sampling)
        held_out = grid.large_run(forecast)
        both = zip(forecast.fit.runs.columns, held_out.columns, strict=True)
        runs = Runs(*([*fitted, *predicted] for fitted, predicted in both))
    else:
        columns = script_args.parameters_column, script_args.tokens_column, script_args.loss_column
        runs = read_runs(script_args.runs, *columns)
        fitted, held_out = runs.split_by_compute(script_args.held_out_share)
        try:
            forecast = forecast_of(fitted, delta, sampling)
        except InputError as error:
            raise InputError(f"{script_args.runs}, without its {len(held_out)} largest run(s): {error}") from None
    try:
        whole = fit_law(runs, delta)
    except InputError as error:
        raise InputError(f"{script_args.runs or Path(script_args.output_dir) / 'runs.csv'}: {error}") from None
    return Study(forecast, held_out, whole, bootstrap(whole, *sampling), script_args.isoflop_tolerance)


def forecast_of(runs: Any, delta: float, sampling: tuple) -> Any:
    """Both laws, fitted to the runs that are not held out."""
    from hfllm.scaling.fitting import bootstrap, fit_law
    from hfllm.scaling.forecast import Forecast, fit_kaplan

    fit = fit_law(runs, delta)
    return Forecast(fit, bootstrap(fit, *sampling), fit_kaplan(runs, *sampling))


def check(script_args: ScalingArguments) -> None:
    """Refuse flags that would have no effect, and numbers without meaning.

    Raises:
        InputError: naming the flag.
    """
    from hfllm.errors import refuse

    plain = ScalingArguments()
    for flag in GRID_FLAGS if script_args.runs else TABLE_FLAGS:
        changed = getattr(script_args, flag) != getattr(plain, flag)
        refuse(
            changed,
            f"--{flag}",
            "it is of the grid, and --runs takes its place" if script_args.runs else "it is of --runs",
        )
    for flag in ("probe_questions", "probe_shots"):
        refuse(
            not script_args.probe and getattr(script_args, flag) != getattr(plain, flag),
            f"--{flag}",
            "it needs --probe",
        )
    is_world = script_args.dataset_name == WORLD
    refuse(script_args.probe and not is_world, "--probe", "its questions are those of --dataset_name world")
    is_other = not is_world and not script_args.runs and script_args.world_seed != plain.world_seed
    refuse(is_other, "--world_seed", "it is of --dataset_name world")
    refuse(is_world and script_args.max_samples is not None, "--max_samples", "the world is as large as the runs need")
    for flag, least in (("resamples", 10), ("probe_questions", 1), ("probe_shots", 1)):
        if getattr(script_args, flag) < least:
            raise InputError(f"--{flag} must be at least {least}, got {getattr(script_args, flag)}")
    for flag in ("huber_delta", "isoflop_tolerance"):
        if not 0 < getattr(script_args, flag) < float("inf"):
            raise InputError(f"--{flag} must be above 0 and finite, got {getattr(script_args, flag)}")
    if not 0 < script_args.held_out_share < 1:
        raise InputError(f"--held_out_share must lie between 0 and 1, got {script_args.held_out_share}")
    for budget in script_args.budgets or []:
        if not 0 < budget < float("inf"):
            raise InputError(f"--budgets {budget}: FLOPs must be above 0 and finite")
    if not 0 <= script_args.seed <= LARGEST_SEED:
        raise InputError(f"--seed must lie between 0 and {LARGEST_SEED}, got {script_args.seed}")


def earlier_report(folder: Path, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """The report of the same run, unless it lacks the probe that is asked for now: then only that is missing.

    Raises:
        InputError: when a run with other arguments has finished there.
    """
    from hfllm.outputs.report import read_report

    report = read_report(folder)
    if report is None:
        return None
    before = report["arguments"]
    if arguments["probe"] and before.get("probe"):
        return finished_run(str(folder), arguments)
    done = finished_run(str(folder), arguments | {flag: before.get(flag) for flag in PROBE_FLAGS})
    return None if arguments["probe"] else done


# ---- the grid ----


class SmallGrid:
    """The recipe's grid of runs, and the larger run that it predicts."""

    def __init__(self, script_args: ScalingArguments):
        import pretrain

        from hfllm.stages.scaling_grid import Grid, GridRun

        self.script_args, self.column = script_args, COUNTS[script_args.count_parameters]
        self.runs = [each for text in script_args.grid for each in GridRun.parse(text, "--grid")]
        self.large, *others = GridRun.parse(script_args.held_out_run, "--held_out_run")
        if others:
            raise InputError(f"--held_out_run {script_args.held_out_run!r}: expected a single number of tokens")
        # The cheapest first, so that what is wrong shows early.
        self.runs.sort(key=lambda each: (each.tokens, each.hidden_size, each.num_hidden_layers))
        if len({*self.runs, self.large}) <= len(self.runs):
            raise InputError("--grid, --held_out_run: a run comes twice")
        flags = ["--seed", str(script_args.seed)]
        for flag in ("dataset_name", "dataset_train_split", "max_samples", "world_seed"):
            if (value := getattr(script_args, flag)) is not None:
                flags += [f"--{flag}", str(value)]
        own = ["--config", script_args.pretrain_config] if script_args.pretrain_config else []
        flags = ["--config", str(PRETRAIN_CONFIG), *own, *flags]
        longest = max(each.tokens for each in (*self.runs, self.large))
        self.grid = Grid(script_args.output_dir, pretrain.parse, pretrain.ARCHITECTURE, flags, longest)

    def small_runs(self) -> Any:
        """The table of the grid's runs, those that are missing trained first.

        Raises:
            InputError: before any training, when the grid could not be fitted.
        """
        from hfllm.scaling.fitting import FEWEST_RUNS

        sizes = {(each.hidden_size, each.num_hidden_layers) for each in self.runs}
        lengths = {each.tokens for each in self.runs}
        if min(len(sizes), len(lengths)) < 3 or len(self.runs) < FEWEST_RUNS:
            raise InputError(
                f"--grid has {len(sizes)} size(s), {len(lengths)} length(s) and {len(self.runs)} run(s): a fit needs "
                f"at least 3, 3 and {FEWEST_RUNS}"
            )
        self._check_held_out()
        return self._runs([self.grid.train(each) for each in self.runs])

    def _check_held_out(self) -> None:
        """Refuse to call a run that lies within the grid predicted: that is interpolation.

        Raises:
            InputError: when a run of the grid takes as much compute.
        """
        largest = max((self.grid.planned(each)["compute"], each.name) for each in self.runs)
        compute = self.grid.planned(self.large)["compute"]
        if compute <= largest[0]:
            raise InputError(
                f"--held_out_run {self.script_args.held_out_run} takes {compute:.3g} FLOPs, no more than the grid's "
                f"{largest[1]} with {largest[0]:.3g}: the run to predict must be larger than all of --grid"
            )

    def large_run(self, forecast: Any) -> Any:
        """Say what is expected of the larger run, then train it."""
        from hfllm.scaling.forecast import CHINCHILLA, KAPLAN
        from hfllm.scaling.report import formula

        planned = self.grid.planned(self.large)
        parameters, tokens = planned[self.column], planned["tokens"]
        low, high = forecast.interval(parameters, tokens)
        if main_process():
            for form, fit in ((CHINCHILLA, forecast.fit), (KAPLAN, forecast.kaplan)):
                better = "fits better" if form == forecast.form else "fits worse"
                print(f"scaling_laws: {form}, {better}: L(N, D) = {formula(fit.law)}", flush=True)
            print(
                f"run {self.large.name}: {forecast.loss(parameters, tokens):.4f} nats a token are expected "
                f"(95% interval {low:.4f} to {high:.4f})",
                flush=True,
            )
        return self._runs([self.grid.train(self.large)])

    def table(self) -> list[dict[str, Any]]:
        """All runs as rows of the report."""
        return [self.grid.rows[each.name] for each in (*self.runs, self.large)]

    def probe(self) -> Any:
        """What each run can do (an `Emergence`)."""
        from hfllm.data.world.world import World
        from hfllm.evaluation.emergence import Emergence, ProbedRun
        from hfllm.evaluation.few_shot import make_probes, run_probes
        from hfllm.models.modeling_hfllm import HfllmForCausalLM
        from hfllm.runs.models import load_tokenizer

        args, probed = self.script_args, []
        probes = make_probes(World(args.world_seed), args.probe_questions, args.probe_shots, args.seed)
        for each in (*self.runs, self.large):
            folder = str(self.grid.model_folder(each))
            model, tokenizer = HfllmForCausalLM.from_pretrained(folder), load_tokenizer(folder)
            row, rows = self.grid.rows[each.name], run_probes(model, tokenizer, probes)
            probed.append(ProbedRun(each.name, row[self.column], row["compute"], row["loss"], rows))
        return Emergence(probed)

    def _runs(self, rows: list[dict[str, Any]]) -> Any:
        from hfllm.scaling.runs import Runs

        return Runs(*([row[name] for row in rows] for name in (self.column, "tokens", "loss")))


def write_report(
    script_args: ScalingArguments,
    arguments: dict[str, Any],
    metrics: dict[str, float],
    tables: dict[str, list],
    curves: dict[str, Any],
    seconds: float,
) -> None:
    """Write report.json, report.md and the plots, and print what is short."""
    from hfllm.outputs.report import Report

    table = script_args.runs or str(Path(script_args.output_dir) / "runs.csv")
    report = Report(
        stage="scaling_laws",
        arguments=arguments,
        metrics=metrics,
        tables=tables,
        curves=curves,
        artifacts={"runs": table},
        wall_seconds=seconds,
        next_steps=[f"python recipes/scaling_laws.py --runs {table} --output_dir outputs/refit"],
    )
    report.write(script_args.output_dir)
    report.print()


if __name__ == "__main__":
    run(main, parse)
