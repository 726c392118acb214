"""Thoughts on the embedded world, whole: they gain on facts of several hops, and direct answers do not."""

import json
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "reason.py"


@pytest.mark.slow
def test_thoughts_gain_where_direct_answers_cannot(tmp_path, processes):
    """Bounds are loose, and of hops alone: dials are not learned yet (docs/reasoning.md has the figures)."""
    folder = tmp_path / "out"
    processes.run(RECIPE, "--seed", 42, "--output_dir", folder, timeout=2400)
    found = json.loads((folder / "report.json").read_text())["metrics"]
    assert found["thoughts_hops_right"] > 0.6 and found["direct_hops_right"] < 0.3
    assert found["thoughts_hops_valid"] > 0.8 and found["thoughts_hops_steps"] > 0.8
    assert found["direct_dial_right"] < 0.3
    assert found["shuffled_right_change"] < 0.1
