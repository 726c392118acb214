"""A new model in the precision that a loaded one would have."""

from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def cast_weights(model: Model, dtype: torch.dtype) -> Model:
    """The model with its weights in `dtype`, and its buffers as they are, which is how `from_pretrained` loads it.

    `model.to(dtype)` would round buffers too: rotary frequencies in bf16 turn later positions by other angles.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
