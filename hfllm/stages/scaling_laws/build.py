"""Scaling laws: the grid of small runs, and the larger run predicted from it."""

import csv
import io
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from accelerate import PartialState
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils.logging import disable_progress_bar

from hfllm.compression.schemes import default_device
from hfllm.data.loading import load_texts
from hfllm.data.packing import Prepared, packed_tables
from hfllm.data.sources import WORLD
from hfllm.errors import InputError, refuse, refuse_if
from hfllm.evaluation.emergence import Emergence, Probe, ProbedRun, run_probes
from hfllm.evaluation.perplexity import text_likelihood
from hfllm.flags import changed
from hfllm.models.family.modeling_hfllm import HfllmForCausalLM
from hfllm.models.loading.saved import saved_model
from hfllm.outputs.report import write_atomically
from hfllm.runs.command_line import main_process, parse_recipe
from hfllm.runs.models import load_tokenizer
from hfllm.runs.stage import stage_arguments
from hfllm.scaling.fitting import FEWEST_RUNS, Runs
from hfllm.scaling.laws import formula
from hfllm.scaling.studies import CHINCHILLA, KAPLAN, Forecast
from hfllm.stages.pretrain.build import load_or_make_base, stop_if_broken, trainer_of_rows
from hfllm.stages.pretrain.flags import LIBRARY, PretrainArguments, default_settings
from hfllm.stages.pretrain.tokenizer import make_tokenizer
from hfllm.trainers.monitors import LossSpikeGuard

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
    from trl import ModelConfig


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
        refuse_if(others, f"--held_out_run {held_out_run!r}: expected a single number of tokens")
        # The cheapest first, so that errors show early.
        self.runs.sort(key=lambda each: (each.tokens, each.hidden_size, each.num_hidden_layers))
        refuse_if(len({*self.runs, self.large}) <= len(self.runs), "--grid, --held_out_run: a run comes twice")
        self.grid = Grid(output_dir, flags, max(each.tokens for each in (*self.runs, self.large)))

    def small_runs(self) -> Runs:
        """Return the table of the grid's runs, after training the missing ones."""
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

    def large_run(self, forecast: Forecast) -> Runs:
        """Print the loss expected of the larger run, train it, and return it as a table."""
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

    def table(self) -> list[Row]:
        """Return all runs as rows of the report."""
        return [self.grid.rows[each.name] for each in (*self.runs, self.large)]

    def probe(self, probes: Sequence[Probe]) -> Emergence:
        """Ask each model the questions of the world, and return the results."""
        probed = []
        for each in (*self.runs, self.large):
            folder = str(self.grid.model_folder(each))
            model, tokenizer = saved_model(HfllmForCausalLM, folder), load_tokenizer(folder)
            model = model.to(default_device())
            row, rows = self.grid.rows[each.name], run_probes(model, tokenizer, probes)
            probed.append(ProbedRun(each.name, row[self.column], row["compute"], row["loss"], rows))
        return Emergence(probed)

    def _runs(self, rows: list[Row]) -> Runs:
        return Runs(*([row[name] for row in rows] for name in (self.column, "tokens", "loss")))


# ---- grid ----
#
# Train a grid of small models of different size and length, one row of runs.csv per run, for a scaling law.


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
        self._data: tuple[PreTrainedTokenizerBase, datasets.Dataset, list[str]] | None = None

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

    def _prepared(self) -> "tuple[PreTrainedTokenizerBase, datasets.Dataset, list[str]]":
        """Return the tokenizer, the packed rows and the held-out texts of all runs, made on first use."""
        if self._data is not None:
            return self._data
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
    tables = {id(module.weight): module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    head = model.get_output_embeddings().weight
    tables[id(head)] = head
    return sum(weight.numel() for weight in tables.values())


def disable_progress_bars() -> None:
    """Disable the progress bars of each run, to leave one line per run."""
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
