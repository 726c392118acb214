"""Common behavior of all trainers: save on SIGTERM, resume only its own run, and evaluate each row exactly once.

train(trainer, stage.checkpoint, stage.identity)  # in place of trainer.train(resume_from_checkpoint=...)
"""

import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from hfllm.data.packing import IGNORE
from hfllm.errors import InputError, Interrupted, MachineError
from hfllm.outputs.checkpoints import is_complete
from hfllm.runs.output import explained, what_is_saved
from hfllm.runs.schedule import current_job
from hfllm.runs.stage import refuse_without_state
from hfllm.trainers.callbacks import Checksums
from hfllm.trainers.monitors import add_to_logs
from hfllm.trainers.run_record import RunRecord, WholeTrainLoss, check_contents, with_contents

# ---- saving and resuming ----


# The exit status in a shell for a process ended by SIGTERM.
TERMINATED = 128 + signal.SIGTERM


class _AlreadyDone(Exception):
    """Raised when the checkpoint to resume from is from the last step."""


class _LookBeforeTheFirstStep(TrainerCallback):
    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step >= state.max_steps:
            raise _AlreadyDone


def train(
    trainer: Trainer,
    checkpoint: str | None = None,
    run: Mapping[str, Any] | None = None,
    rows_are_sampled: bool = False,
) -> None:
    """Train, from a checkpoint if given; with `enable_jit_checkpoint`, SIGTERM saves, see `SaveOnSigterm`.

    `Trainer` itself would take one more step from a checkpoint of the last step, unless this step ends an epoch.

    Args:
        run: the identity of the run (`Stage.identity`), recorded in its checkpoints.
        rows_are_sampled: whether a model has written the training rows, and they are therefore not compared.

    Raises:
        InputError: when SIGTERM would save an unusable checkpoint, or `checkpoint` is from other rows or another
            model, or cannot be resumed with this engine.
        SystemExit: with 143, once SIGTERM has saved.
        Interrupted: after Ctrl-C, with the way to resume the run.
        MachineError: when memory or disk is full, or the folder cannot be written to; with the same.
    """
    save_on_sigterm(trainer)
    if run is not None:
        run = with_contents(run, trainer, rows_are_sampled)
    check_contents(trainer, checkpoint, run)
    try:
        train_unless_done(trainer, trainer.train, run, resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        raise Interrupted(_how_to_resume(trainer, is_recorded=run is not None)) from None
    except Exception as error:
        job = current_job()
        line = explained(error, *(job.stages[job.place].parsed if job else ()))
        if line is None:
            raise
        raise MachineError(f"{line}; {_how_to_resume(trainer, is_recorded=run is not None)}") from error


def train_unless_done(
    trainer: Trainer, train: Callable[..., TrainOutput], run: Mapping[str, Any] | None = None, **kwargs: object
) -> TrainOutput:
    """Return `train(**kwargs)`, which trains `trainer`; from the last step's checkpoint, only end the run.

    Args:
        run: the record of the run in its checkpoints, besides its losses.

    Raises:
        InputError: when the checkpoint has no optimizer or schedule for this engine.
    """
    if any(isinstance(each, _LookBeforeTheFirstStep) for each in trainer.callback_handler.callbacks):
        # The caller checks.
        return train(**kwargs)
    checkpoint = kwargs.get("resume_from_checkpoint")
    if isinstance(checkpoint, str) and trainer.is_deepspeed_enabled:
        check_shards(checkpoint, trainer.args)
    elif isinstance(checkpoint, str):
        refuse_without_state(checkpoint, "fsdp" if trainer.is_fsdp_enabled else "")
    look, whole, record = _LookBeforeTheFirstStep(), WholeTrainLoss(trainer), RunRecord(trainer, run)
    trainer.add_callback(look)
    # After the callbacks that decide to save, SIGTERM's last.
    trainer.add_callback(record)
    add_to_logs(trainer, whole)
    # Before callbacks that end the process when a checkpoint is saved, or time the next step from then on.
    checksums = Checksums(trainer)
    add_to_logs(trainer, checksums)
    try:
        return train(**kwargs)
    except _AlreadyDone:
        return trainer._finalize_training(None, 0, time.time())
    finally:
        for callback in (look, whole, record, checksums):
            trainer.remove_callback(callback)


def _how_to_resume(trainer: Trainer, is_recorded: bool) -> str:
    """Return the finished part and the way to resume, as a line; an unfinished checkpoint is removed.

    Args:
        is_recorded: whether checkpoints name their run; a recipe does not resume from others.
    """
    state, folder = trainer.state, Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        unfinished = folder / f"checkpoint-{state.global_step}"
        if unfinished.is_dir() and not is_complete(unfinished):
            shutil.rmtree(unfinished, ignore_errors=True)
    line = f"step {state.global_step} of {state.max_steps}"
    return f"{line}; {what_is_saved(folder, is_training=True)}" if is_recorded else line


def check_shards(checkpoint: str, args: TrainingArguments) -> None:
    """Refuse a DeepSpeed checkpoint of another number of processes, unless it is set to load universal ones."""
    if args.deepspeed_plugin.deepspeed_config.get("checkpoint", {}).get("load_universal"):
        return
    saved, ours = len(list(Path(checkpoint).glob("global_step*/*_optim_states.pt"))), args.world_size
    if saved != ours:
        raise InputError(
            f"{checkpoint} was saved by {saved} processes of DeepSpeed and resumes with as many; this run has {ours}"
        )


def save_on_sigterm(trainer: Trainer) -> None:
    """Replace transformers' handling of `enable_jit_checkpoint`, if it is set, by `SaveOnSigterm`.

    transformers saves at the beginning of a step or within one, finishes that step, and lets the script continue as if
    the run were complete. Its processes do not coordinate, and wait for each other forever if they notice
    the signal at different steps.
    """
    if not trainer.args.enable_jit_checkpoint:
        return
    if trainer.args.save_only_model:
        raise InputError("enable_jit_checkpoint with save_only_model: the saved checkpoint could not be resumed")
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, JITCheckpointCallback):
            signal.signal(signal.SIGTERM, callback.jit_manager._original_sigterm_handler)
    trainer.remove_callback(JITCheckpointCallback)
    if not any(isinstance(each, SaveOnSigterm) for each in trainer.callback_handler.callbacks):
        trainer.add_callback(SaveOnSigterm(trainer))


