"""Batches of single documents of similar length, for training with padding instead of packing."""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def pieces_of(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> list[list[int]]:
    """Return the token ids of each document, from the document token on; documents over `max_length` are split."""
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    pieces = []
    for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        ids = start + ids
        pieces += [ids[at : at + max_length] for at in range(0, len(ids), max_length)]
    return pieces


def length_grouped(pieces: list[list[int]], batch_size: int, seed: int, window: int = 20) -> list[list[int]]:
    """Return an order in which each batch has pieces of similar length, and batches come in random order.

    Sorts within windows of `window` batches, then shuffles the batches: transformers' `group_by_length` saves as much
    padding, but goes from long to short over fifty batches at a time, from which a small model learns less.
    """
    rng = random.Random(seed)
    pieces = list(pieces)
    rng.shuffle(pieces)
    batches = []
    for first in range(0, len(pieces), window * batch_size):
        near = sorted(pieces[first : first + window * batch_size], key=len)
        batches += [near[at : at + batch_size] for at in range(0, len(near), batch_size)]
    rng.shuffle(batches)
    return [piece for batch in batches for piece in batch]
