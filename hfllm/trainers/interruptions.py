"""Interrupted runs: save on SIGTERM, and do not train further once they are done.

train(trainer, checkpoint)  # in place of trainer.train(resume_from_checkpoint=checkpoint)
"""

import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import TrainOutput

from hfllm.errors import InputError

# The exit status that a shell reports for a process ended by SIGTERM.
TERMINATED = 128 + signal.SIGTERM


class _AlreadyDone(Exception):
    """Raised when the checkpoint to resume from is that of the last step."""


class _LookBeforeTheFirstStep(TrainerCallback):
    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step >= state.max_steps:
            raise _AlreadyDone


def train(trainer: Trainer, checkpoint: str | None = None) -> None:
    """Train, from a checkpoint if given; with `enable_jit_checkpoint`, SIGTERM saves, see `SaveOnSigterm`.

    `Trainer` alone would take one more step from a checkpoint of the last step, unless that ends an epoch.

    Raises:
        InputError: when SIGTERM would save an unusable checkpoint, or DeepSpeed cannot resume from `checkpoint`.
        SystemExit: with 143, once SIGTERM has saved.
    """
    save_on_sigterm(trainer)
    if trainer.is_deepspeed_enabled and checkpoint is not None:
        check_shards(checkpoint, trainer.args)
    train_unless_done(trainer, trainer.train, resume_from_checkpoint=checkpoint)


def train_unless_done(trainer: Trainer, train: Callable[..., TrainOutput], **kwargs: object) -> TrainOutput:
    """Return `train(**kwargs)`, which trains `trainer`; from the last step's checkpoint, only end the run."""
    if any(isinstance(each, _LookBeforeTheFirstStep) for each in trainer.callback_handler.callbacks):
        # The caller checks.
        return train(**kwargs)
    look = _LookBeforeTheFirstStep()
    trainer.add_callback(look)
    try:
        return train(**kwargs)
    except _AlreadyDone:
        return trainer._finalize_training(None, 0, time.time())
    finally:
        trainer.remove_callback(look)


def check_shards(checkpoint: str, args: TrainingArguments) -> None:
    """Refuse a DeepSpeed checkpoint of another number of processes, unless it is set to load universal ones.

    Raises:
        InputError: with both numbers; a checkpoint without DeepSpeed's files counts as one of 0 processes.
    """
    if args.deepspeed_plugin.deepspeed_config.get("checkpoint", {}).get("load_universal"):
        return
    saved = len(list(Path(checkpoint).glob("global_step*/*_optim_states.pt")))
    if saved != args.world_size:
        raise InputError(
            f"{checkpoint} was saved by {saved} processes of DeepSpeed and resumes with as many; this run has "
            f"{args.world_size}"
        )


def save_on_sigterm(trainer: Trainer) -> None:
    """Replace what transformers does for `enable_jit_checkpoint`, if it is set, by `SaveOnSigterm`.

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

    The checkpoint is an ordinary one between two steps, so a run that resumes from it ends with the bits of
    one that was not interrupted. After each step, processes agree whether any got the signal. While the loss guard
    forbids saving, training continues. Before and after training SIGTERM ends the process at once.

    Raises:
        InputError: when training does not begin in the main thread, the only one that receives signals.
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
            asked = torch.tensor(float(self._is_asked), device=args.device)
            self._is_agreed = bool(self.trainer.accelerator.reduce(asked, "sum") > 0)
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
        # A process that exits while another still writes would end that one too.
        self.trainer.accelerator.wait_for_everyone()
        self._restore()
        if self.trainer.is_world_process_zero():
            print(f"SIGTERM: {what}", file=sys.stderr, flush=True)
        self.trainer.accelerator.end_training()
        sys.exit(TERMINATED)
