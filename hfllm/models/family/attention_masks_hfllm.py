"""Sliding, chunked and sparse attention in time and memory growing with the length, not with its square.

attention_hfllm.py registers two implementations of here with transformers, each with its masks: `"banded"`, for
sliding windows and chunks, and `"sparse"`.

This file imports only torch, transformers and files next to it, and is uploaded to the Hub with modeling_hfllm.py.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, masking_utils
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .configuration_fields_hfllm import SPARSE_SIZES
from .configuration_hfllm import HfllmConfig
from .layers_hfllm import needs_autograd

# ---- banded ----
#
# `attn_implementation="banded"`, for any model of transformers. The queries are cut into blocks, and each block
# attends to the keys within reach of its window, under a mask of this size (local attention in blocks as of Beltagy et
# al. 2020, arXiv:2004.05150, section 3.1). A block is one row of a batch for torch's own attention.
#
# Shapes: B batch, H query heads, K key-value heads, S queries, T keys, D head_dim; N blocks of C queries and L keys.


# Arguments unknown to torch's attention, by their names in models of transformers.
UNSUPPORTED = {"s_aux": "attention sinks", "softcap": "a softcap", "position_bias": "a position bias"}
SMALLEST_BLOCK = 64


def refuse_unsupported(implementation: str, arguments: dict[str, object]) -> None:
    """Refuse arguments of a model that this attention function does not support.

    Args:
        implementation: the registered name.
        arguments: all of the model's arguments by name.

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
    """Return the numbers of queries in a block, C, and of keys within their reach, L: a multiple of C.

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
    """Return the attention's output, (B, S, H, D), and no weights. Arguments are as in transformers' functions.

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
    # Keys within reach of the first block if there were more of them; where there are too many, they are cut off.
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
    """Return the mask in blocks where a window or chunk is much shorter than the keys, else the mask for SDPA.

    Arguments are as in `transformers.masking_utils.sdpa_mask`; `local_size` is the window or the chunk.

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
    # Without the skip there are packed rows, or somebody's function. Tokens of one image with attention to each other,
    # for example, are added to the window by `or_masks`.
    return allow_is_causal_skip or not (torch.compiler.is_compiling() or "or_masks" in functions_in(mask_function))


def functions_in(mask_function: Callable) -> set[str]:
    """Return the names, in `masking_utils`, of the functions combined in a mask function."""
    captured = [cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()]
    parts = [part for each in captured for part in (each if isinstance(each, tuple) else (each,)) if callable(part)]
    name = getattr(mask_function, "__qualname__", "").split(".")[0]
    return {name}.union(*map(functions_in, parts))


@dataclass
class MaskSettings:
    """The fields of a config read by the mask functions of transformers."""

    sliding_window: int | None
    attention_chunk_size: int | None
    is_causal: bool
    _attn_implementation: str = "banded"


def with_banded_masks(config: PreTrainedConfig) -> PreTrainedConfig | MaskSettings:
    """Return a config for banded masks from transformers' mask functions, if `config` says SDPA, else `config`."""
    if config._attn_implementation != "sdpa":
        return config
    return MaskSettings(config.sliding_window, getattr(config, "attention_chunk_size", None), config.is_causal)


def forget_all(cache: Cache, layer_idx: int) -> None:
    """Empty the layer of a window of one token, with nothing needed later.

    Transformers' own cache keeps the last `window - 1` tokens by a slice that takes all of them where `window - 1` is
    0, and then hands out more keys than the mask has.
    """
    layer = cache.layers[layer_idx]
    if isinstance(layer, DynamicSlidingWindowLayer) and not layer.record_past:
        layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]


def register(name: str, forward: Callable, mask: Callable) -> None:
    """Register an attention function with the one for its masks, unless the code of another model has."""
    if name not in AttentionInterface._global_mapping:
        AttentionInterface.register(name, forward)
        masking_utils.AttentionMaskInterface.register(name, mask)


# ---- chunked ----
#
# Masks of attention in chunks, as Llama 4 has it, for packed rows with padding.
#
# Transformers counts the chunks of a row from its first token. Here every document has chunks of its own.
#
# Shapes: B batch, S sequence, E hidden_size.


