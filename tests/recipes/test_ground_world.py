"""Answers from passages on the embedded world, whole: what is learned, and what must not happen does not."""

import json
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "ground.py"


@pytest.mark.slow
def test_the_world_learns_to_answer_from_passages_and_to_say_what_it_does_not_know(tmp_path, processes):
    folder = tmp_path / "out"
    processes.run(RECIPE, "--seed", 42, "--output_dir", folder, timeout=2400)
    found = json.loads((folder / "report.json").read_text())["metrics"]
    assert found["grounded_one_passage_right"] > 0.5
