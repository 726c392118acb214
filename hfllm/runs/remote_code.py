"""The flag that trusts the code of models, and the recipes that it holds for."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import ParamSpec, TypeVar

Given, Made = ParamSpec("Given"), TypeVar("Made")


@dataclass(frozen=True)
class RemoteCodeArguments:
    """The flag, for recipes whose trainer's arguments do not have it."""

    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run the code that models bring along, and the kernels that their configs name."},
    )


def trusts_code_if_asked(main: Callable[Given, Made]) -> Callable[Given, Made]:
    """Return a recipe's `main` that runs code of models if its flags, or those of a recipe around it, trust it."""

    @wraps(main)
    def trusting(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        is_trusted = any(getattr(group, "trust_remote_code", False) is True for group in args)
        if not is_trusted:
            return main(*args, **kwargs)
        from hfllm.models.loading.saved import trusting_remote_code

        with trusting_remote_code(is_trusted):
            return main(*args, **kwargs)

    return trusting
