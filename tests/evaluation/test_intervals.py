"""Intervals of means and differences: that they cover the truth, and published numbers of their parts."""

import math
from itertools import product
from statistics import NormalDist

import numpy as np
import pytest

from hfllm.errors import InputError
from hfllm.outputs.intervals import holm, student
from hfllm.outputs.statistics import clustered_interval, difference_interval, mean_interval, paired_p_value

REPETITIONS = 400


def covered(draw, truth, interval):
    rng = np.random.default_rng(7)
    found = [interval(*draw(rng)) for _ in range(REPETITIONS)]
    return sum(each.low <= truth <= each.high for each in found) / REPETITIONS


def fast(values):
    return mean_interval(values, num_resamples=400)


def fast_difference(first, second):
    return difference_interval(first, second, num_resamples=400)


@pytest.mark.parametrize(("count", "share"), [(40, 0.5), (60, 0.9), (200, 0.03), (240, 0.95)])
def test_intervals_of_a_share_cover_it(count, share):
    """Over all counts of hits, by their binomial probabilities: nothing is drawn."""
    held = 0.0
    for hits in range(count + 1):
        found = mean_interval([1.0] * hits + [0.0] * (count - hits))
        chance = math.comb(count, hits) * share**hits * (1 - share) ** (count - hits)
        held += chance * (found.low <= share <= found.high)
    assert 0.92 <= held <= 0.98


# Of 400 repetitions, 95 percent of which hold the truth, between 92 and 98 do but once in 200.
@pytest.mark.parametrize("count", [30, 120])
def test_intervals_of_gold_scores_cover_their_mean(count):
    values, weights = np.array([-1.0, -0.5, 0.0, 0.5, 1.0]), np.array([0.1, 0.05, 0.15, 0.2, 0.5])
    truth = float(values @ weights)
    assert 0.92 <= covered(lambda rng: [rng.choice(values, count, p=weights)], truth, fast) <= 0.98


def pairs_of_shares(rng, count=60):
    hard = rng.random(count)
    return hard < 0.7, (hard + rng.normal(0, 0.1, count)) < 0.8


def pairs_of_scores(rng, count=60):
    shared = rng.normal(0, 1, count)
    return shared + rng.normal(0, 0.2, count), shared + rng.normal(0.3, 0.2, count)


def test_intervals_of_paired_differences_cover_them_and_gain_from_the_pairs():
    rng = np.random.default_rng(0)
    one, other = pairs_of_shares(rng, 1_000_000)
    assert 0.92 <= covered(pairs_of_shares, other.mean() - one.mean(), fast_difference) <= 0.985
    assert 0.92 <= covered(pairs_of_scores, 0.3, fast_difference) <= 0.98
    one, other = pairs_of_scores(rng)
    paired, alone = difference_interval(one, other), mean_interval(other)
    assert paired.high - paired.low < (alone.high - alone.low) / 2


