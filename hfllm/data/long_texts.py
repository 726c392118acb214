"""Rows of tokens as long as asked, from texts that may be shorter."""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hfllm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def long_rows(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", length: int, most: int, seed: int, what: str = "texts"
) -> tuple[list[list[int]], bool]:
    """Return up to `most` rows of `length` tokens each, and whether short texts were joined for them.

    Rows are pieces of texts of at least that length, as long as there are as many; a text gives pieces that do not
    overlap. Otherwise all texts are joined in a random order with the end token between them, and cut.

    Raises:
        InputError: when all texts together are shorter than one row.
    """
    rng, order = random.Random(seed), list(texts)
    rng.shuffle(order)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    rows, joined, total = [], [], 0
    for text in order:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        total += len(ids)
        rows += [ids[begin : begin + length] for begin in range(0, len(ids) - length + 1, length)]
        if len(joined) < most * length:
            joined += ids + end
        if len(rows) >= most:
            return rows[:most], False
    if len(joined) < length:
        raise InputError(
            f"--dataset_name: the {len(order)} {what} have {total} tokens together, and one row of the longer context "
            f"needs {length}: give more text, or a smaller --factor"
        )
    return [joined[begin : begin + length] for begin in range(0, len(joined) - length + 1, length)][:most], True
