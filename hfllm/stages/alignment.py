"""What alignment refuses before the stages that it needs are trained."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hfllm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def check_rewards(script_args: Any, training_args: Any, function_count: int) -> None:
    """Refuse settings of the rewards that could only fail after the stages before have been trained.

    Raises:
        InputError: for a missing reward, a bad `--value_model` or `--reward_weights`, or a bad ensemble.
    """
    from hfllm.data.sources import WORLD
    from hfllm.rewards.ensembles import RewardEnsemble

    named = script_args.reward_model_name_or_path
    if not named and not function_count and script_args.dataset_name != WORLD:
        raise InputError(
            f"--dataset_name {script_args.dataset_name} needs a reward: --reward_model_name_or_path (train one with "
            "recipes/reward.py) or --reward_funcs path/to/file.py:function"
        )
    if script_args.value_model == "reward" and script_args.reward_funcs and not named:
        raise InputError("--value_model reward needs a reward model; with --reward_funcs use 'head' or a model's name")
    rewards = function_count + bool(named or not function_count)
    weights = training_args.reward_weights
    if weights is not None and len(weights) != rewards:
        raise InputError(f"--reward_weights has {len(weights)} values for {rewards} reward(s)")
    if script_args.reward_aggregation not in RewardEnsemble.AGGREGATIONS:
        raise InputError(
            f"--reward_aggregation {script_args.reward_aggregation!r} is not one of "
            f"{', '.join(RewardEnsemble.AGGREGATIONS)}"
        )
    if script_args.num_reward_models < 1 or (script_args.num_reward_models > 1 and (named or function_count)):
        raise InputError(
            f"--num_reward_models {script_args.num_reward_models}: at least 1, and more only where none is named"
        )


def check_models(
    script_args: Any,
    training_args: Any,
    model_args: Any,
    rows: Sequence[dict],
    policy_config: "PreTrainedConfig",
    trains_first: bool,
) -> None:
    """Refuse what could only fail with the models, after the stages before have been trained.

    Args:
        script_args: with the reward and value models' names.
        rows: the prompts.
        policy_config: of the model to align, be it named or still to be made.
        trains_first: whether stages come before; if none does, models are loaded right away, and fail by themselves.

    Raises:
        InputError: for a reward or value model that cannot be loaded or used, prompts that do not fit the named model,
            an adapter that does not, weights that cannot be trained, or `--use_vllm` without vLLM.
    """
    import torch

    from hfllm.rewards.models import RewardModel
    from hfllm.runs.models import (
        check_trainable,
        load_reward_model,
        load_tokenizer,
        load_value_model,
        max_length_of,
        peft_config,
        try_adapter,
    )
    from hfllm.trainers.ppo.prompts import check_prompts
    from hfllm.trainers.ppo.setup import check_critic
    from hfllm.trainers.ppo.vllm_sampling import check_vllm

    check_trainable(model_args)
    if training_args.use_vllm:
        check_vllm(training_args)
    named = script_args.reward_model_name_or_path or []
    for name in named:
        load_tokenizer(name)
    # A new head must not change the numbers that are drawn later.
    with torch.random.fork_rng():
        if trains_first:
            for name in named:
                RewardModel(load_reward_model(name, model_args), load_tokenizer(name))
            if named or script_args.value_model != "reward":
                check_critic(load_value_model(script_args.value_model, model_args, named))
        if model_args.use_peft:
            try_adapter(policy_config, peft_config(model_args))
    if model_args.model_name_or_path:
        tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision)
        check_prompts(rows, tokenizer, training_args.response_length, max_length_of(policy_config))
