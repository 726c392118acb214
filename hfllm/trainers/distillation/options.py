"""The options of distillation's own. No torch here: `hfllm distill --help` shows them at once.

They are not frozen, as transformers' `TrainingArguments` are not, which `DistillationConfig` is together with them.
"""

from dataclasses import dataclass, field
from typing import Any


def option(default: Any, text: str) -> Any:
    """Return a dataclass field with its help."""
    return field(default=default, metadata={"help": text})


@dataclass
class TeacherOptions:
    """The teacher."""

    teacher_model_name_or_path: str | None = option(None, "Model name or path of the teacher.")
    teacher_model_revision: str | None = option(None, "Revision of the teacher.")
    teacher_model_init_kwargs: dict[str, Any] | str | None = option(
        None, "Keyword arguments of `from_pretrained` for a teacher given by name."
    )
    teacher_top_k: int | None = option(
        None,
        "Ask the teacher once, keep so many of its likeliest tokens at each place on disk, and train from there. By "
        "default it is asked at every step and compared on the whole vocabulary.",
    )
    teacher_cache_dir: str | None = option(
        None,
        "Folder of what was kept, which several runs may share: nothing in it is removed. By default teacher_cache in "
        "the output folder, without what is stale.",
    )


@dataclass
class LossOptions:
    """The loss, and what it is computed on."""

    temperature: float = option(3.0, "Temperature of both distributions in the divergence.")
    beta: float = option(
        0.0, "Divergence: 0 is the forward KL, 1 the reverse KL, between them generalized Jensen-Shannon."
    )
    soft_weight: float = option(0.7, "Weight of the divergence, times the squared temperature.")
    hard_weight: float = option(0.3, "Weight of the cross-entropy with the data.")
    hidden_weight: float = option(
        0.0, "Weight of the mean squared distance between hidden states, a student's layer to one of the teacher's."
    )
    max_length: int | None = option(1024, "Longest row in tokens; what is longer is cut at its end.")
    disable_dropout: bool = option(False, "Switch the student's dropout off.")
    loss_chunk_size: int = option(
        256, "Tokens whose logits exist at a time, of student and teacher; 0 is all of a batch."
    )


@dataclass
class DistillationOptions(TeacherOptions, LossOptions):
    """All options of distillation's own."""
