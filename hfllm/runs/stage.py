"""One run of a recipe: describe it, then refuse, reuse, resume, announce, finish and publish it."""

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hfllm.data.loading import DataArguments
from hfllm.data.receipt import unprinted_lines, whole_receipt
from hfllm.data.sources import EMBEDDED, WORLD, source_files
from hfllm.errors import InputError, refuse_if
from hfllm.fingerprint import FORM, file_fingerprint
from hfllm.flags import changed, given_names, shipped_names, without_nested_secrets
from hfllm.outputs.card import START, is_written, lineage, write_card
from hfllm.outputs.checkpoints import (
    STATE_FILE,
    checkpoints_in,
    damage_in,
    damaged_checkpoint,
    is_complete,
    last_complete_checkpoint,
    missing_for_resuming,
    record_of,
    state_of,
)
from hfllm.outputs.figures import figure_tables
from hfllm.outputs.files import ADAPTER_WEIGHTS, CARD
from hfllm.outputs.hub import Repository, repository_of
from hfllm.outputs.ownership import (
    claim,
    damage_of_finished,
    is_own_card,
    refuse_changed_files,
    refuse_foreign_files,
    write_record,
)
from hfllm.outputs.report import CHANGED, CONTENTS, Bars, Plot, Report, given_flags, plot_history
from hfllm.outputs.verdict import IS_EQUAL, Promise, Verdict, broken_promises, decide, lines_of
from hfllm.runs import schedule
from hfllm.runs.command_line import main_process, say
from hfllm.runs.following import next_command
from hfllm.runs.identity import data_files, difference, finished_run, model_files, run_arguments, run_identity
from hfllm.runs.lock import join, lock, owner_of, release
from hfllm.runs.output import explained
from hfllm.runs.recipes import declared

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from transformers import Trainer, TrainingArguments

Trained = TypeVar("Trained", bound="TrainingArguments")


# ---- one run ----


BATCH_SIZE = "per_device_train_batch_size"
# Input models that a run into their folder would overwrite.
OVERWRITABLE = ("model_name_or_path", "teacher_model_name_or_path", "reward_model_name_or_path", "value_model")


