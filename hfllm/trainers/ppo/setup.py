"""The parts of a `PPOTrainer`: reference, rewards, special tokens, sampling settings."""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hfllm.data.tokenizer import configured_ends, turn_end
from hfllm.errors import InputError, one_line, refuse_if
from hfllm.flags import changed
from hfllm.models.devices import built_whole, forked_random
from hfllm.models.loading import adapters
from hfllm.models.loading.adapters import find_adapter
from hfllm.models.loading.saved import (
    check_vocabulary,
    is_for_pictures,
    location_of,
    reads_pictures,
    saved_config,
    saved_model,
    saved_processor,
    saved_tokenizer,
)
from hfllm.models.loading.weights import load_weights_of
from hfllm.multimodal.processors import ProcessingClass, place_tokens, tokenizer_of
from hfllm.rewards.functions import MOST_REWARD, RewardFunction
from hfllm.rewards.models import RewardModel, TokenRewardModel
from hfllm.rewards.steps import scoring_model
from hfllm.trainers.engines import gather_parameters, unshard
from hfllm.trainers.ppo.actor_critic import looks_ahead
from hfllm.trainers.ppo.config import PPOConfig
from hfllm.trainers.ppo.shared_base import AdapterReward, AdapterScorer, put_critic_on, trained_as_before

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

# A policy with further training of its adapter keeps the initial adapter under this name.
REFERENCE_ADAPTER = "ref"
NO_VLLM = "use_vllm=True with pictures: PPO gives vLLM no pictures; leave use_vllm out"
RewardFunc = str | PreTrainedModel | Callable[..., list[float]]
# Every field with an effect on the distribution is set: generate() fills unset ones from the model's own generation
# config, and the ratio is only right for the distribution computed by token_logprobs.
UNMODIFIED_SAMPLING = {
    "do_sample": True,
    "top_k": 0,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "use_cache": True,
}


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Copy a saved model's weights into `model`, from any number of files."""
    saved = saved_model(type(model), str(folder), dtype=model.dtype)
    model.load_state_dict(saved.state_dict())


def policy_from_name(name: str, load_kwargs: dict[str, Any]) -> PreTrainedModel:
    """Load a language model or vision-language model, with all of its weights.

    An adapter is loaded as transformers does, on its base.
    """
    settings = {"dtype": torch.float32, **load_kwargs}
    if (adapter := find_adapter(name, **location_of(settings))) is not None:
        kind = AutoModelForImageTextToText if is_for_pictures(adapter.base_config()) else AutoModelForCausalLM
        return saved_model(kind, name, **settings)
    kind = AutoModelForImageTextToText if is_for_pictures(_config_of(name, settings)) else AutoModelForCausalLM
    return load_weights_of(kind, name, whose="policy", **settings)[0]


def _config_of(name: str, load_kwargs: dict[str, Any]) -> PreTrainedConfig | None:
    """Return the config of a named model, `None` where there is none: loading the model reports that."""
    try:
        return saved_config(name, **location_of(load_kwargs))
    except (OSError, ValueError):
        return None


def processing_class_of(model: str | PreTrainedModel, load_kwargs: dict[str, Any]) -> ProcessingClass:
    """Load the tokenizer of a model by its name; of a vision-language model, the processor."""
    name = model if isinstance(model, str) else model.config._name_or_path
    config = _config_of(name, load_kwargs) if isinstance(model, str) else model.config
    return saved_processor(name) if is_for_pictures(config) else saved_tokenizer(name)


def scorer_from_name(name: str, load_kwargs: dict[str, Any]) -> PreTrainedModel:
    """Load a model with one score per sequence, or per token if it was saved as a model for tokens."""
    return adapters.load_scorer(name, adapters.scorer_class(name), **{"dtype": torch.float32, **load_kwargs})


