"""The arms of benchmarks/constitution.py: our course, retrained under a clock, and TRL's DPO within a budget."""

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from hfllm.data.tokenizer import end_tokens, tokenize_prompts
from hfllm.models.devices import forked_random
from hfllm.runs.models import NamedModel, load_tokenizer
from hfllm.stages.constitution.build import Steps
from hfllm.stages.constitution.flags import (
    HELPFUL,
    REWARD,
    RL,
    SL,
    ConstitutionArguments,
    ConstitutionCourse,
    constitution_of,
    course_of,
)
from hfllm.stages.shared import Speaking, load_speaking
from hfllm.synthesis.revisions import ROWS_FILE
from hfllm.trainers.ppo.formulas import full_kl

if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig

Row = Mapping[str, Any]
# Optimizer steps that tell how long one takes, after some to warm up.
WARM_UP, TIMED = 3, 12


# ---- our own course ----


@dataclass(frozen=True)
class TimedCourse(ConstitutionCourse):
    """The course of a run that notes CPU-seconds: of each recipe as a whole, and of its trainer's `train` alone."""

    whole: dict[str, float] = field(default_factory=dict)
    training: dict[str, float] = field(default_factory=dict)

    def run(self, name: str) -> dict[str, float]:
        began = time.process_time()
        with timed_training() as seconds:
            metrics = super().run(name)
        self.whole[name], self.training[name] = time.process_time() - began, sum(seconds)
        return metrics


@dataclass(frozen=True)
class Ours:
    """What our course took, in CPU-seconds, from the helpful-only model and the revisions on.

    Args:
        folder: of the models, each under the name of its run.
        training: of `Trainer.train`, by run.
        rows: of sampling and judging, by the run that learns from the rows.
        no_rl: why there is no RL-CAI, if there is none.
        same_weights: whether the retrained SL-CAI has the bytes of the run's own.
    """

    folder: str
    training: Mapping[str, float]
    rows: Mapping[str, float]
    no_rl: str
    same_weights: bool

    @property
    def of_sl(self) -> float:
        """The CPU-seconds of SL-CAI."""
        return self.rows[SL] + self.training[SL]

    @property
    def of_rl(self) -> float:
        """The CPU-seconds of all that RL-CAI needs after SL-CAI."""
        return self.rows[REWARD] + self.of_rl_training

    @property
    def of_rl_training(self) -> float:
        """The CPU-seconds of the preference model's training and of PPO."""
        return self.training[REWARD] + self.training[RL]


