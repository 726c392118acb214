"""Pictures, whole: a small model learns to see from nothing, also pairs that it has never seen, and scanned digits."""

import json
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "vision.py"


def figures(processes, folder, *flags):
    processes.run(RECIPE, "--output_dir", folder, *flags, timeout=2400)
    return json.loads((folder / "report.json").read_text())["metrics"]


@pytest.mark.slow
def test_a_model_learns_to_see_from_nothing(tmp_path, processes):
    found = figures(processes, tmp_path / "out", "--seed", 2)
    families = [name for name in found if name.startswith("seen_") and name.endswith("_right")]
    assert len(families) == 8 and found["seen_right"] > 0.9
    assert all(found[name] > 0.75 for name in families)
    # Color and shape are known apart, and not by heart.
    assert found["held_out_right"] > 0.65
    assert found["held_out_color_right"] > 0.5 and found["held_out_shape_right"] > 0.5
    # Without its picture nobody knows more than the best guess.
    assert found["shuffled_right"] < found["chance_right"] + 0.05
    assert found["seen_absent_right"] > 0.9 and found["called_absent"] < 0.1


@pytest.mark.slow
def test_scanned_digits_are_read(tmp_path, processes):
    pytest.importorskip("sklearn")
    found = figures(processes, tmp_path / "out", "--dataset_name", "digits", "--seed", 2)
    # Three standard errors below 0.833 on seed 2.
    assert found["held_out_right"] > 0.79 and found["shuffled_right"] < 0.15
