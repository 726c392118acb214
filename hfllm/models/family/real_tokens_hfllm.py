"""The tokens of a batch that a model has to compute: no padding, and no beginning that another row has too.

In training on a CPU, padding takes as much time as tokens, a third of it in batches of questions and answers. Rows
that begin alike, as by one system prompt or one question, have the same states there, so a causal model needs them
once. Where nobody observes the layers, states are computed of these tokens alone, and heads put into rows to attend.

Shapes: B rows of a batch, S its longest, N computed tokens, M of them whose states are read, C cells of rows.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .layers_hfllm import is_unobserved, missing_rows

# Computed tokens, as a share, from which on putting them into rows and back takes as long as the others.
LEAST_PADDING = 0.9
# Tokens by which rows must be shorter than others to attend apart from them, for less time than one more call takes.
LEAST_GAP = 8


class Copies(NamedTuple):
    """Cells that are copies of tokens.

    Args:
        sources: (C,), the token of each cell.
        cells: those that count, by their tokens; others have no gradient.
        offsets: (N,), where each token's cells begin among these.
    """

    sources: torch.Tensor
    cells: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def of(cls, sources: torch.Tensor, count: int, counts: torch.Tensor | None = None) -> "Copies":
        """Return the copies of `count` tokens; `counts` (C,) says which cells count, by default all."""
        cells = sources.argsort(stable=True)
        cells = cells if counts is None else cells[counts[cells]]
        index = torch.arange(count, device=sources.device)
        return cls(sources, cells, torch.searchsorted(sources[cells], index))


class Group(NamedTuple):
    """Rows of like length, which attend at once.

    Args:
        count: computed tokens of theirs.
        shape: their own B and S.
        places: (count,), of these tokens among their flattened rows.
    """

    count: int
    shape: tuple[int, int]
    places: torch.Tensor


class RealTokens(NamedTuple):
    """Places of a batch's computed tokens.

    Args:
        shape: B and S.
        places: (N,), of the tokens in the flattened rows, and of some padding (`missing_rows`).
        groups: rows of like length.
        copies: the tokens of all groups' rows, where rows share tokens.
        numbers: (B * S,), the token of each place then.
        read: the places of the tokens whose states are read, or `None` for all.
        among: (M,), which of the tokens are read, and some others.
        read_copies: the tokens of `read`, among those that are read, where rows share tokens.
    """

    shape: tuple[int, int]
    places: torch.Tensor
    groups: tuple[Group, ...]
    copies: Copies | None = None
    numbers: torch.Tensor | None = None
    read: torch.Tensor | None = None
    among: torch.Tensor | None = None
    read_copies: Copies | None = None

    @classmethod
    def of(
        cls,
        attention_mask: torch.Tensor,
        is_read: torch.Tensor | None,
        is_sorted: bool,
        input_ids: torch.Tensor | None = None,
    ) -> "RealTokens | None":
        """Return the tokens of a batch to compute, or `None` where computing them alone takes no less time.

        Args:
            attention_mask: (B, S), 0 for padding.
            is_read: (B, S), true where a state is read; `None`, or of another shape, means everywhere.
            is_sorted: put long rows first, to attend to groups of like length; their padding is at the end.
            input_ids: (B, S), of a causal model: rows that begin by the same tokens share these.
        """
        batch, length = attention_mask.shape
        order = attention_mask.sum(1).argsort(descending=True, stable=True) if is_sorted else torch.arange(batch)
        is_real = attention_mask[order] != 0
        first = _first_cells(input_ids[order], is_real) if input_ids is not None and is_sorted and batch > 1 else None
        is_own = is_real if first is None else is_real & (first == torch.arange(batch * length).view(batch, length))
        if first is not None and int(is_own.sum()) > LEAST_PADDING * int(is_real.sum()):
            first, is_own = None, is_real
        lengths = is_real.sum(1).tolist() if is_sorted else None
        is_own = _with_padding(is_own, is_real, lengths)
        rows, columns = is_own.nonzero(as_tuple=True)
        places = order[rows] * length + columns
        groups = _groups(rows, columns, lengths, batch, length)
        tokens = cls((batch, length), places, groups)
        if first is not None:
            tokens = tokens._shared(first, is_own, is_real, order)
        # An adapter may have put tokens of its own before the others.
        if is_read is not None and is_read.shape == attention_mask.shape:
            return tokens._with_read(is_read)
        if first is not None:
            read = attention_mask.flatten().nonzero().squeeze(1)
            return tokens._replace(read=read, read_copies=Copies.of(tokens.numbers[read], len(places)))
        return tokens if 0 < len(places) < LEAST_PADDING * batch * length else None

    def _shared(
        self, first: torch.Tensor, is_own: torch.Tensor, is_real: torch.Tensor, order: torch.Tensor
    ) -> "RealTokens":
        """Return the same tokens with the copies of them.

        Args:
            first: (B, S), of `order`ed rows, see `_first_cells`.
            is_own, is_real: (B, S), of the ordered rows: cells that are computed, and those that are not padding.
        """
        (batch, length), own = self.shape, is_own.flatten().nonzero().squeeze(1)
        numbers = torch.zeros(batch * length, dtype=torch.long)
        numbers[own] = torch.arange(len(own))
        by_row = numbers[first]
        parts, start = [], 0
        for group in self.groups:
            part = slice(start, start + group.shape[0]), slice(group.shape[1])
            parts.append((by_row[part].flatten(), is_real[part].flatten()))
            start += group.shape[0]
        sources, counts = (torch.cat(each) for each in zip(*parts, strict=True))
        unordered = torch.empty_like(by_row)
        unordered[order] = by_row
        return self._replace(copies=Copies.of(sources, len(own), counts), numbers=unordered.flatten())

    def _with_read(self, is_read: torch.Tensor) -> "RealTokens | None":
        """Return the same tokens with those that are read; `None` where none is."""
        if self.numbers is None:
            among = _with_others(is_read.flatten()[self.places].nonzero().squeeze(1), len(self.places))
            return self._replace(read=self.places[among], among=among) if len(among) else None
        read = is_read.flatten().nonzero().squeeze(1)
        if not len(read):
            return None
        among, sources = self.numbers[read].unique(return_inverse=True)
        among = _with_others(among, len(self.places))
        return self._replace(read=read, among=among, read_copies=Copies.of(sources, len(among)))

    @property
    def all_read(self) -> "RealTokens":
        """The same tokens, all of them read."""
        return self._replace(read=None, among=None, read_copies=None)

    def pick(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the computed tokens of (B, S, ...), (1, N, ...)."""
        return _Gather.apply(rows.flatten(0, 1), self.places).unsqueeze(0)

    def pick_rotations(self, rotations: Any) -> Any:
        """Return cosines and sines (1, N, R), given for rows: a pair, pairs by type of layer, or `None`."""
        if isinstance(rotations, dict):
            return {kind: self.pick_rotations(pair) for kind, pair in rotations.items()}
        batch = self.shape[0]
        return None if rotations is None else tuple(self.pick(part.expand(batch, -1, -1)) for part in rotations)

    def rows_of_read(self, states: torch.Tensor) -> torch.Tensor:
        """Return the states that are read, (1, M, ...), as rows (B, S, ...); the others mean nothing."""
        states, places = states.squeeze(0), self.places if self.read is None else self.read
        if self.read_copies is not None:
            states = _Copy.apply(states, *self.read_copies)
        return _Spread.apply(states, places, math.prod(self.shape)).unflatten(0, self.shape)

    def drop_unread(self, states: torch.Tensor) -> torch.Tensor:
        """Return the states to be read of (1, N, ...), (1, M, ...)."""
        return states if self.among is None else _Gather.apply(states.squeeze(0), self.among).unsqueeze(0)

    def attend(self, attention: Callable[..., torch.Tensor], *heads: torch.Tensor, has_mask: bool) -> torch.Tensor:
        """Return the heads' outputs to be read, (1, M, H * D).

        Args:
            attention: maps queries, keys and values (B, H, S, D) of some rows to outputs (B, S, H, D).
            heads: queries, keys and values, (1, H, N, D).
            has_mask: whether the mask is of all rows.
        """
        groups = (Group(len(self.places), self.shape, self.places),) if has_mask else self.groups
        by_token = (each[0].transpose(0, 1) for each in heads)
        if self.copies is None:
            parts = zip(*(each.split([group.count for group in groups]) for each in by_token), strict=True)
        else:
            copies = Copies.of(self.numbers, len(self.places)) if has_mask else self.copies
            sizes = [math.prod(group.shape) for group in groups]
            parts = zip(*(_Copy.apply(each, *copies).split(sizes) for each in by_token), strict=True)
        outputs = []
        for part, group in zip(parts, groups, strict=True):
            if self.copies is None:
                part = (_Spread.apply(each, group.places, math.prod(group.shape)) for each in part)
            output = attention(*(each.unflatten(0, group.shape).transpose(1, 2) for each in part))
            outputs.append(_Gather.apply(output.flatten(0, 1).flatten(1), group.places))
        return self.drop_unread(torch.cat(outputs).unsqueeze(0) if len(outputs) > 1 else outputs[0].unsqueeze(0))


