"""Abstention: guarantees hold in simulation, thresholds are those of brute force, p-values those of others."""

import json
import math
from functools import partial

import numpy as np
import pytest

from hfllm.errors import InputError
from hfllm.grounding.abstention import (
    UNKNOWN,
    Abstainer,
    binomial_p,
    conformal_quantile,
    control_risk,
    hoeffding_bentkus_p,
    learn_then_test,
    over_splits,
    rows_needed,
    rows_needed_to_test,
)


def answers(n, seed=0, digits=None):
    """Answers that are wrong more often where they are unsure; the probability is the square of the number."""
    rng = np.random.default_rng(seed)
    numbers = rng.random(n)
    wrong = rng.random(n) < numbers**2
    return (numbers if digits is None else np.round(numbers, digits)), wrong


@pytest.mark.parametrize("digits", [None, 1])
@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.2])
def test_the_threshold_is_the_largest_that_the_bound_allows(alpha, digits):
    numbers, wrong = answers(83, digits=digits)
    found = control_risk(numbers, wrong, alpha)

    def bound(threshold):
        n = len(numbers)
        return n / (n + 1) * np.mean((numbers < threshold) * wrong) + 1 / (n + 1)

    assert bound(found.threshold) <= alpha < bound(np.nextafter(found.threshold, 1))
    larger = [value for value in (*np.unique(numbers), math.inf) if value > found.threshold]
    assert larger and all(bound(value) > alpha for value in larger)
    assert found.answers(numbers).tolist() == (numbers < found.threshold).tolist()


@pytest.mark.parametrize("digits", [None, 1])
@pytest.mark.parametrize("alpha", [0.02, 0.05, 0.1])
def test_the_risk_is_controlled_over_splits(alpha, digits):
    numbers, wrong = answers(360, seed=1, digits=digits)
    found = over_splits(numbers, wrong, partial(control_risk, alpha=alpha))
    assert found["risk"] <= alpha + found["risk_se"]
    # And it is not vain: the bound costs less than one wrong answer of the calibration half and the new row.
    assert found["coverage"] > 0.1 and (digits or found["risk"] > alpha - 1 / 181 - found["risk_se"])


def test_the_risk_is_controlled_over_fresh_samples_and_the_share_among_those_given_is_not():
    risks, among = [], []
    for seed in range(600):
        numbers, wrong = answers(19 + 400, seed)
        given = control_risk(numbers[:19], wrong[:19], 0.1).answers(numbers[19:])
        risks.append(np.mean(given * wrong[19:]))
        among.append(np.mean(wrong[19:][given]) if given.any() else 0.0)
    # Of the 20 rows two may be wrong, so that the risk is .1 on average.
    assert abs(np.mean(risks) - 0.1) < 2 * np.std(risks) / math.sqrt(600)
    assert np.mean(among) > 0.1


@pytest.mark.parametrize(("wrong", "threshold"), [([0] * 40, math.inf), ([1] * 40, 1.0), ([0] * 20 + [1] * 20, 21.0)])
def test_all_right_all_wrong_and_separated(wrong, threshold):
    # (1 + 1) / 41 is below .05, and (2 + 1) / 41 above it.
    assert control_risk(range(40), wrong, 0.05).threshold == threshold


def test_equal_scores_are_answered_together_or_not_at_all():
    assert control_risk([0.5] * 99, [1] * 99, 0.05).threshold == 0.5
    assert control_risk([0.5] * 99, [1] * 4 + [0] * 95, 0.05).threshold == math.inf
    assert control_risk([0.5] * 99, [1] * 5 + [0] * 94, 0.05).threshold == 0.5


@pytest.mark.slow
def test_crepes_gives_the_same_quantiles_and_the_same_decisions():
    crepes = pytest.importorskip("crepes")
    numbers, _ = answers(101, digits=2)
    new, _ = answers(200, seed=7, digits=2)
    for confidence in (0.5, 0.75, 0.875):
        regressor = crepes.ConformalRegressor()
        regressor.fit(numbers)
        width = regressor.predict_int(np.zeros(1), confidence=confidence)[0, 1]
        assert conformal_quantile(numbers, 1 - confidence) == width
    # Where every calibration answer is wrong, answering is to reject at the level alpha.
    classifier = crepes.ConformalClassifier()
    classifier.fit(-numbers)
    p_values = classifier.predict_p(-new[:, None], smoothing=False)[:, 0]
    for alpha in (0.06, 0.11, 0.31):
        given = control_risk(numbers, [True] * 101, alpha).answers(new)
        assert given.any() and given.tolist() == (p_values <= alpha).tolist()