def test_published_intervals():
    # Newcombe 1998, Statistics in Medicine 17:857, table I: 81 of 263 and 0 of 20, by Wilson's method.
    found = mean_interval([1.0] * 81 + [0.0] * 182)
    assert (found.low, found.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    found = mean_interval([0.0] * 20)
    assert (found.low, found.high) == pytest.approx((0.0, 0.1611), abs=5e-5)


def pairs_of(both, first_only, second_only, neither):
    """Answers of two models from the four counts of their paired table."""
    first = [1.0] * both + [1.0] * first_only + [0.0] * (second_only + neither)
    return first, [1.0] * both + [0.0] * first_only + [1.0] * second_only + [0.0] * neither


# Newcombe 1998, Statistics in Medicine 17:2635, method 10; Altman et al. 2000, Statistics with confidence, table 6.2;
# Fagerland et al. 2014, Statistics in Medicine 33:2850 (airways), and their tables of Cavo et al. 2012.
PAIRED = {
    (36, 12, 2, 0): (0.0569, 0.3404),
    (14, 5, 0, 22): (0.011, 0.226),
    (1, 1, 7, 12): (-0.507, -0.026),
    (59, 6, 16, 80): (-0.1186, -0.0046),
}


@pytest.mark.parametrize("counts", PAIRED, ids=str)
def test_published_intervals_of_paired_differences(counts):
    """Of the first share less the second one, and with the sides exchanged."""
    first, second = pairs_of(*counts)
    low, high = PAIRED[counts]
    found, other = difference_interval(second, first), difference_interval(first, second)
    assert (found.low, found.high) == pytest.approx((low, high), abs=6e-4)
    assert (other.low, other.high) == pytest.approx((-high, -low), abs=6e-4)


def test_paired_intervals_against_the_formula_worked_out_again():
    """Method 10 from the roots of Wilson's quadratic, with the correction of positive association and without."""

    z = NormalDist().inv_cdf(0.975)

    def roots(share, count):
        # (share - p)^2 = z^2 p (1 - p) / count, as a quadratic in p.
        square, line, rest = 1 + z * z / count, -(2 * share + z * z / count), share * share
        spread = math.sqrt(line * line - 4 * square * rest)
        return (-line - spread) / (2 * square), (-line + spread) / (2 * square)

    associations = set()
    for counts in product((0, 1, 3, 9), repeat=4):
        count, (both, first_only, second_only, neither) = sum(counts), counts
        if not count:
            continue
        one, other = (both + first_only) / count, (both + second_only) / count
        (low1, high1), (low2, high2) = roots(one, count), roots(other, count)
        margins = math.sqrt(one * (1 - one) * other * (1 - other)) * count**2
        excess = both * neither - first_only * second_only
        corrected = excess if excess <= 0 else max(excess - count / 2, 0)
        associations.add((excess > 0) + (excess > count / 2))
        phi = corrected / margins if margins else 0.0

        def half(a, b, phi=phi):
            return math.sqrt(max(a * a + b * b - 2 * phi * a * b, 0.0))

        change = other - one
        expected = change - half(other - low2, high1 - one), change + half(high2 - other, one - low1)
        found = difference_interval(*pairs_of(*counts))
        assert (found.low, found.high) == pytest.approx(expected, abs=1e-9), counts
    assert associations == {0, 1, 2}


def test_the_bootstrap_of_few_numbers_is_widened_as_students_t():
    """Against all 5^5 samples of five numbers, at the tails that the printed table of Student's t gives."""
    values = np.array([0.03, 0.1, 0.38, 0.41, 0.97])
    means = np.array(list(product(values, repeat=5))).mean(1)
    for level, quantile in ((0.95, 2.776), (0.8, 1.533)):
        # So many standard errors by 4 degrees of freedom, of n - 1 where resamples have n.
        tail, plain_tail = NormalDist().cdf(-quantile * math.sqrt(5 / 4)), NormalDist().cdf(-quantile)
        expected = np.quantile(means, (tail, 1 - tail))
        found = mean_interval(values, level, num_resamples=100_000)
        assert (found.low, found.high) == pytest.approx(expected, abs=0.006)
        # Neither half of the widening is small.
        low, high = np.quantile(means, (plain_tail, 1 - plain_tail))
        assert found.high - found.low > high - low + 0.015
        low, high = np.quantile(means, ((1 - level) / 2, (1 + level) / 2))
        assert found.high - found.low > high - low + 0.05


def test_students_quantiles_against_the_printed_table():
    # Abramowitz and Stegun 1964, table 26.10.
    table = {1: (3.078, 12.706), 2: (1.886, 4.303), 4: (1.533, 2.776), 10: (1.372, 2.228), 120: (1.289, 1.980)}
    for freedom, row in table.items():
        for probability, value in zip((0.9, 0.975), row, strict=True):
            assert student(probability, freedom) == pytest.approx(value, rel=0.006)


def test_the_bootstrap_of_many_numbers_is_that_of_the_normal_distribution():
    values = np.random.default_rng(3).gamma(2.0, 1.0, 2000)
    found = mean_interval(values, num_resamples=5000)
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=half / 15)
    assert found == mean_interval(values, num_resamples=5000) != mean_interval(values, num_resamples=5000, seed=1)


# ---- tests ----


def exchanged(differences):
    """The p-value by all signs of the differences, one by one."""
    total = abs(sum(differences))
    sums = [
        abs(sum(sign * each for sign, each in zip(signs, differences, strict=True)))
        for signs in product((-1, 1), repeat=len(differences))
    ]
    return sum(each >= total - 1e-9 for each in sums) / len(sums)