def real_tokens(
    trunk: nn.Module, attention_mask: torch.Tensor, is_read: torch.Tensor | None, input_ids: torch.Tensor | None
) -> tuple[torch.Tensor | None, RealTokens | None]:
    """Return the mask still needed by an `HfllmModel`, and the tokens to compute; `None` if it computes all.

    Args:
        attention_mask: (B, S), 0 for padding.
        is_read: (B, S), true where a state is read, or `None` if nobody knows.
        input_ids: (B, S), where they alone say what a state is; see `RealTokens.of`.
    """
    config = trunk.config
    # A GPU would have to wait for the number of tokens.
    if is_read is None or attention_mask.device.type != "cpu" or not trunk.computes_by_token:
        return attention_mask, None
    if is_read.shape != attention_mask.shape or bool((is_read & (attention_mask == 0)).any()):
        return attention_mask, None
    reads_few = config.norm_placement == "pre" and not config.parallel_block
    needs_no_mask = config.is_causal and bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())
    ids = input_ids if needs_no_mask and _shares_beginnings(trunk) else None
    tokens = RealTokens.of(attention_mask, is_read if reads_few else None, needs_no_mask, ids)
    return None if needs_no_mask else attention_mask, tokens


def _shares_beginnings(trunk: nn.Module) -> bool:
    """Return whether equal beginnings have equal states: nothing is dropped by chance, or added to the embeddings."""
    if {*trunk.config.layer_types} != {"full_attention"} or not is_unobserved(trunk.embed_tokens):
        return False
    drops = (isinstance(each, nn.Dropout) and each.p for each in trunk.modules())
    return not any(drops) and not any(each.hidden_dropout or each.self_attn.attention_dropout for each in trunk.layers)