def test_a_new_score_is_above_the_quantile_as_often_as_said():
    rng = np.random.default_rng(0)
    above = [rng.random() > conformal_quantile(rng.random(9), 0.3) for _ in range(4000)]
    assert abs(np.mean(above) - 0.3) < 0.025
    assert conformal_quantile(range(1, 20), 0.1) == 18
    assert conformal_quantile(range(1, 20), 0.05) == 19


def test_the_needed_rows_are_just_enough():
    assert [rows_needed(alpha) for alpha in (0.5, 0.1, 0.05, 0.02, 0.3, 1 / 3)] == [1, 9, 19, 49, 3, 2]
    for alpha in (0.02, 0.05, 0.07):
        few = rows_needed(alpha) - 1
        with pytest.raises(InputError, match=f"alpha={alpha:g} needs at least {few + 1} calibration rows, got {few}"):
            control_risk(range(few), [0] * few, alpha)
        with pytest.raises(InputError, match=f"at least {few + 1} calibration rows"):
            conformal_quantile(range(few), alpha)
        assert control_risk(range(few + 1), [0] * (few + 1), alpha).threshold == math.inf
    # .95 to the power of 45 is the first below .1.
    assert rows_needed_to_test(0.05, 0.1) == 45
    assert 0.95**45 < 0.1 < 0.95**44
    assert rows_needed_to_test(0.05, 0.1, 20) == 104
    assert 0.95**104 < 0.005 < 0.95**103


@pytest.mark.slow
def test_p_values_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    for n, wrong, alpha in ((50, 0, 0.05), (50, 2, 0.1), (400, 11, 0.05), (400, 60, 0.1), (7, 7, 0.3), (1, 0, 0.9)):
        assert binomial_p(wrong, n, alpha) == pytest.approx(stats.binom.cdf(wrong, n, alpha), rel=1e-9)
        bentkus = math.e * stats.binom.cdf(wrong, n, alpha)
        r = min(wrong / n, alpha)
        kl = stats.entropy([r, 1 - r], [alpha, 1 - alpha])
        expected = min(1, bentkus, math.exp(-n * kl))
        assert hoeffding_bentkus_p(wrong, n, alpha) == pytest.approx(expected, rel=1e-9)
        # Fractions are losses too.
        assert hoeffding_bentkus_p(wrong, n, alpha) <= hoeffding_bentkus_p(wrong + 0.5, n, alpha) <= 1
    assert binomial_p(0, 0, 0.1) == hoeffding_bentkus_p(0, 0, 0.1) == 1


@pytest.mark.parametrize(("loss", "rows", "alpha"), [(0.5, 50, 0.1), (10.25, 400, 0.05), (3.9, 60, 0.2)])
def test_the_part_of_bentkus_rounds_fractions_of_a_loss_up(loss, rows, alpha):
    """Rounded down, a risk that is above alpha would be called below it too often."""
    count, mean = math.ceil(loss), loss / rows
    chances = [math.comb(rows, k) * alpha**k * (1 - alpha) ** (rows - k) for k in range(count + 1)]
    kl = mean * math.log(mean / alpha) + (1 - mean) * math.log((1 - mean) / (1 - alpha))
    expected = min(math.exp(-rows * kl), math.e * sum(chances))
    assert hoeffding_bentkus_p(loss, rows, alpha) == pytest.approx(expected, rel=1e-9)
    # The next smaller count would show in the result.
    assert math.e * sum(chances[:-1]) < 0.9 * expected


@pytest.mark.parametrize("p_value", ["hoeffding_bentkus", "binomial"])
def test_p_values_are_valid(p_value):
    rng = np.random.default_rng(0)
    test = {"hoeffding_bentkus": hoeffding_bentkus_p, "binomial": binomial_p}[p_value]
    small = [test(rng.binomial(60, 0.2), 60, 0.2) <= 0.1 for _ in range(3000)]
    assert 0.001 < np.mean(small) <= 0.1 + 0.01


