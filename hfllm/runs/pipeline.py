"""The stages of a model's life: run the missing ones before a recipe, or a list of runs of a lesson.

A stage is a step (`sft`), its recipe the script for it, a run one execution of it in one folder. `stage_table` holds
what the recipes declare: the output of every stage, and the stages for its inputs. Without flags `hfllm rlhf` needs
sft and reward, and these need pretrain, so pretrain, sft, reward run before it, in this order:

    chain = chain_before("rlhf", training_args.output_dir, training_args.seed, script_args.world_seed)
    stage = Stage("rlhf", script_args, training_args, model_args, before=chain.parsed)
    ...
    chain.run()
    policy, reward_models = chain.model("sft"), chain.models("reward")

Their flags are a part of the description of a stage whose report shows their results (rlhf, distill, quantize); where
only the model counts (sft, reward), its files do.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from hfllm.data.sources import WORLD
from hfllm.errors import InputError
from hfllm.outputs.ownership import refuse_changed_files, refuse_foreign_files
from hfllm.outputs.report import read_report, write_atomically
from hfllm.runs import schedule
from hfllm.runs.command_line import main_process, say
from hfllm.runs.identity import finished_run
from hfllm.runs.lock import LOCK_FILE, lock, release
from hfllm.runs.output import explained
from hfllm.runs.parser import read_yaml
from hfllm.runs.recipes import Recipe, declared, load_recipe, recipe_names, settings_file, settings_for_the_world
from hfllm.runs.stage import stage_arguments

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


# ---- the stages before ----


Parsed = tuple[Any, ...]


# A stage without a recipe of its own: that of distill, with other settings.
DRAFT = Recipe(
    makes="a draft model",
    needs={"teacher_model_name_or_path": "sft"},
    settings="speculative/draft.yaml",
    minutes=2,
    name="distill",
)


@cache
def stage_table() -> Mapping[str, Recipe]:
    """Return every stage: the recipe that makes it, with its settings on the embedded world and what it needs."""
    recipes = {name: declared(name) for name in recipe_names()}
    return {name: recipe for name, recipe in recipes.items() if recipe.makes} | {"draft": DRAFT}


# The values of these flags when the minutes were measured, where the settings omit them.
AS_TIMED = {"max_steps": -1, "dataset_name": WORLD, "max_samples": None, "use_peft": False, "use_cpu": True}


@dataclass(frozen=True)
class Chain:
    """The stages needed by another one, except for models given by the user, in order.

    Args:
        stage: whose chain it is.
        runs: the parsed flags of each, by name; copies of a stage are called reward_2, reward_3 and so on.
        nested: the chains of stages that run their own, such as rlhf before distill.
    """

    stage: str
    runs: Mapping[str, Parsed]
    nested: Mapping[str, "Chain"] = field(default_factory=dict)

    @property
    def parsed(self) -> dict[str, Parsed]:
        """The flags of all stages to run, nested ones before their parents."""
        flat: dict[str, Parsed] = {}
        for name, flags in self.runs.items():
            flat |= self.nested[name].parsed if name in self.nested else {}
            flat[name] = flags
        return flat

    def model(self, name: str) -> str | None:
        """The folder of the stage's model, or `None` if it is not in this chain."""
        return output_dir_of(self.runs[name]) if name in self.runs else None

    def models(self, name: str) -> list[str]:
        """The folders of the models of the stage and its copies."""
        return [output_dir_of(flags) for each, flags in self.runs.items() if entry_name(each) == name]

    def missing(self) -> dict[str, Parsed]:
        """The flags of the unfinished stages, nested ones before their parents.

        Stages after an unfinished one are made again.
        """
        missing: dict[str, Parsed] = {}
        for name, flags in self.runs.items():
            nested = self.nested.get(name)
            if missing or not has_finished(flags, nested.parsed if nested else None):
                missing |= {**(nested.missing() if nested else {}), name: flags}
        return missing

    def announce(self) -> None:
        """Print the coming stages and about how long they take, unless the parent stage has printed them."""
        before = [
            schedule.Planned(name, output_dir_of(flags), usual_minutes(name, flags))
            for name, flags in self.missing().items()
        ]
        job = schedule.current_job()
        minutes = usual_minutes(self.stage, job.stages[-1].parsed) if job else None
        if schedule.plan(self.stage, before, minutes) and main_process():
            print(f"{self.stage}: {schedule.described(schedule.current_job())}", flush=True)

    def run(self) -> dict[str, dict[str, float]]:
        """Run the missing stages, reuse the rest. Returns the stages' metrics, by name."""
        self.announce()
        folders = {name: output_dir_of(flags) for name, flags in self.runs.items()}
        recipes = {name: stage_table()[entry_name(name)].name for name in self.runs}
        metrics = {}
        for index, (name, flags) in enumerate(self.runs.items()):
            nested = self.nested[name].parsed if name in self.nested else None
            later = {folders[each]: recipes[each] for each in list(folders)[index + 1 :]}
            metrics[name] = run_stage(recipes[name], flags, later, before=nested)
        schedule.come_back(self.stage)
        return metrics


