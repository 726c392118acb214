"""Keys and values of unfinished episodes: the policy's next turn does not read again what it has read and written.

Shapes: B rows of a batch, H key-value heads, S tokens of the longest sequence, W columns of a cache, D head_dim.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class Kept(NamedTuple):
    """A sequence whose keys and values are known.

    Args:
        tokens: the sequence, up to the last token that was fed to the model.
        part: the number of the cache, of those that were kept.
        row: its row there.
        begin: the column of its first token.
    """

    tokens: list[int]
    part: int
    row: int
    begin: int


class TurnCaches:
    """What `generate` computed for the last turn of each episode, on a CPU and for layers of full attention.

    On an accelerator memory is scarcer than the time that reading takes.
    """

    def __init__(self) -> None:
        self._kept: dict[int, Kept] = {}
        self._parts: list[list[tuple[torch.Tensor, torch.Tensor]]] = []

    def keep(
        self,
        episodes: Sequence[int],
        cache: object,
        rows: torch.Tensor,
        ids: torch.Tensor,
        begins: torch.Tensor,
        ends: torch.Tensor,
    ) -> None:
        """Keep the rows of a cache whose turns have ended.

        Args:
            episodes: of the rows.
            rows: (B,), places in the cache.
            ids: (B, S) of these rows.
            begins: (B,), the columns of the first tokens.
            ends: (B,), the columns after the last tokens that were fed to the model.
        """
        if not len(rows) or not _is_plain(cache):
            return
        spans = zip(ids.tolist(), begins.tolist(), ends.tolist(), strict=True)
        for row, (episode, (tokens, begin, end)) in enumerate(zip(episodes, spans, strict=True)):
            self._kept[episode] = Kept(tokens[begin:end], len(self._parts), row, begin)
        self._parts.append([(layer.keys[rows], layer.values[rows]) for layer in cache.layers])

    def before(self, episodes: Sequence[int], ids: torch.Tensor, mask: torch.Tensor) -> DynamicCache | None:
        """Return a cache of what is known of the episodes' sequences, `None` if that is nothing, and forget it.

        It has the same columns for all rows: where some have fewer new tokens than others, their last known ones are
        read again.

        Args:
            ids, mask: (B, S), the sequences, padded on the left.
        """
        kept, parts, self._kept, self._parts = self._kept, self._parts, {}, []
        if any(episode not in kept for episode in episodes):
            return None
        rows, width = [kept[episode] for episode in episodes], ids.shape[1]
        begins = mask.argmax(1).tolist()
        sequences = [row[begin:] for row, begin in zip(ids.tolist(), begins, strict=True)]
        new = [len(all_) - _shared(row.tokens, all_) for row, all_ in zip(rows, sequences, strict=True)]
        columns = width - max(new)
        if columns <= 0:
            return None
        # The old column of each new one; those of padding are masked, whatever they hold.
        shifts = torch.tensor([row.begin - begin for row, begin in zip(rows, begins, strict=True)])
        sources = (shifts.unsqueeze(1) + torch.arange(columns)).clamp(min=0)
        layers = []
        for at in range(len(parts[0])):
            pair = [part[at] for part in parts]
            layers.append(tuple(_gathered([each[side] for each in pair], rows, sources) for side in (0, 1)))
        return DynamicCache(layers)


def _gathered(tensors: Sequence[torch.Tensor], rows: Sequence[Kept], sources: torch.Tensor) -> torch.Tensor:
    """Return (B, H, W, D): of each row's tensor its columns `sources` (B, W)."""
    heads, size = tensors[0].shape[1], tensors[0].shape[3]
    result = tensors[0].new_empty(len(rows), heads, sources.shape[1], size)
    for number, tensor in enumerate(tensors):
        places = [place for place, row in enumerate(rows) if row.part == number]
        if places:
            index = torch.tensor([rows[place].row for place in places]).unsqueeze(1)
            columns = sources[places].clamp(max=tensor.shape[2] - 1)
            result[places] = tensor[index, :, columns].transpose(1, 2)
    return result


def _shared(known: Sequence[int], tokens: Sequence[int]) -> int:
    """Return how many tokens of a sequence are known, at most all but its last, which has to be read."""
    most = min(len(known), len(tokens) - 1)
    if known[:most] == tokens[:most]:
        return most
    return next(at for at in range(most) if known[at] != tokens[at])


def _is_plain(cache: object) -> bool:
    """Return whether a cache has the keys and values of every token, and nothing else."""
    layers = cache.layers if type(cache) is DynamicCache else []
    return bool(layers) and all(
        type(layer) is DynamicLayer and layer.is_initialized and layer.keys.device.type == "cpu" for layer in layers
    )
