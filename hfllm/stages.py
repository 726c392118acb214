"""Steps that several recipes share: begin and end a stage, run the stages before it, load data and models."""

import hashlib
import random
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hfllm.cli import DataArguments, checkpoint_to_resume, finished_run, main_process, run_arguments
from hfllm.data import formats
from hfllm.data.prepared import Prepared
from hfllm.data.sources import PYDOC, WORLD, iterate_source, load_source, source_files
from hfllm.data.world import World
from hfllm.errors import InputError
from hfllm.hub import take_repository
from hfllm.hub_files import CARD
from hfllm.model_card import write_card
from hfllm.reporting import Plot, Report, plot_history, read_report

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer


# ---- the frame of a stage ----


class Stage:
    """One run of a recipe, from its announcement to its report.

    Args:
        name: the stage's name.
        script_args, training_args, model_args: its flags as they were given; trainers change some of them later, so
            what decides the result is noted down here.
        before: the parsed flags of the stages that it runs first, by name; they decide its result too.

    Attributes:
        checkpoint: the checkpoint to resume from, or `None`.
        report: the report of the same run if it has already finished in the output folder, else `None`.
        repository: where to publish the result, or `None`. A run that has already finished is published right away.

    Raises:
        InputError: when another run has finished there, a flag cannot work on this machine, or the Hub refuses.
    """

    def __init__(
        self,
        name: str,
        script_args: Any,
        training_args: Any,
        model_args: Any,
        before: Mapping[str, Sequence[Any]] | None = None,
    ):
        if getattr(training_args, "fp16", False) and training_args.device.type == "cpu":
            raise InputError("--fp16 does nothing on a CPU: use --bf16 or neither")
        check_source(script_args)
        self.name, self.training_args, self.began = name, training_args, time.perf_counter()
        self.arguments = stage_arguments(script_args, training_args, model_args)
        for stage, arguments in (before or {}).items():
            self.arguments |= {f"{stage}.{flag}": value for flag, value in run_arguments(*arguments).items()}
        self.checkpoint = checkpoint_to_resume(training_args)
        self.report = finished_run(training_args.output_dir, self.arguments)
        self.repository = take_repository(training_args, model_args)
        if main_process() and self.report is not None:
            print(f"{name}: already done in {training_args.output_dir} (remove that folder to redo it)", flush=True)
            self.publish()
        elif main_process():
            print(f"\n=== {name} -> {training_args.output_dir}", flush=True)
            if self.repository is not None:
                self.repository.create()

    def finish(
        self,
        trainer: "Trainer",
        metrics: Mapping[str, float],
        summary: str = "",
        tables: Mapping[str, list] | None = None,
        curves: Mapping[str, Plot] | None = None,
        next_steps: Sequence[str] = (),
    ) -> dict[str, float]:
        """Write the report, print it (or `summary` instead), publish if asked, wait for all processes.

        Returns:
            The metrics.

        Raises:
            InputError: when publishing fails; the model and its report are there by then.
        """
        loss = plot_history(
            trainer.state.log_history,
            {"training": "loss", "evaluation": "eval_loss"},
            title=f"{self.name}: loss",
            xlabel="step",
            ylabel="loss",
        )
        report = Report(
            stage=self.name,
            arguments=self.arguments,
            metrics=dict(metrics),
            tables=dict(tables or {}),
            curves={"loss": loss, **(curves or {})},
            artifacts={"model": "."},
            wall_seconds=time.perf_counter() - self.began,
            next_steps=next_steps,
        )
        failure = None
        # The whole history of the logs, for plots of one's own.
        trainer.save_state()
        if main_process():
            folder = Path(self.training_args.output_dir)
            report.write(folder)
            # Trainers leave drafts of a card; this is the one that is published, and the user's to edit.
            (folder / CARD).unlink(missing_ok=True)
            write_card(folder)
            if summary:
                print(f"{self.name}: {summary} ({report.wall_seconds:.0f} s)", flush=True)
            else:
                report.print()
            try:
                self.publish()
            except InputError as error:
                failure = error
        trainer.accelerator.wait_for_everyone()
        if failure is not None:
            raise failure
        return dict(metrics)

    def publish(self) -> None:
        """Push the output folder if that was asked for.

        Raises:
            InputError: when it fails, with the command that tries again.
        """
        if self.repository is None:
            return
        try:
            self.repository.push(self.training_args.output_dir)
        except InputError as error:
            raise InputError(
                f"{error}. The run itself has finished; publish it by recipes/push.py --model_name_or_path "
                f"{self.training_args.output_dir} --hub_model_id {self.repository.repo_id}"
            ) from None


