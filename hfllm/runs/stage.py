"""One run of a recipe: describe it, then refuse, reuse, announce, finish and publish it."""

import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.data.loading import check_source
from hfllm.data.sources import PYDOC, WORLD, source_files
from hfllm.errors import InputError
from hfllm.outputs.card import write_card
from hfllm.outputs.files import CARD
from hfllm.outputs.hub import Repository, repository_of
from hfllm.outputs.report import Bars, Plot, Report, plot_history
from hfllm.runs import schedule
from hfllm.runs.arguments import changed
from hfllm.runs.command_line import checkpoint_to_resume, finished_run, main_process, run_arguments

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from transformers import Trainer, TrainingArguments


class Stage:
    """One run of a recipe, from its announcement to its report. Making one has no effect.

        stage = Stage("sft", script_args, training_args, model_args)
        stage.check()
        if stage.is_finished:
            return stage.reuse()
        stage.announce()
        ...  # train with stage.training_args, from stage.checkpoint
        return stage.finish(metrics, trainer)

    Args:
        name: the stage's name.
        parsed: its flags as they were given, a dataclass each; one has `output_dir`.
        before: the parsed flags of the stages that it runs first, by name; they decide its result too.
        also: what else decides the result, by a name of its own.
        without: flags that do not decide it, or `dataset_name changed at` where `also` tells of the files.

    Attributes:
        arguments: all that decides the result, as JSON values.
        output_dir: its folder.
        redo: what has to be done before a finished run can be made again.
    """

    redo = "remove that folder to redo it"

    def __init__(
        self,
        name: str,
        *parsed: "DataclassInstance",
        before: "Mapping[str, Sequence[DataclassInstance]] | None" = None,
        also: Mapping[str, Any] | None = None,
        without: Sequence[str] = (),
    ):
        self.name, self.parsed, self.began = name, parsed, time.perf_counter()
        self.output_dir: str = _with_field(parsed, "output_dir").output_dir
        self.arguments = stage_arguments(*parsed, before=before, without=without) | dict(also or {})

    @cached_property
    def training_args(self) -> "TrainingArguments":
        """The trainer's arguments, without the pushes of its own and the token: the finished model is pushed once."""
        return changed(_with_field(self.parsed, "per_device_train_batch_size"), push_to_hub=False, hub_token=None)

    @cached_property
    def checkpoint(self) -> str | None:
        """The checkpoint to resume from, or `None`."""
        return checkpoint_to_resume(self.training_args)

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
        """Refuse what no stage can do, before anything is made.

        Raises:
            InputError: when another run has finished there, it is a folder of a model that is read, a flag cannot work
                on this machine or would have no effect, there is no such checkpoint, or the Hub could not be used.
        """
        for group in self.parsed:
            if getattr(group, "fp16", False) and group.device.type == "cpu":
                raise InputError("--fp16 does nothing on a CPU: use --bf16 or neither")
            if hasattr(group, "resume_from_checkpoint"):
                _ = self.checkpoint
            if hasattr(group, "dataset_name"):
                check_source(group)
        refuse_own_input(self.output_dir, *self.parsed)
        _ = self.report, self.repository

    def announce(self, what: str | None = None) -> None:
        """Say what begins, and make the repository that will be published to: a wrong name or token is found now.

        Args:
            what: what is said in place of an arrow to the output folder.
        """
        schedule.enter(schedule.Planned(self.name, self.output_dir, parsed=self.parsed))
        if main_process():
            print(f"\n=== {self.name} {what or f'-> {self.output_dir}'}", flush=True)
            if self.repository is not None:
                self.repository.create()

    def reuse(self) -> dict[str, float]:
        """Say that the same run has finished, and publish it if asked. Returns its metrics."""
        if main_process():
            print(f"{self.name}: already done in {self.output_dir} ({self.redo})", flush=True)
            self.publish()
        return self.report["metrics"]

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
    ) -> dict[str, float]:
        """Write the report, print it (or `summary` instead), publish if asked, wait for all processes.

        Args:
            trainer: what trained, for the loss curve; `None` where nothing was trained and one process has worked.
            artifacts: what lies where in the output folder; by default the model, which then gets its card.
            too_wide: titles of tables that are written and not printed.

        Returns:
            The metrics.

        Raises:
            InputError: when publishing fails; the model and its report are there by then.
        """
        artifacts = {"model": "."} if artifacts is None else dict(artifacts)
        if trainer is not None:
            curves = {"loss": loss_curve(self.name, trainer), **(curves or {})}
            # The whole history of the logs, for plots of your own.
            trainer.save_state()
        report = Report(
            stage=self.name,
            arguments=self.arguments,
            metrics=dict(metrics),
            tables=dict(tables or {}),
            curves=dict(curves or {}),
            artifacts=artifacts,
            wall_seconds=time.perf_counter() - self.began,
            next_steps=next_steps,
        )
        failure = None
        if main_process():
            folder = Path(self.output_dir)
            report.write(folder)
            if artifacts.get("model") == ".":
                # Trainers leave drafts of a card; this is the one that is published, and the user's to edit.
                (folder / CARD).unlink(missing_ok=True)
                write_card(folder)
            if summary:
                print(f"{self.name}: {summary} ({report.wall_seconds:.0f} s)", flush=True)
            else:
                report.print(too_wide)
            try:
                self.publish()
            except InputError as error:
                failure = error
        if trainer is not None:
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
            self.repository.push(self.output_dir)
        except InputError as error:
            raise InputError(
                f"{error}. The run itself has finished; publish it by hfllm push --model_name_or_path "
                f"{self.output_dir} --hub_model_id {self.repository.repo_id}"
            ) from None


