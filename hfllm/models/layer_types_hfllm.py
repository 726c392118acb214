"""What may differ from layer to layer: the kind of attention, and whether positions are rotated.

This file imports only the standard library, and is uploaded to the Hub with configuration_hfllm.py.
"""

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedConfig

    from .configuration_hfllm import HfllmConfig

LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "linear_attention")
# The types that do not see everything, each with the field that says how much.
WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
LINEAR_SIZES = (
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    "linear_conv_kernel_dim",
)
# Of sparse attention, which is no type of layer; models without it do not have these.
SPARSE_SIZES = ("sparse_block_size", "sparse_num_blocks")

OPTIONAL_ROPE_NUMBERS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
ROPE_NUMBERS = (
    *("rope_theta", "factor", "partial_rotary_factor", "low_freq_factor", "high_freq_factor"),
    *("original_max_position_embeddings", *OPTIONAL_ROPE_NUMBERS),
)


def filled_layer_types(config: "HfllmConfig") -> list[str]:
    """Return the config's own `layer_types`, or one type for all layers, which the window decides."""
    if config.layer_types is not None:
        return list(config.layer_types)
    return [_type_of_window(config)] * config.num_hidden_layers


def own_window(config: "HfllmConfig", layer_idx: int) -> int | None:
    """Return how many tokens a layer sees at most, its own included; `None` for no limit."""
    field = WINDOWS.get(config.layer_types[layer_idx])
    return None if field is None else getattr(config, field)


def _type_of_window(config: "HfllmConfig") -> str:
    """Return the type of layer that the first window of the config is for."""
    types = (kind for kind, field in WINDOWS.items() if getattr(config, field) is not None)
    return next(types, "full_attention")


def has_sparse_sizes(config: "PreTrainedConfig") -> bool:
    """Return whether a config has a size of sparse attention, as one of a model that was trained with it does."""
    return any(getattr(config, field, None) is not None for field in SPARSE_SIZES)


def follow_edits(config: "HfllmConfig") -> None:
    """Let what is filled in follow fields that were set since, when a model is built or the config saved.

    A list that says the same of all layers follows their number and the window, as `from_pretrained(name,
    num_hidden_layers=2)` and `sliding_window=None` set them, which know nothing of it. Beside layers of linear
    attention, the others follow the window.
    """
    config.layer_types = filled_layer_types(config)
    fill_linear_sizes(config)
    kinds, number = set(config.layer_types), config.num_hidden_layers
    others = kinds - {"linear_attention"}
    if len(others) == 1 and others <= {"full_attention", *WINDOWS}:
        kind = _type_of_window(config)
        config.layer_types = [each if each == "linear_attention" else kind for each in config.layer_types]
    if len(kinds) == 1:
        config.layer_types = config.layer_types[:1] * number
    if config.no_rope_layers is not None and len(set(config.no_rope_layers)) == 1:
        config.no_rope_layers = config.no_rope_layers[:1] * number


def filled_no_rope_layers(config: "HfllmConfig") -> list[int] | None:
    """Return `no_rope_layers`, or `None`, its other form, if that says 1 of every layer."""
    layers = config.no_rope_layers
    return None if layers is None or layers == [1] * config.num_hidden_layers else list(layers)


def fill_linear_sizes(config: "HfllmConfig") -> None:
    """Set the sizes of linear attention that are not given to OLMo Hybrid's, if the model has such layers."""
    if "linear_attention" not in config.layer_types or config.num_attention_heads < 1:
        return
    for field in ("linear_num_key_heads", "linear_num_value_heads"):
        if getattr(config, field) is None:
            setattr(config, field, config.num_attention_heads)
    if config.linear_key_head_dim is None and config.linear_num_key_heads > 0:
        config.linear_key_head_dim = int(0.75 * config.hidden_size / config.linear_num_key_heads)
    if config.linear_value_head_dim is None and config.linear_key_head_dim is not None:
        config.linear_value_head_dim = 2 * config.linear_key_head_dim


def check_layers(config: "HfllmConfig") -> None:
    """Refuse lists of another length than the model has layers, unknown types, and what does not fit these.

    Raises:
        ValueError: naming the field, its value and what is accepted.
    """
    _check_types(config)
    kinds = set(config.layer_types)
    for kind, field in WINDOWS.items():
        window = getattr(config, field)
        if kind in kinds and window is None:
            raise ValueError(f"layer_types with {kind!r} needs {field}, got None")
        if kind not in kinds and window is not None:
            raise ValueError(f"{field}={window} needs a {kind!r} in layer_types, which has none")
    if kinds >= WINDOWS.keys():
        raise ValueError(f"layer_types has {' and '.join(WINDOWS)}: the masks of a cache are made for one of them")
    if "linear_attention" in kinds:
        _check_linear(config)
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


def longrope_limits(config: "PreTrainedConfig") -> list[int]:
    """Return how long texts may be, in tokens, before rotary factors of `longrope` change (arXiv:2402.13753).

    The long factors then go for the beginning of the text too. There are several numbers where types of layers have
    their own parameters, and none without that type of rotation.

    Args:
        config: of a decoder, also of a native one.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [each for each in rope.values() if isinstance(each, dict)] or [rope]
    return [each["original_max_position_embeddings"] for each in ropes if each.get("rope_type") == "longrope"]


def check_rope_values(rope: "Mapping[str, object]") -> None:
    """Refuse values of rotary parameters that give no frequencies; transformers warns of some and takes them.

    Raises:
        ValueError: naming the key, its value and what is accepted.
    """
    for key in ROPE_NUMBERS:
        value, is_optional = rope.get(key), key in OPTIONAL_ROPE_NUMBERS
        if key not in rope or (value is None and (is_optional or rope["rope_type"] == "longrope")):
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 <= value < float("inf") or (value == 0 and not is_optional):
            least = "of at least 0" if is_optional else "above 0"
            raise ValueError(f"rope_parameters.{key} must be a number {least}, got {value!r}")


def _check_linear(config: "HfllmConfig") -> None:
    if set(config.layer_types) == {"linear_attention"}:
        raise ValueError(
            "layer_types has linear_attention alone: at least one layer must be full_attention, sliding_attention or "
            "chunked_attention, whose cache counts the tokens"
        )
    if not config.is_causal:
        raise ValueError("layer_types with 'linear_attention' needs is_causal=True, got False")
    if config.parallel_block or config.norm_placement not in ("pre", "output"):
        raise ValueError(
            "layer_types with 'linear_attention' needs parallel_block=False and norm_placement='pre' or 'output', got "
            f"{config.parallel_block} and {config.norm_placement!r}"
        )
    for field in LINEAR_SIZES:
        if getattr(config, field) is None or getattr(config, field) < 1:
            raise ValueError(f"{field} must be at least 1, got {getattr(config, field)}")
    if config.linear_num_value_heads % config.linear_num_key_heads:
        raise ValueError(
            f"linear_num_key_heads={config.linear_num_key_heads} must divide "
            f"linear_num_value_heads={config.linear_num_value_heads}"
        )
    if config.linear_dt_min <= 0:
        raise ValueError(f"linear_dt_min={config.linear_dt_min} must be above 0")
    for least, most in (("linear_a_log_min", "linear_a_log_max"), ("linear_dt_min", "linear_dt_max")):
        if not 0 <= getattr(config, least) <= getattr(config, most):
            raise ValueError(f"{least}={getattr(config, least)} must lie between 0 and {most}={getattr(config, most)}")


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
