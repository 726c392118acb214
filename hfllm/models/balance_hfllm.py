"""The load-balancing loss of a mixture of experts.

This file imports only torch and transformers, and is uploaded to the Hub with modeling_hfllm.py.
"""

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .configuration_hfllm import HfllmConfig
from .expert_fields_hfllm import is_sparse


@torch.compiler.assume_constant_result
def install_capturing_hooks(model: PreTrainedModel) -> None:
    """Install the hooks of `capture_outputs`: a compiler cannot trace their installation, so it runs it instead."""
    maybe_install_capturing_hooks(model)


def balance_loss(
    config: HfllmConfig, router_logits: tuple[torch.Tensor, ...], attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """Return the load-balancing loss over all layers (arXiv:2101.03961, equations 4 to 6); padding does not count.

    Of sigmoid scores it takes each expert's share of their sum (arXiv:2412.19437, equations 17 to 20).

    Args:
        config: of the model.
        router_logits: of each layer with experts, (tokens, experts).
        attention_mask: (B, S) with 0 for padding; one of another shape says nothing about padding.
    """
    mask = attention_mask if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2 else None
    if config.scoring_func == "sigmoid":
        # The softmax of the logarithms of scores is their share.
        router_logits = tuple(nn.functional.logsigmoid(logits) for logits in router_logits)
    return load_balancing_loss_func(router_logits, config.num_local_experts, config.num_experts_per_tok, mask)


def counts_load(config: HfllmConfig, layer_idx: int, attention_mask: torch.Tensor | dict | None) -> bool:
    """Return whether a layer's experts have a bias that follows their load, and the mask says what is padding."""
    is_followed = bool(config.router_bias_update_rate) and is_sparse(config, layer_idx)
    return is_followed and isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2


def check_gradients(layers: nn.ModuleList, router_logits: tuple[torch.Tensor, ...], states: torch.Tensor) -> None:
    """Refuse reentrant activation checkpointing, which runs layers without a graph and so loses this loss's gradient.

    Args:
        layers: decoder layers, those with experts with the router `mlp.gate`.
        router_logits: of each of these.
        states: the trunk's output, which has a gradient if anything in the trunk is trained.

    Raises:
        ValueError: naming the two ways out.
    """
    sparse = [layer for layer in layers if hasattr(layer.mlp, "gate")]
    for layer, logits in zip(sparse, router_logits, strict=False):
        is_trained = layer.mlp.gate.weight.requires_grad or layer.gradient_checkpointing
        if is_trained and states.requires_grad and not logits.requires_grad:
            raise ValueError(
                "reentrant activation checkpointing loses the gradient of the experts' load-balancing loss: use "
                "use_reentrant=False (the default), or router_aux_loss_coef=0"
            )