def loss_curve(name: str, trainer: "Trainer") -> Plot:
    """The plot of a trainer's losses over its steps."""
    return plot_history(
        trainer.state.log_history,
        {"training": "loss", "evaluation": "eval_loss"},
        title=f"{name}: loss",
        xlabel="step",
        ylabel="loss",
    )


def _with_field(parsed: "Sequence[DataclassInstance]", name: str) -> Any:
    """The first of the dataclasses that has the field `name`."""
    return next(group for group in parsed if hasattr(group, name))


def refuse_own_input(output_dir: str, *parsed: "DataclassInstance") -> None:
    """Refuse to write a model over one that is read.

    Args:
        parsed: the flags that may name it.

    Raises:
        InputError: naming the flag.
    """
    arguments = run_arguments(*parsed)
    for flag in ("model_name_or_path", "teacher_model_name_or_path", "reward_model_name_or_path", "value_model"):
        named = arguments.get(flag) or []
        for name in [named] if isinstance(named, str) else named:
            if Path(name).is_dir() and Path(name).resolve() == Path(output_dir).resolve():
                raise InputError(f"--output_dir {output_dir} is --{flag}, which it would overwrite: choose another")


def stage_arguments(
    *parsed: "DataclassInstance",
    before: "Mapping[str, Sequence[DataclassInstance]] | None" = None,
    without: Sequence[str] = (),
) -> dict[str, Any]:
    """The flags that decide a stage's result, and when the local data, models and reward functions they name changed.

    Args:
        before: the parsed flags of the stages that it runs first, by name.
        without: what does not decide it.
    """
    arguments = run_arguments(*parsed)
    # What tells of a model's folder that it was written again.
    files = {
        "model_name_or_path": "config.json",
        "config_name_or_path": "config.json",
        "tokenizer_name_or_path": "tokenizer.json",
        "teacher_model_name_or_path": "config.json",
        "assistant_model_name_or_path": "config.json",
    }
    named = {flag: arguments.get(flag) or "" for flag in ("dataset_name", "ptx_dataset_name", *files)}
    named |= {entry: entry.rpartition(":")[0] for entry in arguments.get("dataset_mixture") or []}
    for flag, name in named.items():
        path = Path(name)
        path = path / files[flag] if flag in files and path.is_dir() else path
        if not name or name in (WORLD, PYDOC) or not path.exists() or f"{flag} changed at" in without:
            continue
        files_read = [path] if path.is_file() else source_files(name)
        # A file that is edited leaves its folder's time alone, one that is removed does not.
        read = {path, *files_read, *(file.parent for file in files_read if path.is_dir())}
        arguments[f"{flag} changed at"] = max(each.stat().st_mtime_ns for each in read)
    for flag, paths in _reward_files(arguments).items():
        if written := [path.stat().st_mtime_ns for path in paths if path.is_file()]:
            arguments[f"{flag} changed at"] = max(written)
    for stage, flags in (before or {}).items():
        arguments |= {f"{stage}.{flag}": value for flag, value in run_arguments(*flags).items()}
    return {flag: value for flag, value in arguments.items() if flag not in without}


def _reward_files(arguments: Mapping[str, Any]) -> dict[str, list[Path]]:
    """What tells that a reward or a critic was written again, by the flag that names it; it need not exist."""
    critic = arguments.get("value_model")
    models = {
        "reward_model_name_or_path": arguments.get("reward_model_name_or_path") or [],
        "value_model": [critic] if critic not in (None, "head", "reward") else [],
    }
    files = {flag: [Path(name, "config.json") for name in names] for flag, names in models.items()}
    return {**files, "reward_funcs": [Path(name.rpartition(":")[0]) for name in arguments.get("reward_funcs") or []]}
