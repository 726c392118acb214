"""A recipe of several runs of other recipes, each in a folder of its own and reused where nothing changed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hfllm.runs import schedule
from hfllm.runs.chain import Parsed, output_dir_of, run_stage
from hfllm.runs.command_line import main_process
from hfllm.runs.recipes import load_recipe


@dataclass(frozen=True)
class Course:
    """The runs in their order, with their flags.

    Args:
        stage: the recipe whose course it is.
        recipes: the recipe of each run, by its name.
        runs: its parsed flags.
        minutes: about how long each takes on two cores; empty where nobody knows.
        named: the user's model, where one is named.
    """

    stage: str
    recipes: Mapping[str, str]
    runs: Mapping[str, Parsed]
    minutes: Mapping[str, float]
    named: str | None = None

    def folder(self, name: str) -> str:
        """Return the folder of a run, which is its model's."""
        return output_dir_of(self.runs[name])

    def has_made(self, name: str) -> bool:
        """Return whether a run is one of these and has finished."""
        return name in self.runs and Path(self.folder(name), "report.json").is_file()

    def announce(self) -> None:
        """Say which runs come and about how long they take, if the settings are those that were timed."""
        planned = [
            schedule.Planned(name, output_dir_of(flags), self.minutes.get(name)) for name, flags in self.runs.items()
        ]
        if schedule.plan(self.stage, planned, 1 if self.minutes else None) and main_process():
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
