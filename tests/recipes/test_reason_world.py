"""Thoughts on the embedded world, whole: they gain where direct answers do not, and PPO on outcomes spreads them."""

import json
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "reason.py"


@pytest.mark.slow
@pytest.mark.turn(4)
def test_thoughts_gain_where_direct_answers_cannot(tmp_path, processes):
    """Bounds are at least three standard errors from the worst seed (docs/experiments/reasoning.md)."""
    folder = tmp_path / "out"
    processes.run(RECIPE, "--seed", 42, "--output_dir", folder, timeout=2400)
    report = json.loads((folder / "report.json").read_text())
    found = report["metrics"]
    assert report["warnings"] == []
    assert found["thoughts_hops_right"] > 0.75 and found["direct_hops_right"] < 0.25
    assert found["thoughts_dial_right"] > 0.8 and found["direct_dial_right"] < 0.25
    # More and fewer turns than any text of training has; 100 of each.
    assert found["thoughts_dial_4_right"] > 0.7 and found["thoughts_dial_12_right"] > 0.4
    assert found["thoughts_hops_reworded_right"] > 0.7 and found["thoughts_dial_reworded_right"] > 0.7
    assert found["direct_dial_12_right"] < 0.3
    # Each operation was learned, and its curve is there.
    assert all(found[f"probe_{name}"] > 0.8 for name in ("reading", "adding", "chaining", "recalling"))
    assert (folder / report["artifacts"]["probes"]).read_bytes().startswith(b"\x89PNG")
    assert found["thoughts_hops_valid"] > 0.95 and found["thoughts_dial_valid"] > 0.95 and found["rl_valid"] > 0.9
    # Thoughts spread with right answers, as long as they were.
    for name in ("thinks_change", "right_change"):
        assert found[name] > max(0.3, found[f"shuffled_{name}"] + 0.2)
    assert abs(found["rl_thought_tokens"] - found["mixed_thought_tokens"]) < 3
    # By rewards that say nothing both wander, up or down by the seed.
    assert found["shuffled_right_change"] < 0.3 and found["shuffled_thinks_change"] < 0.35
