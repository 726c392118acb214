"""Scale a learning rate tuned with one batch size to another, and choose Muon."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from hfllm.errors import refuse_if
from hfllm.flags import changed, flag

if TYPE_CHECKING:
    from transformers import TrainingArguments

Trained = TypeVar("Trained", bound="TrainingArguments")

# Factor on the learning rate for a batch `ratio` times as large.
RULES = {
    "none": lambda ratio: 1.0,
    # For Adam: Malladi et al. 2022, arXiv:2205.10287.
    "sqrt": math.sqrt,
    # For SGD: Goyal et al. 2017, arXiv:1706.02677.
    "linear": lambda ratio: ratio,
}


@dataclass(frozen=True)
class BatchArguments:
    """How the learning rate depends on the batch size."""

    lr_scaling_rule: str = flag(
        "none",
        "How --learning_rate grows with the global batch: 'sqrt' (for Adam, arXiv:2205.10287) or "
        "'linear' (for SGD, arXiv:1706.02677) of its ratio to --lr_scaling_base_batch_size.",
        choices=["none", "sqrt", "linear"],
    )
    lr_scaling_base_batch_size: int | None = flag(
        None, "Global batch that --learning_rate was tuned for: sequences per optimizer step, all processes."
    )


@dataclass(frozen=True)
class MuonArguments:
    """Which optimizer."""

    use_muon: bool = flag(False, "Learn the matrices of the layers by Muon, the rest by AdamW, at one learning rate.")


def global_batch_size(args: "TrainingArguments") -> int:
    """Return the sequences (rows, pairs, episodes) per optimizer step of a trainer, over all processes."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def sets_optimizer(args: "TrainingArguments") -> bool:
    """Return whether DeepSpeed's file has an optimizer section, with a rate of its own."""
    plugin = getattr(args, "deepspeed_plugin", None)
    return plugin is not None and "optimizer" in plugin.deepspeed_config


def scaled_learning_rate(scaling: BatchArguments, args: Trained) -> tuple[Trained, dict[str, float]]:
    """Return a trainer's arguments with learning rates scaled to its batch size, and the values to report.

    Returns:
        The arguments, unchanged without a rule; and `learning_rate` as used with `global_batch_size`, or nothing.

    Raises:
        InputError: for a rule without a base batch size, or the other way round, a size not above 0, a missing
            rate, or one set by DeepSpeed's config file.
    """
    rule, base = scaling.lr_scaling_rule, scaling.lr_scaling_base_batch_size
    rule_flag = f"--lr_scaling_rule {rule}"
    refuse_if(rule not in RULES, f"--lr_scaling_rule {rule!r} is not one of {', '.join(RULES)}")
    if rule == "none":
        refuse_if(base is not None, f"--lr_scaling_base_batch_size {base} needs --lr_scaling_rule sqrt or linear")
        return args, {}
    refuse_if(base is None, f"{rule_flag} needs --lr_scaling_base_batch_size: the global batch --learning_rate is for")
    refuse_if(args.learning_rate is None, f"{rule_flag} needs --learning_rate: the rate that is scaled")
    refuse_if(base < 1, f"--lr_scaling_base_batch_size {base}: expected at least 1")
    refuse_if(sets_optimizer(args), f"{rule_flag}: DeepSpeed's file has an optimizer section, which sets its own rate")
    batch = global_batch_size(args)
    factor = RULES[rule](batch / base)
    # PPO's critic may have its own rate.
    rates = {
        name: rate * factor
        for name in ("learning_rate", "value_learning_rate")
        if (rate := getattr(args, name, None)) is not None
    }
    return changed(args, **rates), {"learning_rate": rates["learning_rate"], "global_batch_size": batch}
