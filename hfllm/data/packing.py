"""Pack documents into rows of one length (best fit) without attention between them.

A packed row holds its tokens and the lengths of the pieces in it, one after the other. In each piece, positions
begin at 0 again, which tells attention where a document ends (see `HfllmModel.forward`).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from hfllm.data.prepared import windows
from hfllm.errors import InputError

if TYPE_CHECKING:
    import pyarrow
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
# Window that is packed at a time: large enough to fill rows well, small enough for memory.
MOST_DOCUMENTS, MOST_CHARACTERS = 20_000, 1 << 24


def pack(texts: Iterable[str], tokenizer: "PreTrainedTokenizerBase", length: int) -> "Dataset":
    """Pack texts into rows of at most `length` tokens: best-fit decreasing, longer documents split, nothing lost.

    Each document begins with the tokenizer's document token (`bos_token`), if it has one. Packing is TRL's
    `pack_dataset` (Ding et al. 2024, arXiv:2404.10830) on windows of `MOST_DOCUMENTS` documents or `MOST_CHARACTERS`.

    Returns:
        A dataset with `input_ids` and `seq_lengths`, each a list of lists.

    Raises:
        InputError: when no document has two tokens, so there is nothing to predict.
    """
    from datasets import Dataset, concatenate_datasets

    return concatenate_datasets([Dataset(table) for table in packed_tables(texts, tokenizer, length)])


def packed_tables(
    texts: Iterable[str], tokenizer: "PreTrainedTokenizerBase", length: int
) -> Iterator["pyarrow.Table"]:
    """Pack window by window, as `pack` does, for more text than fits into memory."""
    from datasets import Dataset, Features, List, Value
    from trl import pack_dataset

    features, is_empty = Features({"input_ids": List(Value("int32"))}), True
    # Otherwise it would pack only a thousand pieces at a time.
    whole_window = {"batch_size": MOST_DOCUMENTS}
    for window in windows(texts, MOST_DOCUMENTS, MOST_CHARACTERS):
        pieces = [ids for ids in token_ids(window, tokenizer) if len(ids) > 1]
        if pieces:
            is_empty = False
            documents = Dataset.from_dict({"input_ids": pieces}, features)
            yield pack_dataset(documents, length, "bfd_split", whole_window).data.table
    if is_empty:
        raise InputError("no document has two tokens: there is no next token to predict")


def token_ids(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Return the token ids of each document, from the document token on."""
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    # Not verbose: a document longer than the model's context is split later and needs no warning.
    return [start + ids for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]


def batch_of(
    rows: Sequence[dict[str, Any]], length: int, pad_token_id: int, cut: int = 1
) -> dict[str, "torch.Tensor"]:
    """Return packed rows as the tensors of a causal model, (B * cut, length / cut) each.

    There is no attention mask: padding comes last in a row and is a separate piece.

    Args:
        rows: from `pack`.
        length: tokens per row; shorter rows are padded.
        cut: split each row into this many, for a curriculum over lengths; positions restart at each cut.

    Returns:
        `input_ids`, `position_ids` and `labels`: -100 on padding and on the first token of each piece, which no token
        before it should predict.
    """
    import torch

    input_ids = torch.full((len(rows), length), pad_token_id)
    position_ids = torch.zeros((len(rows), length), dtype=torch.long)
    is_padding = torch.ones((len(rows), length), dtype=torch.bool)
    for row, packed in enumerate(rows):
        ids = packed["input_ids"]
        input_ids[row, : len(ids)] = torch.as_tensor(ids)
        is_padding[row, : len(ids)] = False
        lengths = [*packed["seq_lengths"], length - len(ids)]
        position_ids[row] = torch.cat([torch.arange(count) for count in lengths])
    shape = (len(rows) * cut, length // cut)
    input_ids, position_ids, is_padding = (part.view(shape) for part in (input_ids, position_ids, is_padding))
    # A piece that is split restarts after the cut.
    steps = torch.arange(shape[1])
    position_ids = torch.minimum(position_ids, steps.expand(shape))
    labels = input_ids.masked_fill(is_padding | (position_ids == 0), IGNORE)
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}


def pieces_of(
    batch: dict[str, "torch.Tensor"], most_tokens: int, most_padding: int = 64
) -> Iterator[dict[str, "torch.Tensor"]]:
    """Yield the pieces of a packed causal batch as separate rows, in groups of similar length, without a packing mask.

    Attention costs the square of a row's length, and a block mask as much as a full one; where no kernel supports
    packed rows, short rows are cheaper. Pieces without a target are left out.

    Args:
        batch: `input_ids`, `position_ids` and `labels`, see `batch_of`.
        most_tokens: limit per group, padding included, unless a single piece has more.
        most_padding: pieces of a group differ in length by fewer tokens than this.

    Yields:
        `input_ids` and `labels`, padded on the right, where no token of a causal model attends.
    """
    import torch

    ids, labels = batch["input_ids"].flatten(), batch["labels"].flatten()
    starts = (batch["position_ids"].flatten() == 0).nonzero().squeeze(1)
    lengths = torch.diff(starts, append=starts.new_tensor([len(ids)]))
    has_target = torch.stack([part.any() for part in (labels != IGNORE).split(lengths.tolist())])
    starts, lengths = starts[has_target], lengths[has_target]
    order = lengths.argsort(descending=True, stable=True)
    ordered, first = lengths[order].tolist(), 0
    while first < len(ordered):
        end = first + 1
        while (
            end < len(ordered)
            and ordered[first] - ordered[end] < most_padding
            and (end - first + 1) * ordered[first] <= most_tokens
        ):
            end += 1
        rows = order[first:end]
        places = torch.arange(ordered[first], device=ids.device)
        sources = (starts[rows].unsqueeze(1) + places).clamp(max=len(ids) - 1)
        is_padding = places >= lengths[rows].unsqueeze(1)
        yield {"input_ids": ids[sources], "labels": labels[sources].masked_fill(is_padding, IGNORE)}
        first = end
