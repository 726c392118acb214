"""Rotary positions, attention and its masks, and latent attention.

This file imports only torch, transformers and files next to it, and is uploaded to the Hub with modeling_hfllm.py.
Shapes: B batch, S sequence, H query heads, K key-value heads, D head_dim, R rotated dimensions of a head.
"""

import math
from collections.abc import Callable
from copy import copy
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn
from transformers import masking_utils
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention_masks_hfllm import (
    banded_attention_forward,
    banded_mask,
    create_chunked_mask,
    forget_all,
    is_banded,
    register,
    sparse_attention_forward,
    sparse_mask,
    sparse_sizes,
    with_banded_masks,
)
from .configuration_fields_hfllm import WINDOWS, longrope_limits, own_window
from .configuration_hfllm import HfllmConfig
from .layers_hfllm import HfllmRMSNorm, build_norm, is_unobserved, needs_autograd
from .real_tokens_hfllm import RealTokens

# ---- attention ----


register("banded", banded_attention_forward, banded_mask)
register("sparse", sparse_attention_forward, sparse_mask)


class HfllmRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary embedding (Su et al. 2021, equation 34), with transformers' scaling types."""

    def __init__(self, config: HfllmConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        by_type = {**ROPE_INIT_FUNCTIONS, "default": self.compute_default_rope_parameters}
        inv_freq, self.attention_scaling = by_type[self.rope_type](config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: HfllmConfig, **kwargs) -> tuple[torch.Tensor, float]:
        """Return the inverse frequencies `theta^(-2i/R)`, shape (R/2,), and the attention factor, here 1.

        R is the number of rotated dimensions of a head: all of them unless `partial_rotary_factor` is set.
        """
        size = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, size, 2, dtype=torch.float) / size
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @dynamic_rope_update
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines, each (B, S, R) with equal halves, as transformers' Llama does."""
        angles = position_ids[..., None].float() * self.inv_freq.to(hidden_states.device, torch.float)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


