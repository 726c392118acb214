"""Answers from passages on the embedded world, whole: what is learned, and what must not happen does not."""

import json
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "ground.py"


@pytest.mark.slow
@pytest.mark.turn(0)
def test_the_world_learns_to_answer_from_passages_and_to_say_what_it_does_not_know(tmp_path, processes):
    """Bounds stand three standard errors and more below what was seen on seeds that nothing was chosen on."""
    folder = tmp_path / "out"
    processes.run(RECIPE, "--seed", 1, "--output_dir", folder, timeout=2400)
    found = json.loads((folder / "report.json").read_text())["metrics"]
    assert found["grounded_one_passage_right"] > 0.8
    assert found["grounded_one_passage_cites"] > 0.9
    # In words that no text holds, one of three, another animal's passage, one that does not tell, an instruction.
    assert found["grounded_unread_words_right"] > 0.6 and found["grounded_three_passages_right"] > 0.5
    assert found["grounded_wrong_passage_right"] > 0.6 and found["grounded_injected_follows"] < 0.15
    # The control has read passages in pretraining too; to refuse what they do not tell, it has not learned. Of what an
    # animal's own passage does not tell nothing is asked: .15 to .94 are refused, as the seed has it.
    for group in ("unread_words", "wrong_passage"):
        assert found[f"grounded_{group}_right"] > found[f"sft_{group}_right"]
    # Of two values both are said with a prompt for each passage, and more rarely by the control.
    name = "contradicting_union_right"
    assert found[f"grounded_{name}"] > 0.6 and found[f"grounded_{name}"] > found[f"sft_{name}"]
    # Of three passages the one that tells is cited: a third by chance.
    assert found["grounded_three_passages_cites"] > 0.6
    assert min(found["probe_finding"], found["probe_citing"]) > 0.7 and found["probe_missing"] > 0.25
    assert found["grounded_closed_unknown_right"] > 0.7 and found["grounded_closed_known_right"] > 0.7
    # The gate gives the right passage alone, and none where there is none.
    assert found["gated_answerable_right"] > 0.8 and found["gated_closed_known_right"] > 0.6
    assert found["gated_unanswerable_right"] > 0.6
    assert found["world_gold_kept"] > 0.8
    for measure in ("sequence_probability", "self_consistency"):
        assert found[f"{measure}_auroc"] > 0.65 and abs(found[f"{measure}_auroc_shuffled"] - 0.5) < 0.05
    for percent in (2, 5, 10):
        name = f"risk_{percent}_sequence_probability"
        assert found[name] < percent / 100 + 3 * found[f"{name}_se"]
    assert found["verification_gain"] > 0.05
