"""Rows of tokens as long as asked, from texts that may be shorter."""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hfllm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def start_of(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the token that texts begin with (`bos_token`), as in pretraining, if there is one."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def long_rows(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", length: int, most: int, seed: int, what: str = "texts"
) -> tuple[list[list[int]], bool]:
    """Return up to `most` rows of `length` tokens each, and whether short texts were joined for them.

    Rows are pieces of texts of at least that length, as long as there are as many; a text gives pieces that do not
    overlap. Otherwise all texts are joined in a random order with the end token between them, and cut. Each row begins
    with `start_of` the tokenizer.

    Raises:
        InputError: when all texts together are shorter than one row.
    """
    rng, order = random.Random(seed), list(texts)
    rng.shuffle(order)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    start = start_of(tokenizer)
    room, rows, joined, total = length - len(start), [], [], 0
    for text in order:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        total += len(ids)
        rows += _pieces(ids, room, start)
        if len(joined) < most * length:
            joined += ids + end
        if len(rows) >= most:
            return rows[:most], False
    if len(joined) < room:
        raise InputError(
            f"--dataset_name: the {len(order)} {what} have {total} tokens together, and one row of the longer context "
            f"needs {length}: give more text, or a smaller --factor"
        )
    return _pieces(joined, room, start)[:most], True


def _pieces(ids: list[int], size: int, start: list[int]) -> list[list[int]]:
    return [start + ids[begin : begin + size] for begin in range(0, len(ids) - size + 1, size)]
