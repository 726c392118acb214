"""Models inside of engines: partitioned by ZeRO-3, in evaluation mode or without dropout, and at scheduled rates."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from hfllm.errors import InputError

if TYPE_CHECKING:
    from transformers import TrainingArguments


# ---- ZeRO-3 ----


@contextmanager
def gather_parameters(model: nn.Module) -> Iterator[None]:
    """Gather a model partitioned by ZeRO-3 within this context; every process has to enter."""
    spread = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not spread:
        yield
        return
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    if all(parameter.ds_status == ZeroParamStatus.AVAILABLE for parameter in spread):
        # An outer context would find it partitioned again.
        yield
        return
    with deepspeed.zero.GatheredParameters(spread):
        yield


def unshard(model: nn.Module) -> nn.Module:
    """Undo in place ZeRO-3's partitioning of every loaded model, for one not trained by its engine.

    Returns:
        The model, whole on all processes; every process has to call this.
    """
    whole: dict[int, nn.Parameter] = {}
    with gather_parameters(model):
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if hasattr(parameter, "ds_id"):
                    # Tied weights stay tied.
                    copy = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                    module._parameters[name] = whole.setdefault(parameter.ds_id, copy)
    return model


# ---- evaluation mode and dropout ----


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode within this context; each module gets its own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def disable_dropout(*models: nn.Module | None) -> None:
    """Set every dropout probability of the models to zero, permanently."""
    for model in models:
        if model is None:
            continue
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            # Attention modules store the probability as a number, or read it from the config.
            for holder in (module, getattr(module, "config", None)):
                for name, value in vars(holder).items() if holder is not None else ():
                    if isinstance(value, float) and (name.endswith("dropout") or name.endswith("pdrop")):
                        setattr(holder, name, 0.0)


# ---- schedules ----


def schedule_of(args: "TrainingArguments", num_steps: int) -> Callable[[int], float]:
    """Return the learning rate's factor by step.

    Raises:
        InputError: for a schedule other than a function of the step.
    """
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(num_steps),
        num_training_steps=num_steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    if not isinstance(scheduler, LambdaLR):
        raise InputError(f"--lr_scheduler_type {args.lr_scheduler_type}: expected one that goes by the step alone")
    return scheduler.lr_lambdas[0]


# ---- sharding ----


def shards_parameters(training_args: "TrainingArguments") -> bool:
    """Return whether every process holds only a part of the weights or of their optimizer states."""
    is_fsdp = bool(training_args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return is_fsdp or training_args.deepspeed_plugin is not None
