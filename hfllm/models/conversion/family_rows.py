"""Rows of the table of native families: how one architecture's config becomes ours, and names that rows share.

Here are the rows with layers of several types, norms in other places, experts or latent attention; `families.py` has
those of Llama's kind. A row goes where its like are.
`to_native` tries them in the order of `families.FAMILIES`.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfllm.errors import refuse_if
from hfllm.models.conversion import tensor_layouts
from hfllm.models.family.configuration_fields_hfllm import (
    IDLE,
    expert_width,
    is_sparse,
    longrope_limits,
    num_sparse_layers,
    shared_width,
)
from hfllm.models.family.configuration_hfllm import HfllmConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

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


# ---- rows with layers of several types, or norms in other places ----


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


# ---- experts ----


# Qwen's lists of layers are read in full, and written in one of several equivalent ways.
_QWEN_IDLE = frozenset({"mlp_only_layers", "decoder_sparse_step"})
_QWEN = {
    **{"num_local_experts": "num_experts", "moe_intermediate_size": "moe_intermediate_size"},
    **{name: name for name in ("num_experts_per_tok", "router_aux_loss_coef", "norm_topk_prob")},
}
DEEPSEEK = {
    **{"num_local_experts": "n_routed_experts", "moe_intermediate_size": "moe_intermediate_size"},
    **{name: name for name in ("num_experts_per_tok", "n_shared_experts", "norm_topk_prob", "n_group", "topk_group")},
    "routed_scaling_factor": "routed_scaling_factor",
}
_V3_ROUTER = {
    **{"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    # The native classes have no loss for the load, and leave the bias as it is.
    **{"router_aux_loss_coef": 0.0, "router_bias_update_rate": 0.0},
}


def _qwen_experts(native: "PreTrainedConfig", dense_type: str) -> dict[str, Any]:
    refuse_if(native.num_experts < 1, f"num_experts={native.num_experts}: without experts a model is a {dense_type}")
    only, step = native.mlp_only_layers, native.decoder_sparse_step
    refuse_if(step < 1, f"decoder_sparse_step={step} must be a whole number of at least 1")
    sparse = [index not in only and (index + 1) % step == 0 for index in range(native.num_hidden_layers)]
    return {"mlp_layer_types": ["sparse" if each else "dense" for each in sparse]}


def _written_qwen(config: HfllmConfig) -> dict[str, Any]:
    dense = [index for index in range(config.num_hidden_layers) if not is_sparse(config, index)]
    return {"moe_intermediate_size": expert_width(config), "mlp_only_layers": dense, "decoder_sparse_step": 1}


def deepseek_experts(native: "PreTrainedConfig") -> dict[str, Any]:
    """Return our fields of a native config with DeepSeek-V3's router, trained as in its own class."""
    dense = native.first_k_dense_replace or 0
    layers = native.num_hidden_layers
    return {**_V3_ROUTER, "mlp_layer_types": ["dense"] * min(dense, layers) + ["sparse"] * (layers - dense)}


def written_deepseek(config: HfllmConfig) -> dict[str, Any]:
    """Return the inverse of `deepseek_experts`, and the width of the shared MLP as a number of experts.

    Raises:
        ValueError: for a width other than a multiple of an expert's, or 0.
    """
    width, shared = expert_width(config), shared_width(config)
    if not shared or shared % width:
        raise ValueError(
            f"an MLP of width {shared} that all tokens share has no place there: it must be a multiple of "
            f"moe_intermediate_size={width}"
        )
    sparse = [is_sparse(config, index) for index in range(config.num_hidden_layers)]
    return {
        "moe_intermediate_size": width,
        "n_shared_experts": shared // width,
        "first_k_dense_replace": (sparse.index(True) if any(sparse) else len(sparse)),
    }


EXPERT_FAMILIES = {
    "qwen3_moe": Family(
        {**LLAMA_BIASES, **_QWEN, "sliding_window": "sliding_window"},
        read=lambda native: {
            "qk_norm": True,
            **_qwen_experts(native, "qwen3"),
        },
        write=lambda config: {**_written_qwen(config), "use_sliding_window": config.sliding_window is not None},
        idle=_QWEN_IDLE,
    ),
    "qwen2_moe": Family(
        {**LLAMA, **_QWEN, "attention_bias": "qkv_bias"}
        | {"shared_expert_intermediate_size": "shared_expert_intermediate_size"},
        read=lambda native: {
            **{"attention_output_bias": False, "shared_expert_gate": True},
            **{**layers_of(native), **_qwen_experts(native, "qwen2")},
        },
        write=lambda config: {
            **{**qwen_layers(config), **_written_qwen(config)},
            "shared_expert_intermediate_size": shared_width(config),
        },
        rules=tensor_layouts.qwen2_moe_rules,
        idle=_QWEN_IDLE,
    ),
    "glm4_moe": Family(
        {**LLAMA_BIASES, **DEEPSEEK, "qk_norm": "use_qk_norm"},
        read=lambda native: {**deepseek_experts(native), "attention_output_bias": False},
        # Modules for predicting further tokens are no part of the class for causal language modeling.
        write=lambda config: {**written_deepseek(config), "num_mtp_layers": 0},
        has_partial_rope=True,
        idle=frozenset({"first_k_dense_replace", "num_mtp_layers"}),
    ),
    "dots1": Family(
        {**LLAMA_BIASES, **DEEPSEEK},
        read=lambda native: {
            **{"qk_norm": True, **layers_of(native)},
            **deepseek_experts(native),
        },
        write=lambda config: {**written_layers(config), **written_deepseek(config)},
        idle=frozenset({"first_k_dense_replace"}),
    ),
}