class HfllmRotaryByType(nn.ModuleDict):
    """Rotary embeddings by layer type, where each has parameters of its own (Gemma 3)."""

    def forward(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return {kind: rotary(hidden_states, position_ids) for kind, rotary in self.items()}


def build_rotary(config: HfllmConfig) -> nn.Module:
    """Return the rotary embedding of all layers, or one per type of layer if types have their own parameters."""
    own = config.rotary_types()
    if not own:
        return HfllmRotaryEmbedding(config)
    by_type = {}
    for name in own:
        # Each sees a config with one dictionary, the only form known to transformers' RoPE functions.
        alone = copy(config)
        alone.rope_parameters = config.rope_parameters[name]
        by_type[name] = HfllmRotaryEmbedding(alone)
    return HfllmRotaryByType(by_type)


def rotation_changes(config: HfllmConfig, cache: Cache | None, position_ids: torch.Tensor | None, new: int) -> bool:
    """Return whether keys in a cache have been rotated by other factors than `new` more tokens would be (`longrope`).

    Args:
        position_ids: (B, S), of the new tokens at the end; `None` means counting from 0 for all.
    """
    limits = longrope_limits(config)
    past_length = int(cache.get_seq_length()) if limits and cache is not None else 0
    # A GPU waits for positions only where there may be something to find out.
    if not past_length or all(past_length + new <= limit for limit in limits):
        return False
    before, after = past_length, past_length + new
    if position_ids is not None:
        before, after = int(position_ids[..., -new].max()), int(position_ids.max()) + 1
    return any(before <= limit < after for limit in limits)


def signed(sin: torch.Tensor) -> torch.Tensor:
    """Return the sines with the first half of the last dimension negated, for `rotate_heads`."""
    if type(sin) is torch.Tensor and not torch.compiler.is_compiling():
        return sin * _signs(sin.shape[-1], sin.dtype, sin.device)
    first, second = sin.chunk(2, dim=-1)
    return torch.cat((-first, second), dim=-1)


@lru_cache(maxsize=16)
def _signs(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return -1 for the first half and 1 for the second, (size,): one product per generated token and layer."""
    with torch.inference_mode(False):
        return torch.tensor([-1.0, 1.0]).repeat_interleave(size // 2).to(device, dtype)


def rotate_heads(states: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first dimensions of all heads, as many as `cos` has; the others stay unchanged.

    With the sign in the small tensor of sines, no half of `states` has to be negated.
    """
    size = cos.shape[-1]
    if size == states.shape[-1]:
        product, rolled = states * cos, states.roll(size // 2, -1)
        # In place, to save the time for new memory; nobody else holds the product.
        return product.addcmul_(rolled, signed_sin) if not needs_autograd() else product.addcmul(rolled, signed_sin)
    rotated, passed = states.split((size, states.shape[-1] - size), dim=-1)
    return torch.cat((rotate_heads(rotated, cos, signed_sin), passed), dim=-1)


def apply_rotary_pos_emb(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rotated query and key, as the function of this name in transformers' Llama does.

    Args:
        query: (B, H, S, D).
        key: (B, K, S, D).
        cos: (B, S, R), and so `sin`; where R is less than D, the other dimensions stay unchanged.
        unsqueeze_dim: the dimension of the heads; 2 for (B, S, H, D).
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), signed(sin).unsqueeze(unsqueeze_dim)
    return rotate_heads(query, cos, sin), rotate_heads(key, cos, sin)


class HfllmAttention(nn.Module):
    """Grouped-query self-attention through transformers' attention interface."""

    def __init__(self, config: HfllmConfig, layer_idx: int):
        super().__init__()
        self._set_common(config, layer_idx)
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_output_bias)
        self.normalizes_all_heads = config.qk_norm and config.qk_norm_scope == "all_heads"
        sizes = (query_size, key_size) if self.normalizes_all_heads else (config.head_dim, config.head_dim)
        self.q_norm, self.k_norm = (build_norm(config, size) if config.qk_norm else None for size in sizes)

    def _set_common(self, config: HfllmConfig, layer_idx: int) -> None:
        """Set the values from the config common to all kinds of attention."""
        self.config = config
        self.layer_idx = layer_idx
        self.softcap = config.attn_logit_softcapping
        self.is_causal = config.is_causal
        # Copied, here and in the layer: a config looks up every name in its attribute map, too slow for decoding.
        self.attention_dropout = config.attention_dropout
        self.sliding_window = own_window(config, layer_idx)
        self.use_rope = config.no_rope_layers is None or bool(config.no_rope_layers[layer_idx])

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        tokens: RealTokens | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output (B, S, E) and, from eager attention, the weights (B, H, S, S). Arguments are Llama's.

        With `tokens`, states come and go without padding, (1, N, E).
        """
        batch_and_length = hidden_states.shape[:-1]
        per_head = (*batch_and_length, -1, self.head_dim)
        query, key = self.q_proj(hidden_states), self.k_proj(hidden_states)
        if self.normalizes_all_heads:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.view(per_head), key.view(per_head)
        if self.q_norm is not None and not self.normalizes_all_heads:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        value = self.v_proj(hidden_states).view(per_head).transpose(1, 2)
        if position_embeddings is not None and self.use_rope:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
            if self.sliding_window == 1:
                forget_all(cache, self.layer_idx)
        if tokens is not None:
            attend = partial(self._outputs, attention_mask=attention_mask, **kwargs)
            return self.o_proj(tokens.attend(attend, query, key, value, has_mask=attention_mask is not None)), None
        output, weights = self._attend(query, key, value, attention_mask, **kwargs)
        return self.o_proj(output.reshape(*batch_and_length, -1).contiguous()), weights

    def _outputs(self, *heads: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self._attend(*heads, **kwargs)[0]

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the heads' outputs (B, S, H, D) and, from eager attention, their weights.

        Args:
            query: (B, H, S, D).
            key: (B, K, T, D), and so `value`; together with the ones from the cache.
        """
        eager = eager_attention_forward if self.softcap is None else softcapped_attention
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        if self.softcap is not None:
            check_softcap(self.config._attn_implementation)
            kwargs["softcap"] = self.softcap
        if is_banded(attention_mask, key):
            attend = banded_attention_forward
        if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            attend = partial(attend_in_fp32, attend)
        return attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )


def attend_in_fp32(attend: Callable, module: nn.Module, *states: torch.Tensor, **kwargs: object) -> tuple:
    """Return the result of an attention function of queries, keys and values, in fp32 within autocast.

    On a CPU the backward pass of SDPA takes four times as long in bf16, while products of weights take half as long.

    Args:
        states: (B, heads, S, D) of queries, keys and values, and the mask.
    """
    *heads, mask = states
    if isinstance(mask, torch.Tensor) and mask.is_floating_point():
        mask = mask.float()
    with torch.autocast("cpu", enabled=False):
        return attend(module, *(each.float() for each in heads), mask, **kwargs)


# ---- implementations and masks ----


def check_implementation(implementation: str, config: PreTrainedConfig) -> None:
    """Refuse an attention function unable to compute a model.

    Args:
        config: of the model, also of another family.

    Raises:
        ValueError: for sparse attention without its sizes, or a soft limit of the scores that would be ignored.
    """
    if implementation == "sparse":
        sparse_sizes(config)
    if getattr(config, "attn_logit_softcapping", None) is not None:
        check_softcap(implementation)


def check_softcap(implementation: str) -> None:
    """Refuse attention functions that would ignore a soft limit of the scores.

    Raises:
        ValueError: naming the function and its alternative.
    """
    if implementation not in ("eager", "flex_attention") and "flash" not in implementation:
        raise ValueError(
            f"attn_implementation={implementation!r} has no attn_logit_softcapping: use eager, flex_attention or flash"
        )


def softcapped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float = 1.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return eager attention (B, S, H, D) and its weights, with scores `c * tanh(scores / c)`, c softcap (Gemma 2)."""
    groups = module.num_key_value_groups
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scaling / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def packed_sequences(position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Return the index of each token's packed sequence, (B, S), or `None` when no row holds more than one.

    A sequence begins where positions restart: at a position below the previous token's, or at 0. Positions with
    forward jumps (PoSE, arXiv:2309.10400) stay in one sequence. Padding has no position.
    """
    if position_ids is None or (attention_mask is not None and len(attention_mask.shape) != 2):
        return None
    before, after = position_ids[:, :-1], position_ids[:, 1:]
    if attention_mask is not None:
        real = attention_mask[:, -position_ids.shape[1] :].bool()
        index = torch.arange(position_ids.shape[1], device=real.device)
        last_real = torch.where(real, index, -1).cummax(-1).values[:, :-1]
        before = position_ids.expand(len(real), -1).gather(1, last_real.clamp(min=0))
    begins = (after < before) | (after == 0)
    if attention_mask is not None:
        begins = begins & real[:, 1:] & (last_real >= 0)
    if not torch.compiler.is_compiling() and not begins.any():
        return None
    return nn.functional.pad(begins, (1, 0)).cumsum(-1)


def positions_of_sequences(cu_seq_lens: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """Return `position_ids`, (B, S), restarting where `cu_seq_lens` counts the first token of a sequence.

    Args:
        cu_seq_lens: 0 and the sums of the sequences' lengths, over all rows one after the other.
    """
    index = torch.arange(batch * length, device=cu_seq_lens.device)
    begins = cu_seq_lens.long()[torch.searchsorted(cu_seq_lens.long(), index, right=True) - 1]
    return (index - begins).view(batch, length)


def restarted_positions(packed: torch.Tensor) -> torch.Tensor:
    """Return 0, 1, 2, ... within each sequence of `packed_sequences`, (B, S).

    Attention functions recognize packed sequences in this form: for them, every jump is a boundary.
    """
    index = torch.arange(packed.shape[1], device=packed.device)
    begins = nn.functional.pad(packed.diff(dim=-1), (1, 0)).bool()
    return index - torch.where(begins, index, 0).cummax(-1).values


def keep_last_sequences(inputs: torch.Tensor | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `generate` with an attention mask for only the last packed sequence of each row.

    New tokens continue this one: to them the sequences before it are like padding.

    Args:
        inputs: tokens, unless `arguments` has them as `input_ids` or `inputs_embeds`.
        arguments: `position_ids` among them may be for all tokens, or for the ones not yet in a cache.
    """
    names = ("position_ids", "attention_mask", "input_ids", "inputs_embeds")
    positions, mask, *token_inputs = (arguments.get(name) for name in names)
    tokens = next((each for each in (inputs, *token_inputs) if each is not None), None)
    packed = None if tokens is None else packed_sequences(positions, mask)
    if packed is None:
        return arguments
    batch, length = tokens.shape[:2] if mask is None else mask.shape
    last = (packed == packed[:, -1:]).long().expand(batch, -1)
    last = nn.functional.pad(last, (length - last.shape[1], 0))
    return {**arguments, "attention_mask": last if mask is None else last.to(mask) * mask}


def padding_of_one(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Return the mask (B, 1) of linear attention for a token read by itself, `None` where it is no padding.

    Transformers' function takes it for a generated one, and lets padding, read token by token, into the state.
    """
    if attention_mask is None or masking_utils.is_tracing(attention_mask):
        return None
    last = attention_mask[:, -1:]
    # A GPU would have to wait for the answer.
    return None if last.device.type == "cpu" and last.all() else last


def create_masks(
    config: HfllmConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    packed: torch.Tensor | None,
) -> dict[str, object]:
    """Return the mask per type of layer: a tensor, a block mask, or `None`.

    Args:
        config: its direction, layer types, window and attention function decide.
        inputs_embeds: (B, S, E).
        attention_mask: (B, S) with 0 for padding; a mask of four dimensions is returned as it is.
        cache: holds the tokens before.
        packed: the result of `packed_sequences`.

    Raises:
        ValueError: for packed sequences that a flash kernel cannot separate, and for a mask of four dimensions with
            linear attention, since its state cannot skip the masked tokens of single queries.
    """
    restarts, allowed = None, None
    if "linear_attention" in config.layer_types and getattr(attention_mask, "ndim", 2) == 4:
        raise ValueError("linear attention takes an attention_mask of two dimensions, got four; pack by position_ids")
    if packed is not None and "flash" in config._attn_implementation and not torch.compiler.is_compiling():
        # Flash kernels take no mask: they split only a single row without padding, at its position ids.
        if len(packed) > 1 or not (attention_mask is None or attention_mask.all()):
            raise ValueError("flash attention takes packed sequences as one row without padding only")
        attention_mask = None
    # The mask functions find packed sequences only in a causal model without a padding mask.
    if packed is not None and config.is_causal and attention_mask is None:
        restarts = restarted_positions(packed)
    elif packed is not None:
        allowed = masking_utils.packed_sequence_mask_function(packed.expand(inputs_embeds.shape[0], -1))
    # All of them become bidirectional when config.is_causal is False.
    create = masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING
    settings = {kind: config for kind in config.layer_types}
    settings |= {kind: with_banded_masks(config) for kind in settings.keys() & WINDOWS.keys()}
    masks = {
        kind: create[kind](
            each, inputs_embeds, attention_mask, cache, position_ids=restarts, and_mask_function=allowed
        )
        for kind, each in settings.items()
    }
    if "linear_attention" in masks and inputs_embeds.shape[1] == 1:
        masks["linear_attention"] = padding_of_one(attention_mask)
    if "chunked_attention" in masks and allowed is not None:
        masks["chunked_attention"] = create_chunked_mask(config, inputs_embeds, attention_mask, packed)
    return masks


# ---- latent ----
#
# Multi-head latent attention: keys and values of all heads are made from one small vector per token.
#
# DeepSeek-V2 (arXiv:2405.04434, section 2.1), with the names and the arithmetic of transformers' DeepSeek-V3. A cache
# holds the latent and one rotated key per token and layer, instead of keys and values, as there; every cache
# class of transformers takes them.
#
# Shapes: B batch, S sequence, T keys, H heads, E hidden_size, L kv_lora_rank, N qk_nope_head_dim, R qk_rope_head_dim,
# V v_head_dim.


# The value of all models with latents in transformers, whatever the epsilon of their other norms.
NORM_EPS = 1e-6
# The most queries of one call to attend to latents directly: their scores are in memory all at once.
MOST_ABSORBED = 16


class HfllmLatentAttention(HfllmAttention):
    """Attention whose keys and values are products of one latent per token (DeepSeek-V2, equations 9 to 19).

    Attributes:
        absorb: while decoding, multiply queries and outputs by the two halves of `kv_b_proj` instead of spreading all
            latents into keys and values again for every token (section 2.1.2: the same products in another order). It
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
        # Tensors wrapping others, such as torchao's int8, can be multiplied but not cut.
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
        """Return the output of `forward`, with `kv_b_proj` multiplied into the queries and into the heads' outputs."""
        nope, _, size = self.sizes
        to_keys, to_values = self.kv_b_proj.weight.unflatten(0, (-1, nope + size)).split((nope, size), dim=1)
        latent, shared = latent.squeeze(1), shared.squeeze(1)
        query = torch.einsum("bshn,hnl->bhsl", query, to_keys)
        scores = query.flatten(1, 2) @ latent.mT + query_rotated.transpose(1, 2).flatten(1, 2) @ shared.mT
        scores = scores.unflatten(1, (query.shape[1], -1)) * self.scaling
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            # Not minus infinity: a row of padding has no visible token, and would become NaN.
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
    """Return heads with zeros up to this size, without changing scores or the other numbers of outputs."""
    return states if states.shape[-1] == size else nn.functional.pad(states, (0, size - states.shape[-1]))


def halves_apart(states: torch.Tensor) -> torch.Tensor:
    """Return rotary pairs of neighbors (0, 1), (2, 3), ... as (0, R / 2), (1, R / 2 + 1), ... for Llama's rotation."""
    return states.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def refuse_paging(config: HfllmConfig) -> None:
    """Refuse continuous batching, whose pages have room for keys and values of one size, and whose caller then waits.

    Raises:
        ValueError: naming the field and its alternative.
    """
    if config.kv_lora_rank is not None:
        raise ValueError(
            f"continuous batching has no pages for latent attention (kv_lora_rank={config.kv_lora_rank}): use generate"
        )


def yarn_factor(config: HfllmConfig, layer_idx: int) -> float:
    """Return the factor of DeepSeek's models on their attention scores with scaled positions.

    With `mscale_all_dim` m in `rope_parameters`, it is (0.1 m ln(factor) + 1)^2 (YaRN, arXiv:2309.00071, section 3.4,
    over all dimensions of a head, and not only over the rotated ones), else 1.
    """
    rope = config.rope_parameters or {}
    rope = rope[config.layer_types[layer_idx]] if config.rotary_types() else rope
    mscale, factor = rope.get("mscale_all_dim"), rope.get("factor") or 1.0
    if not mscale or rope.get("rope_type", "default") == "default" or factor <= 1:
        return 1.0
    return (0.1 * mscale * math.log(factor) + 1.0) ** 2
