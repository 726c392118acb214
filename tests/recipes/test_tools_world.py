"""Learning to use tools on the embedded world, whole: it works, and what must not work does not."""

import json
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "tools.py"


@pytest.mark.slow
@pytest.mark.turn(2)
def test_the_world_learns_to_call_tools_where_they_are_needed_alone(tmp_path, processes):
    folder = tmp_path / "out"
    processes.run(RECIPE, "--seed", 42, "--output_dir", folder, timeout=2400)
    found = json.loads((folder / "report.json").read_text())["metrics"]
    assert found["calls_needed_after"] > 0.9 and found["calls_not_needed_after"] < 0.1
    for family, least in (("unknown", 0.5), ("changed", 0.7), ("sum_2", 0.6), ("sum_3", 0.6), ("sum_4", 0.6)):
        assert found[f"right_{family}_after"] > least
        assert found[f"off_right_{family}"] < 0.06
    # In words that no text holds.
    for group, least in (("unread_name", 0.7), ("unread_value", 0.6), ("renamed", 0.7), ("failing", 0.8)):
        assert found[f"right_{group}_after"] > least
    assert found["known_facts_lost"] < 0.08
    assert found["sampled_right_needed_change"] > 0.15
    assert found["shuffled_right_needed_change"] < 0.1
