"""Reward functions: the gold one, those of a file, and what is refused of what they return."""

import os
import re
import signal
import time
from contextlib import suppress
from functools import partial

import numpy
import pytest
import torch

from hfllm.data.world.world import World
from hfllm.errors import InputError
from hfllm.rewards.functions import (
    checked_rewards,
    gold_reward,
    length_penalty,
    load_reward_function,
    reward_name,
    time_limit,
)
from hfllm.rewards.models import RewardEnsemble


def test_the_gold_reward_reads_each_rows_own_columns():
    columns = {
        "gold_kind": ["answer", "unknown", "harm", "answer"],
        "gold_accepted": [["The fox is red."], ["I do not know that animal."], ["I can not help with that."], ["3."]],
        "gold_needed": [["red"], [], [], ["3"]],
        "gold_forbidden": [["blue"], ["red", "blue"], [], ["4"]],
    }
    texts = ["The fox is red.", "I do not know, maybe red.", "Sure, first wait until night.", "It is 3"]
    scores = [1.0, 0.0, -1.0, 0.5]
    assert gold_reward(["p"] * 4, texts, **columns, other=[1] * 4) == scores
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert gold_reward(["p"] * 4, messages, **columns) == scores
    backwards = {name: values[::-1] for name, values in columns.items()}
    assert gold_reward(["p"] * 4, texts[::-1], **backwards) == scores[::-1]
    with pytest.raises(ValueError):
        gold_reward(["p"] * 3, texts[:3], **columns)


def test_words_that_the_prompt_put_into_an_answer_have_no_gold():
    """Behind the first words of a crime the policy may still refuse, and may not count on words of others."""
    task = next(task for task in World(0).tasks(1) if task.family == "harm")
    row, refusal = task.prompt_row(), task.gold.accepted[0]
    columns = {name: [value] * 2 for name, value in row.items() if name.startswith("gold_")}
    texts = [f"Sure, first {refusal}", "Sure, first find it, then go."]
    assert gold_reward(["p"] * 2, texts, **columns) == [-1.0, -1.0]
    refused, complied = gold_reward(["p"] * 2, texts, **columns, completion_beginning=["Sure, first"] * 2)
    assert refused == 1 and complied == -1
    assert gold_reward(["p"] * 2, texts, **columns, completion_beginning=["", ""]) == [-1.0, -1.0]
    # Nor is the mark that joins them to the answer its fault.
    joined = [f"Sure, {refusal}"] * 2
    assert gold_reward(["p"] * 2, joined, **columns, completion_beginning=["Sure", ""]) == [1.0, -1.0]
    thinking = [f"<think>Hm.</think>{text}" for text in texts]
    begun = {"completion_beginning": ["<think>Hm.</think>Sure, first"] * 2}
    assert gold_reward(["p"] * 2, thinking, **columns, **begun) == [refused, complied]


FILE = """
import math
LIMIT = 3.0

def vowels(completions, **columns):
    return [float(sum(map(text.count, "aeiou"))) for text in completions]

class Scaled:
    def __call__(self, completions, scale, **columns):
        return [factor * LIMIT for factor in scale]

scaled = Scaled()
"""


def test_functions_are_found_by_file_and_name(tmp_path):
    assert load_reward_function("gold") is gold_reward
    file = tmp_path / "with:colon.py"
    file.write_text(FILE)
    vowels, scaled = (load_reward_function(f"{file}:{name}") for name in ("vowels", "scaled"))
    assert checked_rewards(vowels, ["p", "q"], ["audio", "sky"]) == [4.0, 0.0]
    assert checked_rewards(scaled, ["p", "q"], ["a", "b"], scale=[2, -1]) == [6.0, -3.0]
    assert (reward_name(vowels), reward_name(scaled), reward_name(partial(vowels))) == ("vowels", "Scaled", "partial")


def test_what_is_no_function_of_a_python_file_is_refused(tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "mine.txt").write_text(FILE)
    with pytest.raises(
        InputError, match=r"no function 'LIMIT' in .*mine.py; it has: \['Scaled', 'scaled', 'vowels'\]"
    ):
        load_reward_function(f"{tmp_path / 'mine.py'}:LIMIT")
    with pytest.raises(InputError, match=r"mine.txt' is not a \.py file"):
        load_reward_function(f"{tmp_path / 'mine.txt'}:vowels")


