"""Sliding and chunked attention in time and memory that grow with the length, not with its square.

Registered with transformers as `attn_implementation="banded"`, for any of its models. The queries are cut into blocks,
and each block attends to the keys that its window can reach, under a mask of that size (local attention in blocks as
of Beltagy et al. 2020, arXiv:2004.05150, section 3.1). A block is one row of a batch for torch's own attention.

This file imports only torch and transformers, and is uploaded to the Hub with modeling_hfllm.py.
Shapes: B batch, H query heads, K key-value heads, S queries, T keys, D head_dim; N blocks of C queries and L keys.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AttentionInterface, masking_utils
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# What torch's attention has no argument for, by the names under which models of transformers pass it.
UNSUPPORTED = {"s_aux": "attention sinks", "softcap": "a softcap", "position_bias": "a position bias"}
SMALLEST_BLOCK = 64


def refuse_unsupported(implementation: str, arguments: dict[str, object]) -> None:
    """Refuse what a model asks of its attention function and this one does not compute.

    Args:
        implementation: the name that it is registered under.
        arguments: all that the model passes by name.

    Raises:
        ValueError: with the argument and its meaning.
    """
    for name, meaning in UNSUPPORTED.items():
        if arguments.get(name) is not None:
            raise ValueError(
                f"attn_implementation={implementation!r} does not support {meaning} ({name}): "
                "use 'eager', or a kernel that does"
            )


def block_sizes(window: int) -> tuple[int, int]:
    """Return the numbers of queries in a block, C, and of keys that these can reach, L: a multiple of C.

    Blocks of half a window leave a third of their scores unused; smaller ones would copy the keys more often.

    Raises:
        ValueError: for a window below 1.
    """
    if window < 1:
        raise ValueError(f"sliding_window and attention_chunk_size must be at least 1, got {window}")
    block = max(-(-window // 2), SMALLEST_BLOCK)
    return block, block * (1 + -(-(window - 1) // block))


def is_banded(attention_mask: torch.Tensor | None, key: torch.Tensor) -> bool:
    """Return whether a mask is one of `banded_mask`, in blocks: each has fewer keys than there are."""
    is_plain = attention_mask is None or not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 4
    return not is_plain and 1 < attention_mask.shape[-1] < key.shape[2]


def banded_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Return the attention's output, (B, S, H, D), and no weights. Arguments are those of transformers' functions.

    Args:
        query: (B, H, S, D), at the end of the keys.
        key: (B, K, T, D), and so `value`.
        attention_mask: of `banded_mask`. With any other, or `None`, this is `sdpa_attention_forward`.

    Raises:
        ValueError: for attention sinks, a softcap or a position bias.
    """
    refuse_unsupported("banded", kwargs)
    if not is_banded(attention_mask, key):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    batch, length = query.shape[0], query.shape[2]
    count, block, reach = attention_mask.shape[1:]
    # Keys that the first block could reach if there were more of them; where there are too many, they are cut off.
    missing = reach - block - (key.shape[2] - length)
    beyond = count * block - length

    def in_reach(states: torch.Tensor) -> torch.Tensor:
        padded = nn.functional.pad(states, (0, 0, missing, beyond)).unflatten(2, (-1, block))
        # Not `unfold`: its gradient is slower, and compiles to additions one by one.
        pieces = [padded[:, :, start : start + count] for start in range(reach // block)]
        return torch.cat(pieces, dim=3).transpose(1, 2).flatten(0, 1)

    blocks = nn.functional.pad(query, (0, 0, 0, beyond)).unflatten(2, (count, block)).transpose(1, 2).flatten(0, 1)
    mask = attention_mask.expand(batch, -1, -1, -1).flatten(0, 1).unsqueeze(1)
    output, _ = sdpa_attention_forward(
        module, blocks, in_reach(key), in_reach(value), mask, dropout=dropout, scaling=scaling
    )
    return output.unflatten(0, (batch, count)).flatten(1, 2)[:, :length].contiguous(), None


def banded_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: object,
) -> torch.Tensor | None:
    """Return the mask in blocks where a window or chunk is much shorter than the keys, else what SDPA takes.

    Arguments are those of `transformers.masking_utils.sdpa_mask`; `local_size` is the window or the chunk.

    Returns:
        A boolean tensor, (B, N, C, L), or (1, N, C, L) where all rows have the same. Its blocks begin at the first
        query; the last query of the last block may be less than C queries after the first one.
    """
    bounds = {"q_length": q_length, "kv_length": kv_length, "q_offset": q_offset, "kv_offset": kv_offset}
    if not _is_worthwhile(local_size, mask_function, **bounds, **kwargs):
        return masking_utils.sdpa_mask(
            batch_size,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            use_vmap=use_vmap,
            device=device,
            **bounds,
            **kwargs,
        )
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None and (masking_utils.is_tracing(padding) or not padding.all()):
        mask_function = masking_utils.and_masks(mask_function, masking_utils.padding_mask_function(padding))
    block, reach = block_sizes(local_size)
    starts = torch.arange(-(-q_length // block), device=device)[:, None] * block
    queries = starts + torch.arange(block, device=device)
    keys = starts + torch.arange(reach, device=device) + (kv_length - q_length - (reach - block))
    exist = (keys >= 0) & (keys < kv_length)
    # Rows after the last query repeat it: one without any key would have no gradient, not even 0.
    queries, keys = queries.clamp(max=q_length - 1) + q_offset, keys.clamp(0, kv_length - 1) + kv_offset
    rows, head = torch.arange(batch_size, device=device), torch.arange(1, device=device)
    if use_vmap:
        for dims in ((None, None, None, 0), (None, None, 0, None), (None, None, 0, 0), (None, 0, None, None)):
            mask_function = torch.vmap(mask_function, in_dims=dims)
        with masking_utils.TransformGetItemToIndex():
            mask = torch.vmap(mask_function, in_dims=(0, None, None, None))(rows, head, queries, keys)
    else:
        rows, head = rows[:, None, None, None, None], head[None, :, None, None, None]
        mask = mask_function(rows, head, queries[None, None, :, :, None], keys[None, None, :, None, :])
    return mask[:, 0] & exist[:, None]


def _is_worthwhile(
    window: int | None,
    mask_function: Callable,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor,
    kv_offset: int,
    allow_is_causal_skip: bool = True,
    **kwargs: object,
) -> bool:
    """Return whether the queries are the last tokens, see nothing beyond the window, and have many keys before it."""
    # Masks of both directions are made with this argument.
    if window is None or "allow_is_bidirectional_skip" in kwargs or kv_length <= 2 * block_sizes(window)[1]:
        return False
    # A static cache counts on its device, and has keys after the queries.
    if isinstance(q_offset, torch.Tensor) or q_offset + q_length != kv_offset + kv_length:
        return False
    # Without the skip there are packed rows, or somebody's function. Tokens of one image that see each other, say, are
    # added to the window by `or_masks`.
    return allow_is_causal_skip or not (torch.compiler.is_compiling() or "or_masks" in functions_in(mask_function))


def functions_in(mask_function: Callable) -> set[str]:
    """Return the names, in `masking_utils`, of the functions that a mask function is made of."""
    held = [cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()]
    parts = [part for each in held for part in (each if isinstance(each, tuple) else (each,)) if callable(part)]
    name = getattr(mask_function, "__qualname__", "").split(".")[0]
    return {name}.union(*map(functions_in, parts))


@dataclass
class MaskSettings:
    """What the mask functions of transformers read of a config."""

    sliding_window: int | None
    attention_chunk_size: int | None
    is_causal: bool
    _attn_implementation: str = "banded"


def with_banded_masks(config: PreTrainedConfig) -> PreTrainedConfig | MaskSettings:
    """Return what makes the mask functions of transformers make banded masks, if `config` says SDPA, else `config`."""
    if config._attn_implementation != "sdpa":
        return config
    return MaskSettings(config.sliding_window, getattr(config, "attention_chunk_size", None), config.is_causal)


def forget_all(cache: Cache, layer_idx: int) -> None:
    """Empty the layer of a window of one token, of whom nothing is needed later.

    Transformers' own cache keeps the last `window - 1` tokens by a slice that takes all of them where that is 0, and
    then hands out more keys than the mask has.
    """
    layer = cache.layers[layer_idx]
    if isinstance(layer, DynamicSlidingWindowLayer) and not layer.record_past:
        layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]


def register(name: str, forward: Callable, mask: Callable) -> None:
    """Register an attention function with the one that makes its masks, unless the code of another model has."""
    if name not in AttentionInterface._global_mapping:
        AttentionInterface.register(name, forward)
        masking_utils.AttentionMaskInterface.register(name, mask)
