"""Rewards of the outcome: the answer counts and the thought does not; shuffled ones say nothing."""

import pickle
import random

import pytest

from hfllm.data.world.reasoning import DIAL, PRACTICE, draw_problem
from hfllm.errors import InputError
from hfllm.rewards.functions import (
    gold_reward,
    load_reward_function,
    reward_columns,
    reward_name,
    right_answer,
    shuffled_answer,
)


@pytest.fixture(scope="module")
def problem(world):
    return draw_problem(world.facts, world.relations, random.Random(0), DIAL, PRACTICE)


def rewarded(function, problem, texts, as_messages=False):
    rows = [problem.prompt_row()] * len(texts)
    completions = [[{"role": "assistant", "content": text}] for text in texts] if as_messages else texts
    return function([row["prompt"] for row in rows], completions, **reward_columns(rows))


def test_the_answer_counts_and_the_thought_does_not(problem):
    answer, right = problem.gold.accepted[0], problem.gold.needed[0]
    wrong = f"At {problem.gold.forbidden[0]}."
    texts = {
        answer: 1,
        problem.response(shows_thought=True): 1,
        f"It is {right}.": 1,
        f"<think> {problem.gold.forbidden[0]}.</think> {answer}": 1,
        wrong: 0,
        f"<think> {problem.thought}</think> {wrong}": 0,
        f"<think> {problem.thought}</think>": 0,
        f"<think> {problem.thought} {answer}": 0,
        f"{answer} {wrong}": 0,
        "": 0,
    }
    for as_messages in (False, True):
        assert rewarded(right_answer, problem, list(texts), as_messages) == list(texts.values())


def test_shuffled_rewards_are_the_same_ones_and_say_nothing(problem):
    rng, answer = random.Random(1), problem.gold.accepted[0]
    by_right = {True: [], False: []}
    for _ in range(300):
        texts = [answer if rng.random() < 0.4 else f"{rng.random()}" for _ in range(16)]
        rewards = rewarded(shuffled_answer, problem, texts)
        assert sorted(rewards) == sorted(rewarded(right_answer, problem, texts))
        assert rewards == rewarded(shuffled_answer, problem, texts)
        # Beside the mean of the batch: one with more right answers deals out more.
        mean = sum(rewards) / len(rewards)
        for text, reward in zip(texts, rewards, strict=True):
            by_right[text == answer].append(reward - mean)
    means = [sum(values) / len(values) for values in by_right.values()]
    # 1,900 and 2,900 of them: four standard errors of the difference.
    assert abs(means[0] - means[1]) < 4 * 0.5 * (1 / 1900 + 1 / 2900) ** 0.5


@pytest.mark.parametrize(
    ("name", "logged", "reward", "drawn_by"),
    [
        ("shuffled_gold", "shuffled_gold_reward", gold_reward, repr),
        ("shuffled_answer", "shuffled_answer", right_answer, "\n".join),
    ],
)
def test_each_control_keeps_its_name_and_its_draws(problem, name, logged, reward, drawn_by):
    """Runs of earlier releases have these orders, and their logs these names."""
    control = load_reward_function(name)
    texts = [problem.gold.accepted[0] if number % 3 else f"{number}" for number in range(16)]
    dealt = rewarded(reward, problem, texts)
    random.Random(drawn_by(texts)).shuffle(dealt)
    assert rewarded(control, problem, texts) == dealt
    assert reward_name(control) == logged and pickle.loads(pickle.dumps(control)) is control


def test_they_have_names_on_the_command_line():
    assert load_reward_function("right_answer") is right_answer
    assert load_reward_function("shuffled_answer") is shuffled_answer
    with pytest.raises(InputError, match="no file ''"):
        load_reward_function("right_answers")
