"""Scaling laws: flags, their checks, the grid of small runs, and the study of a table of runs."""

import csv
import io
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hfllm.data.loading import ON_WORLD, DataArguments
from hfllm.data.sources import PYDOC, WORLD
from hfllm.errors import InputError, refuse
from hfllm.fingerprint import file_fingerprint
from hfllm.flags import POSITIVE, SEED, Fact, Range, Refused, at_least, check_flags, flag
from hfllm.outputs.report import CHANGED, CONTENTS, read_report, write_atomically
from hfllm.runs.arguments import changed
from hfllm.runs.command_line import main_process, parse_recipe, say
from hfllm.runs.flags import RemoteCodeArguments
from hfllm.runs.identity import finished_run
from hfllm.runs.recipes import settings_file
from hfllm.runs.stage import Stage, stage_arguments
from hfllm.stages.pretrain.flags import LIBRARY, PretrainArguments, default_settings

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
    from trl import ModelConfig

    from hfllm.evaluation.emergence import Emergence, Probe
    from hfllm.scaling.fitting import Fit, Outliers, Runs
    from hfllm.scaling.report import Study
    from hfllm.scaling.studies import Forecast


# ---- flags ----


GRID = tuple(f"{width}x2:400000,800000,1600000" for width in (16, 24, 32, 48))
COUNTS = {"total": "parameters", "non_embedding": "parameters_non_embedding"}
PROBE_FLAGS = ("probe", "probe_questions", "probe_shots")
NO_TABLE = Fact(lambda flags: not flags.runs, "it is for --runs")
FROM_TABLE = NO_TABLE.absent("it is for the grid, which --runs replaces")
NO_PROBE = Fact(lambda flags: not flags.probe, "it needs --probe")


