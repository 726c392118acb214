"""Rows of native architectures with multi-head latent attention, with DeepSeek's experts or without."""

from typing import TYPE_CHECKING, Any

from hfllm.models.configuration_hfllm import HfllmConfig
from hfllm.models.expert_family_rows import DEEPSEEK, deepseek_experts, written_deepseek
from hfllm.models.expert_fields_hfllm import IDLE, is_sparse
from hfllm.models.native_family import LLAMA_BIASES, Family

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_LATENT = {
    **{name: name for name in LLAMA_BIASES if name not in ("head_dim", "norm_eps")},
    **{name: name for name in ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")},
    "norm_eps": "rms_norm_eps",
}
# Of models without experts, and modules that predict further tokens, which no class for language modeling has.
_IDLE = frozenset({*DEEPSEEK.values(), "topk_method", "first_k_dense_replace", "num_mtp_layers"})
# What a native class wants to hear of experts in a model that has none.
_NO_EXPERTS = {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}


def _v3_fields(native: "PreTrainedConfig") -> dict[str, Any]:
    return {"attention_output_bias": native.attention_bias, **(_dense_fields(native) or deepseek_experts(native))}


def _v2_fields(native: "PreTrainedConfig") -> dict[str, Any]:
    routing = {
        **deepseek_experts(native),
        # Its router never divides the weights by their sum.
        **{"scoring_func": "softmax", "topk_method": native.topk_method, "norm_topk_prob": False},
        **{"n_group": native.n_group or 1, "topk_group": native.topk_group or 1},
    }
    if native.topk_method == "greedy":
        routing |= {"n_group": 1, "topk_group": 1}
    biases = {"attention_output_bias": native.attention_bias, "rope_interleave": True}
    return {**biases, **(_dense_fields(native) or routing)}


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


def _lite_fields(native: "PreTrainedConfig") -> dict[str, Any]:
    router = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    training = {"router_aux_loss_coef": 0.0, "router_bias_update_rate": 0.0}
    layers = {"mlp_layer_types": list(native.mlp_layer_types), "attention_output_bias": native.attention_bias}
    return {**router, **training, **layers}


def _written_latent(config: HfllmConfig) -> dict[str, Any]:
    if config.kv_lora_rank is None:
        raise ValueError("kv_lora_rank=None: it has latent attention alone")
    return {}


def _minicpm_fields(native: "PreTrainedConfig") -> dict[str, Any]:
    return {
        "attention_output_bias": native.attention_bias,
        "embedding_multiplier": native.scale_emb,
        "logit_scale": native.dim_model_base / native.hidden_size,
    }


def _written_minicpm(config: HfllmConfig) -> dict[str, Any]:
    return {
        **_written_latent(config),
        "scale_emb": config.embedding_multiplier,
        # What it takes for a factor of 1 on each block's output.
        "scale_depth": None,
        "dim_model_base": round(config.logit_scale * config.hidden_size),
    }


LATENT_FAMILIES = {
    "deepseek_v3": Family(
        {**_LATENT, **DEEPSEEK, "rope_interleave": "rope_interleave"},
        read=_v3_fields,
        write=lambda config: {**_written_experts(config), "num_mtp_layers": 0},
        idle=_IDLE,
    ),
    "youtu": Family(
        {**_LATENT, "rope_interleave": "rope_interleave"},
        read=lambda native: {"attention_output_bias": native.attention_bias},
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
        {**_LATENT, **DEEPSEEK, "rope_interleave": "rope_interleave"}, read=_lite_fields, write=_written_lite
    ),
    "minicpm3": Family({**_LATENT, "mlp_bias": "mlp_bias"}, read=_minicpm_fields, write=_written_minicpm),
}