class Stage:
    """One run of a recipe, from its announcement to its report. Creating the object has no side effects.

        stage = Stage("sft", script_args, training_args, model_args)
        stage.check()
        if stage.is_finished:
            return stage.reuse()
        stage.announce()
        ...  # train with stage.training_args, from stage.checkpoint
        return stage.finish(metrics, trainer)

    Args:
        name: the stage's name.
        parsed: its flags as parsed, a list of dataclasses; one of them has `output_dir`.
        before: the parsed flags of the stages that it runs first, by name; the result depends on them too.
        also: other inputs of the result, by name.
        without: flags without effect on the result, or `dataset_name changed at` where `also` covers the files.
        is_spread: whether all processes run it, as in a stage with training.

    Attributes:
        arguments: all inputs of the result, as JSON values.
        output_dir: its folder.
        redo: the user's action required before a finished run is repeated.
    """

    redo = "remove that folder to redo it"

    def __init__(
        self,
        name: str,
        *parsed: "DataclassInstance",
        before: "Mapping[str, Sequence[DataclassInstance]] | None" = None,
        also: Mapping[str, Any] | None = None,
        without: Sequence[str] = (),
        is_spread: bool = False,
    ):
        self.is_spread = is_spread
        self.name, self.parsed, self.began = name, parsed, time.perf_counter()
        self.output_dir: str = _with_field(parsed, "output_dir").output_dir
        self.arguments = stage_arguments(*parsed, before=before, without=without) | dict(also or {})

    @cached_property
    def training_args(self) -> "TrainingArguments":
        """The trainer's arguments without its own pushes and any token: the finished model is pushed once.

        Launched processes share the embedded world's batches (`shared_batch`).
        """
        args = changed(_with_field(self.parsed, BATCH_SIZE), push_to_hub=False, hub_token=None)
        return without_nested_secrets(shared_batch(args, *self.parsed))

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The identity of this run, compared when a checkpoint is resumed, as JSON values."""
        arguments = self.arguments
        if self._trains:
            arguments = {**arguments, BATCH_SIZE: self.training_args.per_device_train_batch_size}
        return run_identity(self.name, arguments, self.parsed, self.output_dir)

    @cached_property
    def checkpoint(self) -> str | None:
        """The checkpoint to resume from, or `None`."""
        requested = self.training_args.resume_from_checkpoint
        checkpoint = checkpoint_to_resume(requested, self.output_dir)
        if checkpoint is not None:
            check_resumable(checkpoint, requested, self.identity)
        return checkpoint

    @cached_property
    def repository(self) -> Repository | None:
        """Where to publish the result, or `None`."""
        return repository_of(*self.parsed)

    @cached_property
    def report(self) -> dict[str, Any] | None:
        """The report of the same run if it has already finished in the output folder, else `None`."""
        return finished_run(self.output_dir, self.arguments)

    @property
    def is_finished(self) -> bool:
        """Whether the same run has already finished in the output folder."""
        return self.report is not None

    def check(self) -> None:
        """Refuse requests unsupported by all stages, before anything is written."""
        self.check_flags()
        refuse_input(self.output_dir, *self.parsed)
        if self.report is None and self._trains:
            _ = self.checkpoint
        _ = self.repository

    def check_flags(self) -> None:
        """Refuse flags unsupported by all stages on this machine, whatever the folder holds; called by `check`."""
        from hfllm.models.devices import refuse_data_parallel

        for group in self.parsed:
            if getattr(group, "fp16", False) and group.device.type == "cpu":
                raise InputError("--fp16 does nothing on a CPU: use --bf16 or neither")
            if hasattr(group, "n_gpu"):
                refuse_data_parallel(group)
            if isinstance(group, DataArguments):
                group.check_source()

    def announce(self, what: str | None = None) -> None:
        """Hold the folder, print the start line, and create the repository, to detect a wrong name or token now.

        Args:
            what: text to print in place of an arrow to the output folder.
        """
        self.refuse_foreign_files()
        self._hold()
        schedule.enter(schedule.Planned(self.name, self.output_dir, parsed=self.parsed))
        if main_process():
            print(f"\n=== {self.name} {what or f'-> {self.output_dir}'}", flush=True)
            for line in filter(None, (self._about_checkpoints(), self._about_batch())):
                print(f"{self.name}: {line}", flush=True)
            if self.repository is not None:
                self.repository.create()

    def refuse_foreign_files(self) -> None:
        """Refuse to overwrite foreign files in the output folder, naming the first; called by `announce`."""
        writes_card = self._trains or declared(self.name).writes == "model"
        refuse_foreign_files(self.output_dir, self.name, writes_card, self._writes_model, self._first_step)

    @property
    def _trains(self) -> bool:
        return any(hasattr(group, "resume_from_checkpoint") for group in self.parsed)

    @property
    def _writes_model(self) -> bool:
        """Whether a model or a tokenizer is written into the folder itself, over its existing files."""
        return self._trains or declared(self.name).writes is not None

    @property
    def _first_step(self) -> int:
        """The optimizer step of the resumed checkpoint, 0 without one."""
        return state_of(self.checkpoint).get("global_step", 0) if self._trains and self.checkpoint else 0

    def _hold(self) -> None:
        """Keep other runs out of the folder until all processes of this one have ended; they refuse together."""
        is_spread = (self._trains or self.is_spread) and int(os.environ.get("WORLD_SIZE", "1")) > 1
        if is_spread and self._trains:
            # It lets the processes find each other.
            _ = self.training_args.device
        elif is_spread:
            from accelerate import PartialState

            PartialState()
        refusal = owner = None
        if main_process():
            try:
                lock(self.output_dir)
                owner = owner_of(self.output_dir)
                # Looked up again: a run may have finished since `check`.
                if self.report is None and type(self).report.func(self) is not None:
                    refusal = f"--output_dir {self.output_dir}: the same run has just finished there"
                elif self._writes_model:
                    refuse_changed_files(self.output_dir)
                    claim(self.output_dir, self._first_step)
            except InputError as error:
                refusal = str(error)
            except OSError as error:
                if not is_spread:
                    raise
                # The other processes would wait for this one until their time is up.
                refusal = explained(error) or f"--output_dir {self.output_dir}: {error}"
        if is_spread:
            from accelerate.utils import broadcast_object_list

            refusal, owner = broadcast_object_list([refusal, owner])
        if refusal is not None:
            raise InputError(refusal)
        join(self.output_dir, owner)

    def _about_checkpoints(self) -> str | None:
        """Return the line about the checkpoints in the folder, `None` without checkpoints."""
        if not self._trains:
            return None
        if self.checkpoint is not None:
            return described(self.checkpoint)
        job = schedule.current_job()
        is_last = job is None or job.place == len(job.stages) - 1
        return about_old_checkpoints(self.output_dir, self.identity, can_resume=is_last)

    def _about_batch(self) -> str | None:
        """Return the line about a batch shared by the processes, `None` without one."""
        if not self._trains:
            return None
        args, before = self.training_args, getattr(_with_field(self.parsed, BATCH_SIZE), BATCH_SIZE)
        if (own := args.per_device_train_batch_size) == before:
            return None
        processes = int(os.environ["WORLD_SIZE"])
        rows = own * args.gradient_accumulation_steps * processes
        return f"{rows} rows a step: --{BATCH_SIZE} {own} in each of {processes} processes, {before} in one"

    def reuse(self) -> dict[str, float]:
        """Print a line about the finished same run, publish it if asked, and return its metrics."""
        if damage := damage_of_finished(self._model_folder):
            raise InputError(damage)
        if main_process():
            print(f"{self.name}: already done in {self.output_dir} ({self.redo})", flush=True)
            self._conclude(self.report.get("warnings") or (), self.report.get("verdict") or {})
            self._complete()
            self.publish()
        return self.report["metrics"]

    @property
    def _model_folder(self) -> Path:
        """The folder of the model named in the report; the output folder if the report names none."""
        return Path(self.output_dir) / (self.report["artifacts"].get("model") or ".")

    def _complete(self) -> None:
        """Complete a run killed after its report: write its card, remove its temporary files and folders."""
        card = Path(self.output_dir) / CARD
        has_card = card.exists() and (not is_own_card(card) or is_written(card))
        # A model removed since then needs none.
        with suppress(InputError):
            if self.report["artifacts"].get("model") == "." and not has_card:
                self._write_card()
        if unfinished := declared(self.name).unfinished:
            shutil.rmtree(Path(self.output_dir) / unfinished, ignore_errors=True)

    def _write_card(self) -> None:
        """Write the card; trainers leave drafts of one. The user may edit it."""
        folder = Path(self.output_dir)
        if is_own_card(folder / CARD):
            (folder / CARD).unlink(missing_ok=True)
        write_card(folder)

    def finish(
        self,
        metrics: Mapping[str, float],
        trainer: "Trainer | None" = None,
        summary: str = "",
        tables: Mapping[str, list] | None = None,
        curves: Mapping[str, Plot | Bars] | None = None,
        artifacts: Mapping[str, str] | None = None,
        next_steps: Sequence[str] = (),
        too_wide: Sequence[str] = (),
        models: Mapping[str, str | Sequence[str] | None] | None = None,
        promises: Sequence[Promise] = (),
        claims: Sequence[Promise] | Verdict = (),
        final_model: str | None = None,
    ) -> dict[str, float]:
        """Write the report, print it, publish if asked, wait for all processes.

        Of a stage that runs before another one only `summary` is printed, and of one without errors of its figures
        `summary` and the files.

        Args:
            trainer: the trainer, for the loss curve, labeled by its `loss_label` if it has one; `None` if nothing was
                trained and one process did the work.
            summary: the result, in a sentence or two.
            artifacts: the contents of the output folder, by path; by default the model, then with its card.
            too_wide: titles of tables to write but not to print.
            models: the models read by the stage, by role, where its flags do not name them: see `lineage`.
            promises: capabilities; the run ends with a warning for each one not shown by its figures.
            claims: what the verdict is about; by default the promises, or the first changed figure. Or the verdict
                itself, of a stage that compares models.
            final_model: the folder of the model for the next command, if it is not the output folder.

        Returns:
            The metrics.
        """
        artifacts = {"model": "."} if artifacts is None else dict(artifacts)
        if trainer is not None:
            curves = {**(curves or {}), "loss": loss_curve(self.name, trainer)}
            # The whole log history, for your own plots.
            trainer.save_state()
        verdict = claims if isinstance(claims, Verdict) else decide(metrics, claims or promises)
        model = final_model or self.output_dir
        decision = IS_EQUAL if verdict.cautions else verdict.decision
        following = next_command(self.name, self.arguments, model, decision, self.output_dir)
        report = Report(
            stage=self.name,
            arguments=self.arguments,
            metrics=dict(metrics),
            tables=dict(tables or {}),
            curves=dict(curves or {}),
            artifacts=artifacts,
            wall_seconds=time.perf_counter() - self.began,
            next_steps=next_steps,
            summary=summary,
            given=given_flags(given_names(*self.parsed), self.arguments),
            parents=lineage(self._models_of_flags() | dict(models or {})),
            warnings=broken_promises(promises, metrics),
            verdict=replace(verdict, next_command=following),
            data=whole_receipt(self.arguments),
        )
        failure = self._write_report(report, too_wide) if main_process() else None
        if trainer is not None:
            trainer.accelerator.wait_for_everyone()
        release(self.output_dir)
        if failure is not None:
            raise failure
        return dict(metrics)

    def _write_report(self, report: Report, too_wide: Sequence[str]) -> InputError | None:
        """Write and print a report, and publish if asked; return an error of the Hub, for after the others' wait."""
        folder, model = Path(self.output_dir), report.artifacts.get("model")
        for line in unprinted_lines(self.arguments):
            say(line)
        report.write(folder)
        if model == ".":
            self._write_card()
        if model is not None:
            write_record(folder / model)
        is_before_another = schedule.runs_before_another()
        if report.summary and (is_before_another or not figure_tables(report.metrics)):
            print(f"{self.name}: {report.summary} ({report.wall_seconds:.0f} s)", flush=True)
            if not is_before_another:
                report.print_files()
        else:
            report.print(too_wide)
        self._conclude(report.warnings, {} if is_before_another else report.verdict.as_dict())
        try:
            self.publish()
        except InputError as error:
            return error
        return None

    def _conclude(self, warnings: Sequence[object], verdict: Mapping[str, object]) -> None:
        """Print the warnings of a report, then its verdict: the last lines are what a reader needs first."""
        for line in (*(f"warning: {self.name}: {line}" for line in warnings), *lines_of(verdict)):
            print(line, flush=True)

    def _models_of_flags(self) -> dict[str, str | Sequence[str] | None]:
        """Return the models named by flags, by role."""
        roles = {
            START: "model_name_or_path",
            "reward model": "reward_model_name_or_path",
            "teacher": "teacher_model_name_or_path",
        }
        return {role: self.arguments.get(flag) for role, flag in roles.items()}

    def publish(self) -> None:
        """Push the output folder if asked."""
        if self.repository is None:
            return
        try:
            self.repository.push(self.output_dir)
        except InputError as error:
            raise InputError(
                f"{error}. The run itself has finished; publish it by hfllm push --model_name_or_path "
                f"{self.output_dir} --hub_model_id {self.repository.repo_id}"
            ) from None


