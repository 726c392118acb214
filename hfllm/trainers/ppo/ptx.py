"""Pretraining data for the PTX term of PPO (Ouyang et al. 2022, arXiv:2203.02155, equation 2)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from hfllm.errors import InputError
from hfllm.trainers.ppo.config import PPOConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


class PretrainingBatches:
    """Batches of a text dataset in an order that depends only on the seed, so a resumed run continues in it.

    Args:
        dataset: rows with a column `text`.
        tokenizer: the policy's; longer texts are cut at `max_length` tokens.
    """

    def __init__(
        self,
        dataset: "Dataset | Sequence[dict]",
        tokenizer: "PreTrainedTokenizerBase",
        max_length: int | None,
        batch_size: int,
        seed: int,
    ):
        if len(dataset) == 0 or "text" not in dataset[0]:
            columns = ", ".join(dataset[0]) if len(dataset) else "no rows"
            raise InputError(f"ptx_dataset needs rows with a column 'text'; it has: {columns}")
        self.dataset, self.tokenizer, self.max_length = dataset, tokenizer, max_length
        self.batch_size, self.seed = batch_size, seed
        self._order: tuple[int, torch.Tensor] | None = None

    @classmethod
    def build(
        cls,
        dataset: "Dataset | Sequence[dict] | None",
        tokenizer: "PreTrainedTokenizerBase",
        context: int | None,
        args: PPOConfig,
    ) -> "PretrainingBatches | None":
        """Return the batches for `args.ptx_coef`, or `None`.

        Raises:
            InputError: when only one of dataset and coefficient is given.
        """
        if (dataset is None) != (args.ptx_coef == 0):
            raise InputError(
                f"ptx_coef={args.ptx_coef} and {'no ' if dataset is None else 'a '}ptx_dataset: give both, or neither"
            )
        if dataset is None:
            return None
        return cls(dataset, tokenizer, context, args.per_device_train_batch_size, args.seed)

    def batch(self, step: int, process: int, processes: int, device: torch.device) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `attention_mask` and `labels` (B, S) of a process for backward pass `step`."""
        first = (step * processes + process) * self.batch_size
        rows = [self.dataset[self._row(place)]["text"] for place in range(first, first + self.batch_size)]
        ids = self.tokenizer(rows, truncation=self.max_length is not None, max_length=self.max_length)["input_ids"]
        if max(map(len, ids)) < 2:
            raise InputError(f"ptx_dataset: no next token to learn in {rows!r}: texts need two tokens")
        batch = self.tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt").to(device)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}

    @staticmethod
    def targets(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the number of next tokens to predict in a batch."""
        return (batch["labels"][:, 1:] != -100).sum()

    def _row(self, place: int) -> int:
        epoch, within = divmod(place, len(self.dataset))
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + 7_000_003 * (epoch + 1))
            self._order = epoch, torch.randperm(len(self.dataset), generator=generator)
        return int(self._order[1][within])