def entry_name(run: str) -> str:
    """The name in the table of a stage's run: `reward` of `reward_2`."""
    base, _, number = run.rpartition("_")
    return base if number.isdecimal() else run


def output_dir_of(parsed: "Sequence[DataclassInstance]") -> str:
    """The output folder in a stage's parsed flags."""
    return next(group.output_dir for group in parsed if hasattr(group, "output_dir"))


def chain_before(
    stage: str,
    output_dir: str,
    seed: int,
    world_seed: int = 0,
    given_models: Mapping[str, str | None] | None = None,
    configs: Mapping[str, str | None] | None = None,
    more_flags: Mapping[str, Sequence[str]] | None = None,
    copies: Mapping[str, Sequence[Sequence[str]]] | None = None,
    skip: Sequence[str] = (),
    over_world: bool = False,
) -> Chain:
    """Return the stages needed by `stage`, each with its parsed flags, for a folder of its own under `output_dir`.

    Args:
        output_dir: of `stage`.
        seed: of all of them.
        world_seed: of the embedded world.
        given_models: models named by the user, by the stage that would make them; `None` is not named.
        configs: YAML files of flags, by stage, in place of the settings for the world.
        more_flags: additional flags for a stage.
        copies: the extra flags of every further run of a stage.
        skip: stages with unneeded models.
        over_world: whether `configs` lie over the settings for the world, in place of replacing them.
    """
    provided = {name: model for name, model in (given_models or {}).items() if model}
    configs, more_flags = configs or {}, more_flags or {}
    runs: dict[str, Parsed] = {}
    table = stage_table()

    def visit(name: str) -> None:
        for need in table[name].needs.values():
            if need in provided or need in skip or need in runs:
                continue
            entry = table[need]
            if not entry.runs_own_chain:
                visit(need)
            flags = ["--seed", str(seed), "--world_seed", str(world_seed)]
            # The world's settings suit the small models made here; your own model keeps the libraries' defaults.
            is_own = any(each in provided for each in entry.needs.values())
            config = configs.get(need)
            if not is_own and (over_world or not config):
                flags += [word for file in chain_settings(entry.settings) for word in ("--config", str(file))]
            flags += ["--config", config] if config else []
            if entry.runs_own_chain:
                passed = {f"--{name}_config": configs.get(name) for name in _all_needs(need)}
                flags += [word for flag, path in passed.items() if path for word in (flag, path)]
            else:
                for flag, made_by in entry.needs.items():
                    flags += [f"--{flag}", provided.get(made_by) or f"{output_dir}/{made_by}"]
            flags += more_flags.get(need, ())
            for number, differs in enumerate([(), *(copies or {}).get(need, ())], 1):
                run = need if number == 1 else f"{need}_{number}"
                runs[run] = load_recipe(entry.name).parse([*flags, "--output_dir", f"{output_dir}/{run}", *differs])

    visit(stage)
    return Chain(stage, runs)


def chain_settings(settings: str) -> list[Path]:
    """Return the YAML files of a stage's settings on the embedded world, by the engine of this run."""
    name, _, file = settings.rpartition("/")
    return settings_for_the_world(name, {}) if file == "world.yaml" else [settings_file(settings)]


def _all_needs(stage: str) -> list[str]:
    """The stages needed by a stage, directly or indirectly, in order."""
    result: list[str] = []
    for need in stage_table()[stage].needs.values():
        result += [name for name in (*_all_needs(need), need) if name not in result]
    return result


def has_finished(parsed: Parsed, before: "Mapping[str, Sequence[DataclassInstance]] | None" = None) -> bool:
    """Return whether the same run has finished in the stage's folder.

    Args:
        parsed: the stage's flags.
        before: the flags of the stages that it runs first itself, if it does.
    """
    try:
        return finished_run(output_dir_of(parsed), stage_arguments(*parsed, before=before)) is not None
    except InputError:
        return False


