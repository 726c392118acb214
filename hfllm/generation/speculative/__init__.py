"""Speculative decoding: a draft proposes tokens, the target verifies them in one pass."""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "EarlyExitDraft": "drafts",
    "Int8Draft": "drafts",
    "ModelDraft": "drafts",
    "PromptLookupDraft": "drafts",
    "speculative_generate": "speculative",
}
__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    # Imported on demand: the formulas need no model code.
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