def stage_arguments(*parsed: Any) -> dict[str, Any]:
    """The flags that decide a stage's result, and when the local data and model they name were last changed."""
    arguments = run_arguments(*parsed)
    named = {
        flag: arguments.get(flag) or ""
        for flag in (
            *("dataset_name", "model_name_or_path", "tokenizer_name_or_path"),
            "teacher_model_name_or_path",
        )
    }
    files = {
        "model_name_or_path": "config.json",
        "tokenizer_name_or_path": "tokenizer.json",
        "teacher_model_name_or_path": "config.json",
    }
    named |= {entry: entry.rpartition(":")[0] for entry in arguments.get("dataset_mixture") or []}
    for flag, name in named.items():
        path = Path(name) / files.get(flag, "")
        if not name or name in (WORLD, PYDOC) or not path.exists():
            continue
        files_read = [path] if path.is_file() else source_files(name)
        # A file that is edited leaves its folder's time alone, one that is removed does not.
        read = {path, *files_read, *(file.parent for file in files_read if path.is_dir())}
        arguments[f"{flag} changed at"] = max(each.stat().st_mtime_ns for each in read)
    return arguments


def run_stage(recipe: ModuleType, arguments: tuple, later_folders: Sequence[str] = ()) -> dict[str, float]:
    """Run a stage that another one needs, in a folder of that one's own, or reuse it when nothing changed.

    Args:
        recipe: the stage's module, with `parse` and `main`.
        arguments: its parsed flags.
        later_folders: stages that build on it; they are removed when it has to run (again).
    """
    output_dir = arguments[1].output_dir
    try:
        done = finished_run(output_dir, stage_arguments(*arguments)) is not None
    except InputError:
        done = False
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    if not done:
        PartialState().wait_for_everyone()
        if main_process():
            for folder in (output_dir, *later_folders):
                if read_report(folder) is not None:
                    shutil.rmtree(folder)
        PartialState().wait_for_everyone()
    metrics = recipe.main(*arguments)
    # The next trainer may use another precision: accelerate keeps the first one for the whole process otherwise.
    AcceleratorState._reset_state()
    return metrics


def run_stages(recipes: Sequence[ModuleType], arguments: Sequence[tuple]) -> list[dict[str, float]]:
    """Run or reuse stages, each of which may build on those before it. Returns their metrics; see `run_stage`."""
    folders = [parsed[1].output_dir for parsed in arguments]
    pairs = enumerate(zip(recipes, arguments, strict=True), 1)
    return [run_stage(recipe, parsed, later_folders=folders[position:]) for position, (recipe, parsed) in pairs]


def with_model_from(
    recipe: ModuleType, config: str | None, script_args: Any, training_args: Any, model_args: Any
) -> Any:
    """`model_args` with the model that `recipe` makes on the embedded world, in a folder under the output folder.

    Args:
        config: a YAML file of the recipe's flags, if not its own for the world.
    """
    folder = f"{training_args.output_dir}/{recipe.__name__}"
    flags = ["--seed", str(training_args.seed), "--world_seed", str(script_args.world_seed), "--output_dir", folder]
    run_stage(recipe, recipe.parse([*flags, *(["--config", config] if config else [])]))
    return replace(model_args, model_name_or_path=folder)


# ---- data ----


def check_source(script_args: Any) -> None:
    """Refuse flags of the data that would have no effect.

    Raises:
        InputError: naming the flag.
    """
    is_world, is_mixed = script_args.dataset_name == WORLD, bool(getattr(script_args, "dataset_mixture", None))
    refuse(is_mixed and not is_world, "--dataset_name", "--dataset_mixture takes its place")
    is_sized = is_world and not is_mixed
    refuse(is_sized and script_args.max_samples is not None, "--max_samples", "the world is sized by --num_...")


def world_of(script_args: DataArguments) -> World | None:
    """The embedded world, if that is where the data comes from."""
    return World(script_args.world_seed) if script_args.dataset_name == WORLD else None


def limited(rows: list, script_args: DataArguments) -> list:
    """The first `--max_samples` rows."""
    return rows if script_args.max_samples is None else rows[: script_args.max_samples]


def split_rows(rows: list, seed: int, share: float = 0.05, most: int = 256) -> tuple[list, list]:
    """Shuffle rows by `seed` and set about `share` of them, at most `most`, aside for evaluation.

    Rows with the same prompt (or the same text) stay together, so that none is met on both sides.
    """
    keys = [str(row["prompt"] if isinstance(row, dict) else row) for row in rows]
    train, held_out = split_places(keys, seed, share, most)
    return [rows[place] for place in train], [rows[place] for place in held_out]


