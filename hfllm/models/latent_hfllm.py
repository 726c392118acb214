"""Multi-head latent attention: keys and values of all heads are made from one small vector per token.

DeepSeek-V2 (arXiv:2405.04434, section 2.1), with the names and the arithmetic of transformers' DeepSeek-V3. A cache
holds the latent and one rotated key per token and layer, in the place of keys and values, as there; every cache class
of transformers takes them.

This file imports only torch, transformers and files beside it, and is uploaded to the Hub with modeling_hfllm.py.
Shapes: B batch, S sequence, T keys, H heads, E hidden_size, L kv_lora_rank, N qk_nope_head_dim, R qk_rope_head_dim,
V v_head_dim.
"""

import math

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention_hfllm import HfllmAttention, apply_rotary_pos_emb
from .banded_hfllm import forget_all
from .configuration_hfllm import HfllmConfig
from .layers_hfllm import HfllmRMSNorm
from .memory_hfllm import is_unobserved

# That of all models with latents in transformers, whatever the epsilon of their other norms.
NORM_EPS = 1e-6
# Queries of one call that look at latents directly, at most: their scores are in memory all at once.
MOST_ABSORBED = 16


class HfllmLatentAttention(HfllmAttention):
    """Attention whose keys and values are products of one latent per token (DeepSeek-V2, equations 9 to 19).

    Attributes:
        absorb: while decoding, multiply queries and outputs by the two halves of `kv_b_proj` in place of spreading all
            latents into keys and values again for each token (section 2.1.2: the same products in another order). It
            is off by itself in training, and where hooks, adapters or quantization on `kv_b_proj` would be passed
            over. Set it to False, on one module or on this class, to spread them always.
    """

    absorb = True

    def __init__(self, config: HfllmConfig, layer_idx: int):
        nn.Module.__init__(self)
        self.sizes = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.head_dim, self.rank = config.qk_nope_head_dim + config.qk_rope_head_dim, config.kv_lora_rank
        self.num_key_value_groups = 1
        self._set_common(config, layer_idx)
        self.scaling = (config.query_pre_attn_scalar or self.head_dim) ** -0.5 * yarn_factor(config, layer_idx)
        self.is_interleaved = config.rope_interleave
        hidden, heads, compressed = config.hidden_size, config.num_attention_heads, config.q_lora_rank
        nope, rotated, value = self.sizes
        self.is_compressed = compressed is not None
        if self.is_compressed:
            self.q_a_proj = nn.Linear(hidden, compressed, bias=config.attention_bias)
            self.q_a_layernorm = HfllmRMSNorm(compressed, NORM_EPS)
            self.q_b_proj = nn.Linear(compressed, heads * self.head_dim, bias=False)
        else:
            self.q_proj = nn.Linear(hidden, heads * self.head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.rank + rotated, bias=config.attention_bias)
        self.kv_a_layernorm = HfllmRMSNorm(self.rank, NORM_EPS)
        self.kv_b_proj = nn.Linear(self.rank, heads * (nope + value), bias=False)
        self.o_proj = nn.Linear(heads * value, hidden, bias=config.attention_output_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output (B, S, E) and, from eager attention, the weights (B, H, S, T). Arguments are Llama's."""
        nope, rotated, _ = self.sizes
        # Heads after tokens until the end: torch's kernel gives its output the layout of the queries.
        query = self._queries(hidden_states).unflatten(-1, (-1, self.head_dim))
        query, query_rotated = query.split((nope, rotated), dim=-1)
        latent, shared = self.kv_a_proj_with_mqa(hidden_states).unsqueeze(2).split((self.rank, rotated), dim=-1)
        latent = self.kv_a_layernorm(latent)
        if position_embeddings is not None and self.use_rope:
            if self.is_interleaved:
                query_rotated, shared = halves_apart(query_rotated), halves_apart(shared)
            query_rotated, shared = apply_rotary_pos_emb(query_rotated, shared, *position_embeddings, unsqueeze_dim=2)
        # One head, (B, 1, S, L) and (B, 1, S, R), as all cache classes take keys and values.
        latent, shared = latent.transpose(1, 2), shared.transpose(1, 2)
        if cache is not None:
            latent, shared = cache.update(latent, shared, self.layer_idx, kwargs=kwargs)
            if self.sliding_window == 1:
                forget_all(cache, self.layer_idx)
            if self._absorbs(query, latent, attention_mask):
                return self._attend_to_latents(query, query_rotated, latent, shared, attention_mask)
        query = torch.cat((query, query_rotated), dim=-1).transpose(1, 2)
        key, value = self._spread(latent, shared)
        if self._needs_one_size(key, value):
            size = max(key.shape[-1], value.shape[-1])
            query, key, value = (padded(states, size) for states in (query, key, value))
        output, weights = self._attend(query, key, value, attention_mask, **kwargs)
        return self.o_proj(output[..., : self.sizes[2]].flatten(2)), weights

    def _queries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.is_compressed:
            return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        return self.q_proj(hidden_states)

    def _spread(self, latent: torch.Tensor, shared: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys (B, H, T, N + R) and values (B, H, T, V) of all heads."""
        nope, _, size = self.sizes
        key, value = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (-1, nope + size)).split((nope, size), dim=-1)
        shared = shared.transpose(1, 2).expand(-1, -1, key.shape[2], -1)
        return torch.cat((key, shared), dim=-1).transpose(1, 2), value.transpose(1, 2)

    def _needs_one_size(self, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Return whether the attention function needs keys and values of one size, or is much faster with it.

        A CPU's kernel needs it, and without it all scores are kept. Flash attention of transformers pads only values.
        """
        implementation, missing = self.config._attn_implementation, key.shape[-1] - value.shape[-1]
        if implementation == "eager" or not missing:
            return False
        return implementation == "sparse" or missing < 0 or key.device.type == "cpu"

    def _absorbs(self, query: torch.Tensor, latent: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
        """Return whether `_attend_to_latents` computes this call, and in less time than all keys and values take."""
        queries, spread = query.shape[1], self.sizes[0] + self.sizes[2]
        is_few = queries <= MOST_ABSORBED and queries * (2 * self.rank - spread) < self.rank * spread
        # Without a mask, several queries would see each other's later tokens.
        is_clear = queries == 1 if attention_mask is None else _is_dense(attention_mask, latent)
        if not (self.absorb and is_few and is_clear) or self.training or self.softcap is not None:
            return False
        if self.config._attn_implementation not in ("eager", "sdpa") or type(self.kv_b_proj) is not nn.Linear:
            return False
        # Tensors that stand for others, such as torchao's int8, can be multiplied and not cut.
        is_plain = not hasattr(self.kv_b_proj.weight, "__tensor_flatten__")
        return is_plain and is_unobserved(self.kv_b_proj)

    def _attend_to_latents(
        self,
        query: torch.Tensor,
        query_rotated: torch.Tensor,
        latent: torch.Tensor,
        shared: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what `forward` does, with `kv_b_proj` multiplied into the queries and into the heads' outputs."""
        nope, _, size = self.sizes
        to_keys, to_values = self.kv_b_proj.weight.unflatten(0, (-1, nope + size)).split((nope, size), dim=1)
        latent, shared = latent.squeeze(1), shared.squeeze(1)
        query = torch.einsum("bshn,hnl->bhsl", query, to_keys)
        scores = query.flatten(1, 2) @ latent.mT + query_rotated.transpose(1, 2).flatten(1, 2) @ shared.mT
        scores = scores.unflatten(1, (query.shape[1], -1)) * self.scaling
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            # Not minus infinity: a row of padding sees nothing, and would become NaN.
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        elif attention_mask is not None:
            scores = scores + attention_mask
        weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(latent.dtype)
        output = (weights.flatten(1, 2) @ latent).unflatten(1, weights.shape[1:3])
        output = torch.einsum("bhsl,hvl->bshv", output, to_values)
        return self.o_proj(output.flatten(2)), weights if self.config._attn_implementation == "eager" else None


def _is_dense(attention_mask: object, latent: torch.Tensor) -> bool:
    """Return whether a mask is a tensor over all keys, as eager attention and SDPA take it."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 4:
        return False
    return attention_mask.shape[-1] == latent.shape[2]


def padded(states: torch.Tensor, size: int) -> torch.Tensor:
    """Return heads with zeros up to this size, which change neither scores nor the other numbers of outputs."""
    return states if states.shape[-1] == size else nn.functional.pad(states, (0, size - states.shape[-1]))


def halves_apart(states: torch.Tensor) -> torch.Tensor:
    """Return rotary pairs of neighbors (0, 1), (2, 3), ... as (0, R / 2), (1, R / 2 + 1), ... for Llama's rotation."""
    return states.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def refuse_paging(config: HfllmConfig) -> None:
    """Refuse continuous batching, whose pages have room for keys and values of one size, and whose caller then waits.

    Raises:
        ValueError: naming the field and what to use instead.
    """
    if config.kv_lora_rank is not None:
        raise ValueError(
            f"continuous batching has no pages for latent attention (kv_lora_rank={config.kv_lora_rank}): use generate"
        )


def yarn_factor(config: HfllmConfig, layer_idx: int) -> float:
    """Return what DeepSeek's models multiply their attention scores by with scaled positions.

    With `mscale_all_dim` m in `rope_parameters`, it is (0.1 m ln(factor) + 1)^2 (YaRN, arXiv:2309.00071, section 3.4,
    over all dimensions of a head, and not only over the rotated ones), else 1.
    """
    rope = config.rope_parameters or {}
    rope = rope[config.layer_types[layer_idx]] if config.rotary_types() else rope
    mscale, factor = rope.get("mscale_all_dim"), rope.get("factor") or 1.0
    if not mscale or rope.get("rope_type", "default") == "default" or factor <= 1:
        return 1.0
    return (0.1 * mscale * math.log(factor) + 1.0) ** 2
