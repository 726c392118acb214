"""Distillation as a `transformers.Trainer`: the student learns a teacher's distributions and the data's tokens.

One step: the student reads a batch, and so does the teacher (or its distributions come from disk); at each position
with a target the two are compared, one chunk of tokens at a time (`losses.py`).
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import ModelOutput

from hfllm.data.packing import IGNORE
from hfllm.errors import InputError, refuse_if
from hfllm.flags import changed, without_nested_secrets
from hfllm.models.devices import refuse_data_parallel
from hfllm.models.loading.saved import saved_tokenizer
from hfllm.trainers.distillation.config import DistillationConfig
from hfllm.trainers.distillation.data import (
    DistillationCollator,
    Row,
    WithTeacher,
    description,
    open_cache,
    teacher_tables,
    tokenize_dataset,
)
from hfllm.trainers.distillation.losses import (
    Teacher,
    TeacherHead,
    TeacherLogits,
    TopK,
    combined,
    linear_distillation,
    token_losses,
)
from hfllm.trainers.distillation.students import (
    check_linear_head,
    check_same_vocabulary,
    layer_pairs,
    load_teacher,
    logit_scale,
)
from hfllm.trainers.engines import disable_dropout
from hfllm.trainers.mixins import TokenMeanEvaluation

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerBase

Rows, Changed = TypeVar("Rows"), TypeVar("Changed")

PROJECTION = "distillation_projection"
PROJECTION_FILE = f"{PROJECTION}.safetensors"
LOGGED = ("soft_loss", "hard_loss", "hidden_loss")


class DistillationTrainer(TokenMeanEvaluation):
    """Trainer for offline distillation: on given texts, from a teacher run at every step or once.

    Args:
        model: the student.
        teacher_model: the teacher, or its name; `None` takes `args.teacher_model_name_or_path`. With
            `args.teacher_top_k` it is loaded only if its cache must be made, and freed afterwards.
        args: see `DistillationConfig`.
        train_dataset, eval_dataset: rows with `input_ids` (and `labels`), `prompt` and `completion` (text or
            messages), or `text`; they may be mixed. For evaluation, also a dict of such datasets by name.
        processing_class: the student's tokenizer.
        teacher_processing_class: the teacher's, to be compared with the student's; taken from a teacher given by name.
        peft_config: adapter to train instead of the student's weights. Only the adapter is saved: a student not
            loaded by name (an adapter records the name) must be saved separately before.
        kwargs: Trainer's.

    Raises:
        InputError: when the two cannot be compared, no teacher is given, or an engine splits parameters.
    """

    # compute_loss divides the sum over a batch by the tokens of the whole step.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel,
        teacher_model: "PreTrainedModel | str | None" = None,
        args: DistillationConfig | None = None,
        train_dataset: Iterable[Row] | None = None,
        eval_dataset: Iterable[Row] | dict[str, Iterable[Row]] | None = None,
        processing_class: "PreTrainedTokenizerBase | None" = None,
        teacher_processing_class: "PreTrainedTokenizerBase | None" = None,
        peft_config: "PeftConfig | None" = None,
        **kwargs: Any,
    ):
        args = args or DistillationConfig("distillation")
        if processing_class is None or processing_class.pad_token_id is None:
            raise InputError("processing_class: the student's tokenizer is needed, with a pad_token")
        if args.ddp_find_unused_parameters is None:
            # The loss uses the head and the projections outside of the model's forward pass.
            args = changed(args, ddp_find_unused_parameters=False)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        if args.disable_dropout:
            disable_dropout(model)
        teacher_model = teacher_model or args.teacher_model_name_or_path
        if teacher_model is None and args.needs_teacher:
            raise InputError("a teacher is needed: --teacher_model_name_or_path, or soft_weight and hidden_weight 0")
        self._tokenize = partial(tokenize_dataset, tokenizer=processing_class, max_length=args.max_length)
        self._named_teacher, self.teacher = teacher_model, None
        # They may hold a token, and `args` are saved.
        self._teacher_settings, args = args.teacher_settings, without_nested_secrets(args)
        self._teacher_tokenizer, self._projection = teacher_processing_class, None
        self._sums = torch.zeros(len(LOGGED) + 1)
        super().__init__(
            model=model,
            args=args,
            train_dataset=self._tokenize(train_dataset) if train_dataset is not None else None,
            eval_dataset=_each(eval_dataset, lambda rows, name: self._tokenize(rows)),
            processing_class=processing_class,
            data_collator=DistillationCollator(processing_class.pad_token_id),
            **kwargs,
        )
        # `compute_loss` divides by the tokens of the whole step, whatever the model's own loss does.
        self.model_accepts_loss_kwargs = True
        self._check_engine()
        if args.loss_chunk_size:
            check_linear_head(self._bare(self.model), "student")
        if args.needs_teacher:
            self._prepare_teacher()

    # ---- the teacher ----

    def _check_engine(self) -> None:
        refuse_data_parallel(self.args)
        plugin = getattr(self.args, "deepspeed_plugin", None)
        is_zero3 = plugin is not None and plugin.zero_stage == 3
        if self.accelerator.distributed_type == DistributedType.FSDP or is_zero3:
            raise InputError("distillation does not work with FSDP or ZeRO-3 yet: use DDP or ZeRO-2")

    def _prepare_teacher(self) -> None:
        """Load the teacher if it must run, now or at every step."""
        if self.args.teacher_top_k is None:
            self.teacher = self._loaded_teacher()
            if self.args.hidden_weight:
                self._projection = self._new_projection()
            return
        folder = Path(self.args.teacher_cache_dir or Path(self.args.output_dir) / "teacher_cache")
        if self.train_dataset is not None:
            self.train_dataset = self._with_cache(self.train_dataset, folder, "train")
        self.eval_dataset = _each(self.eval_dataset, lambda rows, name: self._with_cache(rows, folder, name))
        self.teacher = self._named_teacher = None

    def _with_cache(self, rows: "Dataset", folder: Path, name: str) -> WithTeacher:
        args = self.args
        made_from = description(self._named_teacher, args.teacher_settings, rows, args.temperature, args.teacher_top_k)
        # With another vocabulary the cache is not reused, and the teacher is refused when it is loaded.
        made_from["vocabulary"] = self._bare(self.model).config.get_text_config().vocab_size

        def ask(batch: dict[str, torch.Tensor], mask: torch.Tensor) -> Teacher:
            return self._teacher_of(self._teacher_pass(batch), mask.to(args.device))

        def make() -> "Iterator[pyarrow.Table]":
            self.teacher = self.teacher or self._loaded_teacher()
            loader = DataLoader(rows, batch_size=args.per_device_eval_batch_size, collate_fn=self.data_collator)
            yield from teacher_tables(loader, ask, args.temperature, args.teacher_top_k, args.loss_chunk_size)

        with args.main_process_first(local=False, desc="asking the teacher"):
            return WithTeacher(rows, open_cache(folder, name, made_from, make, bool(args.teacher_cache_dir)))

    def _loaded_teacher(self) -> PreTrainedModel:
        """Return the teacher, checked against the student, frozen and on this process's device."""
        teacher, tokenizer = self._named_teacher, self._teacher_tokenizer
        if isinstance(teacher, str):
            name, settings = teacher, self._teacher_settings
            teacher = load_teacher(name, settings)
            tokenizer = tokenizer or _tokenizer_of(name, settings["revision"])
        refuse_if(teacher is self.model, "the teacher is the student itself: load it a second time")
        check_same_vocabulary(self._bare(self.model), teacher, self.processing_class, tokenizer)
        teacher = teacher.eval().requires_grad_(False)
        if not getattr(teacher, "is_quantized", False):
            teacher = teacher.to(self.args.device)
        if self.args.loss_chunk_size:
            check_linear_head(teacher, "teacher")
        return teacher

    @torch.no_grad()
    def _teacher_pass(self, inputs: dict[str, torch.Tensor]) -> ModelOutput:
        """Return the teacher's outputs on a batch: of its trunk, or with logits when they are not made in chunks."""
        read = {name: inputs[name].to(self.args.device) for name in ("input_ids", "attention_mask")}
        reader = self.teacher.base_model if self.args.loss_chunk_size else self.teacher
        with self.accelerator.autocast():
            return reader(**read, use_cache=False, output_hidden_states=bool(self.args.hidden_weight))

    def _teacher_of(self, outputs: ModelOutput, mask: torch.Tensor) -> Teacher:
        """Return the teacher's distributions at the positions `mask` (B, L) of a batch."""
        if not self.args.loss_chunk_size:
            return TeacherLogits(outputs.logits[mask])
        return TeacherHead(
            outputs.last_hidden_state[mask], self.teacher.get_output_embeddings(), logit_scale(self.teacher)
        )

    # ---- hidden states ----

    def _new_projection(self) -> nn.ModuleList:
        """Return one map from the student's states to the teacher's per pair of layers, if their widths differ."""
        widths = [model.config.get_text_config().hidden_size for model in (self._bare(self.model), self.teacher)]
        same = widths[0] == widths[1]
        maps = [nn.Identity() if same else nn.Linear(*widths, bias=False) for _ in self._layer_pairs()]
        return nn.ModuleList(maps).to(self.args.device, self._bare(self.model).dtype)

    def _layer_pairs(self) -> list[tuple[int, int]]:
        layers = [model.config.get_text_config().num_hidden_layers for model in (self._bare(self.model), self.teacher)]
        return layer_pairs(*layers)

    def _hidden_distance(self, student: ModelOutput, teacher: ModelOutput, mask: torch.Tensor) -> torch.Tensor:
        """Return the mean squared distance of the paired layers' states, summed over tokens."""
        pairs = self._layer_pairs()
        total = 0.0
        for project, (ours, theirs) in zip(self._projection, pairs, strict=True):
            states = project(student.hidden_states[ours][mask]).float()
            total = total + (states - teacher.hidden_states[theirs][mask].float()).square().mean(-1).sum()
        return total / len(pairs)

    # ---- the loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ModelOutput]:
        """Return the loss of a batch, divided by the targets of the whole step on all processes."""
        args, mask = self.args, inputs["shift_labels"] != IGNORE
        targets = inputs["shift_labels"][mask]
        outputs, hidden = self._student_pass(model, inputs)
        with self.accelerator.autocast():
            teacher_outputs = self._teacher_pass(inputs) if self.teacher is not None else None
            soft, hard, loss = self._compared(model, inputs, outputs, hidden, teacher_outputs, mask, targets)
            distance = loss.new_zeros(())
            if args.hidden_weight:
                distance = self._hidden_distance(outputs, teacher_outputs, mask)
                loss = loss + args.hidden_weight * distance
        count = mask.sum()
        items = count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        if getattr(outputs, "aux_loss", None) is not None and model.training:
            # Computed in full for every batch, with only a share of the step's tokens.
            loss = loss + self._bare(model).config.router_aux_loss_coef * outputs.aux_loss * count
        if model.training:
            # On the device: a copy to the CPU would wait for it at every batch.
            self._sums = self._sums.to(loss.device)
            self._sums += torch.stack([soft, hard, distance.detach(), count]).detach().float()
        loss = loss / items
        if args.average_tokens_across_devices and num_items_in_batch is not None:
            # DDP averages over processes.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _student_pass(
        self, model: nn.Module, inputs: dict[str, torch.Tensor]
    ) -> tuple[ModelOutput, torch.Tensor | None]:
        """Return the student's outputs, and with chunks its last hidden state, after a single forward pass for DDP."""
        bare, states = self._bare(model), []
        read = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
        if self.args.hidden_weight:
            read["output_hidden_states"] = True
        if model.training and getattr(bare.config, "router_aux_loss_coef", 0) and is_mixture(bare):
            read["output_router_logits"] = True
        if not self.args.loss_chunk_size:
            return model(**read), None
        hook = bare.base_model.register_forward_hook(lambda module, args, output: states.append(output))
        try:
            # Logits of a single position: the loss computes its own.
            outputs = model(**read, logits_to_keep=1)
        finally:
            hook.remove()
        return outputs, states[0].last_hidden_state

    def _compared(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        outputs: ModelOutput,
        hidden: torch.Tensor | None,
        teacher_outputs: ModelOutput | None,
        mask: torch.Tensor,
        targets: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return divergence, cross-entropy and loss, summed over tokens."""
        settings, bare, teacher = self.args.loss_settings, self._bare(model), None
        if "teacher_rest" in inputs:
            teacher = TopK(*(inputs[f"teacher_{name}"] for name in ("log_probs", "indices", "rest")))
        elif self.args.soft_weight:
            teacher = self._teacher_of(teacher_outputs, mask)
        if hidden is None:
            whole = teacher and teacher.take(slice(None))
            soft, hard = token_losses(outputs.logits[mask], targets, whole, settings)
            return soft.detach(), hard.detach(), combined(soft, hard, settings)
        rows = hidden[mask] * logit_scale(bare)
        loss, soft, hard = linear_distillation(
            rows, bare.get_output_embeddings(), targets, teacher, settings, self.args.loss_chunk_size
        )
        return soft, hard, loss

    # ---- evaluation ----

    def get_eval_dataloader(self, eval_dataset: str | Iterable[Row] | None = None) -> DataLoader:
        """Return Trainer's loader for rows as in `__init__`, or for the dataset of this name, as `evaluate` does.

        Raises:
            InputError: when there is no such name, the rows cannot be read, or the teacher has been freed.
        """
        if isinstance(eval_dataset, str):
            names = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else []
            if eval_dataset not in names:
                raise InputError(f"eval_dataset {eval_dataset!r}: expected one of {', '.join(names) or '(no names)'}")
        elif eval_dataset is not None:
            eval_dataset = self._readable(eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Iterable[Row]) -> DataLoader:
        """Return the loader of test rows, as `get_eval_dataloader`."""
        return super().get_test_dataloader(self._readable(test_dataset))

    def _readable(self, rows: Iterable[Row]) -> "Dataset | WithTeacher":
        if isinstance(rows, WithTeacher):
            return rows
        if self.args.needs_teacher and self.args.teacher_top_k is not None:
            raise InputError(
                f"these rows were not passed to the constructor: with teacher_top_k={self.args.teacher_top_k} its "
                "teacher ran then, and was freed; give DistillationTrainer all rows, as eval_dataset={name: rows}"
            )
        return self._tokenize(rows)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Return the loss of a batch; logits are not kept."""
        return super().prediction_step(model, inputs, True, ignore_keys)

    def _without_repeated_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return a batch without targets, and without the teacher's distributions there, in its filler rows."""
        inputs = super()._without_repeated_rows(inputs)
        if "teacher_rest" in inputs:
            count = self._num_targets(inputs)
            inputs |= {
                f"teacher_{name}": inputs[f"teacher_{name}"][:count] for name in ("log_probs", "indices", "rest")
            }
        return inputs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does, with the parts of the training loss since the last log, in nats per token."""
        if "loss" in logs:
            *parts, tokens = self.accelerator.reduce(self._sums.to(self.args.device), "sum").tolist()
            if tokens:
                logs |= {name: part / tokens for name, part in zip(LOGGED, parts, strict=True)}
            if not self.args.hidden_weight:
                logs.pop("hidden_loss", None)
            self._sums.zero_()
        super().log(logs, start_time)

    def _bare(self, model: nn.Module) -> PreTrainedModel:
        """Return the model itself, without wrappers for several devices or an adapter."""
        model = self.accelerator.unwrap_model(model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    # ---- the projections: trained with the student, saved in checkpoints, and not part of the result ----

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as Trainer does; meanwhile the projections belong to the student's parameters."""
        self._sums.zero_()
        if self._projection is None:
            return super().train(*args, **kwargs)
        self.model.add_module(PROJECTION, self._projection)
        try:
            return super().train(*args, **kwargs)
        finally:
            delattr(self.model, PROJECTION)

    @contextmanager
    def _without_projection(self) -> Iterator[nn.Module | None]:
        projection = getattr(self.model, PROJECTION, None)
        if projection is not None:
            delattr(self.model, PROJECTION)
        try:
            yield projection
        finally:
            if projection is not None:
                self.model.add_module(PROJECTION, projection)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        output_dir = output_dir or self.args.output_dir
        with self._without_projection() as projection:
            if state_dict is not None:
                state_dict = {name: value for name, value in state_dict.items() if PROJECTION not in name}
            super()._save(output_dir, state_dict)
        is_checkpoint = os.path.basename(output_dir.rstrip("/")).startswith(PREFIX_CHECKPOINT_DIR)
        if projection is not None and is_checkpoint and self.args.should_save:
            save_file(projection.state_dict(), os.path.join(output_dir, PROJECTION_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with self._without_projection() as projection:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if projection is not None:
            projection.load_state_dict(load_file(os.path.join(resume_from_checkpoint, PROJECTION_FILE)))


def _each(
    rows: Rows | dict[str, Rows] | None, change: Callable[[Rows, str], Changed]
) -> Changed | dict[str, Changed] | None:
    """Apply `change` to an evaluation dataset, or to each of a dict, with a file name for each."""
    if isinstance(rows, dict):
        return {name: change(part, f"eval_{quote(name, safe='')}") for name, part in rows.items()}
    return None if rows is None else change(rows, "eval")


def is_mixture(model: PreTrainedModel) -> bool:
    """Return whether a model has experts whose load is balanced by a loss."""
    return bool(getattr(model.config, "num_local_experts", 0) or getattr(model.config, "num_experts", 0))


def _tokenizer_of(name: str, revision: str) -> "PreTrainedTokenizerBase | None":
    """Return the tokenizer saved with a model, or `None`."""
    try:
        return saved_tokenizer(name, revision=revision)
    except (OSError, ValueError):
        return None
