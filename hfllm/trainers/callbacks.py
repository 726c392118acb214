"""What a recipe's trainer prints: a plain line at each logging step, and on a terminal one moving line below them."""

import math
import shutil
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import has_length

from hfllm.outputs.report import readable
from hfllm.runs.schedule import current_job

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

SHOWN = {
    "loss": "loss",
    "eval_loss": "held-out loss",
    "eval_reward": "held-out reward",
    "eval_accuracy": "held-out accuracy",
    "eval_kl": "held-out kl",
    "eval_unfinished": "held-out unfinished",
    "soft_loss": "divergence",
    "hard_loss": "cross-entropy",
    "bits_per_byte": "bits/byte",
    "tokens_per_second": "tokens/s",
    "mfu": "mfu",
    "learning_rate": "lr",
    "mean_token_accuracy": "token accuracy",
    "accuracy": "accuracy",
    "margin": "margin",
    "reward": "reward",
    "rewards/gold_reward": "gold",
    "kl": "kl",
    "entropy": "entropy",
    "clip_fraction": "clipped",
    "explained_variance": "value explained",
    "response_length": "length",
    "unfinished": "unfinished",
}
# Smaller figures are rounding, except for learning rates.
LEAST = 5e-5


def plain_line(state: TrainerState, logs: dict[str, float]) -> str | None:
    """The metrics that matter of one log entry as a line, or `None` if it holds none of them."""
    shown = [f"{label} {_short(name, float(logs[name]))}" for name, label in SHOWN.items() if name in logs]
    step = f"step {state.global_step}/{state.max_steps}" if state.max_steps else "before training"
    return f"{step}  {'  '.join(shown)}" if shown else None


def _short(name: str, value: float) -> str:
    return readable(0.0 if abs(value) < LEAST and name != "learning_rate" else value)


class PlainPrinter(TrainerCallback):
    """Print one plain line at each logging step."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if state.is_world_process_zero and logs and (line := plain_line(state, logs)):
            print(line, flush=True)


class MovingLine(PlainPrinter):
    """A line on the terminal that says which stage of how many trains, its step and the time left, rewritten in place.

    The plain lines stand above it.

    Args:
        stream: where it is written, by default stderr.
        clock: seconds.
    """

    # Seconds between two drawings: more would only cost time.
    PAUSE = 0.1

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        self.stream, self.clock = stream or sys.stderr, clock
        self._width, self._drawn_at, self._num_evaluated = 0, -math.inf, 0
        self._began, self._first_step = clock(), 0

    def _draw(self, text: str, whenever: bool = False) -> None:
        """Put `text` in the place of what stands there, unless that was drawn a moment ago."""
        is_same = not text and not self._width
        if is_same or (not whenever and self.clock() - self._drawn_at < self.PAUSE):
            return
        text = text[: shutil.get_terminal_size().columns - 1]
        self.stream.write(f"\r{text.ljust(self._width)}" + ("" if text else "\r"))
        self.stream.flush()
        self._width, self._drawn_at = len(text), self.clock() if text else -math.inf

    def _progress(self, state: TrainerState) -> str:
        done, left = state.global_step - self._first_step, state.max_steps - state.global_step
        text = f"{where()}step {state.global_step}/{state.max_steps}"
        if done > 0 and left > 0:
            text += f"  {clock_time(left * (self.clock() - self._began) / done)} left"
        job = current_job()
        return text + (f", then about {job.minutes_after:g} min" if job and job.minutes_after else "")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._began, self._first_step = self.clock(), state.global_step
        if state.is_world_process_zero:
            self._draw(self._progress(state))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.is_world_process_zero:
            self._draw(self._progress(state))

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: "DataLoader | None" = None,
        **kwargs: object,
    ) -> None:
        self._num_evaluated += 1
        if state.is_world_process_zero and has_length(eval_dataloader):
            self._draw(f"{where()}evaluating {self._num_evaluated}/{len(eval_dataloader)}")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._num_evaluated = 0
        self._draw("", whenever=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._draw("", whenever=True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        self._draw("", whenever=True)
        super().on_log(args, state, control, logs, **kwargs)


def where() -> str:
    """Return the stage that runs and its place among those of the job, such as `reward (3 of 4)  `."""
    job = current_job()
    if job is None:
        return ""
    place = f" ({job.place + 1} of {len(job.stages)})" if len(job.stages) > 1 else ""
    return f"{job.stages[job.place].name}{place}  "


def clock_time(seconds: float) -> str:
    """Return a duration as `M:SS`, or `H:MM:SS` from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def use_plain_lines(trainer: Trainer) -> None:
    """Let any `Trainer` print plain lines, and on a terminal a moving one, in place of whole dictionaries and bars."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(PlainPrinter() if trainer.args.disable_tqdm else MovingLine())