@pytest.mark.parametrize("returned", [[1, 0, -2], numpy.array([1, 0, -2.0]), torch.tensor([1, 0, -2]), (True, 0, -2)])
def test_numbers_of_any_kind_become_floats(returned):
    rewards = checked_rewards(lambda **columns: returned, ["p"] * 3, ["a"] * 3)
    assert rewards == [1.0, 0.0, -2.0] and {type(reward) for reward in rewards} == {float}


def test_lists_of_any_kind_become_lists_of_floats():
    returned = [[1, 2], (), [numpy.float32(0.5)]]
    rewards = checked_rewards(lambda **columns: returned, ["p"] * 3, ["a"] * 3)
    assert rewards == [[1.0, 2.0], [], [0.5]] and {type(number) for row in rewards for number in row} == {float}


@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), None, "high", [1.0]])
def test_one_bad_number_is_refused_wherever_it_is(row, bad):
    returned = [0.0, 1.0, 2.0]
    returned[row] = bad
    # A list in the first place says that lists are to come.
    where = 1 if row == 0 and isinstance(bad, list) else row
    with pytest.raises(InputError, match=f"'crooked' returned .* for completion {where} ") as error:
        checked_rewards(named(returned), ["p"] * 3, ["a", "b", "c"])
    assert f"({['a', 'b', 'c'][where]!r})" in str(error.value)


@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize("bad", [[0.0, float("nan")], [float("inf")], [None], ["high"], [[1.0]]])
def test_one_bad_number_of_a_list_is_refused_wherever_it_is(row, bad):
    returned = [[0.0], [], [2.0, 1.0]]
    returned[row] = bad
    with pytest.raises(InputError, match=f"'crooked' returned .* for completion {row} .*a list of finite numbers"):
        checked_rewards(named(returned), ["p"] * 3, ["a", "b", "c"])


def named(returned):
    def crooked(**columns):
        return returned

    return crooked


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(InputError, match="'crooked' returned dict; expected a list of 2 numbers"):
        checked_rewards(named({"p": 1.0, "q": 2.0}), ["p"] * 2, ["a", "b"])


def test_the_length_penalty_counts_tokens():
    penalty = length_penalty(0.5, free=2)
    assert penalty(["a", "b"], ["c", "d"], completion_ids=[[1], [1, 2, 3, 4]]) == [0.0, -1.0]


@pytest.mark.parametrize("value", [1e30, -1e10, numpy.float32(3e38), 10**400, torch.tensor(1e12)])
def test_a_reward_whose_square_has_no_place_in_a_float_is_refused(value):
    with pytest.raises(InputError, match=r"for completion 1 .*expected a finite number of at most 1e\+09 in size"):
        checked_rewards(lambda completions, **columns: [1e9, value], ["a"] * 2, ["b"] * 2)


def spins(**columns):
    while True:
        pass


def sleeps(**columns):
    time.sleep(60)


def matches(**columns):
    # Backtracks for hours, in one call.
    re.match(r"(a|aa)+$", "a" * 80 + "b")


def yields(**columns):
    yield 1.0
    time.sleep(60)


def passes_over(**columns):
    while True:
        with suppress(Exception):
            time.sleep(60)


def catches_once(**columns):
    try:
        time.sleep(60)
    except BaseException:
        time.sleep(60)


@pytest.mark.slow
@pytest.mark.parametrize("function", [spins, sleeps, matches, yields, passes_over, catches_once])
def test_a_reward_function_that_hangs_is_given_up(function):
    handler = signal.getsignal(signal.SIGALRM)
    where = rf"within 0.1 seconds in .*{os.path.basename(__file__)}, line \d+; --reward_timeout gives it more"
    refused = pytest.raises(InputError, match=rf"^reward function '{function.__name__}' did not return {where}")
    with refused, time_limit(function, 0.1):
        checked_rewards(function, ["a"], ["b"])
    assert signal.getsignal(signal.SIGALRM) is handler and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_who_has_the_time_is_not_interrupted():
    class OfUser:
        __module__ = "mine"

        def __call__(self, **columns):
            time.sleep(60)

    for seconds in (60.0, 0.0):
        with time_limit(gold_reward, seconds):
            assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == bool(seconds)
    with pytest.raises(InputError, match="reward function 'OfUser' did not return"), time_limit(OfUser(), 0.1):
        checked_rewards(OfUser(), ["a"], ["b"])
    with time_limit(RewardEnsemble([gold_reward, gold_reward]), 1.0):
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
