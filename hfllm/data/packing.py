"""Pack documents into rows of one length (best fit) without attention between them, pad, set targets, and store rows.

A packed row holds its tokens and the lengths of the pieces in it, one after the other. In each piece, positions
begin at 0 again, which tells attention where a document ends (see `HfllmModel.forward`).
"""

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hfllm import durable
from hfllm.data.formats import infilling_prompt
from hfllm.errors import InputError, refuse_if

if TYPE_CHECKING:
    import pyarrow
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# ---- on disk: made once, then memory-mapped, and reused after a crash ----

# Characters of text written at a time.
BATCH = 1 << 24
# Prefix of the folders made here; nothing else is ever removed.
OURS = "[0-9a-f]" * 16


class Prepared:
    """Tables of one run, in their own folder.

    Machines with a shared disk may make the same table at once: each writes its own file, and renames it.

    Args:
        folder: the parent of the tables' folder, which is made when the first table is written.
        description: JSON values that determine the tables' content.
        is_shared: keep tables of runs with other descriptions next to them; otherwise these are removed.
    """

    def __init__(self, folder: Path, description: Mapping[str, Any], is_shared: bool = False):
        written = json.dumps(description, sort_keys=True).encode()
        self.folder = folder / hashlib.blake2b(written, digest_size=8).hexdigest()
        # Of other descriptions, which nothing reads again.
        self.removed = [] if is_shared else [other for other in folder.glob(OURS) if other != self.folder]
        for other in self.removed:
            shutil.rmtree(other, ignore_errors=True)

    def texts(self, name: str, make: Callable[[], Iterable[str]]) -> "Dataset":
        """Return a dataset with a `text` column of the texts from `make`, called only if the table is missing."""
        return self.table(name, lambda: _text_tables(make()))

    def table(self, name: str, make: Callable[[], Iterable["pyarrow.Table"]]) -> "Dataset":
        """Return the tables from `make`, all of one schema, concatenated as one dataset.

        Raises:
            InputError: when there is none.
        """
        import pyarrow
        from datasets import Dataset

        path = self.folder / f"{name}.arrow"
        if not path.is_file():
            tables = iter(make())
            # Before the folder is made, since most bad input shows here.
            first = next(tables, None)
            refuse_if(first is None, f"{name}: nothing to write: no row has any text")
            self.folder.mkdir(parents=True, exist_ok=True)
            with (
                durable.written_whole(path) as unfinished,
                pyarrow.OSFile(str(unfinished), "wb") as sink,
                pyarrow.ipc.new_stream(sink, first.schema) as writer,
            ):
                for table in chain([first], tables):
                    writer.write_table(table)
        return Dataset.from_file(str(path))

    def remove(self) -> None:
        """Delete all tables once they are no longer needed, and the parent folder if it is empty."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self.folder.parent.rmdir()


def _text_tables(texts: Iterable[str]) -> Iterator["pyarrow.Table"]:
    import pyarrow

    # Offsets have 64 bits: a single document may be large.
    schema = pyarrow.schema([("text", pyarrow.large_string())])
    for batch in windows(texts, most_texts=100_000, most_characters=BATCH):
        yield pyarrow.table({"text": batch}, schema=schema)


def windows(texts: Iterable[str], most_texts: int, most_characters: int) -> Iterator[list[str]]:
    """Yield lists of consecutive texts; a list ends once it has this many texts or characters."""
    window: list[str] = []
    characters = 0
    for text in texts:
        window.append(text)
        characters += len(text)
        if len(window) >= most_texts or characters >= most_characters:
            yield window
            window, characters = [], 0
    if window:
        yield window


# ---- packing ----


IGNORE = -100
# Window packed at a time: large enough to fill rows well, small enough for memory.
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
    refuse_if(is_empty, "no document has two tokens: there is no next token to predict")


def start_of(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the token at the beginning of texts (`bos_token`), as in pretraining, if there is one."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def token_ids(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Return the token ids of each document, from the document token on."""
    start = start_of(tokenizer)
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
    # A split piece restarts after the cut.
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
        indices = torch.arange(ordered[first], device=ids.device)
        sources = (starts[rows].unsqueeze(1) + indices).clamp(max=len(ids) - 1)
        is_padding = indices >= lengths[rows].unsqueeze(1)
        yield {"input_ids": ids[sources], "labels": labels[sources].masked_fill(is_padding, IGNORE)}
        first = end


# ---- padding ----
#
# Documents and comparisons in batches of like length, for training with padding instead of packing.


Piece = TypeVar("Piece")


def token_pieces(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> list[list[int]]:
    """Return the token ids of each document, from the document token on; documents over `max_length` are split."""
    start, pieces = start_of(tokenizer), []
    for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]:
        ids = start + ids
        pieces += [ids[at : at + max_length] for at in range(0, len(ids), max_length)]
    return pieces


