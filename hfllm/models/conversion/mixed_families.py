"""Rows of native families whose layers differ, or whose norms are in other places."""

from typing import TYPE_CHECKING, Any

from hfllm.models.conversion import tensor_layouts
from hfllm.models.conversion.family_rows import (
    LLAMA,
    LLAMA_BIASES,
    Family,
    layers_of,
    plain_rope,
    refuse_other_types,
    written_layers,
    written_windows,
)
from hfllm.models.family.configuration_hfllm import HfllmConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


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