def loss_curve(name: str, trainer: "Trainer") -> Plot:
    """Return the plot of a trainer's losses over its steps."""
    return plot_history(
        trainer.state.log_history,
        {"training": "loss", "held-out rows": "eval_loss"},
        title=f"Loss of {name}",
        xlabel="optimizer steps",
        ylabel=getattr(trainer, "loss_label", "loss (nats per token)"),
    )


def shared_batch(args: Trained, *parsed: "DataclassInstance") -> Trained:
    """Return a trainer's arguments with a batch of settings for the embedded world divided by the processes.

    Those settings were chosen for so many rows and optimizer steps: with more rows a step and fewer steps the same
    model learns less. Any other batch size is what it is for transformers, one process's.

    Args:
        parsed: the flags of the stage.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    of_world = any(
        getattr(group, "dataset_name", None) == WORLD and not getattr(group, "dataset_mixture", None)
        for group in parsed
    )
    if processes == 1 or not of_world or BATCH_SIZE not in shipped_names(*parsed):
        return args
    before, rows = args.per_device_train_batch_size, args.gradient_accumulation_steps * processes
    own = max(1, before // processes)
    if deepspeed := getattr(args, "hf_deepspeed_config", None):
        # Its config was completed from the arguments as they were parsed.
        for name, factor in (("train_micro_batch_size_per_gpu", 1), ("train_batch_size", rows)):
            if deepspeed.config.get(name) == before * factor:
                deepspeed.config[name] = own * factor
    return changed(args, per_device_train_batch_size=own)


def _with_field(parsed: "Sequence[DataclassInstance]", name: str) -> Any:
    """Return the first of the dataclasses with the field `name`."""
    return next(group for group in parsed if hasattr(group, name))


def refuse_input(output_dir: str, *parsed: "DataclassInstance") -> None:
    """Refuse to overwrite an input model of the stage, and a finished model of ours changed since its run.

    All of the latter is read, by one of the processes started by a launcher on a machine: it ends the others.

    Args:
        parsed: the flags that can name such a model.
    """
    folders = [*_named_folders(*parsed)]
    for flag, name in folders:
        if flag in OVERWRITABLE and Path(name).resolve() == Path(output_dir).resolve():
            raise InputError(f"--output_dir {output_dir} is --{flag}, which it would overwrite: choose another")
    for flag, name in _named_models(*parsed):
        refuse_if(is_missing_folder(name), f"--{flag} {name}: there is no such folder")
    for flag, name in folders if os.environ.get("LOCAL_RANK", "0") == "0" else ():
        if damage := damage_of_finished(name):
            raise InputError(f"--{flag} {name}: {damage}")


def _named_folders(*parsed: "DataclassInstance") -> Iterator[tuple[str, str]]:
    """Yield the flags that name models, each with a local folder among its names."""
    yield from ((flag, name) for flag, name in _named_models(*parsed) if Path(name).is_dir())


def _named_models(*parsed: "DataclassInstance") -> Iterator[tuple[str, str]]:
    """Yield the flags that name models, each with one of its names."""
    for flag, named in run_arguments(*parsed).items():
        if flag.endswith("_name_or_path"):
            yield from ((flag, name) for name in ([named] if isinstance(named, str) else named or []))
        elif flag == "value_model" and named not in (None, "head", "reward"):
            yield flag, named


def is_missing_folder(name: str) -> bool:
    """Return whether a model's name can only be a folder's, or its neighbors are folders here, and it is not there."""
    is_path = (
        name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or (len(Path(name).parts) > 1 and Path(name).parent.is_dir())
    )
    return is_path and not Path(name).exists()


def stage_arguments(
    *parsed: "DataclassInstance",
    before: "Mapping[str, Sequence[DataclassInstance]] | None" = None,
    without: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the flags that decide a stage's result, with times and contents of the local files named by them.

    Args:
        before: the parsed flags of the stages that it runs first, by name.
        without: flags without influence on the result.
    """
    arguments = run_arguments(*parsed)
    # Files whose time reveals a rewritten model folder.
    files = {
        "model_name_or_path": "config.json",
        "config_name_or_path": "config.json",
        "tokenizer_name_or_path": "tokenizer.json",
        "teacher_model_name_or_path": "config.json",
        "assistant_model_name_or_path": "config.json",
        "critic_model_name_or_path": "config.json",
    }
    sources = ("dataset", "eval_dataset", "ptx_dataset", "helpful_dataset", "preference_dataset")
    named = {flag: arguments.get(flag) or "" for flag in (*(f"{source}_name" for source in sources), *files)}
    for flag in [flag for flag in files if isinstance(named[flag], list)]:
        # Several models: each by its name.
        several = named.pop(flag)
        named |= {name: name for name in several}
        files |= dict.fromkeys(several, files[flag])
    named |= {entry: entry.rpartition(":")[0] for entry in arguments.get("dataset_mixture") or []}
    for flag, name in named.items():
        path = Path(name)
        path = _written_last(path, files[flag]) if flag in files and path.is_dir() else path
        if not name or name in EMBEDDED or not path.exists() or f"{flag}{CHANGED}" in without:
            continue
        files_read = [path] if path.is_file() else source_files(name)
        # Editing a file does not change its folder's time; removing one does.
        read = {path, *files_read, *(file.parent for file in files_read if path.is_dir())}
        arguments[f"{flag}{CHANGED}"] = max(each.stat().st_mtime_ns for each in read)
        compared = model_files(name) if flag in files else data_files(name)
        arguments[f"{flag}{CONTENTS}"] = file_fingerprint(compared, dates_large=True)
    for flag, paths in _reward_files(arguments).items():
        if written := [path.stat().st_mtime_ns for path in paths if path.is_file()]:
            arguments[f"{flag}{CHANGED}"] = max(written)
            compared = [model_files(path if flag == "reward_funcs" else path.parent) for path in paths]
            named_files = [(f"{index}/{file}", path) for index, each in enumerate(compared) for file, path in each]
            arguments[f"{flag}{CONTENTS}"] = file_fingerprint(named_files, dates_large=True)
    for stage, flags in (before or {}).items():
        arguments |= {f"{stage}.{flag}": value for flag, value in run_arguments(*flags).items()}
    return {flag: value for flag, value in arguments.items() if flag not in without}