def test_shares_are_tested_as_by_mcnemar():
    # Fagerland et al. 2014, table of airways: 1 against 7, exact conditional P = .0703; and by the binomial.
    for counts in ((1, 1, 7, 12), (59, 6, 16, 80), (3, 0, 5, 2), (4, 0, 0, 9), (0, 4, 4, 0), (300, 90, 131, 600)):
        _, only1, only2, _ = counts
        tail = sum(math.comb(only1 + only2, hits) for hits in range(min(only1, only2) + 1)) / 2 ** (only1 + only2)
        first, second = pairs_of(*counts)
        assert paired_p_value(first, second) == pytest.approx(min(2 * tail, 1.0), rel=1e-9)
        assert paired_p_value(second, first) == paired_p_value(first, second)
    assert paired_p_value(*pairs_of(1, 1, 7, 12)) == pytest.approx(0.0703, abs=5e-5)


@pytest.mark.parametrize("values", [(-1, -0.5, 0, 0.5, 1), (0.01, 0.5, 0.97, 0.3), (0.123456, 0.7654321, 0.31415)])
def test_other_scores_are_tested_by_all_exchanges_or_many(values):
    rng = np.random.default_rng(1)
    for count in (4, 10):
        first, second = rng.choice(values, (2, count))
        expected = exchanged([each for each in (second - first).tolist() if each])
        found = paired_p_value(first, second)
        is_counted = all(float(round(100 * each, 9)).is_integer() for each in values)
        assert found == pytest.approx(expected, abs=1e-9 if is_counted else 0.01)
    many = rng.normal(0, 1, 400)
    assert paired_p_value(many, many + rng.normal(0.5, 1, 400)) == pytest.approx(1 / 50_001, rel=1e-6)
    assert paired_p_value(many, many) == 1.0


def test_items_of_a_cluster_count_once():
    """Each item four times says what it says once, of the test as of the interval."""
    rng = np.random.default_rng(2)
    first, second = rng.integers(0, 2, (2, 30)).astype(float)
    copies, clusters = [np.repeat(each, 4) for each in (first, second)], np.repeat(np.arange(30), 4).tolist()
    assert paired_p_value(*copies, clusters) == pytest.approx(paired_p_value(first, second))
    assert paired_p_value(*copies) < paired_p_value(first, second)
    alone, found = (clustered_interval(*each) for each in ((first, second, range(30)), (*copies, clusters)))
    assert found == pytest.approx(alone)
    differences = second - first
    half = 2.0452 * differences.std(ddof=1) / math.sqrt(30)
    assert (alone.low, alone.high) == pytest.approx((differences.mean() - half, differences.mean() + half), abs=1e-4)
    with pytest.raises(InputError, match="3 and 3 items of 2 clusters"):
        paired_p_value([1, 0, 1], [0, 0, 1], ["a", "b"])
    with pytest.raises(InputError, match="over 1 cluster: expected at least 2"):
        clustered_interval([1, 0], [0, 0], ["a", "a"])


def test_holms_adjustment():
    # As R's p.adjust(p, "holm") prints it.
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert holm([0.04, 0.005, 0.03, 0.01]) == pytest.approx([0.06, 0.02, 0.06, 0.03])
    assert holm([0.9, 0.6]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.slow
def test_equal_models_are_rarely_found_to_differ_in_any_of_several_figures():
    rng, families = np.random.default_rng(5), 250
    found = 0
    for _ in range(families):
        scores = rng.random((2, 8, 60)) < 0.6
        found += min(holm([paired_p_value(*pair) for pair in scores.astype(float).transpose(1, 0, 2)])) <= 0.05
    # At most 5 percent; 20 or more of 250 would happen once in 40 times at exactly that.
    assert found < 20


def test_few_items_and_bad_input():
    assert mean_interval([0.3]).low == mean_interval([0.3]).high == 0.3
    equal = difference_interval([1, 0, 1, 1], [1, 0, 1, 1])
    assert equal.value == 0 and equal.low < 0 < equal.high, "equal answers to four questions do not prove equality"
    with pytest.raises(InputError, match="3 and 2 items"):
        difference_interval([1, 0, 1], [1, 0])
    with pytest.raises(InputError, match="row 2 is NaN"):
        mean_interval([0.0, float("nan")])
    with pytest.raises(InputError, match="level must lie between 0 and 1"):
        mean_interval([0.0, 1.0], level=95)
