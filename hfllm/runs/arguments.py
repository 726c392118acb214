"""Change arguments without changing the parsed ones: derived arguments are a copy with its own name."""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

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


# ---- flags that hold for all runs ----


# The flags of your model for all runs, and the flags of an adapter in addition to `--lora_...`.
HOLD_FOR_ALL = (
    *("dtype", "attn_implementation", "load_in_8bit", "load_in_4bit"),
    *("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"),
)
ADAPTER = ("use_peft", "use_rslora", "use_dora")


def flags_for_all(model_args: "ModelConfig") -> list[str]:
    """Return the flags of the user's model for all runs."""
    return _given(model_args, HOLD_FOR_ALL)


def flags_of_adapter(model_args: "ModelConfig") -> list[str]:
    """Return the flags of the adapter trained by the first run and continued by the others."""
    if not model_args.use_peft:
        return []
    return _given(model_args, (*ADAPTER, *(each.name for each in fields(model_args) if _describes_lora(each.name))))


def _describes_lora(flag: str) -> bool:
    # Each run sets the task of its own adapter.
    return flag.startswith("lora_") and flag != "lora_task_type"


def _given(model_args: "ModelConfig", flags: Sequence[str]) -> list[str]:
    """Return the flags with values other than their defaults, as words of a command line."""
    words: list[str] = []
    for each in fields(model_args):
        value: Any = getattr(model_args, each.name)
        if each.name in flags and value is not None and value != each.default:
            words.append(f"--{each.name}")
            words += map(str, value) if isinstance(value, list) else [str(value)]
    return words


# ---- words of given flags ----


def given_words(group: "DataclassInstance", without: Sequence[str] = ()) -> list[str]:
    """Return the flags of a parsed group with values other than their defaults, as words of a command line."""
    words: list[str] = []
    for each in fields(group):
        value = getattr(group, each.name)
        if each.init and each.name not in without and value is not None and value != each.default and value != []:
            words += [f"--{each.name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words
