"""What a recipe is one stage of: begin and end it, and run those before it."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.data.loading import check_source
from hfllm.data.sources import PYDOC, WORLD, source_files
from hfllm.errors import InputError
from hfllm.outputs.card import write_card
from hfllm.outputs.files import CARD
from hfllm.outputs.hub import take_repository
from hfllm.outputs.report import Plot, Report, plot_history
from hfllm.runs.command_line import checkpoint_to_resume, finished_run, main_process, run_arguments

if TYPE_CHECKING:
    from transformers import Trainer


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
        InputError: when another run has finished there, it is a folder of a model that is read, a flag cannot work on
            this machine, or the Hub refuses.
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
        refuse_own_input(training_args.output_dir, script_args, training_args, model_args)
        self.name, self.training_args, self.began = name, training_args, time.perf_counter()
        self.arguments = stage_arguments(script_args, training_args, model_args, before=before)
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


def refuse_own_input(output_dir: str, *parsed: Any) -> None:
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


def stage_arguments(*parsed: Any, before: Mapping[str, Sequence[Any]] | None = None) -> dict[str, Any]:
    """The flags that decide a stage's result, and when the local data, models and reward functions they name changed.

    Args:
        before: the parsed flags of the stages that it runs first, by name.
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
        if not name or name in (WORLD, PYDOC) or not path.exists():
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
    return arguments


def _reward_files(arguments: Mapping[str, Any]) -> dict[str, list[Path]]:
    """What tells that a reward or a critic was written again, by the flag that names it; it need not exist."""
    critic = arguments.get("value_model")
    models = {
        "reward_model_name_or_path": arguments.get("reward_model_name_or_path") or [],
        "value_model": [critic] if critic not in (None, "head", "reward") else [],
    }
    files = {flag: [Path(name, "config.json") for name in names] for flag, names in models.items()}
    return {**files, "reward_funcs": [Path(name.rpartition(":")[0]) for name in arguments.get("reward_funcs") or []]}
