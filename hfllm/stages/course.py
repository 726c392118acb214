"""A recipe that runs other recipes, each in a folder of its own: their order, their rows, and what they refuse.

A file of rows is written only where it has changed: its time is part of what describes the run that reads it, so that
one written again would be another run's.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from hfllm.data.rows import Message
from hfllm.errors import InputError
from hfllm.outputs.report import write_atomically
from hfllm.runs import schedule
from hfllm.runs.arguments import changed
from hfllm.runs.chain import Parsed, output_dir_of, run_stage
from hfllm.runs.command_line import main_process, say
from hfllm.runs.recipes import load_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
    from trl import ModelConfig

Row = Mapping[str, Any]
Made = TypeVar("Made")
# What the other processes wait for the main one, which revises, judges and answers alone.
LONGEST_WAIT = timedelta(days=30)


@dataclass(frozen=True)
class Course:
    """The runs in their order, with their flags.

    Args:
        recipes: the recipe of each run, by its name.
        runs: its parsed flags.

    Attributes:
        stage: the recipe whose course it is.
        minutes: about how long each run takes on two cores.
    """

    recipes: Mapping[str, str]
    runs: Mapping[str, Parsed]
    stage: ClassVar[str] = ""
    minutes: ClassVar[Mapping[str, float]] = {}

    @property
    def is_timed(self) -> bool:
        """Whether the settings are those that were timed."""
        return True

    def folder(self, name: str) -> str:
        """Return the folder of a run, which is its model's."""
        return output_dir_of(self.runs[name])

    def has_made(self, name: str) -> bool:
        """Return whether a run is one of these and has finished."""
        return name in self.runs and Path(self.folder(name), "report.json").is_file()

    def announce(self) -> None:
        """Say which runs come and about how long they take, if the settings are those that were timed."""
        planned = [
            schedule.Planned(name, output_dir_of(flags), self.minutes.get(name) if self.is_timed else None)
            for name, flags in self.runs.items()
        ]
        if schedule.plan(self.stage, planned, 1 if self.is_timed else None) and main_process():
            print(f"{self.stage}: {schedule.described(schedule.current_job())}", flush=True)

    def run(self, name: str) -> dict[str, float]:
        """Run a stage, or reuse it where nothing changed, and return its metrics. Its rows must be there."""
        names = list(self.runs)
        later = {self.folder(each): self.recipes[each] for each in names[names.index(name) + 1 :]}
        return run_stage(self.recipes[name], self.runs[name], later)

    def end(self) -> None:
        """Note that all runs have ended."""
        schedule.come_back(self.stage)


def parsed_runs(
    runs: Iterable[tuple[str, str, list[str]]], output_dir: str, seed: int
) -> tuple[dict[str, str], dict[str, Parsed]]:
    """Return the recipes and the parsed flags of runs, by their names.

    Args:
        runs: of each its name, its recipe, and its flags but for seed and folder.
        output_dir: where the folders of the runs are.
        seed: of all of them.

    Raises:
        InputError: when a config of one of them is wrong.
    """
    recipes: dict[str, str] = {}
    parsed: dict[str, Parsed] = {}
    for name, recipe, words in runs:
        recipes[name] = recipe
        folder = ["--seed", str(seed), "--output_dir", str(Path(output_dir, name))]
        parsed[name] = load_recipe(recipe).parse([*words, *folder])
    return recipes, parsed


# ---- models ----


@dataclass(frozen=True)
class Speaking:
    """A model that answers, with its tokenizer."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"

    def answers(
        self, prompts: Sequence[list[Message]], length: int, seed: int, samples: int = 1, temperature: float = 1.0
    ) -> list[list[str]]:
        """Return `samples` sampled answers to each prompt."""
        from hfllm.generation.responses import sample_responses

        settings = {"num_return_sequences": samples, "seed": seed, "fast": True, "temperature": temperature}
        return sample_responses(self.model, self.tokenizer, prompts, length, **settings)


def load_speaking(
    name: str, model_args: "ModelConfig", revision: str = "main", processor: "ProcessorMixin | None" = None
) -> Speaking:
    """Load a model to answer with, on the machine's accelerator if there is one.

    Args:
        processor: of a model that sees, which is loaded as such.
    """
    import torch
    from accelerate import PartialState

    from hfllm.data.tokenizer import padding_token
    from hfllm.runs.models import load_policy, load_seeing

    wanted = changed(model_args, model_name_or_path=name, model_revision=revision)
    if processor is None:
        model, tokenizer = load_policy(wanted)
    else:
        model, tokenizer = load_seeing(wanted), processor.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = padding_token(tokenizer)
    device = PartialState().device if torch.cuda.is_available() else model.device
    return Speaking(model.to(device).eval(), tokenizer)


# ---- rows ----


def write_rows(stage: str, path: Path, rows: Iterable[Row]) -> None:
    """Write the rows of a run where the file does not hold them already, in one process."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # Whatever was made of it: an edited file need not be text.
    before = path.read_bytes() if path.is_file() else None
    if before != text.encode():
        if before is not None:
            say(f"{stage}: {path} does not hold the rows of this run: it is written again")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)


def by_main_process(make: Callable[[], Made]) -> Made | None:
    """Return what the main process makes, and `None` in the others, which wait for it however long it takes.

    Raises:
        InputError: in all processes, when the main process refuses.
    """
    made, refusal = None, None
    if main_process():
        try:
            made = make()
        except InputError as error:
            refusal = str(error)
    if (refusal := _of_main_process(refusal)) is not None:
        raise InputError(refusal)
    return made


def _of_main_process(value: str | None) -> str | None:
    from accelerate import PartialState
    from torch import distributed

    if PartialState().num_processes == 1:
        return value
    # The usual groups give up on a process that is silent for 10 or 30 minutes, as one is that revises.
    group = distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
    values = [value]
    distributed.broadcast_object_list(values, src=0, group=group)
    distributed.destroy_process_group(group)
    return values[0]


# ---- what is refused ----


def check_runs(course: Course) -> None:
    """Refuse the flags of the runs, which YAML files may set, as the runs themselves would, but before the first one.

    Raises:
        InputError: naming the flag.
    """
    for name, recipe in course.recipes.items():
        _check_run(recipe, *course.runs[name])


def _check_run(recipe: str, *parsed: Any) -> None:
    from hfllm.data.sources import PYDOC, WORLD
    from hfllm.runs.arguments import changed
    from hfllm.runs.stage import Stage

    is_written = getattr(parsed[0], "dataset_name", WORLD) != WORLD
    # Its rows are not there yet; a source that is always there stands for their file.
    Stage(recipe, *((changed(parsed[0], dataset_name=PYDOC), *parsed[1:]) if is_written else parsed)).check_flags()
    if recipe == "rlhf":
        _check_ppo(*parsed)


def _check_ppo(script_args: Any, training_args: Any, model_args: Any) -> None:
    from hfllm.models.devices import forked_random
    from hfllm.runs.models import load_value_model
    from hfllm.stages import rlhf, rlhf_checks
    from hfllm.trainers.ppo.setup import check_critic
    from hfllm.trainers.ppo.vllm_sampling import check_vllm

    rlhf_checks.check(training_args)
    functions = rlhf.checked_functions(script_args)
    rlhf_checks.check_rewards(script_args, training_args, len(functions))
    rlhf.ptx_texts(script_args, training_args)
    if training_args.use_vllm:
        check_vllm(training_args)
    if script_args.value_model not in ("head", "reward"):
        with forked_random(training_args.device):
            check_critic(load_value_model(script_args.value_model, model_args, ()))
