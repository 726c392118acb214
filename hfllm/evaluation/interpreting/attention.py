"""Where a model looks: attention weights of any causal class, by eager attention for the length of a call.

Weights say what is mixed in, not what matters (Jain and Wallace 2019, arXiv:1902.10186).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hfllm.errors import InputError
from hfllm.evaluation.interpreting.hooks import ATTENTION, Parts


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Context manager in which a model's attention is the eager one, which returns its weights."""
    from transformers import PreTrainedModel

    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    pending = list(configs.values())
    while pending:
        config = pending.pop()
        inner = [getattr(config, key, None) for key in config.sub_configs]
        new = [each for each in inner if each is not None and id(each) not in configs]
        configs |= {id(each): each for each in new}
        pending += new
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        for config, implementation in before:
            # The field itself: the property would hand it on to configs inside, which may have had another.
            config._attn_implementation_internal = implementation


def attention_weights(parts: Parts, input_ids: torch.Tensor, places: torch.Tensor) -> list[torch.Tensor | None]:
    """Return for each layer the weights (B, H, S) in 32 bits from one place of each row; `None` for a layer without.

    Args:
        input_ids: (B, S), padded on the right.
        places: (B,), those that look.

    Raises:
        InputError: when no layer gives weights.
    """
    rows = torch.arange(len(places), device=input_ids.device)
    found: list[torch.Tensor | None] = [None] * len(parts.layers)
    handles = []

    def keep(layer: int):
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if isinstance(weights, torch.Tensor) and weights.dim() == 4:
                found[layer] = weights[rows, :, places].detach().float()

        return hook

    try:
        for layer in range(len(parts.layers)):
            handles.append(parts.component(layer, ATTENTION).register_forward_hook(keep(layer)))
        with torch.no_grad(), eager_attention(parts.model):
            parts.model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    if all(each is None for each in found):
        raise InputError(f"{type(parts.model).__name__} returns no attention weights, also with eager attention")
    return found


def looked_at(weights: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the share of the attention (B, H) that goes to the places of a mask (B, S).

    Args:
        weights: (B, H, S).
    """
    return (weights * mask[:, None].to(weights)).sum(-1)