# Ways to say a width; only one is compared.
WIDTHS = {"moe_intermediate_size": expert_width, "shared_expert_intermediate_size": shared_width}


def irrelevant_fields(config: HfllmConfig) -> set[str]:
    """Return fields of experts without an effect on the results of this model."""
    names = {"n_shared_experts"}
    if not config.num_local_experts:
        names |= {*IDLE, "num_experts_per_tok"}
    elif num_sparse_layers(config) == config.num_hidden_layers:
        names.add("intermediate_size")
    if config.n_group == 1:
        names.add("topk_group")
    return names


# ---- latent attention ----
#
# Rows of native architectures with multi-head latent attention, with DeepSeek's experts or without.


_LATENT = {
    **{name: name for name in LLAMA_BIASES if name not in ("head_dim", "norm_eps")},
    **{name: name for name in ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")},
    "norm_eps": "rms_norm_eps",
}
# Of models without experts, and modules for predicting further tokens, absent from all classes for language modeling.
_IDLE = frozenset({*DEEPSEEK.values(), "topk_method", "first_k_dense_replace", "num_mtp_layers"})
# Values for a native class about experts in a model without any.
_NO_EXPERTS = {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}


def _v2_fields(native: "PreTrainedConfig") -> dict[str, Any]:
    routing = {
        **deepseek_experts(native),
        # Its router never divides the weights by their sum.
        **{"scoring_func": "softmax", "topk_method": native.topk_method, "norm_topk_prob": False},
        **{"n_group": native.n_group or 1, "topk_group": native.topk_group or 1},
    }
    if native.topk_method == "greedy":
        routing |= {"n_group": 1, "topk_group": 1}
    return {"rope_interleave": True, **(_dense_fields(native) or routing)}


def _dense_fields(native: "PreTrainedConfig") -> dict[str, Any]:
    """Return our fields of experts of a DeepSeek model whose layers are all dense, nothing for others."""
    if native.first_k_dense_replace < native.num_hidden_layers:
        return {}
    return {**IDLE, "num_local_experts": 0, "num_experts_per_tok": 2}


def _written_experts(config: HfllmConfig) -> dict[str, Any]:
    written = {**_written_latent(config)}
    if config.num_local_experts:
        return {**written, **written_deepseek(config)}
    dense = {"moe_intermediate_size": config.intermediate_size, "first_k_dense_replace": config.num_hidden_layers}
    return {**written, **_NO_EXPERTS, **dense}


def _written_lite(config: HfllmConfig) -> dict[str, Any]:
    if not config.num_local_experts:
        raise ValueError("num_local_experts=0: a model without experts is a youtu")
    written = {**_written_latent(config), **written_deepseek(config)}
    del written["first_k_dense_replace"]
    kinds = ["sparse" if is_sparse(config, index) else "dense" for index in range(config.num_hidden_layers)]
    return {**written, "mlp_layer_types": kinds}


def _written_latent(config: HfllmConfig) -> dict[str, Any]:
    if config.kv_lora_rank is None:
        raise ValueError("kv_lora_rank=None: it has latent attention alone")
    return {}


def _minicpm_fields(native: "PreTrainedConfig") -> dict[str, Any]:
    return {
        "embedding_multiplier": native.scale_emb,
        "logit_scale": native.dim_model_base / native.hidden_size,
    }


def _written_minicpm(config: HfllmConfig) -> dict[str, Any]:
    return {
        **_written_latent(config),
        "scale_emb": config.embedding_multiplier,
        # The value for a factor of 1 on each block's output.
        "scale_depth": None,
        "dim_model_base": round(config.logit_scale * config.hidden_size),
    }


LATENT_FAMILIES = {
    "deepseek_v3": Family(
        {**_LATENT, **DEEPSEEK, "rope_interleave": "rope_interleave"},
        read=lambda native: _dense_fields(native) or deepseek_experts(native),
        write=lambda config: {**_written_experts(config), "num_mtp_layers": 0},
        idle=_IDLE,
    ),
    "youtu": Family(
        {**_LATENT, "rope_interleave": "rope_interleave"},
        write=_written_latent,
        idle=frozenset({"embedding_initializer_range"}),
    ),
    "deepseek_v2": Family(
        {**_LATENT, **DEEPSEEK, "mlp_bias": "mlp_bias"},
        read=_v2_fields,
        write=lambda config: {**_written_experts(config), "topk_method": config.topk_method},
        idle=_IDLE,
    ),
    "glm4_moe_lite": Family(
        {**_LATENT, **DEEPSEEK, "rope_interleave": "rope_interleave"},
        read=lambda native: {**_V3_ROUTER, "mlp_layer_types": list(native.mlp_layer_types)},
        write=_written_lite,
    ),
    "minicpm3": Family({**_LATENT, "mlp_bias": "mlp_bias"}, read=_minicpm_fields, write=_written_minicpm),
}
