"""Errors are those of independent computations, and what is called a change is one."""

import random

import numpy as np
import pytest

from hfllm.outputs.figures import (
    averaged,
    bounds_of,
    change_of,
    changes,
    figure_tables,
    label_of,
    mean_of,
    plus_minus,
    readable,
    shown,
    word_of,
)
from hfllm.outputs.intervals import ratio_error, share_error, standard_error
from hfllm.outputs.verdict import Promise, broken_promises


def values(count, seed=0):
    drawn = random.Random(seed)
    return [drawn.gauss(0.4, 0.3) for _ in range(count)]


def test_errors_of_means_and_shares_are_the_textbooks():
    drawn = values(50)
    assert standard_error(drawn) == pytest.approx(np.std(drawn, ddof=1) / np.sqrt(50))
    assert standard_error([1.0]) is standard_error([]) is None
    # A share is a mean of zeros and ones; the sample's own error is that over one trial less.
    trials = [1.0] * 36 + [0.0] * 14
    assert share_error(0.72, 50) == pytest.approx(np.sqrt(0.72 * 0.28 / 50))
    assert standard_error(trials) == pytest.approx(share_error(0.72, 50) * np.sqrt(50 / 49))
    assert share_error(0.5, 0) is None and share_error(1.0, 8) == 0


def test_the_error_of_a_ratio_is_what_resampling_rows_gives():
    """Rows of very different lengths, whose losses lie apart: what counts is that whole rows are drawn."""
    generator = np.random.default_rng(0)
    counts = generator.integers(1, 60, 80)
    sums = counts * generator.normal(2.0, 0.4, 80)
    resampled = []
    for _ in range(4000):
        rows = generator.integers(0, 80, 80)
        resampled.append(sums[rows].sum() / counts[rows].sum())
    assert ratio_error(sums.tolist(), counts.tolist()) == pytest.approx(np.std(resampled), rel=0.08)
    # With rows of one length it is the error of a mean.
    assert ratio_error(sums.tolist(), [4] * 80) == pytest.approx(standard_error((sums / 4).tolist()))
    assert ratio_error([1.0], [2]) is None and ratio_error([0.0, 0.0], [0, 0]) is None


def test_the_error_of_a_change_is_that_of_pairs():
    before = values(60)
    after = [value + 0.1 + noise / 10 for value, noise in zip(before, values(60, seed=1), strict=True)]
    metrics = change_of("score", before, after)
    differences = np.subtract(after, before)
    assert metrics["score_before"] == pytest.approx(np.mean(before))
    assert metrics["score_change"] == pytest.approx(differences.mean())
    assert metrics["score_change_se"] == pytest.approx(differences.std(ddof=1) / np.sqrt(60))
    assert metrics["score_n"] == 60
    # The prompts differ far more than the two models on each: unpaired errors would hide the change.
    assert metrics["score_change_se"] < metrics["score_before_se"] / 3
    assert set(metrics) == {
        *("score_before", "score_before_se", "score_after", "score_after_se"),
        *("score_change", "score_change_se", "score_n"),
    }
    with pytest.raises(ValueError):
        change_of("score", before, after[1:])
    assert "score_change_se" not in change_of("score", [1.0], [2.0])


def test_samples_of_one_prompt_are_averaged_first():
    scores = [0.0, 1.0, 1.0, 1.0, 0.5, 0.0]
    assert averaged(scores, 2) == [0.5, 1.0, 0.25]
    assert mean_of("gold", averaged(scores, 2)) == {
        "gold": pytest.approx(np.mean(scores)),
        "gold_se": pytest.approx(np.std([0.5, 1.0, 0.25], ddof=1) / np.sqrt(3)),
        "gold_n": 3,
    }


@pytest.mark.parametrize(
    ("name", "change", "error", "n", "expected"),
    [
        ("gold_reward", 0.5, 0.1, 400, "better"),
        ("gold_reward", -0.5, 0.1, 400, "worse"),
        ("unfinished", -0.5, 0.1, 400, "better"),
        ("response_length", -5.0, 1.0, 400, "less"),
        ("gold_reward", 0.19, 0.1, 400, "noise"),
        # Student's t of 5 degrees of freedom is 2.57 errors wide.
        ("gold_reward", 0.25, 0.1, 6, "noise"),
        ("gold_reward", 0.26, 0.1, 6, "better"),
        ("gold_reward", 0.5, 0.1, 5, "too few"),
        ("gold_reward", 0.0, 0.0, 400, "unchanged"),
        ("gold_reward", 0.1, 0.0, 400, "better"),
        ("gold_reward", 0.5, None, 1, "too few"),
    ],
)
def test_a_change_counts_beyond_its_interval(name, change, error, n, expected):
    metrics = {f"{name}_change": change, f"{name}_n": n, **({} if error is None else {f"{name}_change_se": error})}
    assert word_of(name, metrics) == expected


