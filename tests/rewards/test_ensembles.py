"""Several rewards as one: how they are brought to one scale and aggregated."""

import statistics

import pytest

from hfllm.errors import InputError
from hfllm.rewards.models import RewardEnsemble


def column_of(name):
    """A reward that is a column of the data."""

    def reward(completions, **columns):
        return columns[name]

    reward.__name__ = name
    return reward


def test_ensembles_aggregate():
    def one(completions, **_):
        return [1.0, 4.0]

    def other(completions, **_):
        return [3.0, 0.0]

    def ask(*settings):
        return RewardEnsemble([one, other], *settings)(["a", "b"], ["c", "d"])

    assert ask("mean") == [2.0, 2.0]
    assert ask() == ask("worst") == [1.0, 0.0]
    assert ask("uncertainty", 0.5) == [2.0 - 0.5 * 1.0, 2.0 - 0.5 * 4.0]
    with pytest.raises(InputError, match="aggregation 'best' is not one of mean, worst, uncertainty"):
        RewardEnsemble([one, other], "best")
    with pytest.raises(InputError, match="at least 2"):
        RewardEnsemble([one])


def test_calibrated_members_weigh_the_same_whatever_their_scale():
    def one(completions, **_):
        return [float(len(text)) for text in completions]

    def same_elsewhere(completions, **_):
        return [100.0 * len(text) - 5000.0 for text in completions]

    def reverse(completions, **_):
        return [3.0 - len(text) for text in completions]

    texts = ["a", "aa", "aaa", "aaaa"]
    pair = RewardEnsemble([one, same_elsewhere])
    pair.calibrate(texts, texts)
    scores = pair(texts, texts)
    assert sum(scores) == pytest.approx(0.0, abs=1e-9)
    # The mean of the two spreads.
    assert scores[3] - scores[2] == pytest.approx((1 + 100) / 2)
    opposed = RewardEnsemble([one, reverse])
    opposed.calibrate(texts, texts)
    assert opposed(texts, texts) == pytest.approx([-1.5, -0.5, -0.5, -1.5])

    def constant(completions, **_):
        return [1.0] * len(completions)

    with pytest.raises(InputError, match="'constant' gives all 4 completions the same score"):
        RewardEnsemble([one, constant]).calibrate(texts, texts)


def test_uncertainty_takes_the_variance_of_all_members_off_their_mean():
    columns = {"one": [0.25, -1.0], "two": [1.5, -1.0], "three": [-2.0, -1.0], "four": [0.5, -1.0]}
    ensemble = RewardEnsemble([column_of(name) for name in columns], "uncertainty", 0.7)
    rows = list(zip(*columns.values(), strict=True))
    expected = [statistics.fmean(row) - 0.7 * statistics.pvariance(row) for row in rows]
    assert ensemble(["p", "q"], ["a", "b"], **columns) == pytest.approx(expected)
    assert expected[1] == -1.0 and expected[0] < statistics.fmean(rows[0]) - 0.5


@pytest.mark.parametrize("aggregation", RewardEnsemble.AGGREGATIONS)
def test_a_constant_of_a_member_means_nothing_once_calibrated(aggregation):
    seen = {"one": [0.0, 1.0, 5.0], "two": [2.0, 0.0, 1.0]}
    shifted = {"one": seen["one"], "two": [value + 40 for value in seen["two"]]}
    scores = []
    for columns in (seen, shifted):
        ensemble = RewardEnsemble([column_of("one"), column_of("two")], aggregation)
        ensemble.calibrate(["p"] * 3, ["a"] * 3, **columns)
        scores.append(ensemble(["p"] * 3, ["b"] * 3, **columns))
    assert scores[0] == pytest.approx(scores[1])
    assert len(set(scores[0])) == 3


def test_what_members_give_is_checked():
    def lists(completions, **columns):
        return [[1.0]] * len(completions)

    texts = ["a", "b"]
    with pytest.raises(InputError, match="an ensemble takes one number per completion; 'lists' gives lists"):
        RewardEnsemble([lists, column_of("one")])(texts, texts, one=[0.0, 1.0])
    with pytest.raises(InputError, match="'one' returned nan for completion 1"):
        RewardEnsemble([column_of("two"), column_of("one")])(texts, texts, one=[0.0, float("nan")], two=[0.0, 1.0])
