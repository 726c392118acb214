"""Federated fine-tuning on the embedded world, whole: far beyond each one alone, near the same rows pooled."""

import json
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "federated.py"


@pytest.mark.slow
@pytest.mark.turn(5)
def test_organisations_gain_together_what_none_has_alone(tmp_path, processes):
    """Bounds are far below the seeds of docs/experiments/federation.md: another CPU's rounding is another seed."""
    folder = tmp_path / "out"
    processes.run(RECIPE, "--seed", 102, "--output_dir", folder, timeout=2400)
    found = json.loads((folder / "report.json").read_text())["metrics"]
    assert found["gold_over_local_best"] > 1.8
    assert found["gold_over_equal_steps"] > 0.75
    assert found["gold_untrained"] < 0.2
    assert found["updates_left_out"] == 0 and found["rounds"] == 60
