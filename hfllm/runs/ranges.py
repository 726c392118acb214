"""Which numbers a flag may have: one table for the flags of all recipes, checked as soon as they are read.

A learning rate below 0 or NaN, a batch of no rows or an adapter of rank 0 would otherwise train for minutes, or end
somewhere in a library. Flags that a stage checks itself, with reasons of its own, are not here.
"""

import math
import types
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Union, get_args, get_origin, get_type_hints

from hfllm.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# numpy's generators take no other seeds.
LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Range:
    """The values that some flags take besides none at all.

    Args:
        accepted: the values in words, after "expected".
        holds: whether a finite number is one of them.
        flags: the flags.
    """

    accepted: str
    holds: Callable[[float], bool]
    flags: tuple[str, ...]


RANGES = (
    Range(
        "at least 1",
        lambda value: value >= 1,
        (
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            *("eval_accumulation_steps", "dataset_num_proc", "lora_r", "max_samples", "lora_alpha"),
            *("num_examples", "num_pairs", "num_prompts", "num_eval_prompts", "num_samples", "response_length"),
            *("max_length", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
            *("num_key_value_heads", "max_position_embeddings", "student_layers_every", "student_hidden_size"),
            *("student_num_hidden_layers", "student_num_attention_heads", "num_reward_models", "total_episodes"),
            *("dataloader_prefetch_factor", "ddp_timeout", "retrieval_top_k"),
        ),
    ),
    Range("at least 1, or -1 for --num_train_epochs", lambda value: value >= 1 or value == -1, ("max_steps",)),
    Range(
        "at least 0",
        lambda value: value >= 0,
        ("dataloader_num_workers", "num_documents", "sample_steps", "max_row_bytes"),
    ),
    Range(
        "a number above 0",
        lambda value: value > 0,
        (
            *("num_train_epochs", "adam_epsilon", "temperature", "logging_steps", "save_steps", "eval_steps"),
            *("value_learning_rate", "initializer_range", "student_initializer_range", "peak_flops"),
            *("neftune_noise_alpha", "uncertainty_coef"),
        ),
    ),
    Range(
        "a number of at least 0",
        lambda value: value >= 0,
        (
            *("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "eval_delay", "world_seed"),
            *("z_loss_coef", "loss_chunk_size", "center_rewards_coefficient", "router_aux_loss_coef", "judge_margin"),
            "reward_timeout",
        ),
    ),
    Range(
        "a share in [0, 1]",
        lambda value: 0 <= value <= 1,
        ("warmup_ratio", "mixed_prompts", "share_of_thoughts", "grounded_fraction"),
    ),
    Range(
        "a number in [0, 1)",
        lambda value: 0 <= value < 1,
        (
            *("lora_dropout", "label_smoothing_factor", "adam_beta1", "adam_beta2"),
            *("world_deeds", "world_reasoning", "world_tools", "world_passages"),
        ),
    ),
    Range(
        f"a whole number from 0 to {LARGEST_SEED}",
        lambda value: 0 <= value <= LARGEST_SEED,
        ("seed", "data_seed", "comparison_seed"),
    ),
)
# Where no limit is a wish: gradients are measured, and none is clipped.
MAY_BE_INFINITE = frozenset(("max_grad_norm",))
OF_FLAG = {flag: each for each in RANGES for flag in each.flags}


def check_ranges(*parsed: "DataclassInstance") -> None:
    """Refuse numbers that make no sense for their flag, NaN and infinity among them.

    Args:
        parsed: the flags as parsed.

    Raises:
        InputError: naming the flag, the value and what is accepted.
    """
    # For recipes that also do something without training.
    may_train_nothing = any(getattr(group, "may_train_nothing", False) for group in parsed)
    for group in parsed:
        hints = get_type_hints(type(group))
        for item in fields(group):
            if may_train_nothing and item.name == "max_steps" and getattr(group, item.name) == 0:
                continue
            if item.init:
                _check(item.name, getattr(group, item.name), hints[item.name])


def _check(flag: str, value: object, kind: object) -> None:
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if not {int, float} & set(options):
        return
    accepted = OF_FLAG[flag].accepted if flag in OF_FLAG else "a number"
    if value is None:
        if types.NoneType not in options:
            raise InputError(f"--{flag} has no value: expected {accepted}")
        return
    # A truth value is a number to Python.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number:
        # A field that takes other types too, such as warmup_steps in words, is the library's to judge.
        if set(options) <= {int, float, types.NoneType}:
            raise InputError(f"--{flag} {value!r}: expected {accepted}")
        return
    is_bounded = math.isfinite(value) or (flag in MAY_BE_INFINITE and value == math.inf)
    if not is_bounded or (flag in OF_FLAG and not OF_FLAG[flag].holds(value)):
        raise InputError(f"--{flag} {value}: expected {accepted}")
