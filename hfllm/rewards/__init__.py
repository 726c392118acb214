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
from hfllm.rewards.judge_labels import BiasReport, LabeledPairs, check_bias, measure_bias, preference_rows
from hfllm.rewards.judge_questions import judge_question
from hfllm.rewards.judges import JudgeReward, PreferenceJudge
from hfllm.rewards.models import RewardModel, TokenRewardModel
from hfllm.rewards.reasoning import checked_by, exact_match, step_rewards, thinks, thought_length_penalty

__all__ = [
    "BiasReport",
    "JudgeReward",
    "LabeledPairs",
    "PreferenceJudge",
    "RewardEnsemble",
    "RewardModel",
    "TokenRewardModel",
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
    "step_rewards",
    "thinks",
    "thought_length_penalty",
]
