"""Which blocks of keys a query attends to, and attention to them without scores of all pairs.

Queries that chose the same block are brought together in tiles, as MoBA does (arXiv:2502.13189, section 2.3). Each
tile attends to its block, each query to its own, and a query's parts are merged by the normalizers of their softmax.

This file imports only torch and files beside it, and is uploaded to the Hub with modeling_hfllm.py.
Shapes: B batch, H query heads, K key-value heads, S queries, D head_dim; N blocks of C keys; k blocks chosen.
R is B * H rows of queries, G is B * K rows of keys, M tiles of Q queries.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from .memory_hfllm import needs_autograd

Attend = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class Tiles(NamedTuple):
    """Where each choice of a query stands among the tiles.

    Attributes:
        queries: (R, M * Q), the query in each place of a tile, S where there is none; each row of queries counts from
            S + 1 after the one before.
        blocks: (R, M), the block of each tile, counted over all G * N.
        places: (R, S, k), the place of each choice, M * Q for none; rows count from M * Q + 1 after the one before.
    """

    queries: torch.Tensor
    blocks: torch.Tensor
    places: torch.Tensor


@torch.no_grad()
def choose_blocks(
    query: torch.Tensor, keys: torch.Tensor, own: torch.Tensor, first: torch.Tensor | None, count: int
) -> torch.Tensor:
    """Return the best earlier blocks of each query, (B, H, S, k), by the product with the mean of their keys.

    Args:
        query: (B, H, S, D).
        keys: (B, K, N, C, D).
        own: (B, S) or (1, S), the block that each query is in.
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
    """Return the output (B, S, H, D) for few queries, which get a copy of the keys of their blocks each.

    Args:
        places: (B, S) or (1, S), where among the N * C keys each query stands; N * C for padding.
        query, keys, values, first, count: those of `choose_blocks`.
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
    """Return the output (B, H, S, D) for queries that fill the blocks from number `begin` on.

    Args:
        query, keys, values, first, count: those of `choose_blocks`.
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
    """Return tiles of at most `size` queries that chose the same block.

    Their number depends on the shapes alone: for each block one tile may not be full.

    Args:
        chosen: (R, S, k), from 0 to `number`, which stands for none.
        number: N.
        groups: rows of queries for each row of keys, H // K.
        size: Q.
    """
    rows, _, width = chosen.shape
    flat = chosen.flatten(1)
    length, device = flat.shape[1], flat.device
    # At the end of the counts, those who chose none.
    counts = flat.new_zeros(rows, number + 1).scatter_add(1, flat, torch.ones_like(flat))
    full = -(-counts[:, :number] // size)
    ends, most = full.cumsum(1), -(-length // size) + number
    starts = nn.functional.pad((ends - full) * size, (0, 1), value=most * size)
    order = flat.argsort(dim=1, stable=True)
    block = flat.gather(1, order)
    rank = torch.arange(length, device=device) - (counts.cumsum(1) - counts).gather(1, block)
    place = (starts.gather(1, block) + rank).clamp(max=most * size)
    queries = flat.new_full((rows, most * size + 1), chosen.shape[1])
    # Those who chose none share the last place, which no tile has.
    queries = queries.scatter(1, place, order // max(width, 1))[:, :-1]
    tiles = torch.arange(most, device=device).expand(rows, -1).contiguous()
    of_tile = torch.searchsorted(ends, tiles, right=True).clamp(max=number - 1)
    place = torch.zeros_like(flat).scatter(1, order, place)
    row = torch.arange(rows, device=device)[:, None]
    place = (place + row * (most * size + 1)).reshape(chosen.shape)
    return Tiles(queries + row * (chosen.shape[1] + 1), of_tile + row // groups * number, place)


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
    """Return what `_attend` does, by the kernel behind SDPA on a CPU, which keeps no scores."""
    output, normalizer = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[:, None], key[:, None], value[:, None], 0.0, is_causal, scale=scaling
    )
    return output[:, 0], normalizer[:, 0]


def _of_queries(states: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """Return states (R, S, D) of the queries of each tile, (R * M, Q, D), with zeros where there is none."""
    padded = nn.functional.pad(states, (0, 0, 0, 1)).flatten(0, 1)
    return padded.index_select(0, tiles.queries.flatten()).reshape(tiles.blocks.numel(), -1, states.shape[2])


def _of_blocks(states: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """Return the blocks (G, N, C, D) of the tiles, (R * M, C, D)."""
    return states.flatten(0, 1).index_select(0, tiles.blocks.flatten())


def _own(states: torch.Tensor, rows: int, begin: int) -> torch.Tensor:
    """Return the blocks (G, N, C, D) that the rows of queries are in, (R * (N - begin), C, D)."""
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
        attend: `_attend`, or a kernel that returns the same.
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
