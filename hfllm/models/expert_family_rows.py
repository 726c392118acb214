"""Rows of native architectures with experts of several kinds, and what conversion compares of them."""

from typing import TYPE_CHECKING, Any

from hfllm.errors import InputError
from hfllm.models import tensor_layouts
from hfllm.models.configuration_hfllm import HfllmConfig
from hfllm.models.expert_fields_hfllm import IDLE, expert_width, is_sparse, num_sparse_layers, shared_width
from hfllm.models.mixed_family_rows import layers_of, qwen_layers, written_layers
from hfllm.models.native_family import LLAMA, LLAMA_BIASES, Family

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

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


def _qwen_experts(native: "PreTrainedConfig", dense_type: str) -> dict[str, Any]:
    if native.num_experts < 1:
        raise InputError(f"num_experts={native.num_experts}: without experts a model is a {dense_type}")
    only, step = native.mlp_only_layers, native.decoder_sparse_step
    if step < 1:
        raise InputError(f"decoder_sparse_step={step} must be a whole number of at least 1")
    sparse = [index not in only and (index + 1) % step == 0 for index in range(native.num_hidden_layers)]
    return {"mlp_layer_types": ["sparse" if each else "dense" for each in sparse]}


def _written_qwen(config: HfllmConfig) -> dict[str, Any]:
    dense = [index for index in range(config.num_hidden_layers) if not is_sparse(config, index)]
    return {"moe_intermediate_size": expert_width(config), "mlp_only_layers": dense, "decoder_sparse_step": 1}


def deepseek_experts(native: "PreTrainedConfig") -> dict[str, Any]:
    """Return our fields of a native config with DeepSeek-V3's router, which trains as its own class does."""
    dense = native.first_k_dense_replace or 0
    layers = native.num_hidden_layers
    return {
        **{"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        # The native classes have no loss for the load, and leave the bias as it is.
        **{"router_aux_loss_coef": 0.0, "router_bias_update_rate": 0.0},
        "mlp_layer_types": ["dense"] * min(dense, layers) + ["sparse"] * (layers - dense),
    }


def written_deepseek(config: HfllmConfig) -> dict[str, Any]:
    """Return the inverse of `deepseek_experts`, and the width of the shared MLP as a number of experts.

    Raises:
        ValueError: for a width that is no multiple of an expert's, or 0.
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
            **{"qk_norm": True, "attention_output_bias": native.attention_bias},
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
        # Modules that predict further tokens are no part of the class for causal language modeling.
        write=lambda config: {**written_deepseek(config), "num_mtp_layers": 0},
        has_partial_rope=True,
        idle=frozenset({"first_k_dense_replace", "num_mtp_layers"}),
    ),
    "dots1": Family(
        {**LLAMA_BIASES, **DEEPSEEK},
        read=lambda native: {
            **{"qk_norm": True, "attention_output_bias": native.attention_bias},
            **{**layers_of(native), **deepseek_experts(native)},
        },
        write=lambda config: {**written_layers(config), **written_deepseek(config)},
        idle=frozenset({"first_k_dense_replace"}),
    ),
}

# Ways to say a width, of which one is compared.
WIDTHS = {"moe_intermediate_size": expert_width, "shared_expert_intermediate_size": shared_width}


def irrelevant_fields(config: HfllmConfig) -> set[str]:
    """Return fields of experts that say nothing about what this model computes."""
    names = {"n_shared_experts"}
    if not config.num_local_experts:
        names |= {*IDLE, "num_experts_per_tok"}
    elif num_sparse_layers(config) == config.num_hidden_layers:
        names.add("intermediate_size")
    if config.n_group == 1:
        names.add("topk_group")
    return names
