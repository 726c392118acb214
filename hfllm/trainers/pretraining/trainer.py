"""A `transformers.Trainer` that learns from a `BatchPlan`: each optimizer step has the batch planned for it."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from hfllm.data.packing import IGNORE, pieces_of
from hfllm.errors import InputError
from hfllm.models.devices import refuse_data_parallel
from hfllm.trainers.exact_evaluation import TokenMeanEvaluation
from hfllm.trainers.pretraining.batch_plan import BatchPlan


def only(batches: list[Any]) -> Any:
    """Return the only element of a list."""
    return batches[0]


class PretrainTrainer(TokenMeanEvaluation):
    """Trainer for next-token (or masked) prediction in which batches may differ in size and length.

    A step's batch is split into passes of `per_device_train_batch_size` full rows, so memory stays the same
    whatever the batch; its loss is that of all its tokens on all processes, however they are split.
    `gradient_accumulation_steps` is folded into the plan and must be 1 here.

    Args:
        plan: the batches; it also takes the place of `train_dataset`.
        settings: arguments of the model's forward for every batch, such as `loss_chunk_size`.
        z_loss_coef: weight of the mean squared log-partition function (Chowdhery et al. 2022, section 5, 1e-4 there):
            keeps logits from drifting. It needs all logits of a pass at once.
        kwargs: Trainer's.

    Raises:
        InputError: for gradient accumulation outside of the plan, a negative coefficient, a model that takes no
            `num_items_in_batch` or lets packed documents attend to each other, or an engine that splits parameters.
    """

    # compute_loss divides the sum over a pass by the tokens of the whole step.
    loss_is_scaled_for_ga = True

    def __init__(
        self, *, plan: BatchPlan, settings: Mapping[str, Any] | None = None, z_loss_coef: float = 0.0, **kwargs: Any
    ):
        self.plan, self.settings, self.z_loss_coef = plan, dict(settings or {}), z_loss_coef
        self._padded_length = plan.row_length
        super().__init__(train_dataset=plan, **kwargs)
        refuse_data_parallel(self.args)
        if self.args.gradient_accumulation_steps != 1:
            raise InputError("gradient_accumulation_steps must be 1: the plan's batches are whole optimizer steps")
        if z_loss_coef < 0:
            raise InputError(f"z_loss_coef must not be negative, got {z_loss_coef}")
        family = self.model.config.model_type
        if not self.model_accepts_loss_kwargs:
            raise InputError(f"a model of type {family} takes no num_items_in_batch: its loss is a mean per pass")
        if self.accelerator.distributed_type == DistributedType.FSDP:
            raise InputError("packing does not work with FSDP yet: use DDP or DeepSpeed, or --packing false")
        # Flash attention takes no fp32.
        with self.accelerator.autocast() if has_flash_attention(self.model) else nullcontext():
            is_apart = keeps_documents_apart(self.model)
        if not is_apart:
            raise InputError(f"in a model of type {family} packed documents attend to each other: use --packing false")

    def get_train_dataloader(self) -> DataLoader:
        """Return the plan's batches in order; they already are this process's share."""
        return DataLoader(
            self.plan,
            batch_size=1,
            collate_fn=only,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type != "cpu",
        )

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run the forward and backward passes over one step's batch."""
        # A process without a target in its share must still take part.
        passes = list(self._passes(inputs)) or [nothing_of(inputs)]
        is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        if is_deepspeed:
            passes += self._passes_of_others(passes)
        total = torch.zeros((), device=self.args.device)
        for at, part in enumerate(passes):
            is_last = at == len(passes) - 1
            if is_deepspeed:
                # DeepSpeed's engine takes the optimizer step within the backward pass.
                self.accelerator.sync_gradients = is_last
            # Only the last pass lets DDP average the gradients.
            with nullcontext() if is_last or is_deepspeed else self.accelerator.no_sync(model):
                total += super().training_step(model, {**part, **self.settings}, num_items_in_batch)
        return total

    def _passes_of_others(self, passes: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        """Return empty passes, as many as other processes have more: under ZeRO all must make the same number."""
        most = self.accelerator.gather(torch.tensor([len(passes)], device=self.args.device)).max()
        return [nothing_of(passes[-1])] * (int(most) - len(passes))

    def _passes(self, inputs: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the batch in parts that fit into memory; on a CPU, which has no packed attention, piece by piece."""
        tokens = self.args.per_device_train_batch_size * self.plan.row_length
        if self.args.device.type == "cpu" and self._loss_shifts_labels:
            yield from pieces_of(inputs, tokens)
            return
        if has_flash_attention(self.model):
            # Flash attention finds packed documents only in a single row.
            inputs = {name: values.reshape(1, -1) for name, values in inputs.items()}
            parts = [values.split(tokens, dim=1) for values in inputs.values()]
        else:
            rows = tokens // inputs["input_ids"].shape[1]
            parts = [values.split(rows) for values in inputs.values()]
        yield from (dict(zip(inputs, values, strict=True)) for values in zip(*parts, strict=True))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return Trainer's loss, plus the z-loss in training."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.z_loss_coef and "loss_chunk_size" in inputs:
            inputs = {**inputs, "loss_chunk_size": 0}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        kept = inputs["labels"] != IGNORE
        kept = kept[:, 1:] if self._loss_shifts_labels else kept
        if outputs.get("aux_loss") is not None:
            # Computed in full for each pass, which has only a share of the step's tokens.
            share = kept.sum() / num_items_in_batch
            loss = loss + self.model.config.router_aux_loss_coef * outputs.aux_loss * (share - 1) * processes
        if self.z_loss_coef:
            logits = outputs.logits[:, :-1] if self._loss_shifts_labels else outputs.logits
            partition = logits.float().logsumexp(-1)[kept]
            loss = loss + self.z_loss_coef * partition.square().sum() / num_items_in_batch * processes
        return (loss, outputs) if return_outputs else loss


def nothing_of(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a pass of two tokens without a target."""
    nothing = {name: values[:1, :2] for name, values in inputs.items() if name != "position_ids"}
    return {**nothing, "labels": torch.full_like(nothing["labels"], IGNORE)}


def has_flash_attention(model: PreTrainedModel) -> bool:
    """Return whether the model's attention is one of the flash attention libraries'."""
    return "flash" in (model.config._attn_implementation or "")


@torch.no_grad()
def keeps_documents_apart(model: PreTrainedModel) -> bool:
    """Return whether a document's logits are independent of earlier documents in its packed row.

    Many families do not detect documents by restarting positions, and mix them silently.
    """
    device = model.get_input_embeddings().weight.device
    vocabulary = model.config.get_text_config().vocab_size
    ids = (torch.arange(16, device=device).view(2, 8) * 7 + 3) % vocabulary
    other = ids.clone()
    other[:, :4] = (ids[:, :4] + 1) % vocabulary
    positions = torch.arange(4, device=device).repeat(2, 2)
    if has_flash_attention(model):
        ids, other, positions = ids[:1], other[:1], positions[:1]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        one, two = (
            model(input_ids=each, position_ids=positions, use_cache=False).logits[:, 4:] for each in (ids, other)
        )
    except TypeError:
        return False
    finally:
        for module, training in modes:
            module.training = training
    return torch.allclose(one.float(), two.float(), atol=1e-4, rtol=1e-3)