def _first_cells(input_ids: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
    """Return for each cell of (B, S) the first one, of the flattened rows, with the same tokens up to it.

    Args:
        input_ids: (B, S), padding at the end.
        is_real: (B, S), false for padding.
    """
    batch, length = input_ids.shape
    ids = input_ids.masked_fill(~is_real, -1)
    texts = ids.tolist()
    # Rows with equal beginnings are neighbors.
    order = torch.tensor(sorted(range(batch), key=texts.__getitem__))
    ids, index = ids[order], torch.arange(batch).unsqueeze(1)
    is_new = torch.ones_like(is_real)
    is_new[1:] = (ids[1:] == ids[:-1]).cumprod(1) == 0
    heads = torch.where(is_new, index, 0).cummax(0).values * length + torch.arange(length)
    # The first one as the rows are given.
    own = order.repeat_interleave(length)
    first = torch.full((batch * length,), batch).scatter_reduce(0, heads.flatten(), own, "amin")
    result = torch.empty_like(heads)
    result[order] = first[heads] * length + torch.arange(length)
    return result


def _with_padding(is_own: torch.Tensor, is_real: torch.Tensor, lengths: list[int] | None) -> torch.Tensor:
    """Return the cells to compute (B, S), with as much of the padding after rows as products lack (`missing_rows`).

    Args:
        lengths: see `_groups`; cells beyond a group's are none of it.
    """
    missing = missing_rows(int(is_own.sum()), is_own.device)
    if not missing:
        return is_own
    is_after = (is_real.flip(1).cumsum(1).flip(1) == 0) & is_real.any(1, keepdim=True)
    if lengths is not None:
        bounds = [*_group_starts(lengths), len(lengths)]
        longest = torch.tensor([lengths[start] for start in bounds[:-1]])
        width = longest.repeat_interleave(torch.tensor(bounds).diff())
        is_after &= torch.arange(is_own.shape[1]) < width.unsqueeze(1)
    added = is_after.flatten().nonzero().squeeze(1)[:missing]
    return is_own.flatten().index_fill(0, added, True).view_as(is_own) if len(added) == missing else is_own


def _with_others(among: torch.Tensor, count: int) -> torch.Tensor:
    """Return these of `count` tokens, and as many others after them as products lack (`missing_rows`)."""
    missing = missing_rows(len(among), among.device)
    if not missing or len(among) + missing > count:
        return among
    is_other = torch.ones(count, dtype=torch.bool).index_fill(0, among, False)
    return torch.cat((among, is_other.nonzero().squeeze(1)[:missing]))


def _groups(
    rows: torch.Tensor, columns: torch.Tensor, lengths: list[int] | None, batch: int, length: int
) -> tuple[Group, ...]:
    """Return the groups of rows, of falling `lengths`; `None` puts all into one."""
    counts = torch.bincount(rows, minlength=batch).tolist()
    groups, first = [], 0
    for start, end in pairwise([0, batch] if lengths is None else [*_group_starts(lengths), batch]):
        count, longest = sum(counts[start:end]), length if lengths is None else max(lengths[start], 1)
        part = slice(first, first + count)
        groups.append(Group(count, (end - start, longest), (rows[part] - start) * longest + columns[part]))
        first += count
    return tuple(groups)


def _group_starts(lengths: list[int]) -> list[int]:
    """Return the numbers of the rows where groups begin: rows fall in length, in a group by a quarter at most."""
    starts = [0]
    for row, length in enumerate(lengths):
        if 4 * length < 3 * lengths[starts[-1]] and lengths[starts[-1]] - length >= LEAST_GAP:
            starts.append(row)
    return starts


class _Gather(torch.autograd.Function):
    """Rows at these places; each place is taken once, so gradients are copied and not added up."""

    @staticmethod
    def forward(ctx, rows, places):
        ctx.save_for_backward(places)
        ctx.count = len(rows)
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx, grad):
        return _Spread.apply(grad, *ctx.saved_tensors, ctx.count), None


class _Spread(torch.autograd.Function):
    """The reverse of `_Gather`: rows at these places among `count`, and zeros elsewhere."""

    @staticmethod
    def forward(ctx, rows, places, count):
        ctx.save_for_backward(places)
        return rows.new_zeros(count, *rows.shape[1:]).index_copy_(0, places, rows)

    @staticmethod
    def backward(ctx, grad):
        return _Gather.apply(grad, *ctx.saved_tensors), None, None


class _Copy(torch.autograd.Function):
    """Tokens (N, ...) as cells (C, ...); the gradient of a token is the sum of its cells'."""

    @staticmethod
    def forward(ctx, tokens, sources, cells, offsets):
        ctx.save_for_backward(cells, offsets)
        return tokens.index_select(0, sources)

    @staticmethod
    def backward(ctx, grad):
        cells, offsets = ctx.saved_tensors
        total = F.embedding_bag(cells, grad.flatten(1), offsets, mode="sum")
        return total.unflatten(1, grad.shape[1:]), None, None, None
