"""Change arguments without changing what was parsed: what is derived from them is a copy with its own name."""

from collections.abc import Mapping
from copy import copy
from typing import TypeVar

from hfllm.errors import without_credentials

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
    """Return a copy of a trainer's `arguments` with the credentials hidden that flags such as model_init_kwargs hold.

    A trainer writes its arguments into training_args.bin, into every checkpoint, and to what it reports to.
    """
    nested = {name: value for name, value in vars(arguments).items() if isinstance(value, Mapping | list | tuple)}
    hidden = {name: without_credentials(value) for name, value in nested.items()}
    # What holds none stays the very object that an engine may know.
    return changed(arguments, **{name: value for name, value in hidden.items() if value != nested[name]})
