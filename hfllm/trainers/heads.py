"""Training of heads that give labels: of sequences, of tokens, and of the two ends of a span.

The loss is the sum over all targets of an optimizer step, divided by their number, however they are divided into
batches and processes; targets of -100 have none.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import SequentialSampler
from transformers import Trainer
from transformers.utils import ModelOutput

from hfllm.data.packing import IGNORE
from hfllm.runs.arguments import changed

# Of an output, what is no score.
NO_SCORES = ["loss", "cache", "past_key_values", "hidden_states", "attentions", "router_logits"]


def scores_of(outputs: ModelOutput) -> torch.Tensor:
    """Return scores (..., classes): the logits, or for spans (B, 2, S), of each token to be the first and the last."""
    if "start_logits" in outputs:
        return torch.stack((outputs["start_logits"], outputs["end_logits"]), 1)
    return outputs["logits"]


def head_loss(
    outputs: ModelOutput,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the cross entropy of labels, in nats.

    Args:
        outputs: of a model with a head.
        labels: (B) of sequences, (B, S) of tokens, (B, 2) of spans.
        num_items_in_batch: targets of the whole optimizer step; without it the mean over these is returned.
        attention_mask: (B, S). No span begins or ends in padding, so that its length changes nothing.
    """
    scores = scores_of(outputs).float()
    if attention_mask is not None and "start_logits" in outputs:
        is_padding = attention_mask.eq(0).unsqueeze(1).to(scores.device)
        scores = scores.masked_fill(is_padding, torch.finfo(scores.dtype).min)
    total = cross_entropy(scores.flatten(0, -2), labels.flatten().to(scores.device), reduction="sum")
    return total / (labels.ne(IGNORE).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


class HeadTrainer(Trainer):
    """`transformers.Trainer` with that loss, and batches padded at their end.

    Args:
        kwargs: as Trainer's. Rows have `input_ids` and `labels`.
    """

    def __init__(self, **kwargs: Any):
        kwargs["args"] = changed(kwargs["args"], label_names=["labels"])
        collate = HeadCollator(kwargs["processing_class"].pad_token_id)
        super().__init__(compute_loss_func=self._loss, data_collator=collate, **kwargs)

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return Trainer's loss, by `head_loss`."""
        self._mask = inputs["attention_mask"]
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _loss(self, outputs: ModelOutput, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return head_loss(outputs, labels, num_items_in_batch, self._mask)

    def _get_eval_sampler(self, eval_dataset: Any) -> SequentialSampler | None:
        """Return rows in their order: Trainer's grouping by length, for training, would reach held-out rows too."""
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """Return what Trainer does; scores alone are kept of an output."""
        return super().prediction_step(model, inputs, prediction_loss_only, NO_SCORES)


class HeadCollator:
    """Pads rows at their end: ids with `pad_token_id`, labels of tokens with -100."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        missing = [longest - len(row["input_ids"]) for row in rows]
        pairs = list(zip(rows, missing, strict=True))
        batch = {
            "input_ids": [[*row["input_ids"], *[self.pad_token_id] * more] for row, more in pairs],
            "attention_mask": [[1] * len(row["input_ids"]) + [0] * more for row, more in pairs],
        }
        labels = [row["labels"] for row in rows]
        if not isinstance(labels[0], int) and len(labels[0]) == len(rows[0]["input_ids"]):
            labels = [[*row["labels"], *[IGNORE] * more] for row, more in pairs]
        return {name: torch.tensor(values) for name, values in {**batch, "labels": labels}.items()}