def create_chunked_mask(
    config: HfllmConfig, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, packed: torch.Tensor
) -> object:
    """Return the mask of layers of chunked attention for packed rows: a tensor or a block mask.

    Args:
        config: with `attention_chunk_size`.
        inputs_embeds: (B, S, E).
        attention_mask: (B, S) with 0 for padding, or `None`.
        packed: (B, S) or (1, S), the number of each token's document.
    """
    alone = copy(config)
    # A chunk is never longer than a window of its size.
    alone.sliding_window = config.attention_chunk_size
    chunks = chunk_numbers(packed.expand(inputs_embeds.shape[0], -1), attention_mask, config.attention_chunk_size)
    same = masking_utils.packed_sequence_mask_function(chunks)
    create = masking_utils.create_sliding_window_causal_mask
    return create(with_banded_masks(alone), inputs_embeds, attention_mask, None, and_mask_function=same)


def chunk_numbers(packed: torch.Tensor, attention_mask: torch.Tensor | None, size: int) -> torch.Tensor:
    """Return a number per chunk of every document, (B, S); padding is not counted.

    Args:
        packed: (B, S), the number of each token's document.
        attention_mask: (B, S) with 0 for padding, or `None`.
        size: tokens of a chunk.
    """
    is_real = torch.ones_like(packed) if attention_mask is None else attention_mask.to(packed)
    before = is_real.cumsum(-1) - is_real
    begins = nn.functional.pad(packed.diff(dim=-1), (1, 0)).bool()
    rank = before - torch.where(begins, before, 0).cummax(-1).values
    return packed * (packed.shape[1] + 1) + rank // size


# ---- sparse ----
#
# Sparse attention: a query looks at the means of blocks of keys first, and at the keys of the best blocks then.
#
# MoBA (Lu et al. 2025, arXiv:2502.13189, section 2.2), registered with transformers as `attn_implementation="sparse"`.
# Blocks are counted in each document from its first token, so neither padding nor other documents of a row move
# them. `sparse_block_size` and `sparse_num_blocks` of the config decide; nothing is learned for the choice.
#
# Shapes: B batch, H query heads, K key-value heads, S queries, T keys, D head_dim; N blocks of C keys.


# The parts of masks known to `sparse_mask`: the order of tokens, and the documents of packed rows.
KNOWN_PARTS = {
    *("causal_mask_function", "and_masks", "packed_sequence_mask_function"),
    "remap_positions_for_packed_sequence",
}


def sparse_sizes(config: PreTrainedConfig) -> tuple[int, int]:
    """Return the keys of a block, C, and the number of blocks for each query, its own included (MoBA's top-k).

    Raises:
        ValueError: naming the config's field if missing or below 1.
    """
    sizes = []
    for field in SPARSE_SIZES:
        sizes.append(getattr(config, field, None))
        if not isinstance(sizes[-1], int) or isinstance(sizes[-1], bool) or sizes[-1] < 1:
            raise ValueError(
                f"attn_implementation='sparse' needs {field} of at least 1 in the config, got {sizes[-1]}"
            )
    return sizes[0], sizes[1]