@pytest.mark.parametrize("correction", ["fixed_sequence", "bonferroni"])
@pytest.mark.parametrize("digits", [None, 1])
def test_learn_then_test_fails_no_more_often_than_delta(correction, digits):
    # The true share of wrong answers below t is t^2 / 3, so that t may be .548 at alpha .1.
    failures, coverages = [], []
    for seed in range(200):
        numbers, wrong = answers(500, seed, digits)
        found = learn_then_test(
            numbers, wrong, 0.1, 0.2, correction=correction, p_value="binomial", seed=seed, num_thresholds=10
        )
        new, errors = answers(4000, seed + 10_000, digits)
        given = found.answers(new)
        coverages.append(given.mean())
        # A fresh sample of 4,000 stands for the truth.
        failures.append(given.any() and errors[given].mean() > 0.1 + 2 * math.sqrt(0.09 / max(given.sum(), 1)))
    assert np.mean(failures) <= 0.2
    assert np.mean(coverages) > (0.35 if correction == "fixed_sequence" else 0.25)


def test_learn_then_test_over_splits():
    numbers, wrong = answers(360, seed=1)
    found = over_splits(numbers, wrong, partial(learn_then_test, alpha=0.15), splits=100)
    assert found["selective_risk"] <= 0.15 and found["exceeded"] <= 0.2 and found["coverage"] > 0.3
    assert "exceeded" not in over_splits(numbers, wrong, partial(control_risk, alpha=0.15), splits=2)


def test_thresholds_of_the_users_are_tested_on_all_rows():
    numbers, wrong = np.arange(100), np.arange(100) >= 60
    options = {"thresholds": [80, 50, 60, 70], "p_value": "binomial"}
    # Up to 60 all are right, up to 70 a seventh is wrong, up to 80 a quarter.
    assert [learn_then_test(numbers, wrong, alpha, **options).threshold for alpha in (0.05, 0.25, 0.4)] == [60, 70, 80]
    # 50 of 50 right have the p-value .077, which is above a half of .1.
    options = {"thresholds": [50, 100], "p_value": "binomial"}
    assert learn_then_test(numbers, np.arange(100) >= 50, 0.05, **options).threshold == 50
    assert (
        learn_then_test(numbers, np.arange(100) >= 50, 0.05, correction="bonferroni", **options).threshold == -math.inf
    )
    # In order from the surest: what is not rejected ends the sequence, and Bonferroni's tests go on.
    early = np.arange(100) < 10
    options = {"thresholds": [10, 100], "p_value": "binomial"}
    assert learn_then_test(numbers, early, 0.2, **options).threshold == -math.inf
    assert learn_then_test(numbers, early, 0.2, correction="bonferroni", **options).threshold == 100


@pytest.mark.parametrize("method", [control_risk, partial(learn_then_test, alpha=0.1)])
def test_what_cannot_be_answered_safely_is_not(method):
    alpha = {} if isinstance(method, partial) else {"alpha": 0.001}
    rows = 1200
    found = method(np.zeros(rows), np.ones(rows, bool), **alpha)
    assert not found.answers(np.zeros(3)).any() and (found.threshold == 0 or found.threshold == -math.inf)
    sure = method(np.zeros(rows), np.zeros(rows, bool), **alpha)
    assert sure.threshold == math.inf and sure.answers([math.inf - 1, 1e9])[1]


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: control_risk([0.1], [0], 1.0), "alpha must lie between 0 and 1, got 1.0"),
        (lambda: control_risk([0.1], [0], 0), "alpha must lie between 0 and 1, got 0"),
        (lambda: control_risk([0.1, math.nan], [0, 1], 0.5), "uncertainty of row 2 is NaN"),
        (lambda: learn_then_test([0.1] * 9, [0] * 9, 0.5, 2), "delta must lie between 0 and 1, got 2"),
        (lambda: learn_then_test([0.1] * 9, [0] * 9, 0.05), "needs at least 57 calibration rows, got 9"),
        (
            lambda: learn_then_test([0.1] * 9, [0] * 9, 0.05, thresholds=[1]),
            "needs at least 45 calibration rows, got 9",
        ),
        (lambda: learn_then_test([0.1] * 9, [0] * 9, 0.5, thresholds=[]), "thresholds has no rows"),
        (lambda: learn_then_test([0.1] * 9, [0] * 9, 0.5, correction="holm"), "fixed_sequence, bonferroni"),
        (lambda: learn_then_test([0.1] * 9, [0] * 9, 0.5, num_thresholds=0), "num_thresholds must be at least 1"),
        (lambda: over_splits([0.1] * 9, [0] * 9, control_risk, splits=1), "at least 2 splits"),
        (lambda: Abstainer(0.5).answers([0.1, math.nan]), "uncertainty of row 2 is NaN"),
        (lambda: Abstainer(math.nan), "threshold must be a number, got nan"),
        (lambda: Abstainer(0.5).apply(["a"], [0.1, 0.2]), "1 answers and 2 uncertainties"),
    ],
)
def test_bad_input_is_one_line(call, complaint):
    with pytest.raises(InputError, match=complaint) as error:
        call()
    assert "\n" not in str(error.value)


