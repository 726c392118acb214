"""The longest sequence that a model is made for."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def max_length_of(config: "PreTrainedConfig") -> int | None:
    """Return the longest sequence that a model is made for, in tokens, or `None` if its config does not say."""
    context = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    # XLNet's config says -1: no limit.
    return context if context and context > 0 else None
