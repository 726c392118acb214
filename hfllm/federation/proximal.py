"""FedProx: keep local training near the weights of the round (Li et al. 2020, arXiv:1812.06127)."""

import math

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hfllm.errors import InputError


class ProximalTerm(TrainerCallback):
    """Callback that adds mu / 2 |w - w_round|^2 to the loss of any `Trainer`, by its gradient mu (w - w_round).

    The gradient is added once per optimizer step, after micro-batches are summed and gradients clipped, so that
    neither gradient accumulation nor clipping changes it. Add a new one in each round: it remembers the weights that
    training begins with.

    Args:
        strength: mu; 0 changes nothing.
    """

    def __init__(self, strength: float):
        if not (math.isfinite(strength) and strength >= 0):
            raise InputError(f"the strength of the proximal term is {strength}; expected 0 or more")
        self.strength = strength
        self._received: dict[str, Tensor] = {}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        self._received = {
            name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad
        }

    @torch.no_grad()
    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        for name, value in model.named_parameters():
            if value.grad is not None:
                value.grad.add_(value - self._received[name], alpha=self.strength)
