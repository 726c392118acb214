"""What a recipe declares of itself is all that hfllm must be told of it."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

from hfllm.runs import launcher, pipeline, recipes
from hfllm.runs.recipes import declared, installed, load_recipe, recipe_names

ECHO = '''"""Say a text again (and again). It is a small recipe.

    accelerate launch recipes/echo.py
"""

from hfllm.runs.recipes import Recipe

RECIPE = Recipe(makes="a text said twice", needs={"model_name_or_path": "sft"}, minutes=3, unfinished="half")


def parse(argv):
    return ()
'''


@pytest.mark.parametrize("name", recipe_names())
def test_what_is_read_is_what_is_imported(name):
    known, said = declared(name), getattr(load_recipe(name), "RECIPE", None)
    assert said is not None, f"recipes/{name}.py has no line RECIPE = Recipe(...)"
    assert known == replace(said, name=name, settings=known.settings) and said.settings in ("", known.settings)


@pytest.fixture
def with_echo(tmp_path, monkeypatch):
    """A new recipe beside the others, whose script is its one entry."""
    folders = {"recipes": shutil.copytree(installed("recipes"), tmp_path / "recipes")}
    (folders["recipes"] / "echo.py").write_text(ECHO)
    for module in (recipes, launcher):
        monkeypatch.setattr(module, "installed", lambda name: folders.get(name) or installed(name))
    forget()
    yield folders["recipes"]
    forget()


def forget():
    recipes._read_script.cache_clear()
    pipeline.stage_table.cache_clear()


def test_a_new_recipe_is_known_by_its_script_alone(with_echo, monkeypatch, capsys):
    assert launcher.main(["list"]) == launcher.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("\n    echo             Say a text again\n") == 2
    assert "\n    echo             a text said twice, from what sft made\n" in shown
    monkeypatch.setattr(pipeline, "load_recipe", lambda name: SimpleNamespace(parse=list))
    assert list(pipeline.chain_before("echo", "out", 3).runs) == ["pretrain", "sft"]
    known = declared("echo")
    assert (known.minutes, known.unfinished, known.settings, known.in_one_process) == (3, "half", "", False)


def test_its_settings_are_those_of_its_folder(with_echo):
    (with_echo / "configs" / "echo").mkdir()
    (with_echo / "configs" / "echo" / "world.yaml").write_text("seed: 1\n")
    assert declared("echo").settings == "echo/world.yaml"


def test_a_run_of_no_recipe_has_the_defaults():
    assert declared("nonsense") == recipes.Recipe(name="nonsense")
