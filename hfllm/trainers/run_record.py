"""The records of a run in its checkpoints: its identity, and the losses since its last log.

Both are in `trainer_state.json`, written last by Trainer: a checkpoint has them or is not complete.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hfllm.errors import InputError
from hfllm.fingerprint import FORM, file_fingerprint, fingerprint
from hfllm.outputs.checkpoints import RECORD, record_of, state_of
from hfllm.runs.identity import model_files
from hfllm.runs.stage import made_with
from hfllm.trainers.precision import CHOICE, choice_of

if TYPE_CHECKING:
    from datasets import Dataset

# The compared rows of the training data: all of them, or so many from all over it.
MOST_ROWS = 4096


class RunRecord(TrainerCallback):
    """Callback that records a run in its checkpoints, and takes up the losses of a resumed run.

    Trainer forgets at a checkpoint its sums since the last log. With this callback, `loss` of the next log and
    `train_loss` are as in an uninterrupted run.

    Args:
        run: the identity of the run, as JSON values; `None` records only the losses.
    """

    def __init__(self, trainer: Trainer, run: Mapping[str, Any] | None):
        self.trainer, self.run = trainer, run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        record = record_of({"stateful_callbacks": state.stateful_callbacks})
        if losses := record.get("losses") if state.global_step else None:
            trainer = self.trainer
            trainer._total_loss_scalar = losses["logged"]
            trainer._tr_loss.fill_(losses["since"])
            trainer._globalstep_last_logged = losses["logged_at"]
            _take_up(trainer, losses["parts"])
        state.stateful_callbacks[RECORD] = {"losses": losses} | ({"run": self.run} if self.run is not None else {})

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if control.should_save:
            self._note(state)

    on_epoch_end = on_step_end

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        # Trainer has set its sum to 0 by now; all processes know it.
        if self.trainer._globalstep_last_logged == state.global_step:
            self._write(state, 0.0, {})

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        # The best model so far may be saved next.
        if self.trainer.is_in_train:
            self._note(state)

    def _note(self, state: TrainerState) -> None:
        since = self.trainer.accelerator.reduce(self.trainer._tr_loss.detach().clone(), "mean")
        # At a logged step, they are logged before the checkpoint is saved.
        self._write(state, since.item(), _unlogged_parts(self.trainer))

    def _write(self, state: TrainerState, since: float, parts: dict[str, Any]) -> None:
        trainer = self.trainer
        state.stateful_callbacks[RECORD]["losses"] = {
            "logged": trainer._total_loss_scalar,
            "since": since,
            "logged_at": trainer._globalstep_last_logged,
            "parts": parts | {"tokens": getattr(trainer, "_total_train_tokens", None)},
        }


class WholeTrainLoss(TrainerCallback):
    """Callback that extends `train_loss` of a resumed run to all its steps; before callbacks that report it."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        is_whole = bool(record_of({"stateful_callbacks": state.stateful_callbacks}).get("losses"))
        if not logs or "train_loss" not in logs or not self.trainer._initial_global_step or not is_whole:
            return
        for entry in (logs, state.log_history[-1]):
            entry["train_loss"] = self.trainer._total_loss_scalar / state.global_step


def _unlogged_parts(trainer: Trainer) -> dict[str, Any]:
    """Return the sums of TRL's trainers and distillation since the last log, the mean of all processes."""
    metrics, sums = getattr(trainer, "_metrics", None), getattr(trainer, "_sums", None)
    parts: dict[str, Any] = {}
    if isinstance(metrics, dict) and isinstance(metrics.get("train"), dict):
        parts["metrics"] = {name: list(values) for name, values in metrics["train"].items()}
    if torch.is_tensor(sums):
        parts["sums"] = trainer.accelerator.reduce(sums.to(trainer.args.device, copy=True), "mean").tolist()
    return parts


def _take_up(trainer: Trainer, parts: Mapping[str, Any]) -> None:
    """Continue the sums returned by `_unlogged_parts`."""
    for name, values in parts.get("metrics", {}).items():
        trainer._metrics["train"][name] = list(values)
    if "sums" in parts:
        trainer._sums.copy_(torch.tensor(parts["sums"]))
    if parts.get("tokens") is not None:
        trainer._total_train_tokens = parts["tokens"]


