"""Change arguments without changing the parsed ones: derived arguments are a copy with its own name."""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import fields
from typing import TYPE_CHECKING, TypeVar

from hfllm.errors import without_credentials

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from trl import ModelConfig


Arguments = TypeVar("Arguments")


def changed(arguments: Arguments, **changes: object) -> Arguments:
    """Return a copy of `arguments` with these fields changed.

    For the arguments of trainers: `dataclasses.replace` would run `__post_init__` again, on values already processed.

    Raises:
        AttributeError: for a field that `arguments` does not have.
    """
    derived = copy(arguments)
    for name, value in changes.items():
        getattr(arguments, name)
        object.__setattr__(derived, name, value)
    return derived


def without_nested_secrets(arguments: Arguments) -> Arguments:
    """Return a copy of a trainer's `arguments` with hidden credentials of flags such as model_init_kwargs.

    A trainer writes its arguments into training_args.bin, into every checkpoint, and to its trackers.
    """
    nested = {name: value for name, value in vars(arguments).items() if isinstance(value, Mapping | list | tuple)}
    hidden = {name: without_credentials(value) for name, value in nested.items()}
    # A value without credentials stays the same object, possibly known to an engine.
    return changed(arguments, **{name: value for name, value in hidden.items() if value != nested[name]})


# ---- flags as words of a command line ----


# The flags of your model for all runs, and the flags of an adapter in addition to `--lora_...`.
HOLD_FOR_ALL = (
    *("dtype", "attn_implementation", "load_in_8bit", "load_in_4bit"),
    *("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"),
)
ADAPTER = ("use_peft", "use_rslora", "use_dora")


def flags_for_all(model_args: "ModelConfig") -> list[str]:
    """Return the flags of the user's model for all runs."""
    return given_words(model_args, only=HOLD_FOR_ALL)


def flags_of_adapter(model_args: "ModelConfig") -> list[str]:
    """Return the flags of the adapter trained by the first run and continued by the others."""
    if not model_args.use_peft:
        return []
    # Each run sets the task of its own adapter.
    lora = (each.name for each in fields(model_args) if each.name.startswith("lora_"))
    return given_words(model_args, ("lora_task_type",), (*ADAPTER, *lora))


def given_words(
    group: "DataclassInstance", without: Sequence[str] = (), only: Sequence[str] | None = None
) -> list[str]:
    """Return the flags of a parsed group with values other than their defaults, as words of a command line.

    Args:
        without: flags to leave out.
        only: the flags to return; by default all.
    """
    words: list[str] = []
    for each in fields(group):
        value = getattr(group, each.name)
        is_selected = each.init and each.name not in without and (only is None or each.name in only)
        if is_selected and value is not None and value != each.default and value != []:
            words += [f"--{each.name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words