def _written_last(folder: Path, file: str) -> Path:
    """Return the file whose time shows when a model was written; an adapter has no config, so its weights."""
    adapter = folder / ADAPTER_WEIGHTS[0]
    return adapter if adapter.is_file() and not (folder / file).is_file() else folder / file


def _reward_files(arguments: Mapping[str, Any]) -> dict[str, list[Path]]:
    """Return the files whose time reveals a rewritten reward or critic, by flag; they need not exist."""
    critic = arguments.get("value_model")
    models = {
        "reward_model_name_or_path": arguments.get("reward_model_name_or_path") or [],
        "value_model": [critic] if critic not in (None, "head", "reward") else [],
    }
    files = {flag: [_written_last(Path(name), "config.json") for name in names] for flag, names in models.items()}
    return {**files, "reward_funcs": [Path(name.rpartition(":")[0]) for name in arguments.get("reward_funcs") or []]}


# ---- resuming ----
# Whether a run may resume from a checkpoint, and the handling of checkpoints found by a run.


AUTOMATIC = ("true", "auto")


def is_named(requested: object) -> bool:
    """Return whether `--resume_from_checkpoint` names a folder."""
    return str(requested).lower() not in AUTOMATIC


def checkpoint_to_resume(requested: object, output_dir: str) -> str | None:
    """Return the checkpoint of `--resume_from_checkpoint`: a folder, the last one of the output folder, or none.

    `true` is the last complete checkpoint. `auto` is the same, or the beginning where there is none yet: one command
    for the first launch and for every restart.
    """
    if requested is None or str(requested).lower() in ("false", "none", ""):
        return None
    if is_named(requested):
        if not (Path(requested) / STATE_FILE).is_file():
            raise InputError(f"--resume_from_checkpoint {requested}: not a checkpoint folder (no {STATE_FILE})")
        if damage := damage_in(requested):
            raise InputError(f"--resume_from_checkpoint {requested}: {damage}: name the checkpoint before it, or auto")
        return str(requested)
    is_needed = str(requested).lower() == "true"
    if (checkpoint := last_complete_checkpoint(output_dir)) is not None:
        return str(checkpoint)
    refuse_if(is_needed, f"--resume_from_checkpoint true: no complete checkpoint in {output_dir}")
    if damaged := damaged_checkpoint(output_dir):
        raise InputError(f"--resume_from_checkpoint auto: {damaged}: remove it to start from the beginning")
    return None