def split_places(keys: Iterable, seed: int, share: float = 0.05, most: int = 256) -> tuple[list[int], list[int]]:
    """`split_rows` by what stands for each row: the places of the training rows, and of those held out.

    Raises:
        InputError: when all rows are alike.
    """
    groups: dict[Any, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    if len(groups) < 2:
        raise InputError(f"the dataset has {len(groups)} different prompt(s) or text(s); at least 2 are needed")
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    wanted, held_out = min(max(1, int(sum(map(len, order)) * share)), most), []
    while not held_out or (len(order) > 1 and len(held_out) + len(order[0]) <= wanted):
        held_out += order.pop(0)
    return [place for group in order for place in group], held_out


def load_texts(script_args: Any, seed: int, prepared: Prepared, name: str) -> tuple["Dataset", list[str]]:
    """Pretraining texts (a `text` column) and held-out texts, of the world or of the user's dataset.

    Args:
        script_args: the recipe's.
        seed: of the split, and of the world's texts.
        prepared: where the user's texts are kept, so that they need not fit into memory.
        name: of the table there.
    """
    from datasets import Dataset, Features, Value

    if script_args.dataset_name == WORLD:
        world = World(script_args.world_seed)
        texts = world.documents(script_args.num_documents, seed=seed)
        # A document of the world may be written twice; what is held out must be new.
        known = set(texts)
        held_out = [text for text in world.documents(1000, seed=-1 - seed) if text not in known]
        # Of the type that `prepared` stores, so that both can be parts of one mixture.
        return Dataset.from_dict({"text": texts}, Features({"text": Value("large_string")})), held_out

    def read() -> Iterator[str]:
        rows = iterate_source(script_args.dataset_name, script_args.dataset_train_split)
        for origin, row in islice(rows, script_args.max_samples):
            text = formats.to_text(origin, row)
            if text.strip():
                yield text

    stored = prepared.texts(name, read)
    train, held_out = split_places((hash_of(text) for text in stored["text"]), seed)
    return stored.select(train), stored.select(held_out)["text"][:]


def hash_of(text: str) -> bytes:
    """What two texts share only if they are the same, for all practical purposes."""
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=16).digest()


def load_rows(script_args: DataArguments, mapper: Any) -> list[dict[str, Any]]:
    """The user's dataset in the columns that `mapper` makes."""
    source = load_source(script_args.dataset_name, script_args.dataset_train_split)
    return limited(formats.convert(source, mapper), script_args)


# ---- models ----


def load_kwargs(model_args: Any) -> dict[str, Any]:
    """`from_pretrained` arguments that `ModelConfig`'s flags stand for."""
    from trl import get_quantization_config

    kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "quantization_config": get_quantization_config(model_args),
    }
    return {name: value for name, value in kwargs.items() if value is not None}


def load_policy(model_args: Any) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """A causal language model and its tokenizer.

    Raises:
        InputError: when either cannot be loaded, or the tokenizer has no padding or end token.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision)
    try:
        model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **load_kwargs(model_args))
    except (OSError, ValueError) as error:
        raise _unloadable(model_args.model_name_or_path, error) from error
    return model, tokenizer


def load_tokenizer(name: str, revision: str = "main") -> "PreTrainedTokenizerBase":
    """The tokenizer of a model; without a chat template of its own it gets a plain one.

    Raises:
        InputError: when it cannot be loaded, or has no padding or end token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise _unloadable(name, error) from error
    for token in ("eos_token", "pad_token"):
        if getattr(tokenizer, token) is None:
            raise InputError(
                f"the tokenizer of {name!r} has no {token}: set one and save it, "
                f"for example tokenizer.{token} = ...; tokenizer.save_pretrained(...)"
            )
    if tokenizer.chat_template is None:
        from hfllm.data.tokenizer import plain_chat_template

        tokenizer.chat_template = plain_chat_template()
    return tokenizer


def load_config(name: str, revision: str = "main") -> "PreTrainedConfig":
    """The config of the named model.

    Raises:
        InputError: when it cannot be loaded.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise _unloadable(name, error) from error


def model_context(name: str) -> int | None:
    """The longest sequence that the named model is made for, in tokens, if its config tells."""
    return getattr(load_config(name).get_text_config(), "max_position_embeddings", None)


def load_scorer(name: str, model_args: Any) -> "PreTrainedModel":
    """A sequence-classification model with one label, its head new if `name` is a language model."""
    from transformers import AutoModelForSequenceClassification

    try:
        return AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, **load_kwargs(model_args))
    except (OSError, ValueError) as error:
        raise _unloadable(name, error) from error


def peft_config(model_args: Any, task_type: str = "CAUSAL_LM") -> "PeftConfig | None":
    """The adapter that `--use_peft` and `--lora_*` describe, or `None`."""
    from trl import get_peft_config

    model_args.lora_task_type = task_type
    return get_peft_config(model_args)


def _unloadable(name: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(f"model {name!r} could not be loaded: {reason}")


def fitting_length(max_length: int | None, model: Any) -> int | None:
    """`max_length`, but no more than the model's context."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(filter(None, (max_length, context)), default=None)


def refuse(condition: bool, flag: str, reason: str) -> None:
    """Refuse a flag that would have no effect, rather than ignore it.

    Raises:
        InputError: if `condition` holds.
    """
    if condition:
        raise InputError(f"{flag} cannot be used here: {reason}")
