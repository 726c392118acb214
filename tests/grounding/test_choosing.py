"""The answer that is kept of several, and the comparison of ways to choose it."""

import math

import pytest

from hfllm.errors import InputError
from hfllm.grounding.verification import best_rewarded, compare_choices, contains, first_supported, majority_of_meaning

PASSAGES = [["The zorb is blue."], ["The vex is green.", "The vex eats figs."], []]
SAMPLES = [
    ["The zorb is red.", "The zorb is blue.", "A zorb is blue."],
    ["I do not know.", "The vex is green. It is big.", "The vex eats figs. The vex is green."],
    ["The owl is gray.", "The owl is gray.", "It is gray."],
]


def test_the_first_that_a_passage_supports():
    assert first_supported(SAMPLES, PASSAGES, contains) == [1, 2, None]
    assert first_supported([], [], contains) == []


def test_the_majority_of_meaning():
    assert majority_of_meaning(SAMPLES) == [1, 0, 0]
    assert majority_of_meaning(SAMPLES, [["r", "b", "b"], ["?", "g", "g"], [1, 2, 2]]) == [1, 1, 1]
    assert majority_of_meaning([["", "", "red"]]) == [2] and majority_of_meaning([["", " "]]) == [0]


@pytest.mark.parametrize("is_chat", [False, True])
def test_the_best_by_a_reward(is_chat):
    prompts = [[{"role": "user", "content": "Q"}] if is_chat else "Q"] * 3

    def reward(prompts, completions):
        return [len(each[0]["content"] if is_chat else each) for each in completions]

    assert best_rewarded(prompts, SAMPLES, reward) == [1, 2, 0]
    if is_chat:
        turns = [[[{"role": "assistant", "content": text}] for text in texts] for texts in SAMPLES]
        assert best_rewarded(prompts, turns, reward) == [1, 2, 0]


def test_choices_are_compared_also_where_they_lose():
    right = [[0, 1, 1], [1, 0, 1], [0, 0, 0], [1, 0, 0]]
    choices = {"first_supported": [1, 0, None, None], "reward_model": [0, 1, 2, 1]}
    metrics, table = compare_choices(right, choices, greedy=[1, 1, 0, 1])
    shares = {name: value for name, value in metrics.items() if name.endswith(("right", "wrong", "abstained"))}
    assert {name: value for name, value in shares.items() if value} == {
        "one_sample_right": 0.5,
        "one_sample_wrong": 0.5,
        "greedy_right": 0.75,
        "greedy_wrong": 0.25,
        "first_supported_right": 0.5,
        "first_supported_abstained": 0.5,
        "reward_model_wrong": 1.0,
        "best_possible_right": 0.75,
        "best_possible_wrong": 0.25,
    }
    assert metrics["greedy_right_se"] == pytest.approx(0.25) and metrics["greedy_right_n"] == 4
    assert [row["answer kept"] for row in table] == [
        *("one sample", "greedy", "first supported", "reward model", "best possible")
    ]
    # By hand: gains of -1, 0, 0 and -1 have the mean -.5 and the error .577 / 2.
    assert [row["right, against one sample"] for row in table][3] == "-0.500 ± 0.29"


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: first_supported(SAMPLES, [], contains), "answers to 3 prompts, and passages of 0"),
        (lambda: majority_of_meaning([["a"], []]), "prompt 2 has no answers"),
        (lambda: majority_of_meaning([["a", "b"]], [["m"]]), "prompt 1 has 2 answers and 1 meanings"),
        (lambda: best_rewarded(["Q"], [["a", "b"]], lambda **_: [0, math.nan]), "response to prompt 1 is NaN"),
        (lambda: best_rewarded(["Q"], [[]], lambda **_: []), "prompt 1 has no answers"),
        (lambda: compare_choices([], {}), "there must be prompts"),
        (lambda: compare_choices([[1]], {"mine": [1]}), "mine chose answer 1 of prompt 1, which has 1"),
        (lambda: compare_choices([[1]], {"mine": []}), "answers to 1 prompts, and mine of 0"),
    ],
)
def test_bad_input_is_one_line(call, complaint):
    with pytest.raises(InputError, match=complaint) as error:
        call()
    assert "\n" not in str(error.value)
