"""Rewards with one signature, `(prompts, completions, **columns) -> list[float]`."""

from hfllm.rewards.ensembles import RewardEnsemble
from hfllm.rewards.functions import (
    checked_rewards,
    completion_text,
    gold_reward,
    length_penalty,
    load_reward_function,
    reward_name,
)
from hfllm.rewards.models import RewardModel, TokenRewardModel

__all__ = [
    "RewardEnsemble",
    "RewardModel",
    "TokenRewardModel",
    "checked_rewards",
    "completion_text",
    "gold_reward",
    "length_penalty",
    "load_reward_function",
    "reward_name",
]
