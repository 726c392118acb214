"""The stages that another one needs: which they are, and running those that are missing."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from hfllm.errors import InputError
from hfllm.outputs.report import read_report
from hfllm.runs.command_line import finished_run, main_process
from hfllm.runs.stage import stage_arguments


def run_stage(
    recipe: ModuleType,
    arguments: tuple,
    later_folders: Sequence[str] = (),
    before: Mapping[str, Sequence[Any]] | None = None,
) -> dict[str, float]:
    """Run a stage that another one needs, in a folder of that one's own, or reuse it when nothing changed.

    Args:
        recipe: the stage's module, with `parse` and `main`.
        arguments: its parsed flags.
        later_folders: stages that build on it; they are removed when it has to run (again).
        before: the parsed flags of the stages that it runs first itself, if it does.
    """
    output_dir = arguments[1].output_dir
    try:
        done = finished_run(output_dir, stage_arguments(*arguments, before=before)) is not None
    except InputError:
        done = False
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    if not done:
        PartialState().wait_for_everyone()
        if main_process():
            for folder in (output_dir, *later_folders):
                if read_report(folder) is not None:
                    _remove(Path(folder))
        PartialState().wait_for_everyone()
    metrics = recipe.main(*arguments)
    # The next trainer may use another precision: accelerate keeps the first one for the whole process otherwise.
    AcceleratorState._reset_state()
    return metrics


def _remove(folder: Path) -> None:
    """Remove a stage that has finished, but not the stages inside it, which may be as they should be."""
    for path in folder.iterdir():
        if not path.is_dir():
            path.unlink()
        elif read_report(path) is None:
            shutil.rmtree(path)


def run_stages(recipes: Sequence[ModuleType], arguments: Sequence[tuple]) -> list[dict[str, float]]:
    """Run or reuse stages, each of which may build on those before it. Returns their metrics; see `run_stage`."""
    folders = [parsed[1].output_dir for parsed in arguments]
    pairs = enumerate(zip(recipes, arguments, strict=True), 1)
    return [run_stage(recipe, parsed, later_folders=folders[position:]) for position, (recipe, parsed) in pairs]


def with_model_from(
    recipe: ModuleType, config: str | None, script_args: Any, training_args: Any, model_args: Any
) -> Any:
    """`model_args` with the model that `recipe` makes on the embedded world, in a folder under the output folder.

    Args:
        config: a YAML file of the recipe's flags, if not its own for the world.
    """
    folder = f"{training_args.output_dir}/{recipe.__name__}"
    flags = ["--seed", str(training_args.seed), "--world_seed", str(script_args.world_seed), "--output_dir", folder]
    run_stage(recipe, recipe.parse([*flags, *(["--config", config] if config else [])]))
    return replace(model_args, model_name_or_path=folder)
