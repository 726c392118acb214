"""What may differ from layer to layer: the kind of attention, and whether positions are rotated.

This file imports only the standard library, and is uploaded to the Hub with configuration_hfllm.py.
"""

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .configuration_hfllm import HfllmConfig

LAYER_TYPES = ("full_attention", "sliding_attention")


def filled_layer_types(config: "HfllmConfig") -> list[str]:
    """Return the config's own `layer_types`, or one type for all layers, which the window decides."""
    if config.layer_types is not None:
        return list(config.layer_types)
    kind = "full_attention" if config.sliding_window is None else "sliding_attention"
    return [kind] * config.num_hidden_layers


def filled_no_rope_layers(config: "HfllmConfig") -> list[int] | None:
    """Return `no_rope_layers`, or `None`, its other form, if that says 1 of every layer."""
    layers = config.no_rope_layers
    return None if layers is None or layers == [1] * config.num_hidden_layers else list(layers)


def check_layers(config: "HfllmConfig") -> None:
    """Refuse lists of another length than the model has layers, unknown types, and what does not fit these.

    Raises:
        ValueError: naming the field, its value and what is accepted.
    """
    _check_types(config)
    kinds, window = set(config.layer_types), config.sliding_window
    if "sliding_attention" in kinds and window is None:
        raise ValueError("layer_types with 'sliding_attention' needs sliding_window, got None")
    if "sliding_attention" not in kinds and window is not None:
        raise ValueError(f"sliding_window={window} needs a 'sliding_attention' in layer_types, which has none")
    layers = config.no_rope_layers
    if layers is None:
        return
    if len(layers) != config.num_hidden_layers or not set(layers) <= {0, 1}:
        raise ValueError(
            f"no_rope_layers={layers} must be one 0 (a layer without rotary positions) or 1 for each of "
            f"num_hidden_layers={config.num_hidden_layers}"
        )
    if config.position_embedding_type != "rope":
        raise ValueError(
            f"no_rope_layers needs position_embedding_type='rope', got {config.position_embedding_type!r}"
        )


def _check_types(config: "HfllmConfig") -> None:
    for kind in config.layer_types:
        if kind not in LAYER_TYPES:
            near = get_close_matches(str(kind), LAYER_TYPES, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"layer_types: {kind!r} is not one of {', '.join(LAYER_TYPES)}{hint}")
    if len(config.layer_types) != config.num_hidden_layers:
        raise ValueError(
            f"layer_types names {len(config.layer_types)} layers, and num_hidden_layers={config.num_hidden_layers}"
        )