@dataclass(frozen=True)
class ScalingArguments(DataArguments, RemoteCodeArguments):
    """Runs to fit, or a grid of runs to train."""

    dataset_name: str = flag(
        PYDOC,
        "Texts of the grid: 'pydoc', the documentation of this Python, 'world' (embedded), a local file "
        "or folder, or a dataset id on the Hub.",
    )
    runs: str | None = flag(None, "CSV file of finished runs; without it a grid is trained.")
    parameters_column: str | None = flag(None, "Its column of N, if not a common name.", never=NO_TABLE)
    tokens_column: str | None = flag(None, "Its column of D, if not a common name.", never=NO_TABLE)
    loss_column: str | None = flag(None, "Its column of losses, if not a common name.", never=NO_TABLE)
    held_out_share: float = flag(
        0.1,
        "Share of the file's runs, those with the most compute, to predict.",
        takes=Range("a share between 0 and 1", lambda value: 0 < value < 1),
        never=NO_TABLE,
    )
    outliers: str = flag(
        "keep",
        "What to do with the file's runs that are far from the law of the others: 'keep' and name them, "
        "or 'drop' them.",
        choices=["keep", "drop"],
        never=NO_TABLE,
    )
    resamples: int = flag(1000, "Bootstrap resamples behind the 95%% intervals.", takes=at_least(10))
    huber_delta: float = flag(1e-3, "Error in log loss above which the Huber loss is linear.", takes=POSITIVE)
    isoflop_tolerance: float = flag(
        0.05, "How far the compute of runs may lie above or below their IsoFLOP budget, as a share.", takes=POSITIVE
    )
    budgets: list[float] | None = flag(
        None, "FLOPs to divide between N and D in the report; by default ten times the largest run's."
    )
    grid: list[str] = flag(
        GRID, "Models and their training tokens: WIDTHxLAYERS:TOKENS,... once per model.", never=FROM_TABLE
    )
    held_out_run: str = flag(
        "64x3:2400000",
        "The run to predict, WIDTHxLAYERS:TOKENS, with more compute than any of the grid.",
        never=FROM_TABLE,
    )
    count_parameters: str = flag(
        "total",
        "N of the grid: 'total', Chinchilla's, or 'non_embedding', Kaplan's. runs.csv has both.",
        choices=list(COUNTS),
        never=FROM_TABLE,
    )
    pretrain_config: str | None = flag(
        None, "YAML flags of `hfllm pretrain` for all runs of the grid.", never=FROM_TABLE
    )
    probe: bool = flag(
        False,
        "Ask each size the world's questions, and plot exact match beside log-likelihood.",
        never=(FROM_TABLE, ON_WORLD.absent("its questions need --dataset_name world")),
    )
    probe_questions: int = flag(50, "Questions of each task family.", takes=at_least(1), never=NO_PROBE)
    probe_shots: int = flag(1, "Solved examples before a few-shot question.", takes=at_least(1), never=NO_PROBE)
    seed: int = flag(42, "Seed of the grid's data and weights, and of the bootstrap.", takes=SEED)
    output_dir: str = flag("outputs/scaling_laws", "Where runs, models and report go.")

    refused: ClassVar[Refused] = {
        **dict.fromkeys([item.name for item in fields(DataArguments)], FROM_TABLE),
        "world_seed": (FROM_TABLE, ON_WORLD.absent("it is for --dataset_name world")),
        "max_samples": (FROM_TABLE, ON_WORLD.because("the world is as large as the runs need")),
    }

    def pretrain_flags(self) -> list[str]:
        """Return the flags of `hfllm pretrain` for all runs of the grid."""
        flags = ["--config", str(settings_file("pretrain/grid.yaml"))]
        flags += ["--config", self.pretrain_config] if self.pretrain_config else []
        flags += ["--seed", str(self.seed)]
        of_data = ("dataset_name", "dataset_train_split", "dataset_config", "dataset_revision", "max_samples")
        for name in (*of_data, "world_seed", "dataset_streaming"):
            if (value := getattr(self, name)) is not None:
                flags += [f"--{name}", str(value)]
        return flags + (["--column_mapping", *self.column_mapping] if self.column_mapping else [])

    def table_files(self) -> dict[str, Any]:
        """Return the times and contents of the files of runs and flags, for `Stage`."""
        files = {name: Path(getattr(self, name) or "") for name in ("runs", "pretrain_config")}
        files = {name: path for name, path in files.items() if path.is_file()}
        times = {f"{name}{CHANGED}": path.stat().st_mtime_ns for name, path in files.items()}
        return times | {f"{name}{CONTENTS}": file_fingerprint([("", path)], True) for name, path in files.items()}


# ---- what is refused ----


def check(script_args: ScalingArguments) -> None:
    """Refuse flags without effect, and numbers out of range."""
    check_flags(script_args)
    for budget in script_args.budgets or []:
        if not 0 < budget < float("inf"):
            raise InputError(f"--budgets {budget}: FLOPs must be above 0 and finite")


# ---- the run ----


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


def study_of(script_args: ScalingArguments, grid: "SmallGrid | None") -> "Study":
    """Fit the smaller runs, measure how well they predict the losses of the larger, then fit all."""
    from hfllm.scaling.fitting import DROP, Runs, bootstrap, fit_law, read_runs
    from hfllm.scaling.report import Study

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


def outliers_of(file: str, runs: "Runs", delta: float, drops: bool, fit: "Fit | None" = None) -> "Outliers":
    """Return the file's runs far from the law of the others, after a warning with their names.

    Args:
        delta: error above which the Huber loss is linear.
        drops: whether they are left out.
        fit: of the law to all runs, if there is one.
    """
    from hfllm.scaling.fitting import find_outliers

    try:
        outliers = find_outliers(runs, delta, fit)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    if len(outliers):
        say(f"scaling_laws: {outliers.warning(file, drops)}")
    return outliers


