"""Warn of weights that training does not change, because their precision rounds the updates away."""

import warnings

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# Steps after the warm-up in which weights may change.
WATCHED_STEPS = 8
# In fp32 all of them do; in bf16, four in a hundred at a usual learning rate.
LEAST_CHANGED = 0.5


class StalledWeights(TrainerCallback):
    """Callback that warns once if most weights of a layer in half precision are the same after several steps.

    Numbers in bf16 have 8 bits: an update of less than 1/512 of a weight is rounded away. In fp32 under bf16 autocast
    (`--dtype float32 --bf16`) the forward pass is as fast and no update is lost.
    """

    def __init__(self):
        self._name, self._before, self._begin, self._due = "", None, 0, 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        self._before = None
        watched = _half_precision_weight(model)
        if watched is not None:
            self._name, weight = watched
            self._before = weight.detach().clone()
            self._begin = state.global_step
            self._due = max(state.global_step, args.get_warmup_steps(state.max_steps)) + WATCHED_STEPS

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        if self._before is None or state.global_step < self._due:
            return
        weight = model.get_parameter(self._name).detach()
        changed = (weight != self._before).float().mean().item()
        self._before = None
        if changed < LEAST_CHANGED and state.is_world_process_zero:
            kind, steps = str(weight.dtype).removeprefix("torch."), state.global_step - self._begin
            warnings.warn(
                f"{self._name}: {changed:.0%} of the weights changed in {steps} steps, since {kind} "
                "rounds small updates away: load the model in float32 and compute in bfloat16 "
                "(--dtype float32 --bf16), or train an adapter (--use_peft)",
                stacklevel=2,
            )


def _half_precision_weight(model: nn.Module | None) -> tuple[str, nn.Parameter] | None:
    """Return the first trained weight of a linear layer in half precision, with its name."""
    for name, parameter in model.named_parameters() if model is not None else ():
        is_linear = parameter.dim() == 2 and "embed" not in name
        # ZeRO-3 and FSDP split weights, and keep fp32 copies of their own.
        is_split = hasattr(parameter, "ds_id") or hasattr(parameter, "device_mesh")
        if is_linear and parameter.requires_grad and not is_split and parameter.dtype in (torch.bfloat16, torch.half):
            return name, parameter
    return None
