"""Figures of uncertainty: against scikit-learn, brute force and numbers computed by hand."""

import itertools
import math

import numpy as np
import pytest

from hfllm.errors import InputError
from hfllm.outputs.statistics import (
    aurc,
    auroc,
    auroc_interval,
    auroc_within,
    ece,
    excess_aurc,
    reliability,
    reliability_plot,
    risk_coverage,
    risk_coverage_plot,
    shuffled_auroc,
    uncertainty_metrics,
)


def data(seed=0, n=200, ties=True):
    rng = np.random.default_rng(seed)
    wrong = rng.random(n) < 0.3
    numbers = rng.normal(size=n) + wrong
    return np.round(numbers, 1) if ties else numbers, wrong


def test_auroc_is_the_share_of_pairs_in_order_with_ties_as_half():
    numbers, wrong = data()
    pairs = [(u > v) + (u == v) / 2 for u in numbers[wrong] for v in numbers[~wrong]]
    assert auroc(numbers, wrong) == pytest.approx(np.mean(pairs), abs=1e-12)
    metrics = pytest.importorskip("sklearn.metrics")
    assert auroc(numbers, wrong) == pytest.approx(metrics.roc_auc_score(wrong, numbers), abs=1e-12)
    assert auroc([1, 1, 1, 1], [0, 1, 0, 1]) == 0.5
    assert auroc([math.inf, 1, 2], [1, 0, 0]) == 1


@pytest.mark.parametrize("ties", [True, False])
def test_delongs_error_is_that_of_the_placements(ties):
    numbers, wrong = data(ties=ties)
    order = lambda u, v: (u > v) + (u == v) / 2  # noqa: E731
    table = np.array([[order(u, v) for v in numbers[~wrong]] for u in numbers[wrong]])
    m, n = table.shape
    expected = math.sqrt(table.mean(1).var(ddof=1) / m + table.mean(0).var(ddof=1) / n)
    found = auroc_interval(numbers, wrong)
    assert found.error == pytest.approx(expected, rel=1e-9)
    assert (found.low, found.high) == pytest.approx(
        (found.value - 1.959964 * expected, found.value + 1.959964 * expected)
    )


def test_delongs_interval_holds_the_true_value_as_often_as_it_says():
    rng = np.random.default_rng(3)
    # Of two normal distributions one deviation apart.
    true, held = 0.5 * (1 + math.erf(0.5)), 0
    for _ in range(400):
        numbers = np.concatenate([rng.normal(1, 1, 40), rng.normal(0, 1, 60)])
        found = auroc_interval(numbers, [True] * 40 + [False] * 60, 0.9)
        held += found.low <= true <= found.high
    assert 0.86 <= held / 400 <= 0.94


@pytest.mark.parametrize("wrong", [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1], [1, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0]])
def test_an_interval_is_never_empty(wrong):
    found = auroc_interval(range(6), wrong)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.error > 0 and found.high - found.low > 0.2
    if found.value == 1:
        assert found.high == 1
    m, n = sum(wrong), 6 - sum(wrong)
    for bound in {found.low, found.high} - {0.0, 1.0}:
        # The bounds are one quantile of the variance there away (Newcombe 2006).
        spread = 1 + 2 * (1 - bound) / (2 - bound) + 2 * bound / (1 + bound)
        variance = bound * (1 - bound) * spread / (m * n)
        assert abs(found.value - bound) == pytest.approx(1.959964 * math.sqrt(variance), rel=1e-4)


def test_auroc_within_groups_sees_no_difference_between_them():
    # The second group is harder, and uncertainty says only which group it is.
    numbers, wrong, groups = [0, 0, 0, 1, 1, 1], [0, 0, 1, 0, 1, 1], ["a"] * 3 + ["b"] * 3
    assert auroc(numbers, wrong) == pytest.approx(2 / 3)
    assert auroc_within(numbers, wrong, groups) == 0.5
    assert auroc_within([0, 1], [0, 1], ["a", "b"]) is None
    with pytest.raises(InputError, match="1 groups and 2 rows"):
        auroc_within([0, 1], [0, 1], ["a"])


def test_shuffled_labels_say_nothing():
    numbers, wrong = data()
    mean, deviation = shuffled_auroc(numbers, wrong)
    assert auroc(numbers, wrong) > 0.7
    assert abs(mean - 0.5) < 0.01 and 0.02 < deviation < 0.08
    assert shuffled_auroc(numbers, wrong) == (mean, deviation)


def test_risk_over_coverage_is_the_mean_over_orders_of_ties():
    numbers, wrong = [2, 0, 1, 1, 1], [1, 0, 1, 0, 0]
    curves = []
    for order in itertools.permutations(range(5)):
        if [numbers[row] for row in order] == sorted(numbers):
            curves.append(np.cumsum([wrong[row] for row in order]) / np.arange(1, 6))
    coverage, risk = risk_coverage(numbers, wrong)
    assert coverage.tolist() == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert risk == pytest.approx(np.mean(curves, axis=0))
    # By hand: 0, 1/6, 2/9, 1/4 and 2/5.
    assert risk == pytest.approx([0, 1 / 6, 2 / 9, 1 / 4, 2 / 5])
    assert aurc(numbers, wrong) == pytest.approx(np.mean([0, 1 / 6, 2 / 9, 1 / 4, 2 / 5]))
    assert aurc([1] * 5, wrong) == pytest.approx(2 / 5)


