"""One layer of a packed model: direct kernel calls on weights that are joined and laid out for them.

Shapes: B rows, Q new tokens of each, N = B * Q tokens, H query heads, K key-value heads, D head_dim, E hidden_size,
W visible columns of the cache, R rotated dimensions of a head.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import SiLUActivation

from hfllm.generation.packed.projections import Function, Projection, added
from hfllm.models.family.attention_hfllm import rotate_heads
from hfllm.models.family.layers_hfllm import HfllmMLP, HfllmRMSNorm
from hfllm.models.family.modeling_hfllm import HfllmDecoderLayer, HfllmForCausalLM

if TYPE_CHECKING:
    from hfllm.generation.packed.ragged_cache import RaggedLayer
    from hfllm.models.family.configuration_hfllm import HfllmConfig

# Rotations of all tokens: factors of complex pairs, or cosines and signed sines, each (B, Q, 1, R).
Rotation = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class PackedLayer:
    """`HfllmDecoderLayer.forward` over tokens (N, E), for every option of the family.

    Args:
        layer: the layer to pack.
        config: the model's config.
        make: function that joins linear layers into one function.
        turns: whether heads are rotated as complex numbers, see `interleaved_rotary`.
    """

    def __init__(
        self,
        layer: HfllmDecoderLayer,
        config: "HfllmConfig",
        make: Callable[[Sequence[nn.Linear]], Projection],
        turns: bool,
    ):
        attention = layer.self_attn
        self.kind, self.use_rope = layer.layer_type, attention.use_rope
        self.is_post, self.is_parallel = layer.norm_placement == "post", layer.parallel_block
        self.input_norm = norm_of(layer.input_layernorm)
        self.mlp_norm = None
        if not (layer.parallel_block and layer.shared_norm):
            self.mlp_norm = norm_of(layer.post_attention_layernorm)
        self.heads, self.key_heads, self.size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.scaling = attention.scaling
        query_and_key = [attention.q_proj, attention.k_proj]
        if turns:
            query_and_key = [paired(linear, config.head_dim) for linear in query_and_key]
        self.qkv = make([*query_and_key, attention.v_proj])
        self.o_proj = make([attention.o_proj])
        self.q_norm = None if attention.q_norm is None else norm_of(attention.q_norm)
        self.k_norm = None if attention.k_norm is None else norm_of(attention.k_norm)
        self.mlp = mlp_of(layer.mlp, make)

    def __call__(
        self,
        states: torch.Tensor,
        rows: int,
        rotation: Rotation | None,
        mask: torch.Tensor | None,
        kept: "RaggedLayer",
    ) -> torch.Tensor:
        if self.is_post:
            attended = self.input_norm(self._attention(states, states, rows, rotation, mask, kept))
            return self.mlp_norm(self.mlp(attended, attended))
        normed = self.input_norm(states)
        attended = self._attention(normed, states, rows, rotation, mask, kept)
        if self.is_parallel:
            return self.mlp(normed if self.mlp_norm is None else self.mlp_norm(states), attended)
        return self.mlp(self.mlp_norm(attended), attended)

    def _attention(
        self,
        states: torch.Tensor,
        onto: torch.Tensor,
        rows: int,
        rotation: Rotation | None,
        mask: torch.Tensor | None,
        kept: "RaggedLayer",
    ) -> torch.Tensor:
        heads, key_heads, size = self.heads, self.key_heads, self.size
        qkv = self.qkv(states)  # (N, (H + 2K) * D)
        self._turn(qkv, rows, rotation if self.use_rope else None)
        if not kept.is_initialized:
            kept.allocate(qkv, rows, (key_heads, size), (key_heads, size))
        key, value = kept.store(qkv[:, heads * size :])
        # The queries of heads that share keys are stacked: (B, K, H / K * Q, D).
        query, groups, length = qkv[:, : heads * size], heads // key_heads, len(qkv) // rows
        if length == 1:
            query = query.view(rows, key_heads, groups, size)
        else:
            query = query.view(rows, length, key_heads, groups, size).permute(0, 2, 3, 1, 4).flatten(2, 3)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scaling)
        if length > 1:
            output = output.unflatten(2, (groups, length)).permute(0, 3, 1, 2, 4)
        return self.o_proj(output.reshape(rows * length, heads * size), onto)

    def _turn(self, qkv: torch.Tensor, rows: int, rotation: Rotation | None) -> None:
        """Normalize and rotate queries and keys, in place."""
        heads, key_heads, size = self.heads, self.key_heads, self.size
        if isinstance(rotation, torch.Tensor):
            pairs = torch.view_as_complex(qkv.view(len(qkv), heads + 2 * key_heads, size // 2, 2))
            (pairs[:, : heads + key_heads] if rotation.shape[1] == 1 else pairs).mul_(rotation)
            return
        qk = qkv.view(rows, -1, heads + 2 * key_heads, size)[:, :, : heads + key_heads]
        if self.q_norm is not None:
            qk.copy_(torch.cat((self.q_norm(qk[:, :, :heads]), self.k_norm(qk[:, :, heads:])), dim=2))
        if rotation is not None:
            qk.copy_(rotate_heads(qk, *rotation))


def interleaved_rotary(model: HfllmForCausalLM) -> bool:
    """Return whether a head's halves are stored as interleaved real and imaginary parts.

    Rotating them is then one product of complex numbers. It needs copies of the weights in that order, as there are on
    a CPU, and heads that are rotated as a whole and not normalized.
    """
    rotary, config = getattr(model.model, "rotary_emb", None), model.config
    if rotary is None or config.qk_norm or model.device.type != "cpu":
        return False
    return 2 * len(rotary.inv_freq) == config.head_dim and model.dtype in (torch.float32, torch.float64)


def paired(linear: nn.Linear, size: int) -> nn.Linear:
    """Return a copy whose outputs i and i + size / 2 of each head of that size are adjacent."""

    def order(tensor: torch.Tensor) -> nn.Parameter:
        return nn.Parameter(tensor.unflatten(0, (-1, 2, size // 2)).transpose(1, 2).flatten(0, 2), requires_grad=False)

    copy = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    copy.weight = order(linear.weight)
    if linear.bias is not None:
        copy.bias = order(linear.bias)
    return copy


def norm_of(norm: nn.Module) -> Function:
    """Return a norm as a function of its input alone."""
    if type(norm) is not HfllmRMSNorm or norm.unit_offset or norm.weight.dtype != torch.float32:
        return norm
    shape, eps = norm.weight.shape, norm.eps
    if norm.weight.device.type != "cpu":
        return lambda states: torch.rms_norm(states, shape, norm.weight, eps)
    # On a CPU `rms_norm` is eight kernels. x w sqrt(E) / sqrt(sum(x^2) + E eps) is the same in four.
    weight, floor = norm.weight.detach() * shape[0] ** 0.5, norm.weight.new_tensor((shape[0] * eps) ** 0.5)
    length = torch.linalg.vector_norm
    return lambda states: (states * weight).div_(torch.hypot(length(states, dim=-1, keepdim=True), floor))


def mlp_of(mlp: nn.Module, make: Callable[[Sequence[nn.Linear]], Projection]) -> Projection:
    """Return an MLP as a function of tokens (N, E) and of what to add to; a mixture of experts is not changed."""
    if type(mlp) is not HfllmMLP:
        return added(mlp)
    activate = F.silu if isinstance(mlp.act_fn, (nn.SiLU, SiLUActivation)) else mlp.act_fn
    down = make([mlp.down_proj])
    if not mlp.is_gated:
        up = make([mlp.up_proj])
        return lambda states, onto: down(activate(up(states)), onto)
    both, width = make([mlp.gate_proj, mlp.up_proj]), mlp.gate_proj.out_features

    def gated(states: torch.Tensor, onto: torch.Tensor) -> torch.Tensor:
        gate, up = both(states).split(width, dim=-1)
        return down(activate(gate).mul_(up), onto)

    return gated


def additive(mask: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the additive mask for scores of stacked queries: (B, 1, Q, W) to (B, 1, groups * Q, W)."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    return bias.repeat(1, 1, groups, 1) if groups > 1 else bias