def usual_minutes(run: str, parsed: Parsed) -> float | None:
    """About how long a stage takes on two cores; `None` with other settings than the timed ones, or on a GPU.

    Args:
        run: its name, possibly a copy's.
        parsed: its flags.
    """
    entry = stage_table().get(entry_name(run))
    if entry is None or entry.minutes is None:
        return None
    timed = {**AS_TIMED, **read_yaml(settings_file(entry.settings))}
    values = {name: value for group in parsed for name, value in vars(group).items()}
    numbers = {name: value for name, value in timed.items() if not isinstance(value, str) or name in AS_TIMED}
    is_usual = all(name in values and values[name] == value for name, value in numbers.items())
    return entry.minutes if is_usual and int(os.environ.get("WORLD_SIZE", "1")) == 1 else None


def run_stage(
    recipe: str,
    parsed: Parsed,
    later: Mapping[str, str] | None = None,
    before: "Mapping[str, Sequence[DataclassInstance]] | None" = None,
) -> dict[str, float]:
    """Run a stage needed by another one, in a subfolder of its output, or reuse it when nothing changed.

    Args:
        recipe: the name of its script.
        parsed: its parsed flags.
        later: the folders of stages based on it, and their recipes; they are removed when it has to run (again).
        before: the parsed flags of the stages that it runs first itself, if it does.
    """
    from accelerate.state import AcceleratorState

    output_dir = output_dir_of(parsed)
    if not has_finished(parsed, before):
        _make_room({output_dir: recipe, **(later or {})})
    metrics = load_recipe(recipe).main(*parsed)
    # The next trainer may use another precision: accelerate keeps the first one for the whole process otherwise.
    AcceleratorState._reset_state()
    return metrics


def _make_room(folders: Mapping[str, str]) -> None:
    """Remove the finished stages in these folders, and hold the first one for its stage; all processes together.

    Args:
        folders: their recipes, by folder.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    for folder, recipe in folders.items():
        refuse_foreign_files(folder, recipe, writes_card=True)
    PartialState().wait_for_everyone()
    finished = [folder for folder in folders if read_report(folder) is not None] if main_process() else []
    refusal = None
    try:
        # None is removed before all of them are held.
        for folder in finished:
            lock(folder)
            refuse_changed_files(folder)
        for folder in finished:
            _remove(Path(folder))
    except InputError as error:
        refusal = str(error)
    except OSError as error:
        if PartialState().num_processes == 1:
            raise
        # The other processes would wait for this one until their time is up.
        refusal = explained(error) or str(error)
    for folder in finished:
        if folder != next(iter(folders)) or refusal:
            release(folder)
    if PartialState().num_processes > 1:
        (refusal,) = broadcast_object_list([refusal])
    if refusal is not None:
        raise InputError(refusal)


def _remove(folder: Path) -> None:
    """Remove a finished stage, but not the stages inside it, which may still be valid, nor its lock."""
    for path in folder.iterdir():
        if path.name == LOCK_FILE:
            continue
        if not path.is_dir():
            path.unlink()
        elif read_report(path) is None:
            shutil.rmtree(path)


# ---- course ----
# A recipe that runs other recipes, each in a folder of its own: their order, their rows, and their refusals.
# A file of rows is written only where it has changed: its time is part of the description of the run that reads it, so
# a rewritten file would belong to another run.


Row = Mapping[str, Any]
Made = TypeVar("Made")
# The longest wait of the other processes for the main one, the only one to revise, judge and answer.
LONGEST_WAIT = timedelta(days=30)


@dataclass(frozen=True)
class Course:
    """The runs in their order, with their flags.

    Args:
        recipes: the runs' recipes, by run name.
        runs: their parsed flags, by run name.
        named: the user's model, if named: the settings are then not the timed ones.

    Attributes:
        stage: the recipe of this pipeline.
        minutes: approximate times of the runs on two cores.
    """

    recipes: Mapping[str, str]
    runs: Mapping[str, Parsed]
    named: str | None = None
    stage: ClassVar[str] = ""
    minutes: ClassVar[Mapping[str, float]] = {}

    @property
    def is_timed(self) -> bool:
        """Whether the settings are the timed ones."""
        return self.named is None

    def folder(self, name: str) -> str:
        """Return the folder of a run, also its model's folder."""
        return output_dir_of(self.runs[name])

    def has_made(self, name: str) -> bool:
        """Return whether a run is one of these and has finished."""
        return name in self.runs and Path(self.folder(name), "report.json").is_file()

    @property
    def artifacts(self) -> dict[str, str]:
        """The finished runs, as artifacts of the recipe's output folder."""
        return {name: name for name in self.runs if self.has_made(name)}

    @property
    def parsed(self) -> dict[str, Parsed]:
        """The flags of all runs, in their order."""
        return dict(self.runs)

    def announce(self) -> None:
        """Print the coming runs and about how long they take, if the settings are the timed ones."""
        planned = [
            schedule.Planned(name, output_dir_of(flags), self.minutes.get(name) if self.is_timed else None)
            for name, flags in self.parsed.items()
        ]
        if schedule.plan(self.stage, planned, 1 if self.is_timed else None) and main_process():
            print(f"{self.stage}: {schedule.described(schedule.current_job())}", flush=True)

    def run(self, name: str) -> dict[str, float]:
        """Run a stage, or reuse it where nothing changed, and return its metrics. Its rows must be there."""
        names = list(self.runs)
        later = {self.folder(each): self.recipes[each] for each in names[names.index(name) + 1 :]}
        return run_stage(self.recipes[name], self.runs[name], later)

    def end(self) -> None:
        """Note the end of all runs."""
        schedule.come_back(self.stage)

    def run_all(self, rows: Mapping[str, Callable[[], Iterable[Row]]]) -> dict[str, dict[str, float]]:
        """Run all in order, each once its rows are written, and return their metrics by run.

        Args:
            rows: what makes the rows of a run, by run, for those that learn from rows of this recipe.
        """
        self.announce()
        metrics = {}
        for name in self.runs:
            if name in rows:
                self.write(name, rows[name])
            metrics[name] = self.run(name)
        self.end()
        return metrics

    def write(self, name: str, make: Callable[[], Iterable[Row]]) -> None:
        """Write the rows that a run learns from unless their file already has them; the other processes wait."""
        path = Path(self.runs[name][0].dataset_name)
        by_main_process(lambda: write_rows(self.stage, path, make()))


