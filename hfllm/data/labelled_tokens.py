"""Tokens of rows with labels: of texts, of words with a label on one token each, and windows of long contexts.

Every encoded row has `input_ids` and `labels`; the end token comes last, since a causal model has read everything only
there. Rows that a tokenizer begins or ends with tokens of its own, such as BERT's, keep them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfllm.data.labelled import Row
from hfllm.data.packing import IGNORE
from hfllm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encoded = dict[str, Any]


@dataclass(frozen=True)
class Window:
    """A part of a context, with its question before it.

    Args:
        row: the number of the row that it is of.
        offsets: of each token the place of its text in the context, `None` for one that is not of the context.
    """

    row: int
    offsets: tuple[tuple[int, int] | None, ...]


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a tokenizer that cannot say where its tokens are in the text.

    Raises:
        InputError: naming it.
    """
    if not tokenizer.is_fast:
        raise InputError(f"{type(tokenizer).__name__} does not say where tokens are in a text: a fast one is needed")


def encode_texts(
    rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", max_length: int, labels: Sequence[str]
) -> tuple[list[Encoded], int]:
    """Return texts as tokens, each with the number of its label, and how many of them are cut to `max_length`."""
    encoded, cut, numbers = [], 0, {name: number for number, name in enumerate(labels)}
    for row in rows:
        ids = tokenizer(row["text"], row["text_pair"], verbose=False)["input_ids"]
        ids, is_cut = _with_end(ids, tokenizer, max_length)
        cut += is_cut
        encoded.append({"input_ids": ids, "labels": numbers[row["label"]]})
    return encoded, cut


def encode_words(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    labels: Sequence[str],
    label_token: str = "first",
) -> tuple[list[Encoded], list[list[int]]]:
    """Return words as tokens, and of each row the place of the token that stands for each word.

    Args:
        rows: with `words` and `tags`.
        labels: the names of all tags.
        label_token: which token of a word has its label: the `first`, as is usual, or the `last`, at which a causal
            model has read the whole word. Other tokens have none (-100).

    Returns:
        The rows, and the places; -1 for a word that is cut off.
    """
    numbers, encoded, places = {name: number for number, name in enumerate(labels)}, [], []
    for row in rows:
        found = tokenizer(" ".join(row["words"]), return_offsets_mapping=True, verbose=False)
        ids, _ = _with_end(found["input_ids"], tokenizer, max_length)
        place = _places(row["words"], found["offset_mapping"], len(ids) - 1, label_token == "last")
        targets = [IGNORE] * len(ids)
        for where, tag in zip(place, row["tags"], strict=True):
            if where >= 0:
                targets[where] = numbers[tag]
        encoded.append({"input_ids": ids, "labels": targets})
        places.append(place)
    return encoded, places


def _places(words: Sequence[str], offsets: Sequence[tuple[int, int]], most: int, takes_last: bool) -> list[int]:
    """Return of each word the place of its first or last token among the first `most`; -1 where there is none."""
    places, begin, token = [], 0, 0
    for word in words:
        end = begin + len(word)
        # A token may begin with the space before its word, and others are of no text.
        while token < len(offsets) and (offsets[token][1] <= begin or offsets[token][0] == offsets[token][1]):
            token += 1
        last = token
        while last + 1 < len(offsets) and begin < offsets[last + 1][1] and max(offsets[last + 1][0], begin) < end:
            last += 1
        is_there = token < len(offsets) and offsets[token][0] < end
        where = last if takes_last else token
        places.append(where if is_there and where < most else -1)
        token, begin = (last + 1 if is_there else token), end + 1
    return places


def _with_end(ids: list[int], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> tuple[list[int], bool]:
    """Return ids with a special token at the end, cut to a length, and whether they were cut."""
    special = set(tokenizer.all_special_ids)
    end = ids[-1] if ids and ids[-1] in special else tokenizer.eos_token_id
    text = ids[:-1] if ids and ids[-1] in special else ids
    return [*text[: max_length - 1], end], len(text) > max_length - 1


def encode_spans(
    rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", max_length: int, stride: int
) -> tuple[list[Encoded], list[Window]]:
    """Return the windows of all rows, a question and a part of its context each.

    `labels` are the places of the first and the last token of the answer; of the end token, twice, in a window that
    does not hold the whole answer. A causal model knows only there that there was none.

    Args:
        rows: with `context`, `question`, and answers as `texts` and `starts`; the first one is learned.
        max_length: the longest window, in tokens.
        stride: how many tokens two neighboring windows share.

    Raises:
        InputError: when a question leaves no room for its context.
    """
    encoded, windows = [], []
    for number, row in enumerate(rows):
        head, tail = _question(row["question"], tokenizer)
        room = max_length - len(head) - len(tail)
        found = tokenizer(row["context"], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = found["input_ids"], [tuple(each) for each in found["offset_mapping"]]
        if room <= stride:
            raise InputError(
                f"a question of {len(head)} tokens leaves {room} of --max_length {max_length} for its context; more "
                f"than --doc_stride {stride} are needed: {row['question'][:60]!r}"
            )
        for begin in range(0, max(len(ids) - stride, 1), room - stride):
            part = slice(begin, begin + room)
            shown = (*[None] * len(head), *offsets[part], *[None] * len(tail))
            whole = [*head, *ids[part], *tail]
            labels = _span_labels(row, shown) or [len(whole) - 1] * 2
            encoded.append({"input_ids": whole, "labels": labels})
            windows.append(Window(number, shown))
    return encoded, windows


def _question(question: str, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Return the tokens before and after a context: those of a tokenizer of pairs, or a new line and the end."""
    mark = tokenizer.eos_token_id
    alone = tokenizer(question, add_special_tokens=False)["input_ids"]
    pair = tokenizer(question, question)
    sides = pair.sequence_ids(0)
    if len(pair["input_ids"]) == 2 * len(alone) or None not in sides:
        return tokenizer(f"{question}\n", add_special_tokens=False)["input_ids"], [mark]
    second = sides.index(1)
    tail = pair["input_ids"][second + sides.count(1) :]
    return pair["input_ids"][:second], tail or [mark]


def _span_labels(row: Row, offsets: Sequence[tuple[int, int] | None]) -> list[int] | None:
    """Return the places of the first and the last token of the answer, `None` where it is not whole in the window."""
    if not row["texts"]:
        return None
    begin, end = row["starts"][0], row["starts"][0] + len(row["texts"][0])
    inside = [place for place, each in enumerate(offsets) if each and each[1] > begin and each[0] < end]
    if not inside or offsets[inside[-1]][1] < end or offsets[inside[0]][0] > begin:
        return None
    return [inside[0], inside[-1]]