def check_resumable(checkpoint: str, requested: object, identity: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another run, one without a record of its run, and one without its optimizer.

    Args:
        requested: the value of `--resume_from_checkpoint`; a folder named there needs no record of its run.
        identity: this run's.
    """
    state = _state(checkpoint)
    refuse_without_state(checkpoint)
    run = record_of(state).get("run")
    if run is None and not is_named(requested):
        raise InputError(
            f"{_shown(checkpoint)} does not say which run made it, so it may be another one's: to resume from it all "
            f"the same name it, --resume_from_checkpoint {checkpoint}; to start anew choose another --output_dir"
        )
    if run is not None and (differs := difference(run, identity)):
        raise InputError(made_with(checkpoint, differs))


def refuse_without_state(checkpoint: str, engine: str | None = None) -> None:
    """Refuse a checkpoint without optimizer or schedule, as `--save_only_model` leaves it."""
    if missing := missing_for_resuming(checkpoint, engine):
        raise InputError(
            f"{_shown(checkpoint)} holds no {missing}, as after --save_only_model, and cannot be resumed: start anew "
            f"in another --output_dir, from its weights by --model_name_or_path {checkpoint}"
        )


def made_with(checkpoint: str, differs: str) -> str:
    """Return the line for refusing a checkpoint of another run.

    Args:
        differs: the first difference, as `difference` returns it.
    """
    return (
        f"{_shown(checkpoint)} was made with {differs}: resume it with its own flags and files, or start anew in "
        "another --output_dir"
    )


def described(checkpoint: str) -> str:
    """Return the point where a run resumes, as a line."""
    state = _state(checkpoint)
    line = f"resuming from {Path(checkpoint).name} (step {state.get('global_step')} of {state.get('max_steps')})"
    if record_of(state).get("run") is None:
        line += "; it does not say which run made it, so its flags are not compared"
    elif (rows := record_of(state)["run"].get("rows")) and rows.get("form") != FORM:
        line += "; an earlier version made it, so of its rows the number is compared and not what they hold"
    return line


def about_old_checkpoints(output_dir: str, identity: Mapping[str, Any], can_resume: bool) -> str | None:
    """Return the line about existing checkpoints not used for resuming; `None` where there are none.

    Args:
        can_resume: whether `--resume_from_checkpoint` would reach this run, and not only its own run.
    """
    result = [path for path in checkpoints_in(output_dir) if is_complete(path)]
    if not result:
        return None
    last, state = result[-1], _state(str(result[-1]))
    line = f"starting from the beginning; the checkpoints there, up to {last.name}, will be overwritten"
    run = record_of(state).get("run")
    if run is not None and (differs := difference(run, identity)):
        return f"{line} (they were made with {differs})"
    if run is None or not can_resume or missing_for_resuming(last):
        return line
    step = f"step {state.get('global_step')} of {state.get('max_steps')}"
    return f"{line}; --resume_from_checkpoint auto would continue from {last.name} ({step})"


def _state(checkpoint: str) -> dict[str, Any]:
    try:
        return state_of(checkpoint)
    except (OSError, ValueError):
        raise InputError(f"{_shown(checkpoint)}: its trainer_state.json cannot be read") from None


def _shown(checkpoint: str) -> str:
    return f"{Path(checkpoint).name} in {Path(checkpoint).parent}"
