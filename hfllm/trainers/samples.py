"""Sample from a model while it trains: a callback of the stock `Trainer` that does not change training.

    trainer.add_callback(SampleCallback(tokenizer, ["The owl"], every_steps=100, output_file="samples.jsonl"))

A `ThroughputCallback` passed to it does not count the sampling time.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hfllm.errors import InputError
from hfllm.trainers.monitors import ThroughputCallback


class SampleCallback(TrainerCallback):
    """Callback that continues each prompt every `every_steps` steps and at the last one, in the main process.

    Training is exactly as without it: its random state and the modules' training flags are restored. A run
    that begins or resumes first removes rows of later steps from the file, since it will reach them again.

    Args:
        tokenizer: encodes prompts and decodes what is generated.
        prompts: texts to continue, each after the tokenizer's start token if it has one.
        every_steps: optimizer steps between samples.
        output_file: JSON lines to append to: `step`, `prompt`, `completion`.
        max_new_tokens: most tokens of a completion, fewer if the model's context ends earlier.
        temperature: 0 means greedy.
        seed: of the sampling, together with the step.
        throughput: the callback that should not count the sampling time.

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
            if value < 1:
                raise InputError(f"{name} is {value}; expected at least 1")
        if temperature < 0:
            raise InputError(f"temperature is {temperature}; expected 0 (greedy) or above")
        self.tokenizer, self.prompts, self.every_steps = tokenizer, list(prompts), every_steps
        self.output_file = Path(output_file)
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed
        self.throughput = throughput
        self.samples: list[dict[str, int | str]] = []

    def _encode(self, prompt: str) -> list[int]:
        start = [self.tokenizer.bos_token_id] if self.tokenizer.bos_token_id is not None else []
        return start + self.tokenizer(prompt, add_special_tokens=False)["input_ids"]

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: object,
    ) -> None:
        if is_split(model):
            raise InputError("SampleCallback needs the whole model in one process: not FSDP, ZeRO-3 or DTensors")
        context = max_length_of(model)
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
        with undisturbed(model):
            torch.manual_seed(self.seed + step)
            for prompt in self.prompts:
                ids = torch.tensor([self._encode(prompt)], device=model.device)
                length = ids.shape[1]
                config = GenerationConfig(
                    max_new_tokens=min(self.max_new_tokens, max_length_of(model) - length),
                    do_sample=self.temperature > 0,
                    use_cache=True,
                    # A document's start token ends the document before it.
                    eos_token_id=sorted(ends) or None,
                    pad_token_id=self.tokenizer.pad_token_id,
                    **drawn,
                )
                output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
                completion = self.tokenizer.decode(output[0, length:], skip_special_tokens=True)
                rows.append({"step": step, "prompt": prompt, "completion": completion})
        return rows


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode; restore torch's random state and every training flag afterwards."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type != "cpu"}
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device.index for device in devices]):
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def is_split(model: nn.Module) -> bool:
    """Return whether each process holds only a part of the model: FSDP, DeepSpeed ZeRO-3 or tensor parallelism."""
    spread = any(hasattr(each, "ds_id") or hasattr(each, "device_mesh") for each in model.parameters())
    return spread or any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())


def max_length_of(model: PreTrainedModel) -> float:
    """Return the model's context in tokens, infinite if its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


def _line(row: dict[str, int | str]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _read_rows(file: Path, last_step: int) -> list[dict[str, int | str]]:
    """Return the rows of a file up to a step, without a last line that is incomplete because the run was killed.

    Raises:
        InputError: when the file holds anything else, which must not be overwritten.
    """
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
