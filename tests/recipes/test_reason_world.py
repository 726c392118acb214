"""Thoughts on the embedded world, whole: they gain, PPO spreads them, and the controls do neither."""

import json
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "reason.py"


@pytest.mark.slow
def test_thoughts_gain_where_direct_answers_cannot_and_ppo_spreads_them(tmp_path, processes):
    """Bounds are loose: docs/reasoning.md has the figures."""
    folder = tmp_path / "out"
    processes.run(RECIPE, "--seed", 42, "--output_dir", folder, timeout=2400)
    found = json.loads((folder / "report.json").read_text())["metrics"]
    assert found["thoughts_hops_right"] > 0.7 and found["direct_hops_right"] < 0.3
    assert found["thoughts_dial_right"] > 0.7 and found["direct_dial_right"] < 0.3
    for group in ("hops", "dial"):
        assert found[f"thoughts_{group}_valid"] > 0.8 and found[f"thoughts_{group}_steps"] > 0.8
    assert 0.15 < found["thinks_before"] < 0.45
    for name in ("thinks", "right"):
        assert found[f"{name}_change"] > 0.2 > found[f"shuffled_{name}_change"]
    assert found["rl_valid"] > 0.8
    # A thought about five to seven turns takes 28 to 38 tokens, with its marks, and the answer 5.
    assert 25 < found["tokens_after"] < 50
