"""Documents and comparisons in batches of like length, for training that pads instead of packing."""

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Piece = TypeVar("Piece")


def pieces_of(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> list[list[int]]:
    """Return the token ids of each document, from the document token on; documents over `max_length` are split."""
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    pieces = []
    for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        ids = start + ids
        pieces += [ids[at : at + max_length] for at in range(0, len(ids), max_length)]
    return pieces


def length_grouped(
    pieces: Sequence[Piece], batch_size: int, seed: int, window: int = 20, length: Callable[[Piece], int] = len
) -> list[Piece]:
    """An order in which a batch holds pieces of like length, while lengths come in random order.

    Sorts within windows of `window` batches, then shuffles the batches: transformers' `group_by_length` saves as much
    padding, but runs from long to short for fifty batches at a time, which this small model learns less from, and
    draws its order anew when a run is resumed or shared between processes.

    Args:
        batch_size: rows of an optimizer step, over all processes.
        length: of a piece, in any unit.
    """
    rng = random.Random(seed)
    pieces = list(pieces)
    rng.shuffle(pieces)
    batches = []
    for first in range(0, len(pieces), window * batch_size):
        near = sorted(pieces[first : first + window * batch_size], key=length)
        batches += [near[at : at + batch_size] for at in range(0, len(near), batch_size)]
    rng.shuffle(batches)
    return [piece for batch in batches for piece in batch]
