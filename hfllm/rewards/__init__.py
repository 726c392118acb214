"""Rewards with one signature, `(prompts, completions, **columns) -> list[float]`."""

from hfllm.rewards.confidence import calibrated, split_confidence
from hfllm.rewards.functions import (
    checked_by,
    checked_rewards,
    completion_text,
    exact_match,
    gold_reward,
    length_penalty,
    load_reward_function,
    reward_name,
    thinks,
    thought_length_penalty,
)
from hfllm.rewards.judges import (
    BiasReport,
    JudgeReward,
    LabeledPairs,
    PreferenceJudge,
    check_bias,
    judge_question,
    measure_bias,
    preference_rows,
)
from hfllm.rewards.models import RewardEnsemble, RewardModel, TokenRewardModel
from hfllm.rewards.steps import ProcessRewardModel, step_rewards

__all__ = [
    "BiasReport",
    "JudgeReward",
    "LabeledPairs",
    "PreferenceJudge",
    "ProcessRewardModel",
    "RewardEnsemble",
    "RewardModel",
    "TokenRewardModel",
    "calibrated",
    "check_bias",
    "checked_by",
    "checked_rewards",
    "completion_text",
    "exact_match",
    "gold_reward",
    "judge_question",
    "length_penalty",
    "load_reward_function",
    "measure_bias",
    "preference_rows",
    "reward_name",
    "split_confidence",
    "step_rewards",
    "thinks",
    "thought_length_penalty",
]
