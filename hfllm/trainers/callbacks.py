"""Callbacks of recipes: lines at logging steps, samples, tables, and checksums of checkpoints."""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.integration_utils import (
    CometCallback,
    MLflowCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import has_length

from hfllm.data.packing import start_of
from hfllm.data.world.operations import OPERATIONS, Probe
from hfllm.errors import InputError, refuse_if
from hfllm.flags import given_names
from hfllm.generation.responses import fast_option, without_cpu_autocast
from hfllm.models.loading.saved import max_length_of
from hfllm.outputs.checkpoints import write_checksums
from hfllm.outputs.figures import readable
from hfllm.runs.schedule import current_job
from hfllm.trainers.engines import evaluation_mode
from hfllm.trainers.monitors import ThroughputCallback

if TYPE_CHECKING:
    from torch.utils.data import DataLoader


# ---- lines ----


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
    **{f"probe_{operation}": operation for operation in OPERATIONS},
}
# Smaller figures are rounding, except for learning rates.
LEAST = 5e-5


def plain_line(state: TrainerState, logs: dict[str, float]) -> str | None:
    """The important metrics of one log entry as a line, or `None` if it holds none of them."""
    metrics = [f"{label} {_short(name, float(logs[name]))}" for name, label in SHOWN.items() if name in logs]
    step = f"step {state.global_step}/{state.max_steps}" if state.max_steps else "before training"
    return f"{step}  {'  '.join(metrics)}" if metrics else None


def _short(name: str, value: float) -> str:
    return readable(0.0 if abs(value) < LEAST and name != "learning_rate" else value)


