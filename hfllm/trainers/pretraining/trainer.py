"""A `transformers.Trainer` that learns from a `BatchPlan`: each optimizer step has the batch planned for it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy
import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedModel

from hfllm.data.packing import IGNORE, batch_of, pieces_of
from hfllm.errors import InputError, refuse, refuse_if
from hfllm.models.devices import refuse_data_parallel
from hfllm.trainers.engines import evaluation_mode
from hfllm.trainers.mixins import TokenMeanEvaluation
from hfllm.trainers.pretraining.muon import muon_factory

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainingArguments


# ---- batch plan ----
#
# The plan of a pretraining run: the rows of all optimizer steps, known before the first step.
#
# A step's batch is a function of only the step, so a run resumed after an interruption gets the next batch
# without reading earlier ones. Length curriculum and batch ramp are part of the plan: a callback could not change
# either exactly, since the dataloader is a batch ahead of the trainer.


@dataclass(frozen=True)
class Schedule:
    """A number changing in steps over a run.

    Args:
        stages: (share of the run's tokens from which the number holds, number), with rising shares from 0.
    """

    stages: tuple[tuple[float, int], ...]

    @classmethod
    def parse(cls, text: str | int, flag: str) -> "Schedule":
        """Parse a number, or comma-separated `share:number` pairs, such as `0:128,0.2:256,0.5:512`."""
        try:
            pairs = [part.split(":") for part in str(text).split(",")]
            stages = [(0.0, int(pairs[0][0]))] if len(pairs[0]) == 1 else [(float(at), int(to)) for at, to in pairs]
        except ValueError:
            raise InputError(f"{flag} {text!r}: expected a number, or share:number,... as in 0:128,0.5:512") from None
        shares = [at for at, _ in stages]
        if shares[0] != 0 or sorted(set(shares)) != shares or shares[-1] >= 1 or min(to for _, to in stages) < 1:
            raise InputError(f"{flag} {text!r}: shares must rise from 0 to below 1, and numbers be at least 1")
        return cls(tuple(stages))

    def at(self, share: float) -> int:
        """Return the number in effect after this share of the run."""
        return next(number for begin, number in reversed(self.stages) if begin <= share)


class BatchPlan(TorchDataset):
    """The batches of a run, one per optimizer step; as a dataset its length is the number of steps.

    Args:
        sources: packed rows (`hfllm.data.packing.pack`), one dataset per source.
        weights: share of the rows per source; an exhausted source starts again in another order.
        row_length: tokens per full row.
        total_rows: rows of the whole run.
        batch_rows: rows per step, over all processes; `tokens` of a schedule are divided by `row_length`.
        lengths: the length of rows after cutting.
        pad_token_id: for incomplete rows.
        seed: seed of the order.
        process, processes: this process and their number, for selecting its share of each batch.
        transform: function applied to every batch, such as masking, given one number per row, unique
            in the whole run, regardless of the row's process.

    Raises:
        InputError: for lengths that do not divide `row_length`, batches of fewer rows than processes, or weights
            in conflict with the sources.
    """

    def __init__(
        self,
        sources: Sequence["Dataset"],
        row_length: int,
        total_rows: int,
        batch_tokens: Schedule,
        lengths: Schedule,
        pad_token_id: int,
        seed: int,
        weights: Sequence[float] | None = None,
        process: int = 0,
        processes: int = 1,
        transform: Callable[[dict[str, torch.Tensor], list[int]], dict[str, torch.Tensor]] | None = None,
    ):
        self.transform = transform
        self.sources, self.row_length, self.pad_token_id, self.seed = list(sources), row_length, pad_token_id, seed
        self.process, self.processes, self.total_rows = process, processes, total_rows
        for _, length in lengths.stages:
            if row_length % length:
                raise InputError(f"a curriculum length of {length} does not divide the row length of {row_length}")
        smallest = min(tokens for _, tokens in batch_tokens.stages) // row_length
        if smallest < processes:
            raise InputError(
                f"a batch of {min(tokens for _, tokens in batch_tokens.stages)} tokens has {smallest} rows of "
                f"{row_length} tokens, fewer than the {processes} process(es)"
            )
        self._order_of: dict[int, tuple[int, numpy.ndarray]] = {}
        self._mix(weights)
        self._steps: list[tuple[int, int, int]] = []
        first = 0
        while total_rows - first >= processes:
            share = first / total_rows
            rows = min(batch_tokens.at(share) // row_length, total_rows - first)
            # The same number on all processes, since all must make the same number of passes.
            rows -= rows % processes
            self._steps.append((first, rows, lengths.at(share)))
            first += rows

    def _mix(self, weights: Sequence[float] | None) -> None:
        sizes = [len(source) for source in self.sources]
        if weights is None:
            weights = sizes
        if len(weights) != len(sizes) or min(weights) <= 0:
            raise InputError(f"{len(weights)} weights for {len(sizes)} source(s); one above 0 for each is expected")
        shares = numpy.asarray(weights, dtype=float) / sum(weights)
        if len(sizes) == 1:
            self._source = numpy.zeros(self.total_rows, dtype=numpy.int16)
        else:
            rng = numpy.random.default_rng((self.seed, 1))
            self._source = rng.choice(len(sizes), size=self.total_rows, p=shares).astype(numpy.int16)
        # The index within its source of each row of the run, counted from the source's first.
        self._number = numpy.zeros(self.total_rows, dtype=numpy.int64)
        for index in range(len(sizes)):
            indices = numpy.flatnonzero(self._source == index)
            self._number[indices] = numpy.arange(len(indices))

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        """Return the tensors of one step on this process, see `batch_of`."""
        first, rows, length = self._steps[step]
        indices = numpy.array_split(numpy.arange(first, first + rows), self.processes)[self.process]
        rows = [self._row(int(index)) for index in indices]
        cut = self.row_length // length
        batch = batch_of(rows, self.row_length, self.pad_token_id, cut)
        if self.transform is None:
            return batch
        starts = range(0, self.row_length, length)
        return self.transform(batch, [int(index) * self.row_length + start for index in indices for start in starts])

    def _row(self, position: int) -> dict:
        index, number = int(self._source[position]), int(self._number[position])
        source = self.sources[index]
        epoch, within = divmod(number, len(source))
        epoch_order = self._order_of.get(index)
        if epoch_order is None or epoch_order[0] != epoch:
            epoch_order = epoch, numpy.random.default_rng((self.seed, 2, index, epoch)).permutation(len(source))
            self._order_of[index] = epoch_order
        return source[int(epoch_order[1][within])]

    def tokens_at(self, step: int) -> int:
        """Return the positions of all steps before `step`, over all processes."""
        first = self._steps[step][0] if step < len(self._steps) else self.total_rows
        return first * self.row_length

    def rows_by_source(self) -> list[int]:
        """Return the numbers of rows of the run per source."""
        return [int((self._source == index).sum()) for index in range(len(self.sources))]


# ---- trainer ----


def only(batches: list[Any]) -> Any:
    """Return the only element of a list."""
    return batches[0]


class PretrainTrainer(TokenMeanEvaluation):
    """Trainer for next-token (or masked) prediction in which batches may differ in size and length.

    A step's batch is split into passes of `per_device_train_batch_size` full rows, so memory stays the same
    whatever the batch; its loss is over all its tokens on all processes, however they are split.
    `gradient_accumulation_steps` is folded into the plan and must be 1 here.

    Args:
        plan: the batches; it also replaces `train_dataset`.
        settings: arguments of the model's forward for every batch, such as `loss_chunk_size`.
        z_loss_coef: weight of the mean squared log-partition function (Chowdhery et al. 2022, section 5, 1e-4 there):
            keeps logits from drifting. It needs all logits of a pass at once.
        kwargs: Trainer's.

    Raises:
        InputError: for gradient accumulation outside of the plan, a negative coefficient, a model that takes no
            `num_items_in_batch` or lets packed documents attend to each other, or an engine with split parameters.
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
        refuse_if(z_loss_coef < 0, f"z_loss_coef must not be negative, got {z_loss_coef}")
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
        """Yield the batch in parts that fit into memory; on a CPU, without packed attention, piece by piece."""
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
        mask = inputs["labels"] != IGNORE
        mask = mask[:, 1:] if self._loss_shifts_labels else mask
        if outputs.get("aux_loss") is not None:
            # Computed in full for every pass, with only a share of the step's tokens.
            share = mask.sum() / num_items_in_batch
            loss = loss + self.model.config.router_aux_loss_coef * outputs.aux_loss * (share - 1) * processes
        if self.z_loss_coef:
            logits = outputs.logits[:, :-1] if self._loss_shifts_labels else outputs.logits
            partition = logits.float().logsumexp(-1)[mask]
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
    try:
        with evaluation_mode(model):
            one, two = (
                model(input_ids=each, position_ids=positions, use_cache=False).logits[:, 4:] for each in (ids, other)
            )
    except TypeError:
        return False
    return torch.allclose(one.float(), two.float(), atol=1e-4, rtol=1e-3)


# ---- optimizer and loss ----


def loss_settings(model: "PreTrainedModel", loss_chunk_size: int | None) -> dict[str, int]:
    """Return the batch entries for computing an hfllm model's loss in chunks.

    In the batch and not in the config, since that is saved and would affect every later use. Not in ZeRO-3: its
    processes gather the head together, and they may differ in their number of chunks.

    Raises:
        InputError: for a size given for a model of another family.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    family = model.config.model_type
    refuse(loss_chunk_size and family != "hfllm", "--loss_chunk_size", f"a model of type {family} has no such loss")
    is_split = is_deepspeed_zero3_enabled()
    refuse(loss_chunk_size and is_split, "--loss_chunk_size", "ZeRO-3 needs the loss of a batch in one piece")
    size = 1024 if loss_chunk_size is None and family == "hfllm" and not is_split else loss_chunk_size
    return {"loss_chunk_size": size} if size else {}


def optimizer_of(use_muon: bool, args: "TrainingArguments") -> tuple[Callable[[], object], dict[str, object]] | None:
    """Return the class and arguments for `Trainer` to build Muon; `None` for the optimizer of its `args`."""
    if not use_muon:
        return None
    return muon_factory, {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
