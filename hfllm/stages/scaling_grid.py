"""Train a grid of small models of different size and length, one row of runs.csv per run, for a scaling law."""

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

from hfllm.errors import InputError, refuse
from hfllm.runs.arguments import changed
from hfllm.runs.command_line import main_process, parse_recipe
from hfllm.runs.stage import stage_arguments
from hfllm.stages.pretrain import LIBRARY, PretrainArguments, default_settings

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
    from trl import ModelConfig

Row = dict[str, int | float | str]

COLUMNS = (
    *("name", "hidden_size", "num_hidden_layers", "parameters", "parameters_non_embedding", "tokens", "epochs"),
    *("compute", "loss", "seconds"),
)
RUNS_FILE, SETTINGS_FILE = "runs.csv", "grid.json"
# Adam's learning rate goes with 1 / width (Yang et al. 2022, arXiv:2203.03466, table 3), and for Muon, whose
# steps are of Adam's size, the same did best for widths of 16 to 96; the settings' rate is for this width.
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

        Raises:
            InputError: naming the flag and what is accepted.
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
    """The runs of one folder: those in its runs.csv are done, others are trained on request.

    Args:
        folder: where runs.csv, the tokenizer and the models go.
        flags: of `hfllm pretrain`, for all runs.
        longest: tokens of the longest run, which decides how many documents of the world are written.

    Raises:
        InputError: when the folder holds runs with other settings, or a flag cannot apply to all runs.
    """

    def __init__(self, folder: str | Path, flags: Sequence[str], longest: int):
        self.folder, self.longest = Path(folder), longest
        self.flags = [*flags, "--output_dir", str(folder)]
        script_args, training_args, model_args = parse_run(self.flags)
        for is_refused, flag, reason in (
            (not script_args.packing, "--packing false", "a run's tokens are counted in packed rows"),
            (script_args.objective != "causal", "--objective", "the law is that of next tokens"),
            (bool(script_args.dataset_mixture), "--dataset_mixture", "the runs read one dataset"),
            (bool(model_args.model_name_or_path), "--model_name_or_path", "the runs start from nothing"),
            (bool(script_args.config_name_or_path), "--config_name_or_path", "each run has its own size"),
        ):
            refuse(is_refused, flag, reason)
        settings = {**stage_arguments(script_args, training_args, model_args), "longest run": longest}
        self.learning_rate, self.is_main = training_args.learning_rate, main_process()
        if not sys.stderr.isatty():
            disable_progress_bars()
        self.rows = self._read(json.loads(json.dumps(settings, default=str)))
        self._data: tuple[PreTrainedTokenizerBase, Dataset, list[str]] | None = None

    def _read(self, settings: dict[str, Any]) -> dict[str, Row]:
        """Finished runs by name. If there is none, remove the tokenizer that runs with other settings left."""
        note, table = self.folder / SETTINGS_FILE, self.folder / RUNS_FILE
        before = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
        if not table.is_file():
            if self.is_main and before != settings:
                from hfllm.outputs.report import write_atomically

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
        """Return the row of a run without `loss` and `seconds`, which need training."""
        import torch

        from hfllm.stages.pretrain_models import load_or_make_base

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
        from hfllm.stages.pretrain_models import load_or_make_base
        from hfllm.stages.pretrain_trainers import trainer_of_rows
        from hfllm.stages.pretrain_watch import stop_if_broken
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
        from hfllm.data.sources import WORLD
        from hfllm.runs.models import load_tokenizer
        from hfllm.stages.tokenizer import make_tokenizer

        script_args, training_args, _ = parse_run(self.flags)
        is_world, place = script_args.dataset_name == WORLD, self.folder / "tokenizer"
        text_args = replace(script_args, num_documents=5000) if is_world else script_args
        with training_args.main_process_first(desc="reading texts"):
            settings = {**stage_arguments(text_args, training_args), "longest run": self.longest}
            prepared = Prepared(self.folder / "prepared", settings)
            texts, test_texts = load_texts(text_args, training_args.seed, prepared, "texts")
        if self.is_main and not (place / "tokenizer.json").is_file():
            if script_args.tokenizer_name_or_path:
                load_tokenizer(script_args.tokenizer_name_or_path).save_pretrained(place)
            else:
                make_tokenizer(script_args, texts["text"]).save_pretrained(place)
        PartialState().wait_for_everyone()
        tokenizer = load_tokenizer(str(place))
        if is_world:
            # One document token each, and a small margin so that no run sees a document twice.
            lengths = [len(ids) + 1 for ids in tokenizer(texts["text"][:], add_special_tokens=False)["input_ids"]]
            count = math.ceil(1.02 * self.longest * len(texts) / sum(lengths))
            enough = replace(script_args, num_documents=count)
            texts, test_texts = load_texts(enough, training_args.seed, prepared, "texts")
        with training_args.main_process_first(desc="packing"):
            rows = prepared.table("rows", lambda: packed_tables(texts["text"], tokenizer, script_args.max_length))
        self._data = tokenizer, rows, test_texts
        return self._data

    def _write(self) -> None:
        from hfllm.outputs.report import write_atomically

        stream = io.StringIO()
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows.values())
        write_atomically(self.folder / RUNS_FILE, stream.getvalue())


def parse_run(flags: Sequence[str]) -> "tuple[PretrainArguments, TrainingArguments, ModelConfig]":
    """Read flags as `hfllm pretrain` reads them."""
    return parse_recipe(flags, "", PretrainArguments, LIBRARY, settings=default_settings)


def embedding_parameters(model: "PreTrainedModel") -> int:
    """Return the parameters of token and position embeddings and of an untied head, which Kaplan et al. exclude."""
    import torch

    tables = {id(module.weight): module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    head = model.get_output_embeddings().weight
    tables[id(head)] = head
    return sum(weight.numel() for weight in tables.values())


def disable_progress_bars() -> None:
    """Disable the progress bars of each run, so that one line per run is left."""
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
