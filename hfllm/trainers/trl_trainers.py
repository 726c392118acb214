"""TRL's trainers for fine-tuning and reward models, with figures of held-out rows as `exact_evaluation` measures them.

Importing this file imports TRL, which takes seconds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import trl
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import ProcessorMixin

from hfllm.data.picture_batches import conversation_batch
from hfllm.rewards.passes import evaluating
from hfllm.trainers.exact_evaluation import ROW_LENGTHS, EachRowOnce, TokenMeanEvaluation


class SFTTrainer(TokenMeanEvaluation, trl.SFTTrainer):
    """TRL's SFTTrainer; `eval_loss`, `eval_entropy` and `eval_mean_token_accuracy` are means over all targets."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return TRL's loss; in evaluation without the load-balancing loss of experts, which TRL logs apart."""
        weight = self.router_aux_loss_coef
        if self._kept is not None:
            self.router_aux_loss_coef = 0.0
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self.router_aux_loss_coef = weight

    def _measured(self, kept: torch.Tensor) -> dict[str, float]:
        counts, logged = kept[..., 1].sum(0), self._metrics["eval"]
        for name in ("entropy", "mean_token_accuracy"):
            # TRL's own are of all processes, one per batch; `log` averages what is here.
            values = torch.tensor(logged[name], dtype=torch.double)
            if len(values) == len(counts):
                logged[name] = [((values * counts).sum() / counts.sum().clamp(min=1)).item()]
        return super()._measured(kept)


class RewardTrainer(EachRowOnce, trl.RewardTrainer):
    """TRL's RewardTrainer; `eval_loss`, `eval_accuracy` and the other figures of rewards are those of all pairs."""

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """Return what TRL does for a batch, and keep the rewards of its pairs."""
        inputs = {name: value for name, value in inputs.items() if name != ROW_LENGTHS}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return TRL's loss; in evaluation also keep both rewards of each pair and the margin asked for."""
        if self._kept is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        chosen, rejected = outputs.logits.detach().squeeze(-1).float().chunk(2)
        margin = inputs["margin"].float() if "margin" in inputs else torch.zeros_like(chosen)
        is_new = torch.arange(len(chosen), device=chosen.device) < self._num_new_rows(len(chosen))
        self._kept.append(torch.stack((chosen, rejected, margin, is_new.float()), 1))
        return (loss, outputs) if return_outputs else loss

    def _measured(self, kept: torch.Tensor) -> dict[str, float]:
        chosen, rejected, margin, is_new = kept.flatten(0, 1).unbind(1)
        chosen, rejected, margin = (values[is_new > 0] for values in (chosen, rejected, margin))
        rewards = torch.cat((chosen, rejected))
        figures = {
            "accuracy": (chosen > rejected).double().mean(),
            "margin": (chosen - rejected).mean(),
            **{"min_reward": rewards.min(), "mean_reward": rewards.mean(), "max_reward": rewards.max()},
        }
        # TRL has one value per batch; `log` averages what is here.
        self._metrics["eval"].update({name: [value.item()] for name, value in figures.items()})
        loss = -nn.functional.logsigmoid(chosen - rejected - margin).mean()
        if self.args.center_rewards_coefficient is not None:
            loss += self.args.center_rewards_coefficient * (chosen + rejected).square().mean()
        return {"loss": loss.item()}


class PictureCompared:
    """Collator of comparisons of answers about pictures: the chosen conversations, then the rejected ones.

    Args:
        processor: of the model.
    """

    def __init__(self, processor: ProcessorMixin):
        self.processor = processor

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        said = [[*row["prompt"], *row[side]] for side in ("chosen", "rejected") for row in rows]
        return dict(conversation_batch(self.processor, said, [row["images"] for row in rows] * 2))


class PictureRewardTrainer(RewardTrainer):
    """RewardTrainer on comparisons of answers about pictures, which TRL's does not read.

    Args:
        processor: the model's, which is saved with it.
        kwargs: as RewardTrainer's; datasets have `prompt`, `chosen` and `rejected` messages with parts, and `images`.
    """

    def __init__(self, processor: ProcessorMixin, **kwargs: Any):
        # TRL asks a tokenizer for its padding.
        super().__init__(processing_class=processor.tokenizer, data_collator=PictureCompared(processor), **kwargs)
        self.processing_class = self.callback_handler.processing_class = processor

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt", "chosen", "rejected", "images"]

    def is_right(self, dataset: Dataset) -> list[float]:
        """Return for each comparison whether the chosen answer has the higher score, in this process alone."""
        model, found = self.model, []
        with evaluating(model), torch.no_grad(), self.accelerator.autocast():
            for batch in DataLoader(dataset, self.args.per_device_eval_batch_size, collate_fn=self.data_collator):
                inputs = {name: value.to(model.device) for name, value in batch.items()}
                chosen, rejected = model(**inputs, use_cache=False).logits.squeeze(-1).float().chunk(2)
                found += (chosen > rejected).float().tolist()
        return found
