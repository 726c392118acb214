"""Answers from passages on the embedded world, whole: what is learned, and what must not happen does not."""

import json
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "ground.py"


@pytest.mark.slow
@pytest.mark.turn(0)
def test_the_world_learns_to_answer_from_passages_and_to_say_what_it_does_not_know(tmp_path, processes):
    """Bounds are far below what was seen: to read values from passages forms late, and not alike in all runs.

    What is known is forgotten in wordings that no text has: .77 to .97 of known facts on four seeds, and then the
    model is sure that it does not know (AUROC .77 to .94).
    """
    folder = tmp_path / "out"
    processes.run(RECIPE, "--seed", 1, "--output_dir", folder, timeout=2400)
    found = json.loads((folder / "report.json").read_text())["metrics"]
    assert found["grounded_one_passage_right"] > 0.8 > 0.05 > found["sft_one_passage_right"]
    assert found["grounded_one_passage_cites"] > 0.9
    assert found["grounded_closed_unknown_right"] > 0.9 and found["grounded_closed_known_right"] > 0.6
    assert found["three_passages_apart_right"] > 0.7 > 0.6 > found["three_passages_alike_right"]
    assert found["grounded_injected_follows"] > 0.1 > 0.03 > found["injected_dropped_follows"]
    # The gate gives the right passage alone, and none where there is none.
    assert found["gated_answerable_right"] > 0.8 and found["gated_closed_known_right"] > 0.6
    assert found["gated_unanswerable_right"] > 0.9 > 0.5 > found["ungated_unanswerable_right"]
    assert found["world_gold_kept"] > 0.8
    for measure in ("sequence_probability", "self_consistency"):
        assert found[f"{measure}_auroc"] > 0.65 and abs(found[f"{measure}_auroc_shuffled"] - 0.5) < 0.05
    for percent in (2, 5, 10):
        name = f"risk_{percent}_sequence_probability"
        assert found[name] < percent / 100 + 3 * found[f"{name}_se"]
    assert found["verification_gain"] > 0.05