def test_excess_is_zero_for_who_knows_all():
    wrong = [0, 1, 0, 1, 0]
    assert excess_aurc(wrong, wrong) == pytest.approx(0)
    assert excess_aurc([1, 0, 1, 0, 1], wrong) > 0.5
    assert excess_aurc([3, 1, 2], [0, 0, 0]) == excess_aurc([3, 1, 2], [1, 1, 1]) == 0


def test_calibration_by_hand_and_against_scikit_learn():
    # Two bins: .2 on average and none right, .9 and half of them right.
    assert ece([0.1, 0.3, 0.8, 1.0], [0, 0, 0, 1], num_bins=2) == pytest.approx((2 * 0.2 + 2 * 0.4) / 4)
    # Three answers in one bin and one in the other.
    assert ece([0.1, 0.3, 0.2, 1.0], [0, 0, 0, 0], num_bins=2) == pytest.approx((3 * 0.2 + 1 * 1.0) / 4)
    rng = np.random.default_rng(1)
    confidence = np.round(rng.random(300) ** 2, 2)
    right = rng.random(300) < confidence
    assert ece(confidence, right) < 0.1 < ece(1 - confidence, right)
    calibration = pytest.importorskip("sklearn.calibration")
    for equal, strategy in (("width", "uniform"), ("mass", "quantile")):
        accuracy, mean = calibration.calibration_curve(right, confidence, n_bins=7, strategy=strategy)
        bins = reliability(confidence, right, 7, equal)
        assert [each.accuracy for each in bins] == pytest.approx(accuracy.tolist())
        assert [each.confidence for each in bins] == pytest.approx(mean.tolist())
        assert sum(each.n for each in bins) == 300


def test_equal_confidences_are_one_bin():
    assert len(reliability([0.5] * 8, [1, 0] * 4, equal="mass")) == 1
    assert ece([1.0] * 4, [1] * 4) == 0 and ece([1.0] * 4, [0] * 4) == ece([0.0] * 4, [1] * 4) == 1


@pytest.mark.slow
def test_the_metrics_of_a_report(tmp_path):
    numbers, wrong = data()
    metrics = uncertainty_metrics({"surprise": numbers, "constant": np.zeros(200)}, wrong)
    assert metrics["surprise_auroc"] == auroc(numbers, wrong) and metrics["surprise_auroc_n"] == 200
    assert metrics["constant_auroc"] == 0.5 and metrics["constant_aurc"] == pytest.approx(metrics["wrong"])
    assert abs(metrics["surprise_auroc_shuffled"] - 0.5) < 0.05
    assert "surprise_auroc" not in uncertainty_metrics({"surprise": numbers}, [False] * 200)
    assert risk_coverage_plot({"surprise": numbers}, wrong, "Risk").draw(tmp_path / "risk.png")
    sure = np.exp(-np.abs(numbers))
    assert reliability_plot({"probability": sure}, ~wrong, "Reliability").draw(tmp_path / "sure.png")


def test_tensors_of_any_type_are_numbers():
    import torch

    numbers, wrong = data()
    assert auroc(torch.tensor(numbers), torch.tensor(wrong)) == auroc(numbers, wrong)
    assert auroc(torch.tensor([1.0, 2.0], dtype=torch.bfloat16), [0, 1]) == 1


@pytest.mark.parametrize(
    ("numbers", "wrong", "complaint"),
    [
        ([0.1, math.nan], [0, 1], "uncertainty of row 2 is NaN"),
        ([0.1, 0.2], [0], "2 uncertainties and 1 labels"),
        ([], [], "uncertainty has no rows"),
        ([0.1, 0.2], [0, 2], "wrong of row 2 is 2; expected true or false"),
        ([0.1, 0.2], [0, math.nan], "wrong of row 2 is NaN"),
        ([[0.1], [0.2]], [0, 1], "one number per row"),
        ([[0.1], 0.2], [0, 1], "one number per row"),
        (["a", "b"], [0, 1], "one number per row"),
        ([0.1, 0.2], [0, 0], "all 2 answers are right"),
        ([0.1, 0.2], [1, 1], "all 2 answers are wrong"),
    ],
)
def test_bad_input_is_one_line(numbers, wrong, complaint):
    with pytest.raises(InputError, match=complaint) as error:
        auroc_interval(numbers, wrong)
    assert "\n" not in str(error.value)


def test_bad_arguments_are_named():
    with pytest.raises(InputError, match="level must lie between 0 and 1, got 95"):
        auroc_interval([0, 1], [0, 1], 95)
    with pytest.raises(InputError, match=r"confidence of row 2 is 1\.5"):
        ece([0.5, 1.5], [0, 1])
    with pytest.raises(InputError, match="at least 1 bin"):
        ece([0.5], [0], num_bins=0)
    with pytest.raises(InputError, match="'width' or 'mass'"):
        ece([0.5], [0], equal="size")