def length_grouped(
    pieces: Sequence[Piece], batch_size: int, seed: int, window: int = 20, length: Callable[[Piece], int] = len
) -> list[Piece]:
    """An order in which a batch holds pieces of like length, while lengths come in random order.

    Sorts within windows of `window` batches, then shuffles the batches: transformers' `group_by_length` saves as much
    padding, but runs from long to short for fifty batches at a time, which this small model learns less from, and
    draws its order again when a run is resumed or shared between processes.

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


# ---- objectives ----
#
# Training objectives as functions of the data: fill-in-the-middle and masked language modeling.
#
# Random draws depend only on `(seed, index)`, never on earlier draws: a resumed run, or one with another number of
# workers, sees exactly the same examples.


# Tokens at the beginning of a prefix, a suffix and a middle, and the one at the end of the middle.
INFILLING_TOKENS = ("<PRE>", "<SUF>", "<MID>", "<EOT>")


def fill_in_the_middle(text: str, index: int, seed: int = 0, rate: float = 0.9, spm_rate: float = 0.5) -> str:
    """Return a document in Code Llama's infilling format, or unchanged (arXiv:2308.12950, section 2.3; 2207.14255).

    It is cut at two positions drawn uniformly, and written as `infilling_prompt` writes prefix and suffix,
    followed by the middle and ` <EOT>`. No character is lost. The paper transforms only documents that fit into one
    context: cut to length first, and encode the result unchanged, with `INFILLING_TOKENS` as special tokens.

    Args:
        text: the document. An empty one, or one with an infilling token, is returned unchanged.
        index: the document's number in the data.
        seed: determines all random draws, together with `index`.
        rate: the probability of transforming a document; 0.9 in the paper.
        spm_rate: the share of transformed documents with the suffix first; a half in the paper.

    Raises:
        InputError: when a probability is outside 0 to 1.
    """
    _check_probability("rate", rate)
    _check_probability("spm_rate", spm_rate)
    # Seeding by a string hashes it (SHA-512): neighboring seeds and indices give unrelated draws, on every machine.
    rng = random.Random(f"fill-in-the-middle {seed} {index}")
    if rng.random() >= rate or not text or any(token in text for token in INFILLING_TOKENS):
        return text
    suffix_first = rng.random() < spm_rate
    first, second = sorted(rng.randint(0, len(text)) for _ in range(2))
    return f"{infilling_prompt(text[:first], text[second:], suffix_first)}{text[first:second]} <EOT>"


def check_infilling_tokens(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Check that a tokenizer encodes each of `INFILLING_TOKENS` as a single token, also inside a text.

    Raises:
        InputError: when it does not, with the call that adds the missing tokens.
    """
    missing = []
    for token in INFILLING_TOKENS:
        # The token's ids are those that a text has only with it; Code Llama's token includes the space.
        inside = tokenizer(f"a {token}b", add_special_tokens=False)["input_ids"]
        result = [each for each in inside if token in tokenizer.convert_ids_to_tokens(each)]
        if len(result) != 1 or result[0] == tokenizer.unk_token_id:
            missing.append(token)
    if missing:
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path!r} has no token for {', '.join(missing)}; fill-in-the-middle "
            f"needs all of {', '.join(INFILLING_TOKENS)}. Add them before the model is made, for example "
            f"tokenizer.add_special_tokens({{'extra_special_tokens': {missing}}}, replace_extra_special_tokens=False)"
        )


def seeded_generator(seed: int, index: int) -> "torch.Generator":
    """Return a random generator on the CPU, dependent only on `(seed, index)`, to mask batch `index` with."""
    import torch

    return torch.Generator().manual_seed(random.Random(f"masking {seed} {index}").getrandbits(63))


def masked_tokens(
    input_ids: "torch.Tensor",
    special_ids: Collection[int],
    mask_token_id: int,
    vocab_size: int,
    generator: "torch.Generator",
    probability: float = 0.15,
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Mask a batch as BERT does (Devlin et al. 2018, arXiv:1810.04805, section 3.1).

    Of the tokens to predict, 80% become the mask token, 10% a token drawn uniformly from the
    vocabulary, 10% stay. A row with any ordinary token has at least one to predict, as in BERT's own code, so that no
    short batch has an undefined loss.

    Args:
        input_ids: (B, S), on the CPU; not changed.
        special_ids: ids that are never masked or drawn: padding and the like. The mask token is one of them.
        mask_token_id: the id of the mask token.
        vocab_size: upper bound (exclusive) of random token ids.
        generator: for example `seeded_generator(seed, index)`.
        probability: the probability of selecting a token for prediction.

    Returns:
        The masked ids, (B, S), and the labels, (B, S): the original id at tokens to predict, -100 elsewhere.

    Raises:
        InputError: when `probability` is outside 0 to 1, an id is outside the vocabulary, or it has special ids only.
    """
    import torch

    _check_probability("probability", probability)
    special = torch.tensor(sorted({mask_token_id, *special_ids}))
    for name, ids in (("input_ids", input_ids), ("special_ids and mask_token_id", special)):
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise InputError(f"{name} from {int(ids.min())} to {int(ids.max())}; vocab_size={vocab_size}")
    ordinary = torch.ones(vocab_size, dtype=torch.bool)
    ordinary[special] = False
    ordinary_ids = ordinary.nonzero().squeeze(1)
    refuse_if(not len(ordinary_ids), f"all {vocab_size} ids of the vocabulary are special: nothing is left to predict")
    maskable = ordinary[input_ids]
    draws = torch.rand(input_ids.shape, generator=generator).masked_fill(~maskable, 2.0)
    chosen = draws < probability
    if probability > 0 and input_ids.numel():
        lowest = draws.argmin(dim=1, keepdim=True)
        chosen = chosen.scatter(1, lowest, maskable.gather(1, lowest))
    fate = torch.rand(input_ids.shape, generator=generator)
    others = ordinary_ids[torch.randint(len(ordinary_ids), input_ids.shape, generator=generator)]
    masked = torch.where(chosen & (fate < 0.8), mask_token_id, input_ids)
    masked = torch.where(chosen & (fate >= 0.9), others, masked)
    return masked, torch.where(chosen, input_ids, IGNORE)


def _check_probability(name: str, value: float) -> None:
    refuse_if(not 0 <= value <= 1, f"{name} is {value}; expected a probability from 0 to 1")


# ---- long texts ----
#
# Rows of tokens of the requested length, from texts that may be shorter.


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
