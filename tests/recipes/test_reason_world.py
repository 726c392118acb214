"""Thoughts on the embedded world, whole: they gain where direct answers do not, and PPO on outcomes spreads them."""

import json
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "reason.py"


@pytest.mark.slow
def test_thoughts_gain_where_direct_answers_cannot(tmp_path, processes):
    """Bounds are three standard errors from what was seen on this seed (docs/reasoning.md has the figures)."""
    folder = tmp_path / "out"
    processes.run(RECIPE, "--seed", 1, "--output_dir", folder, timeout=2400)
    found = json.loads((folder / "report.json").read_text())["metrics"]
    assert found["thoughts_hops_right"] > 0.62 and found["direct_hops_right"] < 0.21
    assert found["thoughts_hops_valid"] > 0.95 and found["thoughts_hops_steps"] > 0.83
    assert found["thoughts_dial_right"] > 0.95 and found["direct_dial_right"] < 0.2
    assert found["thoughts_dial_valid"] > 0.95 and found["rl_valid"] > 0.95
    # Thoughts spread with right answers, as long as they were, and not by rewards that say nothing.
    assert found["thinks_change"] > 0.7 and found["right_change"] > 0.6
    assert abs(found["rl_thought_tokens"] - found["mixed_thought_tokens"]) < 2
    assert found["shuffled_right_change"] < 0.1 and found["shuffled_thinks_change"] < 0.1
