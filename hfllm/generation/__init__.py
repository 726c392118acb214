"""Fast generation: `fast_generate`, speculative decoding, and the choice of a key-value cache."""

from typing import Any

__all__ = ["fast_generate"]


def __getattr__(name: str) -> Any:
    # Imported on demand: the formulas need no model code.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hfllm.generation.speculative.speculative import fast_generate

    return fast_generate