class SaveOnSigterm(TrainerCallback):
    """SIGTERM ends training after the step in progress with a checkpoint and exit code 143.

    The checkpoint is an ordinary one between two steps, so a run resumed from it ends with the bits of
    an uninterrupted run. After each step, processes agree whether any got the signal. While the loss guard
    forbids saving, training continues. Before and after training SIGTERM ends the process at once.

    Raises:
        InputError: when training does not begin in the main thread, the only one to receive signals.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self._previous: Callable[[int, FrameType | None], object] | int | None = None
        self._is_asked, self._is_agreed = False, False

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Schedulers and launchers both send it: a second signal changes nothing.
        self._is_asked = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise InputError("enable_jit_checkpoint: training has to begin in the main thread")
        self._is_asked, self._is_agreed = False, False
        self._previous = signal.signal(signal.SIGTERM, self._note)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if not self._is_agreed:
            save_requested = torch.tensor(float(self._is_asked), device=args.device)
            self._is_agreed = bool(self.trainer.accelerator.reduce(save_requested, "sum") > 0)
        if self._is_agreed:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if self._is_agreed:
            self._leave(f"saved step {state.global_step} in {args.output_dir}; --resume_from_checkpoint auto resumes")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self._is_agreed:
            self._leave("nothing was saved since")
        self._restore()

    def _restore(self) -> None:
        signal.signal(signal.SIGTERM, self._previous if self._previous is not None else signal.SIG_DFL)

    def _leave(self, what: str) -> None:
        # A process exiting while another still writes would end the other one too.
        self.trainer.accelerator.wait_for_everyone()
        self._restore()
        if self.trainer.is_world_process_zero():
            print(f"SIGTERM: {what}", file=sys.stderr, flush=True)
        self.trainer.accelerator.end_training()
        sys.exit(TERMINATED)


# ---- exact evaluation ----
#
# Held-out losses that depend only on the data: not on the evaluation batch, not on the number of processes.
#
# `transformers.Trainer` averages the means of batches, so a batch of few tokens counts as much as one of many; and on
# several processes accelerate fills the last batches with rows already read. `TokenMeanEvaluation` adds up
# losses and counts, once per row. It is a mixin, first among the bases:
#
#     class MyTrainer(TokenMeanEvaluation, Trainer): ...
#
# `eval_loss` (of `evaluate`) and `test_loss` (of `predict`) are then the trainer's loss per target, over all targets
# of the dataset. The load-balancing loss of experts is a property of a batch, and no part of them. Training is
# unchanged.


Batch = dict[str, Any]
Collator = Callable[[Sequence[Any]], Mapping[str, Any]]
# Entry of a batch, taken out before the model sees it: how many tokens of it each row has.
ROW_LENGTHS = "row_lengths"


class WithRowLengths:
    """Collator that adds the length of each row to the batch of another collator; its rows may be joined to one.

    Args:
        collate: the other collator.
        length: tokens per row, where the other pads them all to this length; by default the length of its `input_ids`.
    """

    def __init__(self, collate: Collator, length: int | None = None):
        self.collate, self.length = collate, length

    def __call__(self, rows: Sequence[Any]) -> Mapping[str, Any]:
        lengths = [self.length or _length(row) for row in rows]
        return {**self.collate(rows), ROW_LENGTHS: torch.tensor(lengths)}


def _length(row: Any) -> int:
    ids = row.get("input_ids") if isinstance(row, Mapping) else None
    return 0 if ids is None else len(ids)


class EachRowOnce(Trainer):
    """Base of trainers for measuring each held-out row once, on any number of processes.

    A subclass calls `_keep` at every batch, and computes its metrics in `_measured` from the values kept by all
    processes.
    """

    # Rows of numbers kept by this process, one entry per batch of the current evaluation; `None` outside of one.
    _kept: list[torch.Tensor] | None = None
    # Tokens per row of an evaluation batch, where the collator pads them all to this length.
    _padded_length: int | None = None
    # The model whose floating-point operations per token have been counted, and their number.
    _counted: tuple[nn.Module | None, int] = (None, 0)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return Trainer's number for a batch; it counts the weights of the model once and not in every step."""
        name = getattr(self.model, "main_input_name", "input_ids")
        if name not in inputs or not hasattr(self.model, "num_parameters"):
            return 0
        if self._counted[0] is not self.model:
            self._counted = self.model, 6 * self.model.num_parameters(exclude_embeddings=True)
        return self._counted[1] * inputs[name].numel()

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """Return Trainer's loader; its batches say how long their rows are."""
        with self._row_lengths():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """Return Trainer's loader; its batches say how long their rows are."""
        with self._row_lengths():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _row_lengths(self) -> Iterator[None]:
        collate = self.data_collator
        self.data_collator = WithRowLengths(collate, self._padded_length)
        try:
            yield
        finally:
            self.data_collator = collate

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as Trainer does, with metrics of all rows instead of means over batches."""
        self._kept = []
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            if self._kept:
                # Every process has as many batches, of as many rows.
                row_metrics = torch.cat(self._kept)
                everyone = self.accelerator.gather(row_metrics).double().cpu().view(-1, *row_metrics.shape)
                measured = self._measured(everyone)
                output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in measured.items()})
        finally:
            self._kept = None
        return output

    def _measured(self, row_metrics: torch.Tensor) -> dict[str, float]:
        """Return metrics of the values kept by all processes: (processes, rows, columns), in double precision."""
        raise NotImplementedError

    def _num_new_rows(self, rows: int) -> int:
        """Return how many of the `rows` rows in this process's batch are real, not fillers of the last batch."""
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return rows
        # The last rows are dealt out one process after another, and then the first ones again.
        return min(max(state.remainder - self.accelerator.process_index * rows, 0), rows)


