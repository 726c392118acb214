"""Held-out losses that depend on the data alone: not on the evaluation batch, not on the number of processes.

`transformers.Trainer` averages the means of batches, so a batch of few tokens counts as much as one of many; and on
several processes accelerate fills the last batches with rows that were read already. `TokenMeanEvaluation` adds up
losses and counts, of each row once. It is a mixin, first among the bases:

    class MyTrainer(TokenMeanEvaluation, Trainer): ...

`eval_loss` (of `evaluate`) and `test_loss` (of `predict`) are then the trainer's loss per target, over all targets of
the dataset. The load-balancing loss of experts is a property of a batch, and no part of them. Training is unchanged.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from hfllm.data.packing import IGNORE

Batch = dict[str, Any]
Collator = Callable[[Sequence[Any]], Mapping[str, Any]]
# Entry of a batch, taken out before the model sees it: how many tokens of it each row has.
ROW_LENGTHS = "row_lengths"


class WithRowLengths:
    """Collator that adds the length of each row to another's batch, whose rows may be joined to one.

    Args:
        collate: the other collator.
        length: tokens of each row, where the other pads them all to that; by default those of its `input_ids`.
    """

    def __init__(self, collate: Collator, length: int | None = None):
        self.collate, self.length = collate, length

    def __call__(self, rows: Sequence[Any]) -> Mapping[str, Any]:
        lengths = [self.length or _length(row) for row in rows]
        return {**self.collate(rows), ROW_LENGTHS: torch.tensor(lengths)}


def _length(row: Any) -> int:
    ids = row.get("input_ids") if isinstance(row, Mapping) else None
    return 0 if ids is None else len(ids)


class EachRowOnce(Trainer):
    """Base of trainers that measure each held-out row once, however many processes share them.

    A subclass calls `_keep` at each batch, and computes its metrics in `_measured` of what all processes kept.
    """

    # Rows of numbers that this process has kept of each batch of the evaluation that runs; `None` outside of one.
    _kept: list[torch.Tensor] | None = None
    # Tokens of each row of an evaluation batch, where the collator pads them all to that.
    _padded_length: int | None = None

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """Return Trainer's loader; its batches say how long their rows are."""
        with self._row_lengths():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """Return Trainer's loader; its batches say how long their rows are."""
        with self._row_lengths():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _row_lengths(self) -> Iterator[None]:
        collate = self.data_collator
        self.data_collator = WithRowLengths(collate, self._padded_length)
        try:
            yield
        finally:
            self.data_collator = collate

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as Trainer does, with metrics of all rows in place of means over batches."""
        self._kept = []
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            if self._kept:
                # Every process has as many batches, of as many rows.
                kept = torch.cat(self._kept)
                everyone = self.accelerator.gather(kept).double().cpu().view(-1, *kept.shape)
                measured = self._measured(everyone)
                output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in measured.items()})
        finally:
            self._kept = None
        return output

    def _measured(self, kept: torch.Tensor) -> dict[str, float]:
        """Return metrics of what all processes have kept: (processes, rows, columns), in double precision."""
        raise NotImplementedError

    def _num_new_rows(self, rows: int) -> int:
        """Return how many rows of this process's batch, which has `rows`, are not there to fill the last batch."""
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return rows
        # The last rows are dealt out one process after another, and then the first ones again.
        return min(max(state.remainder - self.accelerator.process_index * rows, 0), rows)


class TokenMeanEvaluation(EachRowOnce):
    """Mixin whose `eval_loss` is the mean over all targets of the held-out rows; see this file's docstring."""

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """Return what Trainer does for a batch, whose repeated rows have no targets, and keep its sum and count."""
        inputs = self._without_repeated_rows(self._prepare_inputs(inputs))
        config = getattr(self.model, "config", None)
        if config is not None and getattr(config.get_text_config(), "output_router_logits", False):
            inputs["output_router_logits"] = False
        count = self._num_targets(inputs)
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if loss is not None and count is not None and self._kept is not None:
            # The loss is the mean over this batch's targets; without one it is not a number.
            total = torch.where(count > 0, loss.detach().float() * count, 0.0)
            self._kept.append(torch.stack((total, count.to(total.dtype))).unsqueeze(0))
        return loss, logits, labels

    def _measured(self, kept: torch.Tensor) -> dict[str, float]:
        total, count = kept.sum((0, 1)).tolist()
        return {"loss": total / count if count else float("nan")}

    def _without_repeated_rows(self, inputs: Batch) -> Batch:
        """Return the model's part of a batch, without targets in rows that only fill it."""
        inputs = dict(inputs)
        lengths = inputs.pop(ROW_LENGTHS, None)
        if lengths is None:
            return inputs
        new = self._num_new_rows(len(lengths))
        for name in ("labels", "shift_labels"):
            if new < len(lengths) and name in inputs:
                inputs[name] = _first_rows(inputs[name], lengths, new)
        return inputs

    def _num_targets(self, inputs: Batch) -> torch.Tensor | None:
        """Return the number of targets of a batch, as a loss counts them; `None` without labels."""
        targets = inputs.get("shift_labels")
        if targets is None and (labels := inputs.get("labels")) is not None:
            targets = labels[..., 1:] if self._loss_shifts_labels else labels
        return None if targets is None else (targets != IGNORE).sum()

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor | int | None:
        """Return Trainer's count in training; in evaluation none, so that a loss is the mean over its own batch."""
        return None if self._kept is not None else super()._get_num_items_in_batch(batch_samples, device)


def _first_rows(labels: torch.Tensor, lengths: torch.Tensor, rows: int) -> torch.Tensor:
    """Return labels without targets after the first rows, which lie one below another or are joined to one."""
    labels = labels.clone()
    if len(labels) == len(lengths):
        labels[rows:] = IGNORE
    else:
        labels[..., int(lengths[:rows].sum()) :] = IGNORE
    return labels
