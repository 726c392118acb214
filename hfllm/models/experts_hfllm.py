"""A mixture of experts: the router, the experts and the layer that joins them.

This file imports only torch, transformers and files beside it, and is uploaded to the Hub with modeling_hfllm.py.
Shapes: N tokens, E hidden_size.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from .configuration_hfllm import HfllmConfig


class HfllmRouter(nn.Module):
    """Selects the experts of each token: softmax over all of them, the best k, renormalized (Mixtral, section 2.1)."""

    def __init__(self, config: HfllmConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size))

    def forward(self, tokens_NE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the logits (N, experts), and the weights and indices (N, k) of the chosen experts."""
        logits = nn.functional.linear(tokens_NE, self.weight)
        weights, indices = nn.functional.softmax(logits, dim=-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        return logits, weights / weights.sum(dim=-1, keepdim=True), indices


@use_experts_implementation
class HfllmExperts(nn.Module):
    """Gated MLPs in two stacked tensors, (experts, 2 * intermediate_size, E) and (experts, E, intermediate_size)."""

    def __init__(self, config: HfllmConfig):
        super().__init__()
        self.num_experts = config.num_local_experts
        width = config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, tokens_NE: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
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

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, indices = self.gate(tokens)
        return self.experts(tokens, indices, weights).reshape(hidden_states.shape)
