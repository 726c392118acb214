"""What alignment by PPO refuses, and which prompts it leaves out."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hfllm.errors import InputError, refuse
from hfllm.stages.rlhf_tools import NO_TOOLS, PolicyTools

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase
    from trl import ModelConfig

    from hfllm.stages.rlhf import RlhfArguments, Row
    from hfllm.trainers.ppo.config import PPOConfig


def check(training_args: "PPOConfig") -> None:
    """Refuse flags that have no effect, and a learning rate that nothing decides.

    YAML flags of stages that do not run are accepted, so that one file serves with and without a named model.

    Raises:
        InputError: naming the flag.
    """
    refuse(training_args.model_init_kwargs, "--model_init_kwargs", "use --dtype, --attn_implementation or the like")
    plugin = getattr(training_args, "deepspeed_plugin", None)
    if training_args.learning_rate is None and plugin is not None and "optimizer" in plugin.deepspeed_config:
        raise InputError("--learning_rate is needed: DeepSpeed's file has an optimizer section, which reads it")


def check_rewards(
    script_args: "RlhfArguments", training_args: "PPOConfig", function_count: int, has_own: bool = False
) -> None:
    """Refuse reward settings that would otherwise fail only after the stages before have been trained.

    Args:
        has_own: whether environments have a reward of their own.

    Raises:
        InputError: for a missing reward, a bad `--value_model` or `--reward_weights`, or a bad ensemble.
    """
    from hfllm.data.sources import WORLD
    from hfllm.rewards.models import RewardEnsemble

    named = script_args.reward_model_name_or_path
    if script_args.environment_factory and not (named or function_count or has_own):
        name = script_args.environment_factory
        raise InputError(f"--environment_factory {name} needs a reward: its get_reward, or a flag that names one")
    if not (named or function_count or has_own) and script_args.dataset_name != WORLD:
        raise InputError(
            f"--dataset_name {script_args.dataset_name} needs a reward: --reward_model_name_or_path (train one with "
            "hfllm reward) or --reward_funcs path/to/file.py:function"
        )
    if script_args.value_model == "reward" and script_args.reward_funcs and not named:
        raise InputError("--value_model reward needs a reward model; with --reward_funcs use 'head' or a model's name")
    rewards = function_count + bool(named or not (function_count or has_own))
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
    script_args: "RlhfArguments",
    training_args: "PPOConfig",
    model_args: "ModelConfig",
    rows: "Sequence[Row]",
    policy_config: "PreTrainedConfig",
    trains_first: bool,
    tools: PolicyTools = NO_TOOLS,
) -> None:
    """Refuse models and prompts that would otherwise fail only after the stages before have been trained.

    Args:
        script_args: with the reward and value models' names.
        rows: the prompts.
        policy_config: of the model to align, whether named or not yet trained.
        trains_first: whether stages come before; if not, models are loaded right away, and loading reports errors.
        tools: from `rlhf_tools.checked_tools`.

    Raises:
        InputError: for a reward or value model that cannot be loaded or used, prompts that do not fit the named model,
            an adapter that does not, weights that cannot be trained, or `--use_vllm` without vLLM.
    """
    from hfllm.models.devices import forked_random
    from hfllm.models.loading.saved import is_for_pictures, max_length_of
    from hfllm.multimodal.processors import tokenizer_of
    from hfllm.rewards.models import reward_model
    from hfllm.runs.models import check_trainable, load_reward_model, load_value_model, peft_config, try_adapter
    from hfllm.stages.rlhf_pictures import (
        check_frozen,
        check_rows,
        load_processing_class,
        processing_class_of,
        refuse_words,
    )
    from hfllm.trainers.ppo.prompts import check_prompts
    from hfllm.trainers.ppo.setup import check_critic
    from hfllm.trainers.ppo.vllm_sampling import check_vllm

    check_trainable(model_args)
    check_rows(rows, policy_config)
    check_frozen(script_args, model_args, rows)
    if training_args.use_vllm:
        check_vllm(training_args)
    named = script_args.reward_model_name_or_path or []
    for name in named:
        processing_class_of(name)
    # A new head must not change the random numbers drawn later.
    with forked_random(training_args.device):
        if trains_first:
            for name in named:
                reward_model(load_reward_model(name, model_args), processing_class_of(name))
            if named or script_args.value_model != "reward":
                check_critic(load_value_model(script_args.value_model, model_args, named))
        if model_args.use_peft and not is_for_pictures(policy_config):
            try_adapter(policy_config, peft_config(model_args))
    if model_args.model_name_or_path and not script_args.filter_prompts:
        reader = load_processing_class(model_args, policy_config)
        context = max_length_of(policy_config)
        refuse_words(rows, reader)
        check_prompts(rows, reader, training_args.response_length, context, tools.schemas)
        _check_tools(rows, tokenizer_of(reader))


def _check_tools(rows: "Sequence[Row]", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse prompts whose calls of tools the chat template leaves out, and say how many tools it does not write."""
    from hfllm.data.conversations import check_written, has_more_than_text
    from hfllm.data.rows import Dropped, origin_of
    from hfllm.runs.command_line import say

    notes = Dropped()
    for row in rows:
        tools, prompt = row.get("tools"), row["prompt"]
        if isinstance(prompt, list) and (tools or has_more_than_text(prompt)):
            text = tokenizer.apply_chat_template(prompt, tools=tools, tokenize=False, add_generation_prompt=True)
            check_written(origin_of(row, "a prompt"), row, prompt, text, notes)
    for note, count in notes.reasons.items():
        say(f"prompts: {count:,} of {len(rows):,} {note}")


