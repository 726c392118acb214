"""A learning rate that follows the batch: tuned on one, right for another."""

import math
from dataclasses import dataclass, field
from typing import Any

from hfllm.errors import InputError

# What a batch that is `ratio` times as large multiplies the learning rate by.
RULES = {
    "none": lambda ratio: 1.0,
    # For Adam: Malladi et al. 2022, arXiv:2205.10287.
    "sqrt": math.sqrt,
    # For SGD: Goyal et al. 2017, arXiv:1706.02677.
    "linear": lambda ratio: ratio,
}


@dataclass
class BatchArguments:
    """How the learning rate follows the batch."""

    lr_scaling_rule: str = field(
        default="none",
        metadata={
            "help": "What a larger global batch does to --learning_rate: 'sqrt' (for Adam, arXiv:2205.10287) or "
            "'linear' (for SGD, arXiv:1706.02677) in its ratio to --lr_scaling_base_batch_size.",
            "choices": ["none", "sqrt", "linear"],
        },
    )
    lr_scaling_base_batch_size: int | None = field(
        default=None,
        metadata={"help": "Global batch that --learning_rate is for: sequences of an optimizer step, all processes."},
    )


def global_batch_size(training_args: Any) -> int:
    """Sequences (rows, pairs, episodes) that one optimiser step learns from, on all processes."""
    return (
        training_args.per_device_train_batch_size
        * training_args.gradient_accumulation_steps
        * training_args.world_size
    )


def scale_learning_rate(script_args: Any, training_args: Any) -> dict[str, float]:
    """Multiply the learning rates of `training_args`, in place, by what `--lr_scaling_rule` says of its batch.

    Call it once, before the trainer is built.

    Returns:
        What the report should show: `learning_rate` as it is used and `global_batch_size`; nothing without a rule.

    Raises:
        InputError: for a rule without a base batch size, or the other way round, a size that is not positive, or a
            rate that DeepSpeed's own file sets.
    """
    rule, base = script_args.lr_scaling_rule, script_args.lr_scaling_base_batch_size
    if rule not in RULES:
        raise InputError(f"--lr_scaling_rule {rule!r} is not one of {', '.join(RULES)}")
    if rule == "none":
        if base is not None:
            raise InputError(f"--lr_scaling_base_batch_size {base} needs --lr_scaling_rule sqrt or linear")
        return {}
    if base is None:
        raise InputError(
            f"--lr_scaling_rule {rule} needs --lr_scaling_base_batch_size: the global batch --learning_rate is for"
        )
    if base < 1:
        raise InputError(f"--lr_scaling_base_batch_size {base}: expected at least 1")
    plugin = getattr(training_args, "deepspeed_plugin", None)
    if plugin is not None and "optimizer" in plugin.deepspeed_config:
        raise InputError(f"--lr_scaling_rule {rule}: DeepSpeed's file has an optimizer section, and a rate of its own")
    batch = global_batch_size(training_args)
    factor = RULES[rule](batch / base)
    training_args.learning_rate *= factor
    # PPO's critic may have one of its own.
    if getattr(training_args, "value_learning_rate", None) is not None:
        training_args.value_learning_rate *= factor
    return {"learning_rate": training_args.learning_rate, "global_batch_size": batch}
