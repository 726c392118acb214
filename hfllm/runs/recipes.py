"""Find recipes and their settings: inside the package installed by pip, or next to it in a checkout."""

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from hfllm.errors import InputError


@cache
def installed(folder: str) -> Path:
    """Return the folder `recipes`, `accelerate_configs` or `ds_configs`."""
    package = Path(__file__).resolve().parents[1]
    for index in (package / folder, package.parent / folder):
        if index.is_dir():
            return index
    raise InputError(f"this installation of hfllm has no folder {folder}: install it again by pip install hfllm")


def settings_file(name: str) -> Path:
    """Return the YAML file of a recipe's settings, such as `sft/world.yaml`."""
    return installed("recipes") / "configs" / name


def recipe_names() -> list[str]:
    """Return the names of all recipes, in alphabetical order."""
    return sorted(path.stem for path in installed("recipes").glob("*.py"))


def recipe_file(name: str) -> Path:
    """Return the script of the recipe called `name`."""
    return installed("recipes") / f"{name}.py"


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