def split_reference(
    model: PreTrainedModel, peft_config: "PeftConfig | None", keep: bool = True
) -> tuple[PreTrainedModel | None, PreTrainedModel]:
    """Return the frozen reference and the policy. With an adapter the reference is `None`, see `as_reference`.

    Without `keep` there is no reference.

    The copy is a new object filled from the weights. `copy.deepcopy` would keep a `forward` set by some trainers
    on the instance, bound to the *original's* weights: the reference would follow the policy, with a KL of 0.
    """
    if getattr(model, "is_loaded_in_4bit", False) and model.device.type == "cpu":
        # When it samples, it repacks its weights for a kernel without gradients, and the adapter would never learn.
        raise InputError(
            "load_in_4bit: bitsandbytes cannot train a model on a CPU after sampling from it; use load_in_8bit"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(
            f"model {model.config._name_or_path!r} is a base model with an adapter loaded into it: merge the adapter, "
            "or load it as a peft.PeftModel"
        )
    if peft_config is not None:
        from peft import get_peft_model

        if hasattr(model, "peft_config"):
            raise InputError("model has an adapter already: leave peft_config out, or merge the adapter first")
        return None, get_peft_model(model, peft_config)
    if hasattr(model, "peft_config"):
        if keep:
            keep_starting_adapter(model)
        elif not any(parameter.requires_grad for parameter in model.parameters()):
            # `PeftModel.from_pretrained` loads an adapter frozen.
            model.set_adapter(model.active_adapter)
        return None, model
    if not keep:
        return None, model
    # By the constructor, not intercepted by DeepSpeed: the reference is whole on every process.
    with built_whole():
        reference = type(model)(model.config).to(model.dtype)
    with gather_parameters(model):
        reference.load_state_dict(model.state_dict())
    # Buffers outside the state dict, such as rotary frequencies, may have another precision than the weights.
    for own, original in zip(reference.buffers(), model.buffers(), strict=True):
        own.data = original.detach().clone()
    return reference.eval().requires_grad_(False), model


def keep_starting_adapter(policy: "PeftModel") -> None:
    """Keep a frozen copy of the policy's initial adapter, as TRL's trainers do, under the same name.

    Raises:
        InputError: when PEFT allows no second adapter next to it.
    """
    active = policy.active_adapter
    if not isinstance(active, str):
        raise InputError(f"model has the adapters {', '.join(active)} active at once: merge them, or activate one")
    # The copy's weights are drawn first.
    with forked_random(policy.device), gather_parameters(policy):
        try:
            policy.add_adapter(REFERENCE_ADAPTER, copy.deepcopy(policy.peft_config[active]))
        except (KeyError, NotImplementedError, ValueError) as error:
            raise InputError(
                f"model's adapter cannot be kept as the reference beside itself ({one_line(error)}): merge it and "
                "train a new one, or leave the reference out by kl_coef=0"
            ) from error
        weights = {**dict(policy.named_parameters()), **dict(policy.named_buffers())}
        for name, weight in weights.items():
            copied = ".".join(REFERENCE_ADAPTER if part == active else part for part in name.split("."))
            # Some kinds share their frozen parts.
            if copied != name and copied in weights:
                weights[copied].data.copy_(weight.data)
    # Only the active adapter is trained.
    policy.set_adapter(active)


@contextmanager
def as_reference(policy: "PeftModel") -> Iterator[None]:
    """Let the policy compute the outputs of its reference: with its initial adapter, or without a new one."""
    with trained_as_before(policy):
        if REFERENCE_ADAPTER not in policy.peft_config:
            with policy.disable_adapter():
                yield
            return
        own = policy.active_adapter
        policy.set_adapter(REFERENCE_ADAPTER)
        try:
            yield
        finally:
            policy.set_adapter(own)


def place_frozen(models: Iterable[PreTrainedModel | None], device: torch.device) -> None:
    """Move frozen models to the policy's device, whole on every process."""
    for model in models:
        if model is not None:
            unshard(model).to(device)


def check_critic(value_model: PreTrainedModel | None) -> None:
    """Refuse a value model that cannot be any policy's critic: a critic is trained as a whole and must be causal."""
    if value_model is None:
        return
    if value_model.config.num_labels != 1:
        raise InputError(f"value_model has num_labels={value_model.config.num_labels}; expected 1")
    if hasattr(value_model, "peft_config") or getattr(value_model, "_hf_peft_config_loaded", False):
        raise InputError("value_model has an adapter, and only that would be trained: merge the adapter")
    with gather_parameters(value_model):
        if looks_ahead(value_model):
            raise InputError(
                f"value_model of type {value_model.config.model_type} looks at later tokens, so its values would "
                "depend on tokens not sampled yet: use a causal model"
            )


def check_value_model(
    value_model: PreTrainedModel | None, policy: PreTrainedModel, rewards: Sequence[RewardModel]
) -> None:
    """Refuse a value model that cannot be this policy's critic: a critic reads the policy's tokens."""
    check_critic(value_model)
    if value_model is None:
        return
    sizes = [model.config.get_text_config().vocab_size for model in (value_model, policy)]
    if sizes[0] != sizes[1]:
        raise InputError(f"value_model has {sizes[0]} tokens and the policy {sizes[1]}: it reads the policy's tokens")
    if any(reward.model is value_model for reward in rewards):
        raise InputError(
            "value_model is one of the reward models, which are frozen: load it a second time, or by name"
        )


def shared_critic(
    value_model: PreTrainedModel | str | None, policy: PreTrainedModel, args: PPOConfig
) -> AdapterScorer | None:
    """Put the critic of a trainer with `shared_base` on the policy's base; `None` where a group is the baseline.

    Raises:
        InputError: for a whole model.
    """
    if args.baseline == "group" and value_model is None:
        return None
    if isinstance(value_model, nn.Module):
        raise InputError(
            "value_model is a whole model: shared_base=True takes the name of an adapter of the policy's base, or none"
        )
    return put_critic_on(policy, value_model)


def shortest_context(*models: PreTrainedModel | None) -> int | None:
    """Return the longest sequence for all of the models, or `None` if no config says."""
    configs = [model.config.get_text_config() for model in models if model is not None]
    return min(filter(None, (getattr(one, "max_position_embeddings", None) for one in configs)), default=None)


def with_total_steps(args: PPOConfig) -> PPOConfig:
    """Return the arguments with `max_steps` for `total_episodes`.

    Rollouts are whole, so at least this many episodes; where it is more, the main process says so.
    """
    if args.total_episodes is None:
        return args
    rollout = args.local_rollout_batch_size * args.world_size
    rollouts = -(-args.total_episodes // rollout)
    if rollouts * rollout != args.total_episodes and args.process_index == 0:
        print(
            f"--total_episodes {args.total_episodes} is rounded up to {rollouts * rollout}: {rollouts} "
            f"rollout{'s' * (rollouts > 1)} of {rollout} (--per_device_train_batch_size and the like set that)",
            flush=True,
        )
    return changed(args, max_steps=rollouts * args.steps_per_rollout)


def special_tokens(
    processing_class: ProcessingClass, policy: PreTrainedModel, args: PPOConfig
) -> tuple[list[int], list[int]]:
    """Return the ids that end a response, and the ids never sampled: padding, unless it also ends responses.

    They include the ids in `generation_kwargs`, and placeholders of images are never sampled.
    """
    tokenizer = tokenizer_of(processing_class)
    if tokenizer.eos_token_id is None:
        raise InputError(f"tokenizer {tokenizer.name_or_path!r} has no end token (eos_token): PPO needs one")
    check_vocabulary(policy, tokenizer)
    if tokenizer.pad_token_id is None:
        advice = f"set pad_token, for example to the end token {tokenizer.eos_token!r}"
        raise InputError(f"tokenizer {tokenizer.name_or_path!r} has no padding token: {advice}")
    generation_kwargs = args.generation_kwargs or {}
    ends = configured_ends(tokenizer, policy) | ({turn_end(processing_class)} - {None})
    if new := ends - configured_ends(tokenizer, policy):
        names = " and ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(new))))
        warnings.warn(
            f"the chat template ends a turn by {names}, the tokenizer a text by {tokenizer.eos_token!r}: responses "
            "end at either, and so do those of the saved model",
            stacklevel=3,
        )
        policy.generation_config.eos_token_id = sorted(ends)
    if generation_kwargs.get("eos_token_id") is not None:
        ends = (
            set(generation_kwargs["eos_token_id"])
            if isinstance(generation_kwargs["eos_token_id"], list)
            else {generation_kwargs["eos_token_id"]}
        )
    padding = set() if tokenizer.pad_token_id in ends else {tokenizer.pad_token_id}
    return sorted(ends), sorted(padding | place_tokens(policy) | set(generation_kwargs.get("suppress_tokens") or []))


def build_rewards(
    reward_funcs: RewardFunc | list[RewardFunc] | None,
    tokenizers: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None,
    load_kwargs: dict[str, Any],
    policy_tokenizer: PreTrainedTokenizerBase,
    args: PPOConfig,
    own: Sequence[Callable[..., list[float]]] = (),
) -> list[Callable[..., list[float]]]:
    """Turn names and models into reward functions, each model with its own tokenizer; `own` are added to them."""
    if reward_funcs is None:
        reward_funcs = []
    funcs = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    tokenizers = tokenizers if isinstance(tokenizers, list) else [tokenizers] * len(funcs)
    refuse_if(not funcs and not own, "reward_funcs is empty: PPO needs at least one reward")
    if len(tokenizers) != len(funcs):
        raise InputError(f"{len(tokenizers)} reward_processing_classes for {len(funcs)} reward_funcs")
    rewards = []
    for func, tokenizer in zip(funcs, tokenizers, strict=True):
        if isinstance(func, str) and args.shared_base:
            func = AdapterReward(func, tokenizer or saved_tokenizer(func), args.local_rollout_forward_batch_size)
        elif isinstance(func, str):
            name, func = func, scorer_from_name(func, load_kwargs)
            tokenizer = tokenizer or (saved_processor if reads_pictures(func) else saved_tokenizer)(name)
        if isinstance(func, nn.Module):
            load = saved_processor if reads_pictures(func) else saved_tokenizer
            tokenizer = tokenizer or load(func.config._name_or_path)
            func = scoring_model(func, tokenizer, args.local_rollout_forward_batch_size)
        if isinstance(func, TokenRewardModel) and func.tokenizer.get_vocab() != policy_tokenizer.get_vocab():
            why = "its tokenizer is not the policy's: their tokens do not match"
            raise InputError(f"{func.__name__!r} gives a reward for each token, and {why}")
        rewards.append(func)
    return [*rewards, *own]


def reward_models(rewards: Sequence[RewardFunction]) -> list[RewardModel]:
    """Return the models among the rewards and the members of ensembles."""
    every = [member for reward in rewards for member in getattr(reward, "members", [reward])]
    return [reward for reward in every if isinstance(reward, RewardModel)]


def reward_weights(weights: list[float] | None, count: int) -> list[float]:
    """Return one weight per reward, 1 by default."""
    if weights is not None and len(weights) != count:
        raise InputError(f"{len(weights)} reward_weights for {count} reward_funcs")
    if (bad := next((each for each in weights or () if not abs(each) <= MOST_REWARD), None)) is not None:
        raise InputError(f"reward_weights has {bad}: expected finite numbers of at most {MOST_REWARD:g} in size")
    return weights or [1.0] * count


def sampling_config(
    args: PPOConfig, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int], never_sampled: Sequence[int]
) -> GenerationConfig:
    """Return the sampling settings: the policy's own distribution, unless `generation_kwargs` change it."""
    settings = {
        **UNMODIFIED_SAMPLING,
        "max_new_tokens": args.response_length,
        "temperature": args.temperature,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": list(eos_token_ids),
        "bos_token_id": tokenizer.bos_token_id,
        "suppress_tokens": list(never_sampled) or None,
    }
    generation_kwargs = dict(args.generation_kwargs or {})
    for name, argument in (("temperature", "temperature"), ("max_new_tokens", "response_length")):
        if name in generation_kwargs:
            raise InputError(f"generation_kwargs has {name}={generation_kwargs[name]!r}: set {argument} itself")
    # These are in `special_tokens`, also used by the policy's log-probabilities.
    for name in ("eos_token_id", "suppress_tokens"):
        generation_kwargs.pop(name, None)
    settings |= generation_kwargs
    if settings["num_beams"] != 1 or settings.get("num_return_sequences", 1) != 1:
        raise InputError(
            "generation_kwargs: PPO samples, so num_beams must be 1; use num_generations for several responses"
        )
    return GenerationConfig(**settings)


def check_uses(
    args: "PPOConfig", counts: Sequence[tuple[int, int]], value_model: "PreTrainedModel | None", samples: bool
) -> None:
    """Refuse settings without support for images or for a critic, and warn of a critic that does not read images.

    Args:
        counts: per dataset its prompts with images, and all.
        samples: whether a `rollout_func` samples.
    """
    if args.baseline == "group" and value_model is not None:
        raise InputError("baseline='group' has no use of a value_model: leave one of them out")
    if not any(count for count, _ in counts):
        return
    refuse_if(args.use_vllm, NO_VLLM)
    refuse_if(samples, "rollout_func reads no pictures: leave the pictures out, or it")
    # Also where accelerate brings it, and not the flag.
    if args.deepspeed_plugin is not None and any(0 < count < total for count, total in counts):
        # A process whose prompts have none would not take part in gathering or reducing the vision tower.
        raise InputError("deepspeed with pictures in some prompts only: give each prompt a picture, or use DDP")
    if value_model is not None and not reads_pictures(getattr(value_model, value_model.base_model_prefix)):
        kind = type(value_model).__name__
        warnings.warn(f"value_model ({kind}) reads no pictures: its values go by the words alone", stacklevel=3)