def sparse_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Return the attention's output, (B, S, H, D), and no weights. Arguments are as in transformers' functions.

    A layer with a window keeps it, as in banded attention. Where all keys fit into the blocks, this is SDPA.

    Args:
        query: (B, H, S, D).
        key: (B, K, T, D), and so `value`.
        attention_mask: of `sparse_mask`; `None` means one document, whose last tokens are the queries.

    Raises:
        ValueError: for dropout, attention sinks, a softcap, a position bias, or a mask of the caller's own.
    """
    refuse_unsupported("sparse", kwargs)
    block, count = sparse_sizes(module.config)
    if sliding_window is not None or key.shape[2] <= block * count:
        return banded_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ValueError(
            f"attn_implementation='sparse' does not support dropout: set attention_dropout=0, not {dropout}"
        )
    if attention_mask is not None and attention_mask.dtype != torch.long:
        raise ValueError("attn_implementation='sparse' takes no mask of four dimensions: give one of (batch, length)")
    # Under autocast only the value may have the lower precision.
    query, key = query.to(value.dtype), key.to(value.dtype)
    length, past = query.shape[2], key.shape[2] - query.shape[2]
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    source = first = None
    indices = past + torch.arange(length, device=query.device)[None]
    if attention_mask is not None:
        source, first, indices = attention_mask[:, 0].unbind(1)
        first, indices = first[:, ::block], indices[:, :length]
    keys, values = (_in_blocks(states, source, block).unflatten(2, (-1, block)) for states in (key, value))
    if length * count <= key.shape[2]:
        return attend_by_query(query, keys, values, indices, first, count, scaling), None
    # Queries too by position; in a row without padding only the ones of the last blocks.
    begin = 0 if source is not None else past // block
    if source is None:
        queries = nn.functional.pad(query, (0, 0, past - begin * block, -key.shape[2] % block))
    else:
        index = torch.arange(length, device=query.device).expand_as(indices)
        holders = torch.full_like(source, length)
        queries = _in_blocks(query, nn.functional.pad(holders, (0, 1)).scatter(1, indices, index)[:, :-1], block)
    output = attend_by_block(queries, keys, values, begin, first, count, scaling)
    index = (indices - begin * block).clamp(max=output.shape[2] - 1)[:, None, :, None]
    output = output.gather(2, index.expand(query.shape[0], query.shape[1], -1, query.shape[3]))
    return output.transpose(1, 2).contiguous(), None


def _in_blocks(states: torch.Tensor, source: torch.Tensor | None, block: int) -> torch.Tensor:
    """Return states (B, H, T, D) in whole blocks, (B, H, N * C, D), with zeros where there is no token."""
    if source is None:
        return nn.functional.pad(states, (0, 0, 0, -states.shape[2] % block))
    index = source[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
    return nn.functional.pad(states, (0, 0, 0, 1)).gather(2, index)


def sparse_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    config: PreTrainedConfig | None = None,
    **kwargs: object,
) -> torch.Tensor | None:
    """Return where the tokens of each row stand among its blocks, or `None` for one document without padding.

    Arguments are as in `transformers.masking_utils.sdpa_mask`. With a window it is `banded_mask`.

    Returns:
        Integers (B, 1, 3, N * C). Each document fills its blocks from their first position on. The first row has the
        key of each position, or T where it is empty; the second, for positions with a token, the first block of its
        document; the third the positions of the queries, N * C for padding.

    Raises:
        ValueError: where not every token sees just the tokens before it in its document.
    """
    block, count = sparse_sizes(config)
    bounds = {"q_length": q_length, "kv_length": kv_length, "q_offset": q_offset, "kv_offset": kv_offset}
    if local_size is not None or kv_length <= block * count:
        return banded_mask(
            batch_size,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            device=device,
            **bounds,
            **kwargs,
        )
    if "allow_is_bidirectional_skip" in kwargs:
        raise ValueError("attn_implementation='sparse' needs a causal model")
    # Without the skip there are packed rows, or somebody's function.
    is_packed = not allow_is_causal_skip and q_length == kv_length
    if is_packed and torch.compiler.is_compiling():
        raise ValueError(
            "attn_implementation='sparse' compiles no packed rows: leave out position_ids, or do not compile"
        )
    is_known = allow_is_causal_skip or torch.compiler.is_compiling()
    if not is_known and (unknown := functions_in(mask_function) - KNOWN_PARTS):
        raise ValueError(f"attn_implementation='sparse' cannot apply the mask function {', '.join(sorted(unknown))}")
    # From here on, among the kept keys: a cache that drops tokens has them from `kv_offset` on.
    q_offset = q_offset - kv_offset
    begins = None
    if is_packed:
        index, rows = torch.arange(q_length, device=device)[None], torch.arange(batch_size, device=device)[:, None]
        begins = ~mask_function(rows, rows.new_zeros(1), index, (index - 1).clamp(min=0)).expand(batch_size, -1)
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None and not masking_utils.is_tracing(padding) and padding.all():
        padding = None
    is_at_the_end = isinstance(q_offset, int) and q_offset + q_length == kv_length
    if is_at_the_end and padding is None and (begins is None or not begins.any()):
        return None
    index = torch.arange(kv_length, device=device)
    visible = (index < q_offset + q_length).expand(batch_size, -1)
    visible = visible if padding is None else visible & padding[:, kv_offset : kv_offset + kv_length]
    return _positions(visible, begins, index[:q_length] + q_offset, block)


def _positions(visible: torch.Tensor, begins: torch.Tensor | None, queries: torch.Tensor, block: int) -> torch.Tensor:
    """Return the result of `sparse_mask`.

    Args:
        visible: (B, T), whether a key is a token visible to some query.
        begins: (B, T), whether a key is the first of a document.
        queries: (S,), the indices of the queries among the keys.
        block: C.
    """
    batch, length = visible.shape
    document = torch.zeros_like(visible, dtype=torch.long) if begins is None else begins.long().cumsum(1)
    size = 1 if begins is None else int(document.max()) + 1
    tokens = document.new_zeros(batch, size).scatter_add(1, document, visible.long())
    blocks = -(-tokens // block)
    first = (blocks.cumsum(1) - blocks).gather(1, document)
    rank = visible.cumsum(1) - 1 - (tokens.cumsum(1) - tokens).gather(1, document)
    count = -(-length // block) if begins is None else max(-(-length // block), int(blocks.sum(1).max()))
    indices = (first * block + rank).masked_fill(~visible, count * block)
    index = torch.arange(length, device=visible.device).expand(batch, -1)
    rows = indices.new_full((batch, count * block + 1), length).scatter(1, indices, index)
    firsts = indices.new_zeros(batch, count * block + 1).scatter(1, indices, first)
    queries = nn.functional.pad(indices[:, queries], (0, count * block - len(queries)))
    return torch.stack((rows[:, :-1], firsts[:, :-1], queries), 1).unsqueeze(1)


# ---- sparse blocks ----
#
# The choice of blocks of keys for a query, and attention to them without scores of all pairs.
#
# Queries with the same chosen block are brought together in tiles, as MoBA does (arXiv:2502.13189, section 2.3). Each
# tile attends to its block, each query to its own, and a query's parts are merged by the normalizers of their softmax.
#
# Shapes: B batch, H query heads, K key-value heads, S queries, D head_dim; N blocks of C keys; k blocks chosen.
# R is B * H rows of queries, G is B * K rows of keys, M tiles of Q queries.


Attend = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class Tiles(NamedTuple):
    """Where each choice of a query stands among the tiles.

    Attributes:
        queries: (R, M * Q), the query at each position of a tile, S where there is none; each row of queries counts
            from S + 1 after the one before.
        blocks: (R, M), the blocks of the tiles, counted over all G * N.
        places: (R, S, k), the positions of the choices, M * Q for none; rows count from M * Q + 1 after the one
            before.
    """

    queries: torch.Tensor
    blocks: torch.Tensor
    places: torch.Tensor


@torch.no_grad()
def choose_blocks(
    query: torch.Tensor, keys: torch.Tensor, own: torch.Tensor, first: torch.Tensor | None, count: int
) -> torch.Tensor:
    """Return the best earlier blocks of the queries, (B, H, S, k), by the product with the mean of their keys.

    Args:
        query: (B, H, S, D).
        keys: (B, K, N, C, D).
        own: (B, S) or (1, S), the blocks of the queries.
        first: (B, N), the first block of each block's document, or `None` for 0.
        count: k + 1.

    Returns:
        Numbers of blocks, N where a query has fewer earlier ones.
    """
    number = keys.shape[2]
    grouped = query.unflatten(1, (keys.shape[1], -1)).flatten(2, 3).float()
    scores = (grouped @ keys.float().mean(3).mT).unflatten(2, (-1, query.shape[2])).flatten(1, 2)
    blocks = torch.arange(number, device=query.device)
    is_earlier = blocks < own[..., None]
    if first is not None:
        is_earlier = is_earlier & (blocks >= first.gather(1, own.expand(len(first), -1))[..., None])
    best, chosen = scores.masked_fill(~is_earlier[:, None], -torch.inf).topk(min(count - 1, number), -1)
    return chosen.masked_fill(best == -torch.inf, number)


def attend_by_query(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    places: torch.Tensor,
    first: torch.Tensor | None,
    count: int,
    scaling: float,
) -> torch.Tensor:
    """Return the output (B, S, H, D) for few queries, each with a copy of the keys of its blocks.

    Args:
        places: (B, S) or (1, S), the indices of the queries among the N * C keys; N * C for padding.
        query, keys, values, first, count: as in `choose_blocks`.
        scaling: factor on the scores.
    """
    batch, heads = query.shape[:2]
    number, block = keys.shape[2:4]
    own = (places // block).clamp(max=number - 1)
    earlier = choose_blocks(query, keys, own, first, count)
    chosen = torch.cat((own[:, None, :, None].expand(batch, heads, -1, 1), earlier), -1)
    row = torch.arange(batch, device=query.device)[:, None, None, None]
    head = (torch.arange(heads, device=query.device) // (heads // keys.shape[1]))[:, None, None]

    def of_chosen(states: torch.Tensor) -> torch.Tensor:
        return states[row, head, chosen.clamp(max=number - 1)].flatten(3, 4).flatten(0, 1)

    at = chosen[..., None] * block + torch.arange(block, device=query.device)
    is_seen = (at <= places[:, None, :, None, None]) & (chosen < number)[..., None]
    mask = is_seen.flatten(3).flatten(0, 1).unsqueeze(2)
    output = nn.functional.scaled_dot_product_attention(
        query.flatten(0, 1).unsqueeze(2), of_chosen(keys), of_chosen(values), attn_mask=mask, scale=scaling
    )
    return output.reshape(query.shape).transpose(1, 2).contiguous()


def attend_by_block(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    begin: int,
    first: torch.Tensor | None,
    count: int,
    scaling: float,
) -> torch.Tensor:
    """Return the output (B, H, S, D) for queries filling the blocks from number `begin` on.

    Args:
        query, keys, values, first, count: as in `choose_blocks`.
        scaling: factor on the scores.
    """
    number, block = keys.shape[2:4]
    own = begin + torch.arange(query.shape[2], device=query.device)[None] // block
    chosen = choose_blocks(query, keys, own, first, count).flatten(0, 1)
    tiles = in_tiles(chosen, number, query.shape[1] // keys.shape[1], max(block // 2, 1))
    parts = (query.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1), tiles, begin, scaling)
    has_kernel = query.device.type == "cpu" and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    if has_kernel and not needs_autograd():
        output = _Merged.apply(*parts[:3], *tiles, begin, scaling)
    else:
        output, _ = merge(*parts, _attend)
    return output.reshape(query.shape)


def in_tiles(chosen: torch.Tensor, number: int, groups: int, size: int) -> Tiles:
    """Return tiles of at most `size` queries with the same chosen block.

    Their number depends only on the shapes: for each block one tile may not be full.

    Args:
        chosen: (R, S, k), from 0 to `number`; the latter means none.
        number: N.
        groups: rows of queries per row of keys, H // K.
        size: Q.
    """
    rows, _, width = chosen.shape
    flat = chosen.flatten(1)
    length, device = flat.shape[1], flat.device
    # At the end of the counts, unused choices.
    counts = flat.new_zeros(rows, number + 1).scatter_add(1, flat, torch.ones_like(flat))
    full = -(-counts[:, :number] // size)
    ends, most = full.cumsum(1), -(-length // size) + number
    starts = nn.functional.pad((ends - full) * size, (0, 1), value=most * size)
    order = flat.argsort(dim=1, stable=True)
    block = flat.gather(1, order)
    rank = torch.arange(length, device=device) - (counts.cumsum(1) - counts).gather(1, block)
    index = (starts.gather(1, block) + rank).clamp(max=most * size)
    queries = flat.new_full((rows, most * size + 1), chosen.shape[1])
    # Unused choices share the last position, outside of all tiles.
    queries = queries.scatter(1, index, order // max(width, 1))[:, :-1]
    tiles = torch.arange(most, device=device).expand(rows, -1).contiguous()
    of_tile = torch.searchsorted(ends, tiles, right=True).clamp(max=number - 1)
    index = torch.zeros_like(flat).scatter(1, order, index)
    row = torch.arange(rows, device=device)[:, None]
    index = (index + row * (most * size + 1)).reshape(chosen.shape)
    return Tiles(queries + row * (chosen.shape[1] + 1), of_tile + row // groups * number, index)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs (X, Q, D) and the logarithms of the softmax's normalizers (X, Q), by the formulas."""
    scores = (query @ key.mT).float() * scaling
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
    normalizer = scores.logsumexp(-1)
    return (scores - normalizer[..., None]).exp().to(value.dtype) @ value, normalizer


