"""Passes without gradients over sequences of different lengths: which share one, and in which precision."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from hfllm.models.devices import most_tokens

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from transformers import PreTrainedModel


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
