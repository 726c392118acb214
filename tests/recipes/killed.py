"""How a recipe that keeps what it has done is killed: its own test file says so (test_NAME.py or test_NAME_recipe.py).

`KILLED` there is a `Killed`, with which test_fresh_processes.py kills it once at a place in the code, and .ci/kills.py
at random moments if .ci/kills.yaml has no case of it; or the test in that file that kills it otherwise.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import yaml

from hfllm.runs.recipes import recipe_names

HERE = Path(__file__).parent
SAVES = ["--save_strategy", "steps", "--save_steps", "1", "--resume_from_checkpoint", "auto", "--max_steps", "3"]


@dataclass(frozen=True)
class Files:
    """What flags name: tiny settings by stage, a tiny model, and a folder for rows and settings of its own."""

    tiny: dict[str, str]
    base: Path
    folder: Path

    def rows(self, *rows):
        path = self.folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return ["--dataset_name", str(path)]

    def settings(self, sizes, configs):
        """The flags of a recipe's own tiny test, which names YAML files of its runs and numbers."""
        words = [str(word) for name, value in sizes.items() for word in (f"--{name}", value)]
        for name, values in configs.items():
            (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
            words += [f"--{name}_config", str(self.folder / f"{name}.yaml")]
        return words

    def model(self, flag="model_name_or_path"):
        return [f"--{flag}", str(self.base)]


@dataclass(frozen=True)
class Killed:
    """How a recipe is killed, and what its next process says if it resumes.

    Args:
        flags: of a tiny run.
        says: a line of the next process.
        place: the process ends before a call of this function, see kill_run.py.
        number: of that call.
    """

    flags: Callable[[Files], list[str]]
    says: str = "resuming from checkpoint-"
    place: str = "hfllm.trainers.callbacks:write_checksums"
    number: int = 2


def of_stages(flags):
    """A recipe of several stages, killed in the second: the first has finished."""
    return Killed(flags, "already done in", "hfllm.runs.stage:Stage.announce", 3)


def trained(name, *more):
    return Killed(lambda files: ["--config", files.tiny[name], *files.model(), *SAVES, *more])


# Of the recipes of the main job, which share their tests.
OF_THE_MAIN_JOB = {
    "pretrain": Killed(lambda files: ["--config", files.tiny["pretrain"], *SAVES]),
    "sft": trained("sft"),
    "reward": trained("reward", "--on_policy_fraction", "0"),
    "rlhf": trained("rlhf", "--reward_funcs", "gold"),
}


def killed_recipes() -> dict[str, Killed | Callable]:
    """How each recipe is killed that is, by its name."""
    return {name: how for name in recipe_names() if (how := killed_recipe(name)) is not None}


def killed_recipe(name: str) -> Killed | Callable | None:
    """How a recipe is killed, `None` if nothing says so."""
    if name in OF_THE_MAIN_JOB:
        return OF_THE_MAIN_JOB[name]
    files = [HERE / f"test_{name}.py", HERE / f"test_{name}_recipe.py"]
    # A file without it may need what is not installed.
    module = next((path.stem for path in files if path.is_file() and "\nKILLED = " in path.read_text()), None)
    return import_module(module).KILLED if module else None
