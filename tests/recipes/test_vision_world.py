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
    # Three standard errors below what seed 2 has given: 0.876, and of relations, the worst family, 0.653.
    assert len(families) == 7 and found["seen_right"] > 0.845
    assert all(found[name] > 0.7 for name in families if name != "seen_relation_right")
    assert found["seen_relation_right"] > 0.48
    # Color and shape are known apart, and not by heart: 0.856 in all, 0.813 and 0.665.
    assert found["held_out_right"] > 0.82
    assert found["held_out_color_right"] > 0.71 and found["held_out_shape_right"] > 0.55
    # Without its picture nobody knows more than the best guess.
    assert found["shuffled_right"] < found["chance_right"] + 0.05
    # 0.938 and 0.020.
    assert found["seen_absent_right"] > 0.87 and found["called_absent"] < 0.04


@pytest.mark.slow
def test_scanned_digits_are_read(tmp_path, processes):
    pytest.importorskip("sklearn")
    found = figures(processes, tmp_path / "out", "--dataset_name", "digits", "--seed", 2)
    # Three standard errors below 0.962 on seed 2.
    assert found["held_out_right"] > 0.94 and found["shuffled_right"] < 0.15
