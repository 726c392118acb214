"""Arguments of `DistillationTrainer`."""

from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from hfllm.flags import POSITIVE, changed, check_arguments, flag
from hfllm.trainers.distillation.losses import LossSettings
from hfllm.trainers.distillation.options import DistillationOptions


@dataclass
class DistillationConfig(DistillationOptions, TrainingArguments):
    """`transformers.TrainingArguments` plus distillation's options, named as in TRL where they mean the same.

    Distillation's options are in `hfllm/trainers/distillation/options.py`.
    """

    logging_steps: float = flag(10, "Log every X optimizer steps; below 1, a share of all steps.", takes=POSITIVE)
    remove_unused_columns: bool | None = flag(False, "Keep False: the trainer reads the dataset's columns itself.")

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]

    def __post_init__(self):
        super().__post_init__()
        check_arguments(self, DistillationOptions)
        if not self.soft_weight + self.hard_weight + self.hidden_weight:
            raise ValueError("soft_weight, hard_weight and hidden_weight are all 0: there is nothing to learn from")
        if self.teacher_top_k and not self.soft_weight:
            raise ValueError("teacher_top_k is for the divergence, and its weight soft_weight is 0")
        if self.teacher_cache_dir and not self.teacher_top_k:
            raise ValueError("teacher_cache_dir needs teacher_top_k: without it nothing is cached")
        if self.teacher_top_k and self.hidden_weight:
            raise ValueError("hidden_weight needs the teacher at every step: it cannot be combined with teacher_top_k")
        init_kwargs = self.teacher_model_init_kwargs or {}
        if not isinstance(init_kwargs, dict):
            raise ValueError(f"teacher_model_init_kwargs must be a JSON object, got {init_kwargs!r}")
        if self.teacher_model_revision and "revision" in init_kwargs:
            raise ValueError("teacher_model_revision is given, and so is a revision in teacher_model_init_kwargs")
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor changes no part of the loss: the teacher smooths the targets")
        if self.use_cpu and self.fp16:
            raise ValueError("fp16 does nothing on a CPU: use --bf16 or neither")

    @property
    def needs_teacher(self) -> bool:
        """Return whether any part of the loss comes from the teacher."""
        return bool(self.soft_weight or self.hidden_weight)

    def without_teacher(self) -> "DistillationConfig":
        """Return the arguments of the same training with the cross-entropy on the answers only."""
        weights = {"soft_weight": 0.0, "hard_weight": 1.0, "hidden_weight": 0.0}
        return changed(self, **weights, teacher_top_k=None, teacher_cache_dir=None)

    @property
    def teacher_settings(self) -> dict[str, Any]:
        """Return the arguments to load a teacher given by name."""
        return {"revision": self.teacher_model_revision or "main", **(self.teacher_model_init_kwargs or {})}

    @property
    def loss_settings(self) -> LossSettings:
        """Return the settings of the loss."""
        return LossSettings(self.temperature, self.beta, self.soft_weight, self.hard_weight)
