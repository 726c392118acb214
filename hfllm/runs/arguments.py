"""Arguments stay as they were parsed: what is derived from them is a copy with a name of its own."""

from copy import copy
from typing import TypeVar

Arguments = TypeVar("Arguments")


def changed(arguments: Arguments, **changes: object) -> Arguments:
    """Return a copy of `arguments` with these fields changed.

    For the arguments of trainers: `dataclasses.replace` would run `__post_init__` again, on what it made before.

    Raises:
        AttributeError: for a field that `arguments` does not have.
    """
    derived = copy(arguments)
    for name, value in changes.items():
        getattr(arguments, name)
        object.__setattr__(derived, name, value)
    return derived
