"""The verdict on two models: which figures are in it, what it says, and the items in which the models differ."""

import math
from typing import ClassVar

import pytest

from hfllm.errors import InputError
from hfllm.evaluation.suites.base import Record, Suite
from hfllm.evaluation.verdicts import Compared, can_differ, fail_if_worse, judged, sentence
from hfllm.outputs.intervals import holm
from hfllm.stages.evaluate.flags import SUITES
from hfllm.stages.evaluate.report import changes_of, compared_figures, report


class Made(Suite):
    """A suite with a figure that decides, one that only describes, and a group that is a control."""

    name = "made"
    better: ClassVar = {"right": 1, "wordy": -1}
    primary: ClassVar = ("right", "wordy")

    def primary_of(self, group):
        return () if group == "control" else self.primary

    def items(self):
        return []

    def judge(self, subject, items):
        return iter(())


def records(model, right, group="all", wordy=None):
    """A record for each item; those without a score were skipped."""
    return [
        Record(
            model=model,
            suite="made",
            item=f"{group} {number}",
            group=group,
            scores={}
            if score is None
            else {"right": float(score), "length": 10.0 * score} | ({} if wordy is None else {"wordy": wordy[number]}),
            asked=f"question {number}",
            said=f"{model} says {score}",
            skipped="" if score is not None else "too long",
        )
        for number, score in enumerate(right)
    ]


def found(*parts, labels=("A", "B")):
    return report([Made()], labels, [each for part in parts for each in part])


def test_one_sentence_says_which_model_is_better():
    better, worse, half = [1] * 30, [0] * 20 + [1] * 10, [1, 0] * 15
    for first, second, word in ((better, worse, "worse"), (worse, better, "better"), (half, half, "no different")):
        result = found(records("A", first), records("B", second))
        assert (
            result.summary.startswith(f"B is {word} ") and "at alpha .05 (Holm over 1 primary figure" in result.summary
        )
        assert result.metrics["verdict/worse/B"] == (word == "worse")
        assert result.metrics["verdict/better/B"] == (word == "better")
    assert (
        "made, all: right 1.000 to 0.333 (adjusted p below .0001)"
        in found(records("A", better), records("B", worse)).summary
    )
    both = found(
        *(records(model, [1] * 30, "easy") + records(model, worse, "hard") for model in "A"),
        *(records(model, worse, "easy") + records(model, [1] * 30, "hard") for model in "B"),
    )
    assert "B is both worse and better than A" in both.summary
    assert "worse in 1: made, easy: right" in both.summary and "better in 1: made, hard: right" in both.summary
    assert "verdict" not in str(found(records("A", better), labels=("A",)).metrics)


def test_less_is_better_where_the_suite_says_so():
    same = [1] * 12
    result = found(records("A", same, wordy=[0.0] * 12), records("B", same, wordy=[1.0] * 12))
    assert result.metrics["verdict/worse/B"] == 1 and result.metrics["verdict/family"] == 2
    assert result.metrics["made/all/wordy/B_difference_p"] == pytest.approx(2 * 0.5**12)


def test_controls_and_what_describes_are_not_in_the_family():
    """A control and a description that differ throughout decide nothing, and are in the table as before."""
    same, other = [1, 0] * 20, [0, 1] * 20
    result = found(
        records("A", same) + records("A", [1] * 40, "control"),
        records("B", other) + records("B", [0] * 40, "control"),
    )
    assert result.metrics["verdict/family"] == 1 and result.metrics["verdict/worse/B"] == 0
    assert result.metrics["made/control/right/B_difference"] == -1
    assert result.metrics["made/control/length/B_difference_high"] < 0
    assert "made/control/right/B_difference_p" not in result.metrics
    assert " of all 4 differences to A, controls too and not adjusted, beyond their 95% intervals" in result.summary


def test_chance_among_many_figures_is_no_verdict():
    """Twenty groups, one of which has p .02 by itself, which of twenty is no surprise."""
    groups = [f"g{number}" for number in range(20)]
    unlucky = [1] * 9 + [0] + [1, 0] * 10
    first = [each for group in groups for each in records("A", [1, 0] * 15, group)]
    second = [each for group in groups[1:] for each in records("B", [1, 0] * 15, group)]
    second += records("B", [0, 0, 0, 0, 0, 0, 0, 0, 0, 0] + [1, 0] * 10, groups[0])
    first[:30] = records("A", unlucky, groups[0])
    result = found(first, second)
    p_value = result.metrics["made/g0/right/B_difference_p"]
    assert p_value == pytest.approx(2 * 0.5**9) and result.metrics["verdict/worse/B"] == 0 + (p_value * 20 <= 0.05)
    mild = records("B", [0] * 7 + [1, 1, 0] + [1, 0] * 10, groups[0])
    result = found(first, [each for each in second if each["group"] != "g0"] + mild)
    assert result.metrics["made/g0/right/B_difference_high"] < 0, "beyond its own interval"
    assert result.metrics["made/g0/right/B_difference_p"] == pytest.approx(2 * 0.5**7)
    assert result.metrics["made/g0/right/B_difference_p_adjusted"] == pytest.approx(20 * 2 * 0.5**7)
    assert result.summary.startswith("B is no different from A at alpha .05 (Holm over 20 primary figures")


def test_items_are_paired_and_too_few_are_left_out():
    first, second = records("A", [1] * 10 + [None] * 5), records("B", [None] * 3 + [0] * 12)
    (figure,) = (each for each in compared_figures([Made()], ("A", "B"), first + second) if each.key.endswith("right"))
    assert figure.items == [f"all {number}" for number in range(3, 10)] and figure.means == (1.0, 0.0)
    assert not found(records("A", [1] * 5), records("B", [0] * 5)).metrics["verdict/family"]
    assert can_differ(figure) and 2 * 0.5**5 > 0.05 >= 2 * 0.5**6
    few = found(records("A", [1] * 5), records("B", [0] * 5)).summary
    assert few.startswith("no verdict on B") and "1 figure of too few items left out: made, all: right (B, 5)" in few