def test_a_share_of_all_items_has_an_interval_too():
    """Nine of nine by Wilson 1927: the upper end is 1, the lower 9 / (9 + 1.96 squared)."""
    metrics = change_of("right", [0.0] * 9, [1.0] * 9)
    low, high = bounds_of("right_after", metrics)
    assert low == pytest.approx(9 / (9 + 1.959964**2)) and high == 1
    assert shown(metrics, "right_after") == "1 [0.70, 1.00]" and metrics["right_after_se"] == 0
    # Of a change too, though it is the same for each item.
    low, high = bounds_of("right_change", metrics)
    assert 0.5 < low < 1 == high and word_of("right", metrics) == "more"
    assert "right_change_low" not in change_of("right", [0.0] * 9, [0.5] * 9)
    equal = mean_of("score", [0.5] * 9)
    assert bounds_of("score", equal) == (0.5, 0.5) and shown(equal, "score") == "0.5"


def test_pure_noise_is_seldom_called_a_change():
    """The same policy twice: about one figure in twenty."""
    drawn = np.random.default_rng(1)
    called = 0
    for _ in range(400):
        metrics = change_of("score", drawn.normal(size=40).tolist(), drawn.normal(size=40).tolist())
        called += word_of("score", metrics) != "noise"
    assert called / 400 < 0.09


def test_tables_show_each_figure_once_with_its_error():
    metrics = {
        **change_of("gold_reward", [0.0, 0.2, 0.1, 0.1, 0.0, 0.2], [0.7, 0.8, 0.9, 0.8, 0.7, 0.9]),
        **mean_of("kl_to_reference", [1.0, 1.5, 1.2]),
        "response_length": 9.0,
        **change_of("response_length", [9.0, 8.0], [9.0, 9.0]),
        "train_prompts": 8192,
    }
    changed, single = figure_tables(metrics)
    assert [row["figure"] for row in changed] == [label_of(name) for name in changes(metrics)]
    assert changed[0] == {
        "figure": "gold reward (sampled answers)",
        "before": "0.1",
        "after": "0.8",
        "change": "+0.7",
        "95% interval": "[0.63, 0.77]",
        "n": "6",
        "": "better",
    }
    assert [row["figure"] for row in single] == ["KL to the reference (nats per response)", "prompts trained on"]
    # Student's t of 2 degrees of freedom is 4.30 errors.
    half = 4.3027 * standard_error([1.0, 1.5, 1.2])
    assert single[0]["95% interval"] == f"[{3.7 / 3 - half:.1f}, {3.7 / 3 + half:.1f}]"
    assert single[1] == {"figure": "prompts trained on", "value": "8,192", "95% interval": "", "n": ""}
    assert figure_tables({"loss": 1.0, "rows": 3}) == []


def test_numbers_are_short():
    assert [readable(number) for number in (0.76321, 24123.4, 8192, 0.0, 12.34, 3e-6, True)] == [
        *("0.763", "24,123", "8,192", "0", "12.3", "3e-06", "True")
    ]
    assert plus_minus(0.76321, 0.0213) == "0.763 ± 0.021"
    assert plus_minus(12.34, 1.26) == "12.3 ± 1.3" and plus_minus(0.5, None) == plus_minus(0.5, 0.0) == "0.5"
    assert label_of("gold_reward_student_alone") == "gold reward (sampled answers), student alone"
    assert label_of("parameters") == "parameters"


def promise(control="direct", **more):
    return Promise("dials", "thoughts", control, "direct answers", **more)


@pytest.mark.parametrize(
    ("metrics", "line"),
    [
        ({"thoughts": 0.083, "thoughts_se": 0.016, "direct": 0.12, "direct_se": 0.019}, "0.083 ± 0.016, not above"),
        ({"thoughts": 0.5, "thoughts_se": 0.0, "direct": 0.5}, "0.5, not above direct answers (0.5)"),
        # Two errors of the difference are 0.1.
        ({"thoughts": 0.59, "thoughts_se": 0.03, "direct": 0.5, "direct_se": 0.04}, "not above direct answers"),
        ({"thoughts": 0.61, "thoughts_se": 0.03, "direct": 0.5, "direct_se": 0.04}, None),
        ({"thoughts": 0.61}, None),
        ({"direct": 0.5}, None),
    ],
)
def test_a_promise_is_kept_beyond_two_errors_of_the_difference(metrics, line):
    found = broken_promises([promise()], metrics)
    assert found == [] if line is None else line in found[0] and found[0].startswith("dials: ")


def test_a_promise_may_be_less_and_each_figure_is_warned_of_once():
    metrics = {"thoughts": 0.1, "thoughts_se": 0.02}
    assert broken_promises([promise(0.2, is_less=True)], metrics) == []
    line = "dials: 0.100 ± 0.020, not below direct answers (0.1)"
    assert broken_promises([promise(0.1, is_less=True)], metrics) == [line]
    assert len(broken_promises([promise(0.125), promise(0.1), promise(0.0)], metrics)) == 1