def forecast_of(runs: "Runs", delta: float, sampling: tuple[int, int, float]) -> "Forecast":
    """Return both laws, fitted to the runs not held out.

    Args:
        delta: error above which the Huber loss is linear.
        sampling: resamples of the bootstrap, their seed, and `delta`.
    """
    from hfllm.scaling.fitting import bootstrap, fit_law
    from hfllm.scaling.studies import Forecast, fit_kaplan

    fit = fit_law(runs, delta)
    return Forecast(fit, bootstrap(fit, *sampling), fit_kaplan(runs, *sampling))


class SmallGrid:
    """The grid of small runs, and the larger run predicted from it.

    Args:
        sizes: models and their tokens, see `GridRun.parse`.
        held_out_run: the larger run, likewise.
        column: the count of parameters that is N.
        flags: of `hfllm pretrain`, for all runs.
        output_dir: where runs.csv, the tokenizer and the models go.
    """

    def __init__(self, sizes: Sequence[str], held_out_run: str, column: str, flags: Sequence[str], output_dir: str):
        self.held_out_run, self.column = held_out_run, column
        self.runs = [each for text in sizes for each in GridRun.parse(text, "--grid")]
        self.large, *others = GridRun.parse(held_out_run, "--held_out_run")
        if others:
            raise InputError(f"--held_out_run {held_out_run!r}: expected a single number of tokens")
        # The cheapest first, so that errors show early.
        self.runs.sort(key=lambda each: (each.tokens, each.hidden_size, each.num_hidden_layers))
        if len({*self.runs, self.large}) <= len(self.runs):
            raise InputError("--grid, --held_out_run: a run comes twice")
        self.grid = Grid(output_dir, flags, max(each.tokens for each in (*self.runs, self.large)))

    def small_runs(self) -> "Runs":
        """Return the table of the grid's runs, after training the missing ones."""
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
        """Refuse a held-out run within the grid: its loss would be an interpolation, not a prediction."""
        largest = max((self.grid.planned(each)["compute"], each.name) for each in self.runs)
        compute = self.grid.planned(self.large)["compute"]
        if compute <= largest[0]:
            raise InputError(
                f"--held_out_run {self.held_out_run} takes {compute:.3g} FLOPs, no more than the grid's "
                f"{largest[1]} with {largest[0]:.3g}: the run to predict must be larger than all of --grid"
            )

    def large_run(self, forecast: "Forecast") -> "Runs":
        """Print the loss expected of the larger run, train it, and return it as a table."""
        from hfllm.scaling.report import formula
        from hfllm.scaling.studies import CHINCHILLA, KAPLAN

        planned = self.grid.planned(self.large)
        parameters, tokens = planned[self.column], planned["tokens"]
        low, high = forecast.interval(parameters, tokens)
        if main_process():
            for form, fit in ((CHINCHILLA, forecast.fit), (KAPLAN, forecast.kaplan)):
                better = "fits better" if form == forecast.form else "fits worse"
                print(f"scaling_laws: {form}, {better}: L(N, D) = {formula(fit.law)}", flush=True)
            print(
                f"run {self.large.name}: {forecast.loss(parameters, tokens):.4f} nats per token are expected "
                f"(95% interval {low:.4f} to {high:.4f})",
                flush=True,
            )
        return self._runs([self.grid.train(self.large)])

    def table(self) -> "list[Row]":
        """Return all runs as rows of the report."""
        return [self.grid.rows[each.name] for each in (*self.runs, self.large)]

    def probe(self, probes: "Sequence[Probe]") -> "Emergence":
        """Ask each model the questions of the world, and return the results."""
        from hfllm.compression.schemes import default_device
        from hfllm.evaluation.emergence import Emergence, ProbedRun, run_probes
        from hfllm.models.family.modeling_hfllm import HfllmForCausalLM
        from hfllm.models.loading.saved import saved_model
        from hfllm.runs.models import load_tokenizer

        probed = []
        for each in (*self.runs, self.large):
            folder = str(self.grid.model_folder(each))
            model, tokenizer = saved_model(HfllmForCausalLM, folder), load_tokenizer(folder)
            model = model.to(default_device())
            row, rows = self.grid.rows[each.name], run_probes(model, tokenizer, probes)
            probed.append(ProbedRun(each.name, row[self.column], row["compute"], row["loss"], rows))
        return Emergence(probed)

    def _runs(self, rows: "list[Row]") -> "Runs":
        from hfllm.scaling.fitting import Runs

        return Runs(*([row[name] for row in rows] for name in (self.column, "tokens", "loss")))


