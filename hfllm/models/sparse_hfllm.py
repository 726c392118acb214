"""Sparse attention: each query looks at the means of blocks of keys first, and at the keys of the best blocks then.

MoBA (Lu et al. 2025, arXiv:2502.13189, section 2.2), registered with transformers as `attn_implementation="sparse"`.
Blocks are counted in each document from its first token, so that neither padding nor other documents of a row move
them. `sparse_block_size` and `sparse_num_blocks` of the config decide; nothing is learned for the choice.

This file imports only torch, transformers and files beside it, and is uploaded to the Hub with modeling_hfllm.py.
Shapes: B batch, H query heads, K key-value heads, S queries, T keys, D head_dim; N blocks of C keys.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import masking_utils
from transformers.configuration_utils import PreTrainedConfig

from .banded_hfllm import banded_attention_forward, banded_mask, functions_in, refuse_unsupported
from .layer_types_hfllm import SPARSE_SIZES
from .sparse_blocks_hfllm import attend_by_block, attend_by_query

# The parts of masks that `sparse_mask` knows: the order of tokens, and the documents of packed rows.
KNOWN_PARTS = {
    *("causal_mask_function", "and_masks", "packed_sequence_mask_function"),
    "remap_positions_for_packed_sequence",
}


def sparse_sizes(config: PreTrainedConfig) -> tuple[int, int]:
    """Return the keys of a block, C, and the blocks that a query attends to, its own included (MoBA's top-k).

    Raises:
        ValueError: naming the field of the config that is missing or below 1.
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
    """Return the attention's output, (B, S, H, D), and no weights. Arguments are those of transformers' functions.

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
    # Under autocast the value alone may have the lower precision.
    query, key = query.to(value.dtype), key.to(value.dtype)
    length, past = query.shape[2], key.shape[2] - query.shape[2]
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    source = first = None
    places = past + torch.arange(length, device=query.device)[None]
    if attention_mask is not None:
        source, first, places = attention_mask[:, 0].unbind(1)
        first, places = first[:, ::block], places[:, :length]
    keys, values = (_by_place(states, source, block).unflatten(2, (-1, block)) for states in (key, value))
    if length * count <= key.shape[2]:
        return attend_by_query(query, keys, values, places, first, count, scaling), None
    # Queries too by place; in a row without padding only those of the last blocks.
    begin = 0 if source is not None else past // block
    if source is None:
        queries = nn.functional.pad(query, (0, 0, past - begin * block, -key.shape[2] % block))
    else:
        index = torch.arange(length, device=query.device).expand_as(places)
        holders = torch.full_like(source, length)
        queries = _by_place(query, nn.functional.pad(holders, (0, 1)).scatter(1, places, index)[:, :-1], block)
    output = attend_by_block(queries, keys, values, begin, first, count, scaling)
    index = (places - begin * block).clamp(max=output.shape[2] - 1)[:, None, :, None]
    output = output.gather(2, index.expand(query.shape[0], query.shape[1], -1, query.shape[3]))
    return output.transpose(1, 2).contiguous(), None


def _by_place(states: torch.Tensor, source: torch.Tensor | None, block: int) -> torch.Tensor:
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

    Arguments are those of `transformers.masking_utils.sdpa_mask`. With a window it is `banded_mask`.

    Returns:
        Integers (B, 1, 3, N * C). Each document fills its blocks from their first place on. The first row has the key
        of each place, or T where it is empty; the second, for places with a token, the first block of its document;
        the third the places of the queries, which are N * C for padding.

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
    # From here on, among the keys that are kept: a cache that lets tokens go has them from `kv_offset` on.
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
    return _places(visible, begins, index[:q_length] + q_offset, block)


def _places(visible: torch.Tensor, begins: torch.Tensor | None, queries: torch.Tensor, block: int) -> torch.Tensor:
    """Return what `sparse_mask` does.

    Args:
        visible: (B, T), whether a key is a token that some query may see.
        begins: (B, T), whether a key is the first of a document.
        queries: (S,), which of the keys are the queries'.
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
    places = (first * block + rank).masked_fill(~visible, count * block)
    index = torch.arange(length, device=visible.device).expand(batch, -1)
    rows = places.new_full((batch, count * block + 1), length).scatter(1, places, index)
    firsts = places.new_zeros(batch, count * block + 1).scatter(1, places, first)
    queries = nn.functional.pad(places[:, queries], (0, count * block - len(queries)))
    return torch.stack((rows[:, :-1], firsts[:, :-1], queries), 1).unsqueeze(1)