def fitting_prompts(
    script_args: "RlhfArguments",
    training_args: "PPOConfig",
    model_args: "ModelConfig",
    rows: "Sequence[Row]",
    policy_config: "PreTrainedConfig",
    tools: PolicyTools = NO_TOOLS,
) -> "list[Row]":
    """Return the prompts; with `--filter_prompts` those that leave room for a response, and say how many do not.

    Raises:
        InputError: when none does, or the model is not named.
    """
    from hfllm.data import formats
    from hfllm.data.rows import Dropped, origin_of
    from hfllm.models.loading.saved import max_length_of
    from hfllm.runs.command_line import say
    from hfllm.stages.own_pictures import WORDS_FOR_A_PICTURE
    from hfllm.stages.rlhf_pictures import check_rows, load_processing_class, words_for_a_picture
    from hfllm.trainers.ppo.prompts import EMPTY, unfit_prompts

    if not script_args.filter_prompts:
        return list(rows)
    refuse(not model_args.model_name_or_path, "--filter_prompts", "it needs --model_name_or_path, to count tokens")
    tokenizer = load_processing_class(model_args, policy_config)
    check_rows(rows, policy_config)
    context = max_length_of(policy_config)
    dropped = Dropped(len(rows))
    unfit = dict.fromkeys(words_for_a_picture(rows, tokenizer), WORDS_FOR_A_PICTURE)
    read = [place for place in range(len(rows)) if place not in unfit]
    unfit |= {place: EMPTY for place in read if formats.is_blank(rows[place]["prompt"])}
    tried = (tokenizer, training_args.response_length, context, tools.schemas)
    unfit |= {read[place]: why for place, why in unfit_prompts([rows[place] for place in read], *tried)}
    long = f"too long for --response_length {training_args.response_length} in a context of {context}"
    reasons = {EMPTY: "with an empty prompt", WORDS_FOR_A_PICTURE: WORDS_FOR_A_PICTURE}
    for place, why in sorted(unfit.items()):
        dropped.add(reasons.get(why, long), origin_of(rows[place], ""))
    if len(unfit) == len(rows):
        raise InputError(f"--filter_prompts: no prompt is left: {dropped}")
    if unfit:
        say(f"{script_args.dataset_name}: {dropped}")
    return [row for place, row in enumerate(rows) if place not in unfit]