def test_the_rows_that_a_test_says_it_needs_are_enough():
    rows = 57
    assert learn_then_test(range(rows), [0] * rows, 0.05).threshold == math.inf
    with pytest.raises(InputError, match="at least 57 calibration rows, got 55"):
        learn_then_test(range(55), [0] * 55, 0.05)


def test_an_abstainer_answers_or_says_that_it_does_not_know():
    abstainer = Abstainer(0.5)
    assert abstainer.apply(["red", "blue", "green"], [0.4, 0.5, 0.6]) == ["red", UNKNOWN, UNKNOWN]
    assert abstainer.apply([], []) == []


@pytest.mark.parametrize("threshold", [0.1, -2.5, math.inf, -math.inf, 3])
def test_an_abstainer_is_saved_as_strict_json(threshold, tmp_path):
    abstainer = Abstainer(threshold, "P(answered and wrong) <= 0.05", 19, "semantic_entropy", 0.05)
    abstainer.save(tmp_path / "abstainer.json")
    json.loads((tmp_path / "abstainer.json").read_text(), parse_constant=pytest.fail)
    assert Abstainer.load(tmp_path / "abstainer.json") == abstainer


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[1]", "expected an object with a threshold"),
        ('{"alpha": 0.1}', "expected an object with a threshold"),
        ('{"threshold": "often"}', "threshold must be a number, got 'often', or 'never' or 'always'"),
        ('{"threshold": NaN}', "threshold must be a number"),
        ('{"threshold": true}', "threshold must be a number"),
        ('{"threshold": 1, "color": 2}', "unknown field 'color'"),
    ],
)
def test_a_damaged_file_is_named(text, complaint, tmp_path):
    if text is not None:
        (tmp_path / "abstainer.json").write_text(text)
    with pytest.raises(InputError, match=rf"abstainer\.json: .*{complaint}"):
        Abstainer.load(tmp_path / "abstainer.json")


@pytest.mark.parametrize("alpha", [1e-12, 1e-17, 1e-30, 1e-300, 1 / 3, 0.05, 0.1, 0.7])
def test_rows_for_any_alpha_are_known_at_once(alpha):
    rows = rows_needed(alpha)
    assert 1 / (rows + 1) <= alpha and (rows > 2**52 or not rows or 1 / rows > alpha)
    tested = rows_needed_to_test(alpha, 0.1)
    assert tested == pytest.approx(math.log(0.1) / math.log1p(-alpha), rel=1e-9, abs=1)
    assert binomial_p(0, tested, alpha) <= 0.1
    with pytest.raises(InputError, match="needs at least" if alpha < 0.05 else "alpha"):
        control_risk([0.1] * 9, [0] * 9, alpha) if alpha < 0.05 else control_risk([0.1], [0], -alpha)


@pytest.mark.slow
def test_p_values_of_large_and_small_counts_are_those_of_sums_of_fractions():
    from fractions import Fraction

    for wrong, rows, alpha in ((0, 1, 0.5), (3, 20, 0.1), (17, 40, 0.3), (40, 300, 0.2), (2, 5000, 0.001)):
        p = Fraction(alpha)
        exact = sum(math.comb(rows, k) * p**k * (1 - p) ** (rows - k) for k in range(wrong + 1))
        assert binomial_p(wrong, rows, alpha) == pytest.approx(float(exact), rel=1e-10)
    # The work does not grow with the rows.
    assert binomial_p(1, 10**12, 1e-12) == pytest.approx(2 / math.e, rel=1e-6)


@pytest.mark.parametrize("values", [0.5, None, [10**400], [[1.0], [2.0, 3.0]]])
def test_what_is_no_list_of_numbers_is_named(values):
    with pytest.raises(InputError, match="uncertainty must be one number per row"):
        control_risk(values, [0], 0.5)