# ---- grid ----
#
# Train a grid of small models of different size and length, one row of runs.csv per run, for a scaling law.


Row = dict[str, int | float | str]

COLUMNS = (
    *("name", "hidden_size", "num_hidden_layers", "parameters", "parameters_non_embedding", "tokens", "epochs"),
    *("compute", "loss", "seconds"),
)
RUNS_FILE, SETTINGS_FILE = "runs.csv", "grid.json"
# Adam's learning rate goes with 1 / width (Yang et al. 2022, arXiv:2203.03466, table 3), and for Muon, with
# steps of Adam's size, the same did best for widths of 16 to 96; the settings' rate is for this width.
REFERENCE_WIDTH = 128
HEAD_WIDTH = 32


@dataclass(frozen=True)
class GridRun:
    """One run of the grid.

    Args:
        hidden_size, num_hidden_layers: size of the model.
        tokens: positions of its packed rows.
    """

    hidden_size: int
    num_hidden_layers: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.hidden_size}x{self.num_hidden_layers}-{self.tokens}"

    @classmethod
    def parse(cls, text: str, flag: str) -> list["GridRun"]:
        """Parse `WIDTHxLAYERS:TOKENS,...`, such as 64x3:250000,500000.

        Heads are 32 wide, so a width must be a multiple of 32, or an even number below 64 with a single head.
        """
        size, _, lengths = text.partition(":")
        try:
            (width, layers), tokens = map(_whole, size.split("x")), [*map(_whole, lengths.split(","))]
        except ValueError:
            raise InputError(f"{flag} {text!r}: expected WIDTHxLAYERS:TOKENS,... as in 64x3:250000,500000") from None
        if width % 2 or (width >= 2 * HEAD_WIDTH and width % HEAD_WIDTH):
            raise InputError(f"{flag} {text!r}: a width must be a multiple of {HEAD_WIDTH}, or even and below 64")
        return [cls(width, layers, each) for each in tokens]

    def flags(self, learning_rate: float) -> list[str]:
        """Return the flags of `hfllm pretrain` for this run; `learning_rate` is for a model of `REFERENCE_WIDTH`."""
        values = {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": max(1, self.hidden_size // HEAD_WIDTH),
            "initializer_range": self.hidden_size**-0.5,
            "learning_rate": learning_rate * REFERENCE_WIDTH / self.hidden_size,
            "total_tokens": self.tokens,
        }
        return [word for name, value in values.items() for word in (f"--{name}", str(value))]