class TokenMeanEvaluation(EachRowOnce):
    """Mixin whose `eval_loss` is the mean over all targets of the held-out rows; the comment above says why."""

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """Return Trainer's results for a batch, without targets in repeated rows, and keep its sum and count."""
        inputs = self._without_repeated_rows(self._prepare_inputs(inputs))
        config = getattr(self.model, "config", None)
        if config is not None and getattr(config.get_text_config(), "output_router_logits", False):
            inputs["output_router_logits"] = False
        count = self._num_targets(inputs)
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if loss is not None and count is not None and self._kept is not None:
            # The loss is the mean over this batch's targets; without one it is not a number.
            total = torch.where(count > 0, loss.detach().float() * count, 0.0)
            self._kept.append(torch.stack((total, count.to(total.dtype))).unsqueeze(0))
        return loss, logits, labels

    def _measured(self, row_metrics: torch.Tensor) -> dict[str, float]:
        total, count = row_metrics.sum((0, 1)).tolist()
        return {"loss": total / count if count else float("nan")}

    def _without_repeated_rows(self, inputs: Batch) -> Batch:
        """Return the model's part of a batch, without targets in filler rows."""
        inputs = dict(inputs)
        lengths = inputs.pop(ROW_LENGTHS, None)
        if lengths is None:
            return inputs
        new = self._num_new_rows(len(lengths))
        for name in ("labels", "shift_labels"):
            if new < len(lengths) and name in inputs:
                inputs[name] = _first_rows(inputs[name], lengths, new)
        return inputs

    def _num_targets(self, inputs: Batch) -> torch.Tensor | None:
        """Return the number of targets of a batch, as a loss counts them; `None` without labels."""
        targets = inputs.get("shift_labels")
        if targets is None and (labels := inputs.get("labels")) is not None:
            targets = labels[..., 1:] if self._loss_shifts_labels else labels
        return None if targets is None else (targets != IGNORE).sum()

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor | int | None:
        """Return Trainer's count in training; in evaluation none, for a loss averaged over its own batch."""
        return None if self._kept is not None else super()._get_num_items_in_batch(batch_samples, device)


def _first_rows(labels: torch.Tensor, lengths: torch.Tensor, rows: int) -> torch.Tensor:
    """Return labels without targets after the first rows, one below another or joined to one."""
    labels = labels.clone()
    if len(labels) == len(lengths):
        labels[rows:] = IGNORE
    else:
        labels[..., int(lengths[:rows].sum()) :] = IGNORE
    return labels
