"""Find recipes, their settings and what they declare: in the package installed by pip, or next to it in a checkout."""

import ast
import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from hfllm.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """What hfllm must know of a recipe without importing it, declared in its script: `RECIPE = Recipe(...)`.

    The declaration is read as text (`declared`): its arguments are literals, by their names.

    Args:
        makes: its output, as in `hfllm list`, if it is a stage: if others need it, or it needs others.
        needs: the flags naming models of another stage, and the name of the stage.
        settings: the YAML file of its settings on the embedded world, under recipes/configs; by default its folder's
            world.yaml, if there is one.
        runs_own_chain: whether others leave the stages before it to its recipe: they run inside its own folder, and
            its stage's own flags (`hfllm/stages/NAME`) list them.
        minutes: about how long it takes on two cores with these settings.
        in_one_process: whether it runs in one process, however many devices there are, since it trains nothing.
        writes: "model" or "tokenizer", if it writes that over the files in its folder without a trainer.
        unfinished: the folder in its output folder for the work of an unfinished run, removed at the very end.
        name: its script's; `declared` fills it in.
    """

    makes: str | None = None
    needs: Mapping[str, str] = field(default_factory=dict)
    settings: str = ""
    runs_own_chain: bool = False
    minutes: float | None = None
    in_one_process: bool = False
    writes: str | None = None
    unfinished: str | None = None
    name: str = ""


@cache
def installed(folder: str) -> Path:
    """Return the folder `recipes`, `accelerate_configs` or `ds_configs`."""
    package = Path(__file__).resolve().parents[1]
    for index in (package / folder, package.parent / folder):
        if index.is_dir():
            return index
    raise InputError(f"this installation of hfllm has no folder {folder}: install it again by pip install hfllm")


def is_sharded(provided: Mapping[str, Any]) -> bool:
    """Return whether an engine splits matrices over processes, by the user's flags or by accelerate.

    Args:
        provided: the user's values, by flag.
    """
    engines = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    by_accelerate = any(os.environ.get(name, "false").lower() == "true" for name in engines)
    return by_accelerate or bool(provided.get("fsdp") or provided.get("deepspeed"))


def settings_for_the_world(name: str, provided: Mapping[str, Any], file: str = "world") -> list[Path]:
    """Return the YAML files of a recipe's settings on the embedded world, `file` and that by AdamW.

    Where those say Muon, and it cannot be used, the last file puts AdamW in its place: for split matrices, adapters,
    and where the user names an optimizer.
    """
    by_adamw = is_sharded(provided) or bool(provided.get("optim") or provided.get("use_peft"))
    instead = settings_file(f"{name}/{file}_adamw.yaml")
    return [settings_file(f"{name}/{file}.yaml"), *([instead] if by_adamw and instead.is_file() else [])]


def settings_file(name: str) -> Path:
    """Return the YAML file of a recipe's settings, such as `sft/world.yaml`."""
    return installed("recipes") / "configs" / name


def is_shipped(path: Path) -> bool:
    """Return whether a file of settings is one that hfllm ships."""
    return path.resolve().is_relative_to(settings_file("").resolve())


def recipe_names() -> list[str]:
    """Return the names of all recipes, in alphabetical order."""
    return sorted(path.stem for path in installed("recipes").glob("*.py"))


def recipe_file(name: str) -> Path:
    """Return the script of the recipe called `name`."""
    return installed("recipes") / f"{name}.py"


def declared(name: str) -> Recipe:
    """Return what the recipe called `name` declares; the defaults if it declares nothing, or is no recipe."""
    return _read_script(name)[1] if name in recipe_names() else Recipe(name=name)


def docstring_of(name: str) -> str:
    """Return the docstring of the recipe called `name`."""
    return _read_script(name)[0]


@cache
def _read_script(name: str) -> tuple[str, Recipe]:
    """Return a recipe's docstring and declaration, without the imports of running it."""
    tree = ast.parse(recipe_file(name).read_text(encoding="utf-8"))
    values = {"settings": f"{name}/world.yaml" if settings_file(f"{name}/world.yaml").is_file() else ""}
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "RECIPE":
            values |= {each.arg: ast.literal_eval(each.value) for each in node.value.keywords}
    return ast.get_docstring(tree) or "", Recipe(name=name, **values)


def load_recipe(name: str) -> ModuleType:
    """Load the recipe called `name` as a module with `parse` and `main`; every call returns the same module."""
    full_name = f"hfllm.recipes.{name}"
    if full_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(full_name, recipe_file(name))
        module = importlib.util.module_from_spec(spec)
        sys.modules[full_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[full_name]
            raise
    return sys.modules[full_name]