def final_train_loss(trainer: Trainer) -> float:
    """Return the mean loss of all steps of the just ended run."""
    return next(entry["train_loss"] for entry in reversed(trainer.state.log_history) if "train_loss" in entry)


def with_contents(run: Mapping[str, Any], trainer: Trainer, rows_are_sampled: bool) -> dict[str, Any]:
    """Return the identity of a run, with hashes of its training rows and of its initial model.

    Args:
        rows_are_sampled: whether a model has written them; they may differ when written again on a GPU.
    """
    config = getattr(trainer.model, "config", None)
    name, model = getattr(config, "_name_or_path", "") or "", None
    if name and Path(name).is_dir():
        model = {"value": name, "content": file_fingerprint(model_files(name))}
    elif name:
        model = {"value": name, "content": getattr(config, "_commit_hash", None)}
    rows = None if rows_are_sampled else content_of_rows(trainer)
    return {**run, "model": model, "rows": rows, CHOICE: choice_of(trainer.args)}


def content_of_rows(trainer: Trainer) -> dict[str, Any] | None:
    """Return the number and a hash of a trainer's training rows, `None` where they cannot be counted.

    Raises:
        InputError: for a value in a row without contents to compare, such as an object of your own, naming both.
    """
    plan = getattr(trainer, "plan", None)
    parts = plan.sources if plan is not None else [getattr(trainer.train_dataset, "rows", trainer.train_dataset)]
    result, count = [], 0
    for part in parts:
        if not hasattr(part, "__len__") or not hasattr(part, "__getitem__"):
            return None
        count += len(part)
        every = max(1, len(part) / MOST_ROWS)
        indices = [int(number * every) for number in range(min(len(part), MOST_ROWS))]
        rows = zip(indices, _rows_at(part, indices), strict=True)
        result.append([fingerprint(row, f"training row {index}") for index, row in rows])
    return {"count": count, "content": fingerprint(result), "form": FORM}


def check_contents(trainer: Trainer, checkpoint: str | None, run: Mapping[str, Any] | None) -> None:
    """Refuse a checkpoint whose run had other training rows or another model to start from; all processes together.

    Raises:
        InputError: when it had, or processes would resume from different steps.
    """
    complaint, step = None, -1
    if checkpoint is not None:
        state = state_of(checkpoint)
        step = state.get("global_step", -1)
        if run is not None and (differs := _other_contents(record_of(state).get("run") or {}, run)):
            complaint = made_with(checkpoint, differs)
    if trainer.args.world_size > 1:
        statuses = torch.tensor([[step, int(complaint is not None)]], device=trainer.args.device)
        statuses = trainer.accelerator.gather(statuses).tolist()
        steps = sorted({each for each, _ in statuses})
        if len(steps) > 1:
            raise InputError(f"processes would resume from different steps ({steps}): can all read the checkpoints?")
        if complaint is None and any(refuses for _, refuses in statuses):
            complaint = f"another process refuses {checkpoint}"
    if complaint is not None:
        raise InputError(complaint)


def _other_contents(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    was, model = before.get("model"), now["model"]
    if was and model and None not in (was["content"], model["content"]) and was["content"] != model["content"]:
        return f"another model to start from ({was['value']}), or other contents of it"
    was, rows = before.get("rows"), now["rows"]
    # Hashes made in another way by an earlier version cannot be compared; `runs.stage.described` says so.
    same = ("count", "content") if was and rows and was.get("form") == rows["form"] else ("count",)
    if was and rows and any(was[each] != rows[each] for each in same):
        counts = f" ({was['count']} rows, this run has {rows['count']})" if was["count"] != rows["count"] else ""
        return f"other training rows{counts}"
    return None


def _rows_at(rows: "Dataset | Sequence[object]", indices: Sequence[int]) -> list[object]:
    if hasattr(rows, "with_format"):
        # As they are stored: images and sounds are not decoded.
        return rows.with_format("arrow")[indices].to_pylist()
    return [rows[index] for index in indices]
