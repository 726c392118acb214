"""A mixture of experts: the experts, and the layer that joins them with their router and the MLP of all tokens.

This file imports only torch, transformers and files beside it, and is uploaded to the Hub with modeling_hfllm.py.
Shapes: N tokens, E hidden_size.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import grouped_mm_experts_forward

from .configuration_hfllm import HfllmConfig
from .expert_fields_hfllm import expert_width, is_sparse, shared_width
from .layers_hfllm import HfllmMLP
from .router_hfllm import HfllmRouter


@use_experts_implementation
class HfllmExperts(nn.Module):
    """Gated MLPs of width W in two stacked tensors, (experts, 2 * W, E) and (experts, E, W)."""

    def __init__(self, config: HfllmConfig):
        super().__init__()
        self.num_experts = config.num_local_experts
        width = expert_width(config)
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, tokens_NE: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            # The loop below depends on which experts there are; this is one graph.
            return grouped_mm_experts_forward(self, tokens_NE, indices, weights)
        output = torch.zeros_like(tokens_NE)
        # Under expert parallelism, `num_experts` marks a choice that another rank computes.
        for expert in indices.unique().tolist():
            if expert == self.num_experts:
                continue
            rows, ranks = torch.where(indices == expert)
            gate, up = nn.functional.linear(tokens_NE[rows], self.gate_up_proj[expert]).chunk(2, dim=-1)
            mixed = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert]) * weights[rows, ranks, None]
            output.index_add_(0, rows, mixed.to(output.dtype))
        return output


class HfllmSparseMLP(nn.Module):
    """A mixture of experts in place of the MLP (Shazeer et al. 2017, arXiv:1701.06538)."""

    def __init__(self, config: HfllmConfig):
        super().__init__()
        self.gate = HfllmRouter(config)
        self.experts = HfllmExperts(config)
        width = shared_width(config)
        self.shared_experts = HfllmMLP(config, width) if width else None
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None

    def forward(self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Map (B, S, E) to (B, S, E); `token_mask` (B, S) is 0 for padding, which is no load of the experts."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, indices = self.gate(tokens) if token_mask is None else self.gate(tokens, token_mask)
        output = self.experts(tokens, indices, weights).reshape(hidden_states.shape)
        if self.shared_experts is None:
            return output
        shared = self.shared_experts(hidden_states)
        if self.shared_expert_gate is not None:
            shared = self.shared_expert_gate(hidden_states).sigmoid() * shared
        return output + shared


def build_mlp(config: HfllmConfig, layer_idx: int) -> nn.Module:
    """Return the MLP of a layer, or its experts."""
    return HfllmSparseMLP(config) if is_sparse(config, layer_idx) else HfllmMLP(config)


def last_projections(mlp: nn.Module) -> list[nn.Module]:
    """Return what writes into the residual stream: an MLP's `down_proj`, or the experts and that of the shared MLP."""
    if isinstance(mlp, HfllmMLP):
        return [mlp.down_proj]
    return [mlp.experts] if mlp.shared_experts is None else [mlp.experts, mlp.shared_experts.down_proj]


def fp32_names(config: HfllmConfig) -> list[str]:
    """Return the names of weights that stay in fp32 where a model is loaded in half precision: those of the routers
    that compute in it, as in DeepSeek's."""
    is_plain = (config.scoring_func, config.topk_method) == ("softmax", "greedy")
    return [] if is_plain else ["mlp.gate.weight", "e_score_correction_bias"]


def init_experts(module: nn.Module, std: float, residual_std: float) -> None:
    """Initialize a router or stacked experts, whose `down_proj` writes into the residual stream."""
    for name, parameter in module.named_parameters(recurse=False):
        init.normal_(parameter, mean=0.0, std=residual_std if name == "down_proj" else std)
    for buffer in module.buffers(recurse=False):
        init.zeros_(buffer)
