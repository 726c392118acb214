"""What is held out of a user's data."""

from collections import Counter

import pytest

from hfllm.data.loading import split_places
from hfllm.errors import InputError


@pytest.mark.parametrize("seed", range(20))
def test_a_text_that_fills_half_of_the_data_is_not_held_out(seed):
    keys = ["much"] * 500 + list(range(500))
    train, held_out = split_places(keys, seed)
    assert len(held_out) == 50 and sorted([*train, *held_out]) == list(range(1000))
    assert "much" not in {keys[place] for place in held_out}


@pytest.mark.parametrize("seed", range(5))
def test_where_all_groups_are_too_large_the_smallest_is_held_out(seed):
    keys = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    train, held_out = split_places(keys, seed)
    assert Counter(keys[place] for place in held_out) == {"c": 10}
    assert Counter(keys[place] for place in train) == {"a": 60, "b": 30}


def test_equal_keys_stay_on_one_side():
    keys = [number % 100 for number in range(300)]
    train, held_out = split_places(keys, seed=0)
    assert len(held_out) == 15
    assert not {keys[place] for place in train} & {keys[place] for place in held_out}


def test_rows_that_are_all_alike_cannot_be_split():
    with pytest.raises(InputError, match="at least 2 are needed"):
        split_places(["a", "a"], seed=0)
