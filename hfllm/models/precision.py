"""Cast a new model to the precision that a loaded one would have."""

from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def cast_weights(model: Model, dtype: torch.dtype) -> Model:
    """Return the model with its weights in `dtype` and its buffers unchanged, as `from_pretrained` loads it.

    `model.to(dtype)` would round buffers too: rotary frequencies in bf16 rotate later positions by wrong angles.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