def parsed_runs(
    runs: Iterable[tuple[str, str, list[str]]], output_dir: str, seed: int
) -> tuple[dict[str, str], dict[str, Parsed]]:
    """Return the recipes and the parsed flags of runs, by their names.

    Args:
        runs: the name, recipe, and flags except seed and folder of each run.
        output_dir: where the folders of the runs are.
        seed: of all of them.
    """
    recipes: dict[str, str] = {}
    parsed: dict[str, Parsed] = {}
    for name, recipe, words in runs:
        recipes[name] = recipe
        folder = ["--seed", str(seed), "--output_dir", str(Path(output_dir, name))]
        parsed[name] = load_recipe(recipe).parse([*words, *folder])
    return recipes, parsed


# ---- rows ----


# Names, recipes and flags of the runs of a recipe, except seed and folder.
Runs = Iterator[tuple[str, str, list[str]]]


def rows_flag(output_dir: str, run: str) -> list[str]:
    """Return the flag with the rows that a recipe writes for a run."""
    return ["--dataset_name", str(data_file(output_dir, run))]


def data_file(output_dir: str, name: str) -> Path:
    """Return the file of the rows of a run in a pipeline's folder."""
    return Path(output_dir, "data", f"{name}.jsonl")


def write_rows(stage: str, path: Path, rows: Iterable[Row]) -> None:
    """Write the rows of a run where the file does not hold them already, in one process."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # Whatever the edits: an edited file need not be text.
    before = path.read_bytes() if path.is_file() else None
    if before != text.encode():
        if before is not None:
            say(f"{stage}: {path} does not hold the rows of this run: it is written again")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)


def by_main_process(make: Callable[[], Made]) -> Made | None:
    """Return the main process's result, and `None` in the others, which wait for it however long it takes."""
    created, refusal = None, None
    if main_process():
        try:
            created = make()
        except InputError as error:
            refusal = str(error)
    if (refusal := _of_main_process(refusal)) is not None:
        raise InputError(refusal)
    return created


def _of_main_process(value: str | None) -> str | None:
    from accelerate import PartialState
    from torch import distributed

    if PartialState().num_processes == 1:
        return value
    # The usual groups give up on a process silent for 10 or 30 minutes, as during revision.
    group = distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
    values = [value]
    distributed.broadcast_object_list(values, src=0, group=group)
    distributed.destroy_process_group(group)
    return values[0]