def _attend_by_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output of `_attend`, by the kernel behind SDPA on a CPU, without keeping scores."""
    output, normalizer = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[:, None], key[:, None], value[:, None], 0.0, is_causal, scale=scaling
    )
    return output[:, 0], normalizer[:, 0]


def _of_queries(states: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """Return states (R, S, D) of the queries per tile, (R * M, Q, D), with zeros where there is none."""
    padded = nn.functional.pad(states, (0, 0, 0, 1)).flatten(0, 1)
    return padded.index_select(0, tiles.queries.flatten()).reshape(tiles.blocks.numel(), -1, states.shape[2])


def _of_blocks(states: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """Return the blocks (G, N, C, D) of the tiles, (R * M, C, D)."""
    return states.flatten(0, 1).index_select(0, tiles.blocks.flatten())


def _own(states: torch.Tensor, rows: int, begin: int) -> torch.Tensor:
    """Return the blocks (G, N, C, D) with the rows of queries in them, (R * (N - begin), C, D)."""
    return states[:, begin:].repeat_interleave(rows // len(states), 0).flatten(0, 1)


def merge(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tiles: Tiles,
    begin: int,
    scaling: float,
    attend: Attend,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs (R, S, D) over all blocks of each query, and the logarithms of the normalizers (R, S).

    Args:
        query: (R, S, D), in the blocks from number `begin` on.
        keys: (G, N, C, D), and so `values`.
        attend: `_attend`, or a kernel with the same result.
    """
    rows, length, size = query.shape
    blocks = query.reshape(-1, keys.shape[2], size)
    output, normalizer = attend(blocks, _own(keys, rows, begin), _own(values, rows, begin), True, scaling)
    output, normalizer = output.reshape(query.shape), normalizer.reshape(rows, length)
    if not tiles.places.shape[2]:
        return output, normalizer
    parts, part_normalizers = attend(
        _of_queries(query, tiles), _of_blocks(keys, tiles), _of_blocks(values, tiles), False, scaling
    )
    index = tiles.places.flatten()
    part_normalizers = nn.functional.pad(part_normalizers.reshape(rows, -1), (0, 1), value=-torch.inf)
    part_normalizers = part_normalizers.flatten().index_select(0, index).reshape(tiles.places.shape)
    parts = nn.functional.pad(parts.reshape(rows, -1, size), (0, 0, 0, 1))
    parts = parts.flatten(0, 1).index_select(0, index).reshape(*tiles.places.shape, size)
    total = torch.cat((normalizer[..., None], part_normalizers), -1).logsumexp(-1)
    merged = output * (normalizer - total).exp()[..., None]
    merged = merged + (parts * (part_normalizers - total[..., None]).exp()[..., None]).sum(2)
    return merged.to(query.dtype), total


