"""How well a model predicts text at each distance from its beginning: what it makes of a long context."""

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Tokens of one forward pass, whose logits are in memory at once.
BATCH_TOKENS = 4096


def nats_by_position(
    model: "PreTrainedModel", rows: Sequence[Sequence[int]], window: int | None = None, kept: int = 0
) -> "torch.Tensor":
    """Return minus the log-probability of each token but the first, (rows, length - 1), in nats.

    Args:
        rows: tokens, all rows of the same length.
        window: the most tokens that are read at once, at least 2; a token then has between half as many and as many
            before it, where there are any. `None` reads whole rows.
        kept: first tokens of a row with which each of its windows begins, such as a token that begins texts.
    """
    import torch
    from tqdm import tqdm

    ids = torch.tensor([list(row) for row in rows], device=model.device)
    length = ids.shape[1]
    window = length if window is None else min(window, length)
    was_training, found = model.training, []
    model.eval()
    with torch.inference_mode():
        for begin, end, new in tqdm(_windows(length, window), disable=not sys.stderr.isatty(), leave=False):
            seen = torch.cat([ids[:, :kept], ids[:, begin + kept : end]], dim=1)
            parts = seen.split(max(1, BATCH_TOKENS // (end - begin)))
            found.append(torch.cat([_nats(model, part)[:, new - begin :] for part in parts]))
    model.train(was_training)
    return torch.cat(found, dim=1)


def _windows(length: int, window: int) -> list[tuple[int, int, int]]:
    """Return the windows' first and last places, and the place of the first token that none before has predicted."""
    places, new = [(0, window, 0)], window
    while new < length:
        end = min(new + window // 2, length)
        places.append((end - window, end, new - 1))
        new = end
    return places


def _nats(model: "PreTrainedModel", ids: "torch.Tensor") -> "torch.Tensor":
    import torch

    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).cpu()


def bytes_of(rows: Sequence[Sequence[int]], tokenizer: "PreTrainedTokenizerBase", first: int, last: int) -> list[int]:
    """Return the UTF-8 bytes of the tokens from `first` to before `last` of each row, special ones left out."""
    texts = tokenizer.batch_decode([list(row[first:last]) for row in rows], skip_special_tokens=True)
    return [max(1, len(text.encode())) for text in texts]


def edges_of(original: int, length: int) -> list[int]:
    """Return the borders of the ranges that figures are given for: they double, and `original` is one of them."""
    edges, place = [length], original
    while place < length:
        edges.append(place)
        place *= 2
    edges += [original // share for share in (2, 4) if original // share > 1]
    return sorted({1, *edges})


def bits_by_range(
    nats: "torch.Tensor", rows: Sequence[Sequence[int]], tokenizer: "PreTrainedTokenizerBase", first: int, last: int
) -> list[float]:
    """Return the bits per byte of each row's tokens from `first` (at least 1) to before `last`.

    Args:
        nats: (rows, length - 1), of `nats_by_position`.
    """
    sums = nats[:, first - 1 : last - 1].double().sum(1).tolist()
    sizes = bytes_of(rows, tokenizer, first, last)
    return [total / math.log(2) / size for total, size in zip(sums, sizes, strict=True)]
