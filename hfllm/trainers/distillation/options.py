"""The options of distillation. No torch here, so that `hfllm distill --help` is fast.

They are not frozen, since `DistillationConfig` also inherits from transformers' `TrainingArguments`, not frozen
either.
"""

from dataclasses import dataclass
from typing import Any

from hfllm.flags import NOT_NEGATIVE, POSITIVE, SHARE, at_least, flag


@dataclass
class TeacherOptions:
    """The teacher."""

    teacher_model_name_or_path: str | None = flag(None, "Model name or path of the teacher.")
    teacher_model_revision: str | None = flag(None, "Revision of the teacher.")
    teacher_model_init_kwargs: dict[str, Any] | str | None = flag(
        None, "Keyword arguments of `from_pretrained` for a teacher given by name."
    )
    teacher_top_k: int | None = flag(
        None,
        "Run the teacher once, keep this many of its most likely tokens per position on disk, and train on them. By "
        "default it runs at every step and is compared on the whole vocabulary.",
        takes=at_least(1),
    )
    teacher_cache_dir: str | None = flag(
        None,
        "Folder of this cache, which several runs may share: nothing in it is removed. By default teacher_cache in "
        "the output folder, where stale files are removed.",
    )


@dataclass
class LossOptions:
    """The loss, and the tokens that it is computed on."""

    temperature: float = flag(3.0, "Temperature of both distributions in the divergence.", takes=POSITIVE)
    beta: float = flag(
        0.0,
        "Divergence: 0 is the forward KL, 1 the reverse KL, values between are generalized Jensen-Shannon.",
        takes=SHARE,
    )
    soft_weight: float = flag(0.7, "Weight of the divergence, times the squared temperature.", takes=NOT_NEGATIVE)
    hard_weight: float = flag(0.3, "Weight of the cross-entropy with the data.", takes=NOT_NEGATIVE)
    hidden_weight: float = flag(
        0.0,
        "Weight of the mean squared distance between hidden states, each student layer against one of the teacher's.",
        takes=NOT_NEGATIVE,
    )
    max_length: int | None = flag(1024, "Longest row in tokens; longer rows are cut at the end.", takes=at_least(1))
    disable_dropout: bool = flag(False, "Switch the student's dropout off.")
    loss_chunk_size: int = flag(
        128, "Tokens per chunk of logits, of student and teacher; 0 means a whole batch.", takes=NOT_NEGATIVE
    )


@dataclass
class DistillationOptions(TeacherOptions, LossOptions):
    """All options of distillation."""
