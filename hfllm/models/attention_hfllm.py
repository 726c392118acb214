"""Rotary positions, attention and its masks.

This file imports only torch, transformers and files beside it, and is uploaded to the Hub with modeling_hfllm.py.
Shapes: B batch, S sequence, H query heads, K key-value heads, D head_dim, R rotated dimensions of a head.
"""

from copy import copy
from functools import lru_cache
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

from .banded_hfllm import banded_attention_forward, banded_mask, forget_all, is_banded, register, with_banded_masks
from .chunked_hfllm import create_chunked_mask
from .configuration_hfllm import HfllmConfig
from .layer_types_hfllm import WINDOWS, longrope_limits, own_window
from .layers_hfllm import build_norm
from .memory_hfllm import needs_autograd
from .sparse_hfllm import sparse_attention_forward, sparse_mask, sparse_sizes

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
        """Return the inverse frequencies `theta^(-2i/R)`, shape (R/2,), and the attention factor, which is 1 here.

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
    """Return the rotary embedding of all layers, or of each type of them if each has its own parameters."""
    own = config.rotary_types()
    if not own:
        return HfllmRotaryEmbedding(config)
    by_type = {}
    for name in own:
        # Each sees a config with one dictionary, which is all that transformers' RoPE functions need to know.
        alone = copy(config)
        alone.rope_parameters = config.rope_parameters[name]
        by_type[name] = HfllmRotaryEmbedding(alone)
    return HfllmRotaryByType(by_type)


def rotation_changes(config: HfllmConfig, cache: Cache | None, position_ids: torch.Tensor | None, new: int) -> bool:
    """Return whether keys in a cache have been rotated by other factors than `new` more tokens would be (`longrope`).

    Args:
        position_ids: (B, S), of the new tokens at the end; `None` means that all count from 0.
    """
    limits = longrope_limits(config)
    held = int(cache.get_seq_length()) if limits and cache is not None else 0
    # A GPU waits for positions only where there may be something to find out.
    if not held or all(held + new <= limit for limit in limits):
        return False
    before, after = held, held + new
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
    """Return -1 for the first half and 1 for the second, (size,): one product for each generated token and layer."""
    with torch.inference_mode(False):
        return torch.tensor([-1.0, 1.0]).repeat_interleave(size // 2).to(device, dtype)


def rotate_heads(states: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first dimensions of each head, as many as `cos` has; the others stay unchanged.

    With the sign in the small tensor of sines, no half of `states` has to be negated.
    """
    size = cos.shape[-1]
    if size == states.shape[-1]:
        product, rolled = states * cos, states.roll(size // 2, -1)
        # In place, to save the time that new memory takes; nobody else holds the product.
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
        """Set what attention of every kind takes from the config."""
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output (B, S, E) and, from eager attention, the weights (B, H, S, S). Arguments are Llama's."""
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
        output, weights = self._attend(query, key, value, attention_mask, **kwargs)
        return self.o_proj(output.reshape(*batch_and_length, -1).contiguous()), weights

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
            key: (B, K, T, D), and so `value`; with those that the cache held.
        """
        eager = eager_attention_forward if self.softcap is None else softcapped_attention
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        if self.softcap is not None:
            check_softcap(self.config._attn_implementation)
            kwargs["softcap"] = self.softcap
        if is_banded(attention_mask, key):
            attend = banded_attention_forward
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


def check_implementation(implementation: str, config: PreTrainedConfig) -> None:
    """Refuse an attention function that cannot compute a model.

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
        ValueError: naming the function and what to use instead.
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

    A sequence begins where positions restart: at a position below that of the token before, or at 0. Positions that
    jump forward (PoSE, arXiv:2309.10400) stay in one sequence. Padding has no position.
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
    """Return `position_ids`, (B, S), that restart where `cu_seq_lens` counts the first token of a sequence.

    Args:
        cu_seq_lens: 0 and the sums of the sequences' lengths, over all rows one after the other.
    """
    index = torch.arange(batch * length, device=cu_seq_lens.device)
    begins = cu_seq_lens.long()[torch.searchsorted(cu_seq_lens.long(), index, right=True) - 1]
    return (index - begins).view(batch, length)


def restarted_positions(packed: torch.Tensor) -> torch.Tensor:
    """Return 0, 1, 2, ... within each sequence of `packed_sequences`, (B, S).

    This is the form in which attention functions recognize packed sequences: for them, every jump is a boundary.
    """
    index = torch.arange(packed.shape[1], device=packed.device)
    begins = nn.functional.pad(packed.diff(dim=-1), (1, 0)).bool()
    return index - torch.where(begins, index, 0).cummax(-1).values


def keep_last_sequences(inputs: torch.Tensor | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `generate` with an attention mask that leaves each row the last of its packed sequences.

    New tokens continue that one: the sequences before it are to them what padding is.

    Args:
        inputs: tokens, unless `arguments` has them as `input_ids` or `inputs_embeds`.
        arguments: `position_ids` among them may be those of all tokens, or of the ones that no cache holds yet.
    """
    names = ("position_ids", "attention_mask", "input_ids", "inputs_embeds")
    positions, mask, *given = (arguments.get(name) for name in names)
    tokens = next((each for each in (inputs, *given) if each is not None), None)
    packed = None if tokens is None else packed_sequences(positions, mask)
    if packed is None:
        return arguments
    batch, length = tokens.shape[:2] if mask is None else mask.shape
    last = (packed == packed[:, -1:]).long().expand(batch, -1)
    last = nn.functional.pad(last, (length - last.shape[1], 0))
    return {**arguments, "attention_mask": last if mask is None else last.to(mask) * mask}


def padding_of_one(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Return the mask (B, 1) of linear attention for a token that is read alone, `None` where it is no padding.

    Transformers' function takes it for a generated one, and lets padding that is read token by token into the state.
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
    """Return what each type of layer takes as its mask: a tensor, a block mask, or `None`.

    Args:
        config: its direction, layer types, window and attention function decide.
        inputs_embeds: (B, S, E).
        attention_mask: (B, S) with 0 for padding; a mask of four dimensions is returned as it is.
        cache: holds the tokens before.
        packed: the result of `packed_sequences`.

    Raises:
        ValueError: for packed sequences that a flash kernel cannot keep apart, and for a mask of four dimensions with
            linear attention, whose state cannot skip what single tokens do not see.
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
