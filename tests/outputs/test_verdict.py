"""A verdict is right as often as its tests promise, and says first what makes it meaningless."""

import numpy as np
import pytest

from hfllm.outputs.figures import change_of, mean_of, share_of
from hfllm.outputs.verdict import (
    IS_BETTER,
    IS_EQUAL,
    IS_NOT_COMPARED,
    IS_TOO_FEW,
    IS_WORSE,
    Promise,
    change_claim,
    decide,
    lines_of,
)

RIGHT = Promise("right answers", "right", "chance", "by chance")


def drawn(seed, n, shift=0.0):
    return (np.random.default_rng(seed).normal(size=n) + shift).tolist()


@pytest.mark.parametrize(
    ("shift", "n", "decision"),
    [(1.0, 40, IS_BETTER), (-1.0, 40, IS_WORSE), (0.0, 40, IS_EQUAL), (1.0, 5, IS_TOO_FEW)],
)
def test_a_change_is_decided_by_its_interval(shift, n, decision):
    metrics = change_of("gold_reward", drawn(1, n), drawn(2, n, shift))
    verdict = decide(metrics)
    assert verdict.decision == decision and verdict.sentence.startswith(f"{decision}: gold reward (sampled answers)")
    assert f"n {n}" in verdict.sentence and "±" not in verdict.sentence
    assert verdict.worse == (["gold_reward"] if decision == IS_WORSE else [])


def test_a_stage_that_changes_nothing_is_seldom_called_anything():
    """Ten figures of the same model twice: one corrected decision, 5 of 100 for all of them together."""
    names = ["gold_reward", "unfinished", "needle", "over_refusal", "perplexity", "fact_accuracy", "bits_per_byte"]
    called = 0
    for seed in range(200):
        metrics = {}
        for index, name in enumerate(names):
            metrics |= change_of(name, drawn(1000 * seed + index, 30), drawn(5000 + 1000 * seed + index, 30))
        verdict = decide(metrics)
        called += verdict.decision != IS_EQUAL or bool(verdict.worse)
        assert verdict.tested == len(names)
    # 10 expected; three standard errors above.
    assert called <= 10 + 3 * (200 * 0.05 * 0.95) ** 0.5


def test_what_got_worse_stands_beside_what_got_better():
    before, after = drawn(1, 80), drawn(1, 80, 1.0)
    metrics = change_of("gold_reward", before, after)
    metrics |= change_of("unfinished", [0.0] * 80, [0.0] * 40 + [1.0] * 40)
    metrics |= change_of("response_length", before, after)
    verdict = decide(metrics)
    assert verdict.decision == IS_BETTER and verdict.worse == ["unfinished"]
    assert "; worse: share of responses cut off 0 to 0.5, +0.5 [0.3" in verdict.sentence
    # Neither good nor bad in itself: not tested.
    assert verdict.tested == 2 and "length" not in verdict.sentence


def test_shares_of_all_or_none_have_intervals_too():
    """Two of two right is nothing; twenty of twenty against a known level of a half is something."""
    few = {**share_of("right", 1.0, 2), "chance": 0.5}
    many = {**share_of("right", 1.0, 20), "chance": 0.5}
    assert decide(few, [RIGHT]).decision == IS_TOO_FEW
    verdict = decide(many, [RIGHT])
    assert verdict.decision == IS_BETTER and "+0.5 [0.34, 0.50], n 20" in verdict.sentence
    assert decide({**share_of("right", 0.5, 20), "chance": 0.5}, [RIGHT]).decision == IS_EQUAL


def test_the_difference_of_two_shares_has_newcombes_interval():
    """56 of 70 against 48 of 80: .0524 to .3339 (Newcombe 1998, Statistics in Medicine 17:873, table II)."""
    metrics = {**share_of("right", 56 / 70, 70), **share_of("chance", 48 / 80, 80)}
    assert "+0.2 [0.05, 0.33], n 70" in decide(metrics, [RIGHT]).sentence


