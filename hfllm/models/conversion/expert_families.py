"""Rows of native architectures with experts, or with latent attention, and their parts compared by conversion."""

from typing import TYPE_CHECKING, Any

from hfllm.errors import refuse_if
from hfllm.models.conversion import tensor_layouts
from hfllm.models.conversion.family_rows import LLAMA, LLAMA_BIASES, Family, layers_of, qwen_layers, written_layers
from hfllm.models.family.configuration_fields_hfllm import (
    IDLE,
    expert_width,
    is_sparse,
    num_sparse_layers,
    shared_width,
)
from hfllm.models.family.configuration_hfllm import HfllmConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


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