class PlainPrinter(TrainerCallback):
    """Print one plain line per logging step, with the time left.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self._began, self._first_step = clock(), 0

    def _left(self, state: TrainerState) -> str:
        """Return the time left in the pace so far; empty at the ends."""
        done, left = state.global_step - self._first_step, state.max_steps - state.global_step
        return f"  {clock_time(left * (self.clock() - self._began) / done)} left" if done > 0 and left > 0 else ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._began, self._first_step = self.clock(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if state.is_world_process_zero and logs and (line := plain_line(state, logs)):
            print(line + self._suffix(state), flush=True)

    def _suffix(self, state: TrainerState) -> str:
        return self._left(state)


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
        super().__init__(clock)
        self.stream = stream or sys.stderr
        self._width, self._drawn_at, self._num_evaluated = 0, -math.inf, 0

    def _suffix(self, state: TrainerState) -> str:
        # The moving line below says it.
        return ""

    def _draw(self, text: str, whenever: bool = False) -> None:
        """Replace the current line by `text`, unless that line was drawn a moment ago."""
        is_same = not text and not self._width
        if is_same or (not whenever and self.clock() - self._drawn_at < self.PAUSE):
            return
        text = text[: shutil.get_terminal_size().columns - 1]
        self.stream.write(f"\r{text.ljust(self._width)}" + ("" if text else "\r"))
        self.stream.flush()
        self._width, self._drawn_at = len(text), self.clock() if text else -math.inf

    def _progress(self, state: TrainerState) -> str:
        text = f"{where()}step {state.global_step}/{state.max_steps}{self._left(state)}"
        job = current_job()
        return text + (f", then about {job.minutes_after:g} min" if job and job.minutes_after else "")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
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
    """Return the current stage and its position among the stages of the job, such as `reward (3 of 4)  `."""
    job = current_job()
    if job is None:
        return ""
    index = f" ({job.place + 1} of {len(job.stages)})" if len(job.stages) > 1 else ""
    return f"{job.stages[job.place].name}{index}  "


def clock_time(seconds: float) -> str:
    """Return a duration as `M:SS`, or `H:MM:SS` from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class LogsOfShortRuns(TrainerCallback):
    """Log a run of few steps at least ten times, so that its plots are lines; `--logging_steps` of the user wins."""

    LEAST = 10

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        given = given_names(args)
        if given is not None and not {"logging_steps", "logging_strategy"} & {*given}:
            state.logging_steps = min(state.logging_steps, max(1, state.max_steps // self.LEAST))


def use_plain_lines(trainer: Trainer) -> None:
    """Let any `Trainer` print plain lines, and on a terminal a moving one, instead of whole dictionaries and bars."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(PlainPrinter() if trainer.args.disable_tqdm else MovingLine())
    trainer.add_callback(LogsOfShortRuns())


# ---- checksums ----
#
# Write the checksums of a checkpoint when all processes have saved their parts of it.


class Checksums(TrainerCallback):
    """Callback for writing a checkpoint's checksums once it is whole; see `hfllm.outputs.checkpoints`."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        # Each process has written its own random state, and its part of the optimizer.
        self.trainer.accelerator.wait_for_everyone()
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and folder.is_dir():
            write_checksums(folder)
        # None begins the next checkpoint, or ends, before.
        self.trainer.accelerator.wait_for_everyone()


# ---- samples ----
#
# Sample from a model while it trains: a callback of the stock `Trainer` without an effect on training.
#
#     trainer.add_callback(SampleCallback(tokenizer, ["The owl"], every_steps=100, output_file="samples.jsonl"))
#
# A `ThroughputCallback` passed to it does not count the sampling time.


class SampleCallback(TrainerCallback):
    """Callback that continues each prompt every `every_steps` steps and at the last one, in the main process.

    Training is exactly as without it: its random state and the modules' training flags are restored. At its beginning
    or when resumed, a run first removes rows of later steps from the file, since it will reach them again.

    Args:
        tokenizer: encodes prompts and decodes generated tokens.
        prompts: texts to continue, each after the tokenizer's start token if it has one.
        every_steps: optimizer steps between samples.
        output_file: JSON lines to append to: `step`, `prompt`, `completion`.
        max_new_tokens: most tokens of a completion, fewer if the model's context ends earlier.
        temperature: 0 means greedy.
        seed: of the sampling, together with the step.
        throughput: the callback to exclude the sampling time.

    Attributes:
        samples: the rows of the file.

    Raises:
        InputError: when an argument is out of its range, and, when training begins, when a prompt has no tokens or
            fills the model's context, the file holds anything but samples, or the model is split over processes.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        every_steps: int,
        output_file: str | os.PathLike,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        throughput: ThroughputCallback | None = None,
    ):
        for name, value in (("every_steps", every_steps), ("max_new_tokens", max_new_tokens)):
            refuse_if(value < 1, f"{name} is {value}; expected at least 1")
        refuse_if(temperature < 0, f"temperature is {temperature}; expected 0 (greedy) or above")
        self.tokenizer, self.prompts, self.every_steps = tokenizer, list(prompts), every_steps
        self.output_file = Path(output_file)
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed
        self.throughput = throughput
        self.samples: list[dict[str, int | str]] = []

    def _encode(self, prompt: str) -> list[int]:
        return start_of(self.tokenizer) + self.tokenizer(prompt, add_special_tokens=False)["input_ids"]

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: object,
    ) -> None:
        refuse_if(is_split(model), "SampleCallback needs the whole model in one process: not FSDP, ZeRO-3 or DTensors")
        context = max_length_of(model.config) or math.inf
        for prompt in self.prompts:
            length = len(self._encode(prompt))
            if not 0 < length < context:
                raise InputError(f"prompt {prompt[:80]!r} has {length} tokens; expected 1 to {context - 1}")
        if state.is_world_process_zero:
            self.samples = _read_rows(self.output_file, state.global_step)
            self.output_file.parent.mkdir(parents=True, exist_ok=True)
            draft = self.output_file.with_name(f"{self.output_file.name}.draft")
            draft.write_text("".join(map(_line, self.samples)), encoding="utf-8")
            draft.replace(self.output_file)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: object,
    ) -> None:
        is_due = state.global_step % self.every_steps == 0 or state.global_step == state.max_steps
        if not is_due or not state.is_world_process_zero:
            return
        with self.throughput.paused() if self.throughput is not None else nullcontext():
            rows = self._sample(model, state.global_step)
        self.samples += rows
        with self.output_file.open("a", encoding="utf-8") as file:
            file.writelines(map(_line, rows))

    def _sample(self, model: PreTrainedModel, step: int) -> list[dict[str, int | str]]:
        ends = {self.tokenizer.eos_token_id, self.tokenizer.bos_token_id} - {None}
        drawn = {"temperature": self.temperature, "top_k": 0, "top_p": 1.0} if self.temperature > 0 else {}
        rows = []
        with undisturbed(model), without_cpu_autocast(model):
            torch.manual_seed(self.seed + step)
            for prompt in self.prompts:
                ids = torch.tensor([self._encode(prompt)], device=model.device)
                length = ids.shape[1]
                config = GenerationConfig(
                    max_new_tokens=min(self.max_new_tokens, (max_length_of(model.config) or math.inf) - length),
                    do_sample=self.temperature > 0,
                    use_cache=True,
                    # A document's start token ends the document before it.
                    eos_token_id=sorted(ends) or None,
                    pad_token_id=self.tokenizer.pad_token_id,
                    **drawn,
                )
                fast = fast_option(model, length + config.max_new_tokens)
                output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, **fast)
                completion = self.tokenizer.decode(output[0, length:], skip_special_tokens=True)
                rows.append({"step": step, "prompt": prompt, "completion": completion})
        return rows


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode; restore torch's random state and every training flag afterwards."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type != "cpu"}
    with evaluation_mode(model), torch.random.fork_rng(devices=[device.index for device in devices]):
        yield


def is_split(model: nn.Module) -> bool:
    """Return whether every process holds only a part of the model: FSDP, DeepSpeed ZeRO-3 or tensor parallelism."""
    spread = any(hasattr(each, "ds_id") or hasattr(each, "device_mesh") for each in model.parameters())
    return spread or any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())


def _line(row: dict[str, int | str]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _read_rows(file: Path, last_step: int) -> list[dict[str, int | str]]:
    """Return the rows of a file up to a step, without an incomplete last line of a killed run."""
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.exists() else [""]
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
            is_ours = set(row) == {"step", "prompt", "completion"}
        except (ValueError, TypeError, RecursionError):
            is_ours = False
        if not is_ours:
            raise InputError(f"{file}, line {number}: {line[:80]!r} is no sample; samples need their own file")
        if row["step"] <= last_step:
            rows.append(row)
    return rows


# ---- probes ----


class ProbeCallback(TrainerCallback):
    """Callback that adds to each training log the share of probed tokens that the model predicts right, by operation.

    Each is `probe_OPERATION`, in the main process; training is exactly as without it. Add it by
    `hfllm.trainers.monitors.add_to_logs`.

    Args:
        tokenizer: a fast one, which tells where its tokens stand.
        probes: texts and their probed places, by operation.
        throughput: the callback to exclude the time of the probes.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        probes: Mapping[str, Sequence[Probe]],
        throughput: ThroughputCallback | None = None,
    ):
        self.tokenizer, self.probes, self.throughput = tokenizer, probes, throughput

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: object,
    ) -> None:
        refuse_if(is_split(model), "ProbeCallback needs the whole model in one process: not FSDP, ZeRO-3 or DTensors")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        model: PreTrainedModel | None = None,
        **kwargs: object,
    ) -> None:
        if logs is None or "loss" not in logs or not state.is_world_process_zero:
            return
        with self.throughput.paused() if self.throughput is not None else nullcontext():
            added = {f"probe_{name}": sum(shares) / len(shares) for name, shares in self.shares(model).items()}
        # By now the trainer has put a copy of the logs into the history.
        for entry in (logs, state.log_history[-1]):
            entry.update(added)

    def shares(self, model: PreTrainedModel) -> dict[str, list[float]]:
        """Return the share of right tokens of each probe, by operation: of those that fit into the model's context."""
        with undisturbed(model), torch.inference_mode():
            shares = {operation: self._shares(model, probes) for operation, probes in self.probes.items()}
        return {operation: values for operation, values in shares.items() if values}

    def _shares(self, model: PreTrainedModel, probes: Sequence[Probe]) -> list[float]:
        start, context = start_of(self.tokenizer), max_length_of(model.config) or math.inf
        texts = [each.text for each in probes]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        rows = zip(probes, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        fitting = [(probe, start + ids, offsets) for probe, ids, offsets in rows if len(start) + len(ids) <= context]
        if not fitting:
            return []
        batch = [torch.tensor(ids) for _, ids, _ in fitting]
        # Padding on the right changes nothing before it.
        ids = nn.utils.rnn.pad_sequence(batch, batch_first=True).to(model.device)
        guessed = (model(input_ids=ids).logits.argmax(-1)[:, :-1] == ids[:, 1:]).tolist()
        return [
            _share_of(is_right[max(len(start) - 1, 0) :], offsets[not start :], probe)
            for is_right, (probe, _, offsets) in zip(guessed, fitting, strict=True)
        ]


def _share_of(is_right: Sequence[bool], offsets: Sequence[tuple[int, int]], probe: Probe) -> float:
    """Return the share of right tokens in the places of a probe; the offsets of the tokens are in the same order."""
    right = [
        each
        for each, (begin, end) in zip(is_right, offsets, strict=False)
        if any(first < end and begin < last for first, last in probe.spans)
    ]
    return sum(right) / max(len(right), 1)


# ---- tables ----
#
# Log tables of completions to the integrations of `report_to`.


Rows = Sequence[dict[str, Any]]


def log_table(callbacks: Sequence[TrainerCallback], name: str, rows: Rows, step: int) -> None:
    """Log rows to every integration among a trainer's callbacks that supports tables or text.

    Args:
        callbacks: the trainer's; others than integrations, or integrations not yet set up, are skipped.
        name: the name of the table.
        rows: rows with the same columns.
        step: the optimizer step.
    """
    for callback in callbacks:
        for kind, log in BACK_ENDS.items():
            if isinstance(callback, kind):
                log(callback, name, rows, step)


def storable(rows: Rows) -> list[dict[str, Any]]:
    """Return rows with a message's fields as text, other values as JSON text.

    A column of a file has values of one kind: arguments of calls have any, and content is text or a list of parts.
    """

    def message(fields: Mapping[str, Any]) -> dict[str, str | None]:
        return {
            name: value if isinstance(value, str | None) else json.dumps(value, ensure_ascii=False, default=str)
            for name, value in fields.items()
        }

    return [
        {name: [message(each) for each in value] if isinstance(value, list) else value for name, value in row.items()}
        for row in rows
    ]


def columns_of(rows: Rows) -> dict[str, list]:
    """Return rows as columns."""
    return {column: [row[column] for row in rows] for column in rows[0]}


def markdown_of(rows: Rows) -> str:
    """Return rows as a markdown table, with line breaks and vertical bars escaped."""

    def line(cells: Sequence) -> str:
        texts = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " / ") for cell in texts) + " |"

    return "\n".join([line(list(rows[0])), line(["-"] * len(rows[0])), *(line(list(row.values())) for row in rows)])