@contextlib.contextmanager
def timed_training() -> Iterator[list[float]]:
    """Collect the CPU-seconds of each call of `Trainer.train`."""
    plain, seconds = Trainer.train, []

    def train(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        began = time.process_time()
        try:
            return plain(self, *args, **kwargs)
        finally:
            seconds.append(time.process_time() - began)

    Trainer.train = train
    try:
        yield seconds
    finally:
        Trainer.train = plain


def arguments_of(run: Path) -> ConstitutionArguments:
    """Return the arguments of a finished run of `hfllm constitution` on the embedded world."""
    path = run / "report.json"
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; expected the output folder of a finished `hfllm constitution`")
    report = json.loads(path.read_text(encoding="utf-8"))
    if report["stage"] != "constitution" or report["arguments"]["model_name_or_path"]:
        raise SystemExit(
            f"{path}: expected a run of `hfllm constitution` on the embedded world, without a named model"
        )
    given = {each.name: report["arguments"].get(each.name) for each in fields(ConstitutionArguments) if each.init}
    return ConstitutionArguments(**{name: value for name, value in given.items() if value is not None})


def course_in(
    run: Path, folder: Path, script_args: ConstitutionArguments, model_args: "ModelConfig"
) -> tuple[ConstitutionArguments, TimedCourse]:
    """Return the run's course in a folder of its own, with the helpful-only model and the revisions."""
    if folder.exists():
        shutil.rmtree(folder)
    for name in (HELPFUL, "revisions"):
        shutil.copytree(run / name, folder / name)
    script_args = replace(script_args, output_dir=str(folder), controls=["none"])
    course = course_of(script_args, model_args)
    return script_args, TimedCourse(course.recipes, course.runs, course.named)


def retrain(
    run: Path,
    script_args: ConstitutionArguments,
    model_args: "ModelConfig",
    course: TimedCourse,
    rl_like: Ours | None = None,
) -> Ours:
    """Train SL-CAI and RL-CAI as the recipe does, with its own classes, under the clock.

    Args:
        run: the finished run.
        script_args, model_args, course: of `course_in`.
        rl_like: another run's figures, to train SL-CAI alone: RL-CAI is then the run's own, and is taken to need as
            many seconds. It needs as many pairs, comparisons and steps, whatever the seed.
    """
    constitution = constitution_of(script_args.constitution, script_args.is_world)
    steps = Steps(script_args, model_args, constitution, course)
    steps.revise()  # all rows are there
    rows = {SL: _rest(course, steps.supervised)}
    weights = [(folder / SL / "model.safetensors").read_bytes() for folder in (run, Path(script_args.output_dir))]
    is_same = weights[0] == weights[1]
    if rl_like is not None:
        no_rl = "" if (run / RL / "report.json").is_file() else "the run has none"
        training = {**rl_like.training, **course.training}
        return Ours(str(run), training, {**rl_like.rows, **rows}, no_rl, is_same)
    rows[REWARD] = _rest(course, steps.reinforced)
    return Ours(script_args.output_dir, course.training, rows, steps.no_rl, is_same)


def _rest(course: TimedCourse, step: Any) -> float:
    """Return a step's CPU-seconds without those of the recipes that it runs."""
    began, before = time.process_time(), sum(course.whole.values())
    step()
    return time.process_time() - began - (sum(course.whole.values()) - before)


# ---- TRL's DPO ----


def pairs_of_revisions(folder: Path) -> list[Row]:
    """Return the pairs of the revisions: the last one against the first answer, where they differ."""
    rows = _read(folder / "revisions" / ROWS_FILE)
    kept = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    return [row for row in kept if row["chosen"] != row["rejected"]]


def pairs_of_ai(folder: str) -> list[Row]:
    """Return the comparisons that the preference model of a run learned from."""
    return _read(Path(folder, "data", f"{REWARD}.jsonl"))


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Budget(TrainerCallback):
    """Ends training where its CPU-seconds are spent."""

    def __init__(self, seconds: float):
        self.seconds, self.began, self.marks = seconds, 0.0, []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.began = time.process_time()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.marks.append(time.process_time() - self.began)
        control.should_training_stop |= self.marks[-1] >= self.seconds


@dataclass(frozen=True)
class DPO:
    """TRL's DPO from a model on pairs, with the batch, the optimizer and the schedule of SL-CAI.

    Args:
        start: folder of the model, which is the reference too.
        pairs: rows of `prompt`, `chosen`, `rejected`.
        like: the arguments of SL-CAI.
        beta: of DPO.
        loss_type: TRL's; `["sigmoid", "sft"]` adds the loss of the chosen answers.
        seed: of the order of rows.
    """

    start: Path
    pairs: Sequence[Row]
    like: "SFTConfig"
    beta: float = 0.1
    loss_type: Sequence[str] = ("sigmoid",)
    seed: int = 0

    def seconds_per_step(self, folder: Path) -> float:
        """Return the CPU-seconds of an optimizer step, from a few."""
        trainer, budget, _ = self._trainer(folder, WARM_UP + TIMED, 1e-6, float("inf"))
        trainer.train()
        return (budget.marks[-1] - budget.marks[WARM_UP - 1]) / TIMED

    def run(self, folder: Path, learning_rate: float, seconds: float, per_step: float) -> dict[str, float]:
        """Train for as many CPU-seconds, the reference's log-probabilities included, and save the model.

        The learning rate falls over the steps that fit; training ends early where they take longer than expected.
        """
        reference = self._seconds_of_reference(per_step)
        steps = max(1, round((seconds - reference) / per_step))
        trainer, budget, spent = self._trainer(folder, steps, learning_rate, seconds)
        budget.seconds -= sum(spent)
        began = time.process_time()
        trainer.train()
        used = time.process_time() - began + sum(spent)
        trainer.save_model(str(folder))
        done = trainer.state.global_step
        epochs = done * self.like.per_device_train_batch_size / len(self.pairs)
        return {"cpu_seconds": used, "steps": done, "epochs": epochs, "learning_rate": learning_rate}

    def _seconds_of_reference(self, per_step: float) -> float:
        """Return about how long the reference takes: a forward pass of each pair, a third of a step's work."""
        return per_step / 3 * len(self.pairs) / self.like.per_device_train_batch_size

    def _trainer(self, folder: Path, steps: int, learning_rate: float, seconds: float) -> Any:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        spent: list[float] = []

        class Clocked(DPOTrainer):
            """TRL's trainer; its passes of the reference before training are timed."""

            def compute_ref_log_probs(self, *args: Any, **kwargs: Any) -> Any:
                began = time.process_time()
                result = super().compute_ref_log_probs(*args, **kwargs)
                spent.append(time.process_time() - began)
                return result

        like, budget = self.like, Budget(seconds)
        config = DPOConfig(
            str(folder),
            max_steps=steps,
            learning_rate=learning_rate,
            per_device_train_batch_size=like.per_device_train_batch_size,
            gradient_accumulation_steps=like.gradient_accumulation_steps,
            lr_scheduler_type=like.lr_scheduler_type,
            lr_scheduler_kwargs=like.lr_scheduler_kwargs,
            warmup_steps=min(like.warmup_steps, steps // 5),
            adam_beta2=like.adam_beta2,
            weight_decay=like.weight_decay,
            max_length=like.max_length,
            beta=self.beta,
            loss_type=list(self.loss_type),
            precompute_ref_log_probs=True,  # the reference is asked once, not in each epoch
            seed=self.seed,
            use_cpu=like.use_cpu,
            bf16=like.bf16,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=25,
        )
        set_seed(self.seed)
        # From disk: a model that a trainer of TRL has held keeps its forward.
        speaking = load(self.start)
        trainer = Clocked(
            model=speaking.model,
            args=config,
            train_dataset=Dataset.from_list([dict(row) for row in self.pairs]),
            processing_class=speaking.tokenizer,
            callbacks=[budget],
        )
        return trainer, budget, spent


def load(folder: Path) -> Speaking:
    """Load a model with its tokenizer."""
    return load_speaking(NamedModel(str(folder), settings={"dtype": "float32"}))


# ---- KL ----


def kl_of_responses(
    model: torch.nn.Module,
    reference: torch.nn.Module,
    folder: Path,
    prompts: Sequence[list[dict[str, str]]],
    max_new_tokens: int,
    seed: int = 0,
    batch_size: int = 128,
) -> list[float]:
    """Return the KL of a model to a reference, in nats per response, for each prompt.

    A response is sampled from the model, and at each of its tokens, the end among them, the divergence of the two
    next-token distributions is summed exactly. The mean over responses is KL(model || reference) by the chain rule,
    without the noise of log(p / q) of the sampled tokens alone.

    Args:
        folder: of the tokenizer, which both share.
        prompts: conversations.
    """
    tokenizer = load_tokenizer(str(folder))
    return kl_of_tokens(
        model,
        reference,
        tokenize_prompts(prompts, tokenizer),
        sorted(end_tokens(tokenizer, model)),
        tokenizer.pad_token_id,
        max_new_tokens,
        seed,
        batch_size,
    )


def kl_of_tokens(
    model: Any,
    reference: Any,
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int],
    pad: int,
    max_new_tokens: int,
    seed: int = 0,
    batch_size: int = 128,
) -> list[float]:
    """Return `kl_of_responses` for prompts that are token ids."""
    found: list[float] = []
    with forked_random(model.device), torch.inference_mode():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            rows = prompts[start : start + batch_size]
            width = max(map(len, rows))
            ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=model.device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
                eos_token_id=list(ends),
            )
            said = output[:, width:]
            is_end = torch.isin(said, said.new_tensor(list(ends))).int()
            is_said = (is_end.cumsum(1) - is_end) == 0  # up to the end token, which is a choice too
            mask = torch.cat((mask, is_said.to(mask.dtype)), 1)
            logs = [
                each(input_ids=output, attention_mask=mask, use_cache=False).logits[:, width - 1 : -1].log_softmax(-1)
                for each in (model, reference)
            ]
            found += (full_kl(*logs) * is_said).sum(1).tolist()
    return found
