"""The form of a row of the table, and rows of architectures with differing layers, or norms in other places."""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfllm.models.conversion import tensor_layouts
from hfllm.models.family.configuration_fields_hfllm import longrope_limits
from hfllm.models.family.configuration_hfllm import HfllmConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


# ---- what a row is ----
#
# The correspondence of one native architecture's config to ours: the form of a row, and names shared by many rows.


SHARED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings"),
    *("initializer_range", "pad_token_id", "bos_token_id", "eos_token_id", "attention_dropout"),
)


@dataclass(frozen=True)
class Family:
    """Conversion of one native architecture's config to hfllm, and back.

    Args:
        names: our field -> the native field with the same meaning, beyond `SHARED`.
        read: our other fields, from a native config.
        write: the native config's other fields, from ours.
        rules: tensors with other names or layouts.
        has_partial_rope: whether `partial_rotary_factor` has an effect there.
        classifier: the name of the head of its token classifier.
        reads_again: whether its generation reads the text again where the factors of `longrope` change, as ours does;
            others keep keys of both kinds.
        idle: native fields without effect on the supported models.
    """

    names: Mapping[str, str]
    read: Callable[["PreTrainedConfig"], dict[str, Any]] = lambda config: {}
    write: Callable[[HfllmConfig], dict[str, Any]] = lambda config: {}
    rules: Callable[[HfllmConfig], Iterator[tensor_layouts.Rule]] = lambda config: iter(())
    has_partial_rope: bool = False
    classifier: str = "score"
    reads_again: bool = False
    idle: frozenset[str] = frozenset()

    def ours(self, native: "PreTrainedConfig") -> HfllmConfig:
        names = {name: name for name in SHARED} | dict(self.names)
        # `head_dim` is None in some native configs and absent from others, but still accepted there.
        values = {ours: getattr(native, theirs, None) for ours, theirs in names.items()}
        if values.get("rope_parameters"):
            rope = plain_rope(values["rope_parameters"])
            for each in (rope, *(part for part in rope.values() if isinstance(part, dict))):
                if not self.has_partial_rope:
                    each.pop("partial_rotary_factor", None)
            values["rope_parameters"] = rope
        return HfllmConfig(**values | self.read(native))

    def theirs(self, config: HfllmConfig, native_class: type["PreTrainedConfig"]) -> "PreTrainedConfig":
        """Return the native config.

        Raises:
            ValueError: for values refused by the native class, or misread by it.
        """
        names = {name: name for name in SHARED} | dict(self.names)
        values = {theirs: getattr(config, ours) for ours, theirs in names.items()}
        if values.get("rope_parameters"):
            values["rope_parameters"] = deepcopy(dict(values["rope_parameters"]))
            if self.has_partial_rope:
                # If absent, the native class takes another value.
                values["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
        if longrope_limits(config) and not self.reads_again:
            raise ValueError("rope_type='longrope' has no place there: generation keeps keys of other factors")
        written = self.write(config)
        if config.rotary_types() and "rope_parameters" not in written:
            raise ValueError("rope_parameters by layer type have no place there")
        return native_class(**values | written)


def plain_rope(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy, since configs change theirs in place, without entries of no effect.

    These are a factor of 1, and other entries next to dictionaries by layer type, where a config made with one
    dictionary keeps it.
    """
    by_type = {name: dict(value) for name, value in parameters.items() if isinstance(value, Mapping)}
    rope = by_type or dict(parameters)
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    return rope


# ---- names ----

LLAMA = {
    **{name: name for name in ("intermediate_size", "num_key_value_heads", "hidden_act", "max_position_embeddings")},
    **{"rope_parameters": "rope_parameters", "norm_eps": "rms_norm_eps", "head_dim": "head_dim"},
}
# The bias of attention's output follows this one, unless a family says otherwise.
LLAMA_BIASES = {**LLAMA, "attention_bias": "attention_bias"}


# ---- layers of several types ----


def layers_of(native: "PreTrainedConfig") -> dict[str, Any]:
    """Return our fields of a native config with a type per layer. A window without a layer is none."""
    kinds = list(native.layer_types)
    return {"layer_types": kinds, "sliding_window": native.sliding_window if "sliding_attention" in kinds else None}


def written_layers(config: HfllmConfig) -> dict[str, Any]:
    """Return the inverse of `layers_of`.

    Raises:
        ValueError: for types absent from its families; their configs would accept the name, but not build the layer.
    """
    refuse_other_types(config, "full_attention", "sliding_attention")
    return {"layer_types": list(config.layer_types), "sliding_window": config.sliding_window}


def written_windows(config: HfllmConfig) -> dict[str, Any]:
    """Return `written_layers` for a class that makes the mask of a window even without a layer for it."""
    return {**written_layers(config), "sliding_window": config.sliding_window or config.max_position_embeddings}


def refuse_other_types(config: HfllmConfig, *kinds: str) -> None:
    """Raise a ValueError, with its name, for a type of layer outside `kinds`."""
    for kind in config.layer_types:
        if kind not in kinds:
            raise ValueError(f"layer_types with {kind!r} have no place there")


def qwen_layers(config: HfllmConfig) -> dict[str, Any]:
    """Return the fields of Qwen's configs for layers, where a window needs a switch too."""
    return {**written_layers(config), "use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}


def _rotations_of(native: "PreTrainedConfig") -> dict[str, Any]:
    """Return `rope_parameters` by layer type, or one dictionary if all types have the same."""
    # Heads are rotated as a whole there, whatever the factor says.
    factor = "partial_rotary_factor"
    ropes = plain_rope(native.rope_parameters).items()
    every = {kind: {name: value for name, value in rope.items() if name != factor} for kind, rope in ropes}
    first, *others = every.values()
    return {"rope_parameters": first if all(other == first for other in others) else every}


def _written_rotations(config: HfllmConfig) -> dict[str, Any]:
    rope = config.rope_parameters or {}
    own = config.rotary_types()
    kinds = ("sliding_attention", "full_attention")
    # A type without a layer is written too: the native class would fill it, and perhaps differently.
    return {"rope_parameters": {kind: dict(rope.get(kind, rope[own[0]]) if own else rope) for kind in kinds}}


def _gemma_fields(native: "PreTrainedConfig") -> dict[str, Any]:
    scalar = native.query_pre_attn_scalar
    return {
        **layers_of(native),
        **{"norm_placement": "both", "norm_unit_offset": True},
        "embedding_multiplier": native.hidden_size**0.5,
        "query_pre_attn_scalar": None if scalar == native.head_dim else scalar,
    }


def _written_gemma(config: HfllmConfig) -> dict[str, Any]:
    return {**written_windows(config), "query_pre_attn_scalar": config.query_pre_attn_scalar or config.head_dim}


def _hybrid_fields(native: "PreTrainedConfig") -> dict[str, Any]:
    # Published models have this dictionary without a base, and no positions.
    is_rotated = (native.rope_parameters or {}).get("rope_theta") is not None
    return {
        **{**_OLMO, "layer_types": list(native.layer_types)},
        "position_embedding_type": "rope" if is_rotated else "none",
    }


def _written_hybrid(config: HfllmConfig) -> dict[str, Any]:
    rope = config.rope_parameters or {"rope_type": "default", "rope_theta": None}
    return {"layer_types": list(config.layer_types), "rope_parameters": dict(rope)}


def _llama4_fields(native: "PreTrainedConfig") -> dict[str, Any]:
    kinds = list(native.layer_types)
    return {
        **{"layer_types": kinds, "no_rope_layers": list(native.no_rope_layers)},
        "attention_chunk_size": native.attention_chunk_size if "chunked_attention" in kinds else None,
    }


def _written_llama4(config: HfllmConfig) -> dict[str, Any]:
    refuse_other_types(config, "full_attention", "chunked_attention")
    return {
        **{"layer_types": list(config.layer_types), "attention_chunk_size": config.attention_chunk_size},
        "no_rope_layers": config.no_rope_layers or [1] * config.num_hidden_layers,
        # Supported models have none of these.
        **{"use_qk_norm": False, "attn_temperature_tuning": False, "moe_layers": []},
    }


_LINEAR = (
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    *("linear_conv_kernel_dim", "linear_allow_neg_eigval", "linear_a_log_min", "linear_a_log_max"),
    *("linear_dt_min", "linear_dt_max", "linear_dt_init_floor"),
)
_OLMO = {"norm_placement": "output", "qk_norm": True, "qk_norm_scope": "all_heads"}
_GEMMA = {**LLAMA_BIASES, "hidden_act": "hidden_activation", "final_logit_softcapping": "final_logit_softcapping"}

MIXED_FAMILIES = {
    "smollm3": Family(
        {**LLAMA_BIASES, "mlp_bias": "mlp_bias", "no_rope_layers": "no_rope_layers"},
        read=layers_of,
        write=lambda config: {
            **written_layers(config),
            "use_sliding_window": config.sliding_window is not None,
            "no_rope_layers": config.no_rope_layers or [1] * config.num_hidden_layers,
        },
        # It says how to fill the list, already filled here.
        idle=frozenset({"no_rope_layer_interval"}),
    ),
    "cwm": Family(
        {**LLAMA, "mlp_bias": "mlp_bias"},
        read=layers_of,
        write=written_windows,
    ),
    "llama4_text": Family(
        {**LLAMA_BIASES, "intermediate_size": "intermediate_size_mlp"},
        read=_llama4_fields,
        write=_written_llama4,
        rules=tensor_layouts.llama4_rules,
        # Of experts, of disabled scales, and of the way of filling the lists.
        idle=frozenset({"intermediate_size", "num_local_experts", "num_experts_per_tok", "interleave_moe_layer_step"})
        | {"no_rope_layer_interval", "floor_scale", "attn_scale", "attention_chunk_size"},
    ),
    "ministral": Family(LLAMA, read=layers_of, write=written_windows),
    "cohere2": Family(
        {**LLAMA_BIASES, "norm_eps": "layer_norm_eps", "logit_scale": "logit_scale"},
        read=lambda native: {
            **{"norm_type": "layernorm", "norm_bias": False, "parallel_block": True},
            **layers_of(native),
            "no_rope_layers": [int(kind == "sliding_attention") for kind in native.layer_types],
        },
        write=written_windows,
        rules=tensor_layouts.rotary_pairs_rules,
    ),
    "gemma2": Family(
        {**_GEMMA, "attn_logit_softcapping": "attn_logit_softcapping"}, read=_gemma_fields, write=_written_gemma
    ),
    "gemma3_text": Family(
        _GEMMA,
        read=lambda native: {**_gemma_fields(native), **_rotations_of(native), "qk_norm": True},
        write=lambda config: {**_written_gemma(config), **_written_rotations(config)},
    ),
    "olmo2": Family(LLAMA_BIASES, read=lambda native: _OLMO),
    "olmo3": Family(
        LLAMA_BIASES,
        read=lambda native: {**_OLMO, **layers_of(native), **_rotations_of(native)},
        write=lambda config: {**written_windows(config), **_written_rotations(config)},
    ),
    "olmo_hybrid": Family(
        {**LLAMA_BIASES, **{name: name for name in _LINEAR}}, read=_hybrid_fields, write=_written_hybrid
    ),
}
