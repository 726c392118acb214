"""Rewards of the outcome: whether an answer is right, whatever was thought before it, and a control."""

from collections.abc import Sequence

from hfllm.data.world.vocabulary import RIGHT
from hfllm.rewards.functions import completion_text, gold_reward, shuffled


def right_answer(prompts: Sequence, completions: Sequence, **columns: Sequence[Sequence]) -> list[float]:
    """Return 1 where a completion's answer is right by the gold columns of its row, and else 0.

    The thought does not count: neither a right number in it, nor a wrong one. One that never ends leaves no answer.
    """
    return [float(score >= RIGHT) for score in gold_reward(prompts, completions, **columns)]


def _texts(completions: Sequence) -> str:
    return "\n".join(map(completion_text, completions))


shuffled_answer = shuffled(right_answer, "shuffled_answer", _texts)
