"""Pictures, whole: a small model learns to see from nothing, also pairs that it has never seen, and scanned digits."""

import json
from pathlib import Path

import pytest

from hfllm.data.world.pictures import FAMILIES

RECIPE = Path(__file__).parents[2] / "recipes" / "vision.py"


def figures(processes, folder, *flags):
    processes.run(RECIPE, "--output_dir", folder, *flags, timeout=2400)
    return json.loads((folder / "report.json").read_text())["metrics"]


@pytest.mark.slow
def test_a_model_learns_to_see_from_nothing(tmp_path, processes):
    found = figures(processes, tmp_path / "out", "--seed", 2)
    families = [f"seen_{family}_right" for family in FAMILIES]
    # Seed 2 gives 0.876, and another CPU's rounding is another seed: 1, with families drawn alike, gave 0.836.
    assert len(families) == 7 and found["seen_right"] > 0.78
    late = ("seen_relation_right", "seen_absent_right")
    assert all(found[name] > 0.65 for name in families if name not in late)
    # What is learned last: 0.653 and 0.938, on seed 1 0.556 and 0.600.
    assert found["seen_relation_right"] > 0.35 and found["seen_absent_right"] > 0.45
    # Color and shape are known apart, and not by heart: 0.856 in all, 0.813 and 0.665 (0.755, 0.647, 0.690).
    assert found["held_out_right"] > 0.68
    assert found["held_out_color_right"] > 0.5 and found["held_out_shape_right"] > 0.5
    # With another picture it says what that one shows, and is right as often as who reads it without a fault.
    assert abs(found["shuffled_right"] - found["other_truth_right"]) < 0.05
    assert found["called_absent"] < 0.06


@pytest.mark.slow
def test_scanned_digits_are_read(tmp_path, processes):
    pytest.importorskip("sklearn")
    found = figures(processes, tmp_path / "out", "--dataset_name", "digits", "--seed", 2)
    # 0.962 on seed 2, which chose the number of rows.
    assert found["held_out_right"] > 0.9 and found["shuffled_right"] < 0.15
