"""Data for distillation: tokens, targets, and batches with the teacher's distributions."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hfllm.data.conversations import Conversations
from hfllm.data.packing import IGNORE, token_ids
from hfllm.data.rows import Dropped
from hfllm.errors import InputError
from hfllm.runs.command_line import say_once

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# A row of a dataset, in one of `FORMATS`.
Row = Mapping[str, Any]
FORMATS = "input_ids (and labels); prompt and completion, text or messages; text"
# Rows that are tokenized at a time.
ROWS = 1000


def tokenize_dataset(
    dataset: Iterable[Row], tokenizer: "PreTrainedTokenizerBase", max_length: int | None
) -> "Dataset":
    """Return `input_ids` and `labels` of rows in any of `FORMATS`, which may be mixed.

    In a text all tokens but the first are targets, in a pair the completion and its end token, as in TRL's SFTTrainer;
    in a conversation every turn of the assistant from the completion on.
    Rows are cut to `max_length` tokens, and left out if no target remains.

    Raises:
        InputError: when a row cannot be read, or none remains.
    """
    from datasets import Dataset, Features, List, Value

    rows: dict[str, list] = {"input_ids": [], "labels": []}
    batch: list[tuple[int, Row]] = []
    notes = Dropped()

    def flush() -> None:
        for ids, first in _tokens(batch, tokenizer, notes):
            ids, labels = _labeled(ids, first)
            ids, labels = ids[:max_length], labels[:max_length]
            if any(label != IGNORE for label in labels[1:]):
                rows["input_ids"].append(ids)
                rows["labels"].append(labels)
            else:
                notes.add(f"rows are left out: no token to learn within --max_length {max_length}")
        batch.clear()

    for number, row in enumerate(dataset):
        batch.append((number, row))
        if len(batch) == ROWS:
            flush()
    flush()
    for note, count in notes.reasons.items():
        # The student without its teacher reads the same rows.
        say_once(f"distill: {count:,} {note}")
    if not rows["input_ids"]:
        raise InputError(f"no row has a token to learn within max_length={max_length}")
    return Dataset.from_dict(rows, Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))}))


def _labeled(ids: Sequence[int], first: int | Sequence[int]) -> tuple[list[int], list[int]]:
    """Return ids and labels, where `first` is the position of the first label or the labels themselves."""
    ids = list(ids)
    if not isinstance(first, int):
        return ids, list(first)
    return ids, [IGNORE] * first + ids[first:]


def _tokens(
    batch: Sequence[tuple[int, Row]], tokenizer: "PreTrainedTokenizerBase", notes: Dropped
) -> Iterable[tuple[Sequence[int], int | Sequence[int]]]:
    """Return the ids of each row, and the position of its first label or its labels."""
    texts = [row["text"] for _, row in batch if row.get("input_ids") is None and row.get("text") is not None]
    written = iter(token_ids(texts, tokenizer) if texts else [])
    pairs = iter(
        _pairs([entry for entry in batch if _is_pair(entry[1]) and not _is_conversation(entry[1])], tokenizer)
    )
    longer = [row for _, row in batch if _is_conversation(row)]
    conversations = Conversations(tokenizer, notes=notes).label(longer) if longer else iter(())
    for number, row in batch:
        if row.get("input_ids") is not None:
            labels = row.get("labels")
            if labels is not None and len(labels) != len(row["input_ids"]):
                raise InputError(f"row {number}: {len(row['input_ids'])} input_ids and {len(labels)} labels")
            yield row["input_ids"], (1 if labels is None else labels)
        elif row.get("text") is not None:
            yield next(written), 1
        elif _is_conversation(row):
            for labeled in next(conversations):
                yield labeled.input_ids, labeled.labels
        elif _is_pair(row):
            yield next(pairs)
        else:
            raise InputError(f"row {number}: columns {', '.join(row) or '(none)'}; expected one of: {FORMATS}")


def _is_pair(row: Row) -> bool:
    has_more = row.get("input_ids") is not None or row.get("text") is not None
    return not has_more and row.get("prompt") is not None and row.get("completion") is not None


def _is_conversation(row: Row) -> bool:
    """Return whether a row's completion goes on after the first answer, or has tools."""
    completion = row.get("completion")
    return _is_pair(row) and isinstance(completion, list) and (len(completion) > 1 or bool(row.get("tools")))


def _pairs(batch: Sequence[tuple[int, Row]], tokenizer: "PreTrainedTokenizerBase") -> Iterable[tuple[list[int], int]]:
    if not batch:
        return
    prompts, wholes = [], []
    for number, row in batch:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) != isinstance(completion, str):
            raise InputError(f"row {number}: prompt and completion must both be text, or both lists of messages")
        if isinstance(prompt, str):
            prompts.append(prompt)
            wholes.append(completion + (tokenizer.eos_token or ""))
        else:
            prompts.append(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))
            wholes.append(tokenizer.apply_chat_template([*prompt, *completion], tokenize=False))
    # A chat template writes the special tokens itself; a text prompt gets those that the tokenizer adds.
    is_text = [isinstance(row["prompt"], str) for _, row in batch]
    with_special = tokenizer(prompts)["input_ids"]
    without = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    rest = tokenizer(wholes, add_special_tokens=False)["input_ids"]
    for (number, _), text, start, prompt, whole in zip(batch, is_text, with_special, without, rest, strict=True):
        if text:
            yield start + whole, len(start)
        elif whole[: len(prompt)] != prompt:
            raise InputError(
                f"row {number}: with its completion, the prompt's tokens change; the chat template must write the "
                "conversation after the text of the prompt"
            )
        else:
            yield whole, len(prompt)


def targets_of(labels: Sequence[int]) -> list[int]:
    """Return the target of each position of a row, `IGNORE` where there is none."""
    return [*labels[1:], IGNORE]


@dataclass
class DistillationCollator:
    """Collator that right-pads rows, with targets in `shift_labels` and the teacher's distributions at the targets.

    Args:
        pad_token_id: the tokenizer's padding id.
        pad_to_multiple_of: pad to lengths of this multiple.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of

        def padded(values: list[list[int]], filler: int) -> torch.Tensor:
            return torch.tensor([[*row, *[filler] * (length - len(row))] for row in values])

        batch = {
            "input_ids": padded([list(row["input_ids"]) for row in rows], self.pad_token_id),
            "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": padded([list(row["labels"]) for row in rows], IGNORE),
            "shift_labels": padded([targets_of(row["labels"]) for row in rows], IGNORE),
        }
        if "teacher_rest" in rows[0]:
            for name in ("log_probs", "indices", "rest"):
                batch[f"teacher_{name}"] = torch.cat([torch.as_tensor(row[f"teacher_{name}"]) for row in rows])
        return batch