class Grid:
    """The runs of one folder: runs in its runs.csv are done, others are trained on request.

    Args:
        folder: where runs.csv, the tokenizer and the models go.
        flags: of `hfllm pretrain`, for all runs.
        longest: tokens of the longest run; it determines the number of the world's documents written.
    """

    def __init__(self, folder: str | Path, flags: Sequence[str], longest: int):
        self.folder, self.longest = Path(folder), longest
        self.flags = [*flags, "--output_dir", str(folder)]
        script_args, training_args, model_args = parse_run(self.flags)
        for is_refused, name, reason in (
            (not script_args.packing, "--packing false", "a run's tokens are counted in packed rows"),
            (script_args.objective != "causal", "--objective", "the law is that of next tokens"),
            (bool(script_args.dataset_mixture), "--dataset_mixture", "the runs read one dataset"),
            (bool(model_args.model_name_or_path), "--model_name_or_path", "the runs start from nothing"),
            (bool(script_args.config_name_or_path), "--config_name_or_path", "each run has its own size"),
        ):
            refuse(is_refused, name, reason)
        settings = {**stage_arguments(script_args, training_args, model_args), "longest run": longest}
        self.learning_rate, self.is_main = training_args.learning_rate, main_process()
        if not sys.stderr.isatty():
            disable_progress_bars()
        self.rows = self._read(json.loads(json.dumps(settings, default=str)))
        self._data: tuple[PreTrainedTokenizerBase, Dataset, list[str]] | None = None

    def _read(self, settings: dict[str, Any]) -> dict[str, Row]:
        """Finished runs by name. If there is none, remove the tokenizer left by runs with other settings."""
        note, table = self.folder / SETTINGS_FILE, self.folder / RUNS_FILE
        before = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
        if not table.is_file():
            if self.is_main and before != settings:
                shutil.rmtree(self.folder / "tokenizer", ignore_errors=True)
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomically(note, json.dumps(settings, indent=2) + "\n")
            return {}
        for name in sorted({*before, *settings}):
            if before.get(name) != settings.get(name):
                raise InputError(
                    f"--output_dir {self.folder} holds runs with {name}={before.get(name)!r}, this grid has "
                    f"{name}={settings.get(name)!r}: choose another folder or remove that one"
                )
        with table.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        return {row["name"]: {name: _value(row[name]) for name in COLUMNS} for row in rows}

    def train(self, run: GridRun) -> Row:
        """Return the row of a run, and train it unless it is done."""
        if run.name not in self.rows:
            self.rows[run.name] = self._trained(run)
            if self.is_main:
                self._write()
                row = self.rows[run.name]
                print(
                    f"run {run.name}: {row['parameters']:,} parameters, {row['tokens']:,} tokens, held-out loss "
                    f"{row['loss']:.4f} nats per token ({row['seconds']:.0f} s)",
                    flush=True,
                )
        return self.rows[run.name]

    def model_folder(self, run: GridRun) -> Path:
        """Return where the model and the tokenizer of a finished run are."""
        return self.folder / "models" / run.name

    def planned(self, run: GridRun) -> Row:
        """Return the row of a run without `loss` and `seconds`, as these need training."""
        import torch

        from hfllm.stages.pretrain.build import load_or_make_base

        script_args, _, model_args = self._arguments(run)
        _, packed, _ = self._prepared()
        with torch.device("meta"):
            model, _ = load_or_make_base(script_args, model_args, [])
        rows, filled = run.tokens // script_args.max_length, sum(map(len, packed["input_ids"])) / len(packed)
        parameters, tokens = model.num_parameters(), round(rows * filled)
        return {
            "name": run.name,
            "hidden_size": run.hidden_size,
            "num_hidden_layers": run.num_hidden_layers,
            "parameters": parameters,
            "parameters_non_embedding": parameters - embedding_parameters(model),
            "tokens": tokens,
            "epochs": round(rows / len(packed), 3),
            "compute": 6 * parameters * tokens,
        }

    def _arguments(self, run: GridRun) -> "tuple[PretrainArguments, TrainingArguments, ModelConfig]":
        """Return the parsed flags of a run, with the tokenizer shared by all runs."""
        self._prepared()
        script_args, training_args, model_args = parse_run([*self.flags, *run.flags(self.learning_rate)])
        return replace(script_args, tokenizer_name_or_path=str(self.folder / "tokenizer")), training_args, model_args

    def _trained(self, run: GridRun) -> Row:
        from transformers import set_seed
        from transformers.trainer_callback import PrinterCallback, ProgressCallback

        from hfllm.evaluation.perplexity import text_likelihood
        from hfllm.stages.pretrain.build import load_or_make_base, stop_if_broken, trainer_of_rows
        from hfllm.trainers.monitors import LossSpikeGuard

        began, planned = time.perf_counter(), self.planned(run)
        script_args, training_args, model_args = self._arguments(run)
        tokenizer, packed, test_texts = self._prepared()
        set_seed(training_args.seed)
        model, _ = load_or_make_base(script_args, model_args, [])
        # Runs of a grid are not published.
        plain_args = changed(training_args, push_to_hub=False, hub_token=None)
        trainer = trainer_of_rows(script_args, plain_args, model, tokenizer, [packed], test_texts)
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(LossSpikeGuard(action=script_args.loss_spikes))
        trainer.train()
        stop_if_broken(trainer)
        loss = text_likelihood(trainer.model, tokenizer, test_texts, script_args.max_length)
        trainer.save_model(str(self.model_folder(run)))
        seconds = round(time.perf_counter() - began, 1)
        return {**planned, "loss": round(loss.nats / loss.tokens, 6), "seconds": seconds}

    def _prepared(self) -> "tuple[PreTrainedTokenizerBase, Dataset, list[str]]":
        """Return the tokenizer, the packed rows and the held-out texts of all runs, made on first use."""
        if self._data is not None:
            return self._data
        from accelerate import PartialState

        from hfllm.data.loading import load_texts
        from hfllm.data.packing import packed_tables
        from hfllm.data.prepared import Prepared
        from hfllm.runs.models import load_tokenizer
        from hfllm.stages.pretrain.tokenizer import make_tokenizer

        script_args, training_args, _ = parse_run(self.flags)
        is_world, index = script_args.dataset_name == WORLD, self.folder / "tokenizer"
        text_args = replace(script_args, num_documents=5000) if is_world else script_args
        (source,) = text_args.text_sources.values()
        with training_args.main_process_first(desc="reading texts"):
            settings = {**stage_arguments(text_args, training_args), "longest run": self.longest}
            prepared = Prepared(self.folder / "prepared", settings)
            texts, test_texts = load_texts(source, training_args.seed, prepared, "texts")
        if self.is_main and not (index / "tokenizer.json").is_file():
            if script_args.tokenizer_name_or_path:
                load_tokenizer(script_args.tokenizer_name_or_path).save_pretrained(index)
            else:
                size, context = script_args.vocab_size, script_args.max_position_embeddings
                make_tokenizer(texts["text"], size, context, world=script_args.world_texts).save_pretrained(index)
        PartialState().wait_for_everyone()
        tokenizer = load_tokenizer(str(index))
        if is_world:
            # One document token each, and a small margin so that no run sees a document twice.
            lengths = [len(ids) + 1 for ids in tokenizer(texts["text"][:], add_special_tokens=False)["input_ids"]]
            count = math.ceil(1.02 * self.longest * len(texts) / sum(lengths))
            enough = replace(source, num_documents=count)
            texts, test_texts = load_texts(enough, training_args.seed, prepared, "texts")
        with training_args.main_process_first(desc="packing"):
            rows = prepared.table("rows", lambda: packed_tables(texts["text"], tokenizer, script_args.max_length))
        self._data = tokenizer, rows, test_texts
        return self._data

    def _write(self) -> None:
        stream = io.StringIO()
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows.values())
        write_atomically(self.folder / RUNS_FILE, stream.getvalue())


def parse_run(flags: Sequence[str]) -> "tuple[PretrainArguments, TrainingArguments, ModelConfig]":
    """Read flags as `hfllm pretrain` reads them."""
    return parse_recipe(flags, "", PretrainArguments, LIBRARY, settings=default_settings)


def embedding_parameters(model: "PreTrainedModel") -> int:
    """Return the parameters of token and position embeddings and of an untied head, excluded by Kaplan et al."""
    import torch

    tables = {id(module.weight): module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    head = model.get_output_embeddings().weight
    tables[id(head)] = head
    return sum(weight.numel() for weight in tables.values())


def disable_progress_bars() -> None:
    """Disable the progress bars of each run, to leave one line per run."""
    import datasets
    from transformers.utils.logging import disable_progress_bar

    datasets.disable_progress_bars()
    disable_progress_bar()


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(text)
    return int(text)


def _value(text: str) -> int | float | str:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text