def test_a_stage_is_better_only_where_all_of_its_claims_are():
    good = {**share_of("right", 0.9, 100), "chance": 0.5}
    claims = [RIGHT, Promise("others", "others", 0.5, "by chance")]
    assert decide({**good, **share_of("others", 0.9, 100)}, claims).decision == IS_BETTER
    verdict = decide({**good, **share_of("others", 0.5, 100)}, claims)
    assert verdict.decision == IS_EQUAL and verdict.sentence.startswith("no difference: others 0.5")
    assert "1 of its 2 claims aside" in verdict.sentence
    assert decide({**good, **share_of("others", 0.1, 100)}, claims).worse == ["others"]
    # A claim that was not measured is none.
    assert decide(good, claims).decision == IS_BETTER


def test_less_is_better_where_the_figure_says_so():
    loss = change_of("held_out_loss", drawn(1, 40, 3.0), drawn(2, 40))
    assert decide(loss).decision == IS_BETTER
    assert decide(loss, [change_claim("held_out_loss")]).decision == IS_BETTER
    counted = {"bits": 1.0, "bits_se": 0.01, "bits_n": 50, "grams": 1.5}
    assert decide(counted, [Promise("bits", "bits", "grams", "by a 5-gram", is_less=True)]).decision == IS_BETTER


def test_what_makes_the_figures_meaningless_comes_first():
    metrics = change_of("proxy_reward", [0.5] * 9, [0.5] * 9) | change_of("unfinished", [1.0] * 9, [1.0] * 9)
    verdict = decide(metrics)
    assert verdict.sentence.startswith("every response was cut off at its longest length")
    assert "every response got the same reward, 0.5; no difference" in verdict.sentence
    assert len(verdict.cautions) == 2 and verdict.as_dict()["cautions"] == verdict.cautions


def test_a_stage_without_a_control_says_so_and_no_more():
    verdict = decide({**mean_of("loss", [1.0, 2.0]), "rows": 3})
    assert verdict.decision == IS_NOT_COMPARED and not verdict.sentence
    assert lines_of(verdict.as_dict()) == [] and lines_of({"next": "hfllm chat x"}) == ["next: hfllm chat x"]


def test_a_run_that_diverged_says_so():
    broken = {"held_out_loss_before": 3.0, "held_out_loss_after": float("nan"), "held_out_loss_change": float("nan")}
    verdict = decide({**broken, "held_out_loss_change_se": float("nan"), "held_out_loss_n": 40})
    assert verdict.decision == IS_TOO_FEW
    assert "held_out_loss_after, held_out_loss_change" in verdict.sentence and "diverged" in verdict.sentence


def test_few_items_get_students_p_values():
    """At the level of one test, and of ten adjusted, exactly where the interval ends: 2.571 errors for 6 items."""

    def metrics(errors):
        return {"gold_reward_change": errors, "gold_reward_change_se": 1.0, "gold_reward_n": 6}

    assert decide({**metrics(2.60), "gold_reward_before": 0.0, "gold_reward_after": 1.0}).decision == IS_BETTER
    assert decide({**metrics(2.54), "gold_reward_before": 0.0, "gold_reward_after": 1.0}).decision == IS_EQUAL
    # Ten at once: p of .005 are 4.77 errors of 5 degrees of freedom; by the normal distribution 3.68 would do.
    names = ("needle", "unfinished", "perplexity", "over_refusal", "fact_accuracy", "proxy_reward", "bits_per_byte")
    others = {}
    for name in (*names, "needle_text", "held_out_loss"):
        others |= {f"{name}_change": 0.1, f"{name}_change_se": 1.0, f"{name}_n": 6}
        others |= {f"{name}_before": 0.0, f"{name}_after": 0.1}
    sides = {"gold_reward_before": 0.0, "gold_reward_after": 1.0}
    assert decide({**metrics(4.9), **sides, **others}).decision == IS_BETTER
    assert decide({**metrics(4.6), **sides, **others}).decision == IS_EQUAL
