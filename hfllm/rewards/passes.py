"""Passes without gradients over sequences of different lengths: which share one, in which precision, and replies."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from hfllm.models.devices import most_tokens

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def batches_of_like_length(model: "PreTrainedModel", lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield rows of similar length: on a CPU one more short pass costs less than padding.

    Args:
        lengths: tokens of each row.
        batch_size: most rows in one pass; a device's memory may allow fewer.
    """
    most_padding = 8 if model.device.type == "cpu" else 256
    limit = most_tokens(model, model.device)
    rows: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        is_full = rows and limit is not None and (len(rows) + 1) * lengths[rows[0]] > limit
        if rows and (is_full or len(rows) == batch_size or lengths[rows[0]] - lengths[row] >= most_padding):
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


def pass_precision(model: "PreTrainedModel") -> "AbstractContextManager":
    """Return the context of a forward pass: flash attention takes no fp32, and nothing else is changed."""
    import torch

    needs_16_bits = "flash" in (model.config._attn_implementation or "") and model.dtype == torch.float32
    return torch.autocast(model.device.type, torch.bfloat16) if needs_16_bits else nullcontext()


@contextmanager
def evaluating(model: "PreTrainedModel") -> Iterator[None]:
    """Put a model into evaluation mode, and back: it may be one that is being trained."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def reply_log_odds(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: Sequence[Sequence[int]],
    first: int,
    second: int,
    batch_size: int,
) -> list[float]:
    """Return log P(first) - log P(second) of the token after each question, in nats.

    Args:
        questions: token ids, up to where the two replies differ.
        first, second: the tokens in which they differ, see `hfllm.rewards.judges.letter_tokens`.
        batch_size: questions in one pass.
    """
    import torch

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    keeps_logits = "logits_to_keep" in inspect.signature(base.forward).parameters
    replies = [0.0] * len(questions)
    with evaluating(model), torch.inference_mode(), pass_precision(model):
        for rows in batches_of_like_length(model, [len(ids) for ids in questions], batch_size):
            padded = tokenizer.pad(
                {"input_ids": [list(questions[row]) for row in rows]}, padding_side="right", return_tensors="pt"
            ).to(model.device)
            batch = {name: padded[name] for name in ("input_ids", "attention_mask")}
            last = batch["attention_mask"].sum(1) - 1
            # The head is applied where a row ends, and nowhere else.
            places, column = last.unique(return_inverse=True)
            keep = {"logits_to_keep": places} if keeps_logits else {}
            logits = model(**batch, use_cache=False, **keep).logits
            logits = logits[torch.arange(len(rows), device=logits.device), column if keeps_logits else last]
            odds = logits[:, first].float() - logits[:, second].float()
            for row, value in zip(rows, odds.tolist(), strict=True):
                replies[row] = value
    return replies