class _Merged(torch.autograd.Function):
    """`merge` by the CPU's kernel. With the normalizer of all parts, the kernel's backward pass of a part gives that
    part's share of the gradient (Dao 2023, arXiv:2307.08691, algorithm 2; Liu et al. 2023, arXiv:2310.01889)."""

    @staticmethod
    def forward(ctx, query, keys, values, queries, blocks, places, begin, scaling):
        output, total = merge(query, keys, values, Tiles(queries, blocks, places), begin, scaling, _attend_by_kernel)
        ctx.save_for_backward(query, keys, values, queries, blocks, places, output, total)
        ctx.begin, ctx.scaling = begin, scaling
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, keys, values, *indices, output, total = ctx.saved_tensors
        tiles, block, size = Tiles(*indices), keys.shape[2], query.shape[2]

        def gradients(gradient, query, key, value, output, total, is_causal):
            states = [each[:, None].contiguous() for each in (gradient, query, key, value, output, total)]
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *states, 0.0, is_causal, scale=ctx.scaling
            )
            return [each[:, 0].float() for each in parts]

        own = [each.reshape(-1, block, size) for each in (gradient, query, output)]
        of_keys = [_own(each, len(query), ctx.begin) for each in (keys, values)]
        grad_query, *grads = gradients(own[0], own[1], *of_keys, own[2], total.reshape(-1, block), True)
        grad_query = nn.functional.pad(grad_query.reshape(query.shape), (0, 0, 0, 1))
        sums = []
        for grad in grads:
            grouped = grad.reshape(len(keys), len(query) // len(keys), -1, block, size).sum(1)
            sums.append(nn.functional.pad(grouped, (0, 0, 0, 0, ctx.begin, 0)).flatten(0, 1))
        if tiles.places.shape[2]:
            of_tiles = [_of_queries(each, tiles) for each in (gradient, query, output)]
            chosen = [_of_blocks(each, tiles) for each in (keys, values)]
            totals = _of_queries(total[..., None], tiles)[..., 0]
            part, *grads = gradients(of_tiles[0], of_tiles[1], *chosen, of_tiles[2], totals, False)
            grad_query.flatten(0, 1).index_add_(0, tiles.queries.flatten(), part.flatten(0, 1))
            for total_of_block, grad in zip(sums, grads, strict=True):
                total_of_block.index_add_(0, tiles.blocks.flatten(), grad)
        grad_keys, grad_values = (each.reshape(keys.shape).to(keys.dtype) for each in sums)
        return grad_query[:, :-1].to(query.dtype), grad_keys, grad_values, None, None, None, None, None