def _wandb(callback: WandbCallback, name: str, rows: Rows, step: int) -> None:
    if callback._wandb is not None and callback._wandb.run is not None:
        table = callback._wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        callback._wandb.log({name: table, "train/global_step": step})


def _trackio(callback: TrackioCallback, name: str, rows: Rows, step: int) -> None:
    import pandas

    if callback._initialized:
        callback._trackio.log({name: callback._trackio.Table(dataframe=pandas.DataFrame(columns_of(rows)))})


def _tensorboard(callback: TensorBoardCallback, name: str, rows: Rows, step: int) -> None:
    if callback.tb_writer is not None:
        callback.tb_writer.add_text(name, markdown_of(rows), step)


def _mlflow(callback: MLflowCallback, name: str, rows: Rows, step: int) -> None:
    if callback._initialized:
        callback._ml_flow.log_table(columns_of([{"step": step, **row} for row in rows]), f"{name}.json")


def _comet(callback: CometCallback, name: str, rows: Rows, step: int) -> None:
    if callback._experiment is not None:
        data = [list(row.values()) for row in rows]
        callback._experiment.log_table(f"{name}_{step}.csv", tabular_data=data, headers=list(rows[0]))


BACK_ENDS: dict[type[TrainerCallback], Callable[[Any, str, Rows, int], None]] = {
    WandbCallback: _wandb,
    TrackioCallback: _trackio,
    TensorBoardCallback: _tensorboard,
    MLflowCallback: _mlflow,
    CometCallback: _comet,
}
