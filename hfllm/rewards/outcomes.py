"""Rewards of the outcome: whether an answer is right, whatever was thought before it, and a control."""

import random
from collections.abc import Sequence

from hfllm.data.world.rubric import RIGHT
from hfllm.rewards.functions import completion_text, gold_reward


def right_answer(prompts: Sequence, completions: Sequence, **columns: Sequence[Sequence]) -> list[float]:
    """Return 1 where a completion's answer is right by the gold columns of its row, and else 0.

    The thought does not count: neither a right number in it, nor a wrong one. One that never ends leaves no answer.
    """
    return [float(score >= RIGHT) for score in gold_reward(prompts, completions, **columns)]


def shuffled_answer(prompts: Sequence, completions: Sequence, **columns: Sequence[Sequence]) -> list[float]:
    """Return the rewards of `right_answer`, dealt out to the completions of the batch by chance.

    A control: these are as many and as large as right ones, and say nothing about any answer, so that a policy must
    not gain by them. The same completions are always dealt the same, as resuming needs.
    """
    rewards = right_answer(prompts, completions, **columns)
    random.Random("\n".join(map(completion_text, completions))).shuffle(rewards)
    return rewards
