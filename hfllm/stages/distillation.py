"""What distillation refuses before the stages that make its teacher are trained."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def check_student(
    model_args: Any,
    teacher_config: "PreTrainedConfig | None",
    make_student: "Callable[[PreTrainedModel], PreTrainedModel]",
) -> None:
    """Refuse a student that could only fail with the teacher, after the stages before have been trained.

    Args:
        model_args: with the student's name, if it has one.
        teacher_config: of the teacher that the stages are to make; `None` if it is named, and loaded right away.
        make_student: makes a new student for that teacher.

    Raises:
        InputError: for a named student that cannot be loaded or trained, an adapter that does not fit it, or a new
            one that cannot be made.
    """
    import torch

    from hfllm.models.stored import adapter_base, empty_model
    from hfllm.runs.models import check_trainable, load_config, load_tokenizer, peft_config, try_adapter

    name, revision = model_args.model_name_or_path, model_args.model_revision
    # New weights of an adapter or a student must not change the numbers that are drawn later.
    with torch.random.fork_rng():
        if name:
            load_tokenizer(name, revision)
            check_trainable(model_args)
            if model_args.use_peft:
                base = adapter_base(name, revision=revision) or name
                try_adapter(load_config(base, revision), peft_config(model_args))
        elif teacher_config is not None:
            with torch.device("meta"):
                make_student(empty_model(teacher_config))