def test_a_gate_is_not_green_where_nothing_was_tested():
    def gate(first, second, models=("B",), *more):
        result = found(first, second, *more, labels=("A", *models))
        with pytest.raises(InputError) as error:
            fail_if_worse(result.metrics, "A", models)
        return result, str(error.value)

    # A model that skips what it cannot read leaves the family, however wrong it is in the rest.
    result, said = gate(records("A", [1] * 30), records("B", [0] * 5 + [None] * 25))
    assert said == (
        "--fail_on_regression: nothing of B could be tested against A: its 1 primary figure has fewer than 6 items "
        "that both have"
    )
    assert (result.metrics["verdict/tested/B"], result.metrics["verdict/too_few/B"]) == (0, 1)
    assert "left out: made, all: right (B, 0)" in gate(records("A", [1] * 30), records("B", [None] * 30))[0].summary
    assert "made, all: right (B, 0)" in gate(records("A", [None] * 30), records("B", [1] * 30))[0].summary
    said = gate(records("A", [1] * 9, "control"), records("B", [0] * 9, "control"))[1]
    assert said.endswith("nothing of B could be tested against A: no primary figure was measured")
    # Each model has to have one: B's figures say nothing of C.
    first, second = records("A", [1] * 12), records("B", [1] * 12)
    assert "nothing of C" in gate(first, second, ("B", "C"), records("C", [0] * 5 + [None] * 7))[1]
    # One group that is left out is named, and the others decide.
    both = found(first + records("A", [1] * 9, "hard"), second + records("B", [0] * 5 + [None] * 4, "hard"))
    assert "1 figure of too few items left out: made, hard: right (B, 5)" in both.summary
    assert both.metrics["verdict/family"] == 1 and not [title for title in both.tables if "hard: right" in title]
    fail_if_worse(both.metrics, "A", ["B"])


def test_several_models_are_one_family():
    result = found(
        records("A", [1] * 12), records("B", [0] * 7 + [1] * 5), records("C", [1] * 12), labels=("A", "B", "C")
    )
    p_values = [result.metrics[f"made/all/right/{model}_difference_p"] for model in "BC"]
    adjusted = [result.metrics[f"made/all/right/{model}_difference_p_adjusted"] for model in "BC"]
    assert adjusted == holm(p_values) and result.metrics["verdict/family"] == 2
    assert "B is worse than A" in result.summary and "C is no different from A" in result.summary
    with pytest.raises(SystemExit) as stop:
        fail_if_worse(result.metrics, "A", ["B", "C"])
    assert stop.value.code == 1
    fail_if_worse(result.metrics, "A", ["C"])
    with pytest.raises(InputError, match="has no verdict"):
        fail_if_worse({}, "A", ["B"])


def test_the_items_that_changed_are_told_with_their_texts():
    first, second = records("A", [1] * 8 + [0] * 4), records("B", [0] * 6 + [1] * 6)
    family = compared_figures([Made()], ("A", "B"), first + second)
    rows = changes_of(("A", "B"), family, first + second)
    assert [row["change"] for row in rows] == ["worse"] * 6 + ["better"] * 4
    assert rows[0]["item"] == "all 0" and rows[0]["scores"] == [1.0, 0.0]
    assert rows[0]["said"] == ["A says 1", "B says 0"] and rows[0]["asked"] == "question 0"
    result = found(first, second)
    shown = result.tables["made, all: right: where B differs from A"]
    assert [row["change"] for row in shown] == ["1 to 0, worse"] * 3 + ["0 to 1, better"] * 3
    (verdict,) = result.tables["Verdict on the primary figures (Holm over 1)"]
    assert verdict["worse, better, n"] == "6, 4, 12"


def test_a_family_of_clusters():
    """Forty items of four passages that all got worse are four differences, which cannot say anything."""
    clusters = [number // 10 for number in range(40)]
    figure = Compared("f", "f", "B", 1, list(map(str, range(40))), [1.0] * 40, [0.0] * 40, clusters)
    assert not can_differ(figure)
    clusters = [number // 4 for number in range(40)]
    figure = Compared("f", "f", "B", 1, list(map(str, range(40))), [1.0] * 40, [0.0] * 40, clusters)
    (verdict,) = judged([figure])
    assert verdict.p_value == pytest.approx(2 * 0.5**10) and verdict.word == "worse"
    assert math.isfinite(verdict.difference.low) and sentence("A", "C", [verdict]).startswith("no verdict on C")


def test_every_suite_declares_what_decides_with_a_direction():
    from hfllm.evaluation import pictures, suites
    from hfllm.evaluation.suites import few_shot, preferences, refusals, robustness, tools, truthfulness, world_suites

    kinds = [
        *(few_shot.FewShot, pictures.Pictures, preferences.Preferences, refusals.XSTest, robustness.Robustness),
        *(
            truthfulness.TruthfulQA,
            world_suites.WorldTruthfulness,
            world_suites.WorldPreferences,
            world_suites.WorldRefusals,
        ),
        *(world_suites.WorldFewShot, tools.Tools),
    ]
    for kind in kinds:
        assert kind.primary and {*kind.primary} <= kind.better.keys(), kind
    # These only describe, and lm_eval asks its tasks.
    assert {kind.name for kind in kinds} == {*SUITES} - {"calibration", "interpretability", "lm_eval"}
    assert suites is not None and robustness.Robustness(dataset_name="x").primary_of("random search") == ()
