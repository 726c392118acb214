"""Rows of native architectures with multi-head latent attention, of which the ones without experts convert."""

from typing import TYPE_CHECKING, Any

from hfllm.errors import InputError
from hfllm.models.configuration_hfllm import HfllmConfig
from hfllm.models.native_family import LLAMA_BIASES, Family

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_LATENT = {
    **{name: name for name in LLAMA_BIASES if name not in ("head_dim", "norm_eps")},
    **{name: name for name in ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")},
    "norm_eps": "rms_norm_eps",
}
# What layers with experts read, and extra heads that no model of transformers has unless it is asked to draft.
_OF_EXPERTS = frozenset(
    {
        *("moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "norm_topk_prob"),
        *("routed_scaling_factor", "n_group", "topk_group", "topk_method", "first_k_dense_replace"),
        *("num_mtp_layers", "num_nextn_predict_layers"),
    }
)


def _dense_fields(native: "PreTrainedConfig") -> dict[str, Any]:
    """Return our fields of a DeepSeek model, all layers of which must be dense."""
    if native.first_k_dense_replace < native.num_hidden_layers:
        raise InputError(
            f"first_k_dense_replace={native.first_k_dense_replace}: layers with shared and routed experts have no "
            f"place, only {native.num_hidden_layers} dense layers have"
        )
    return {"attention_output_bias": native.attention_bias}


def _written_dense(config: HfllmConfig) -> dict[str, Any]:
    return {**_written_latent(config), "first_k_dense_replace": config.num_hidden_layers}


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
        {**_LATENT, "rope_interleave": "rope_interleave"}, read=_dense_fields, write=_written_dense, idle=_OF_EXPERTS
    ),
    "youtu": Family(
        {**_LATENT, "rope_interleave": "rope_interleave"},
        read=lambda native: {"attention_output_bias": native.attention_bias},
        write=_written_latent,
        idle=frozenset({"embedding_initializer_range"}),
    ),
    "deepseek_v2": Family(
        {**_LATENT, "mlp_bias": "mlp_bias"},
        read=lambda native: {**_dense_fields(native), "rope_interleave": True},
        write=_written_dense,
        idle=_OF_EXPERTS,
    ),
    "minicpm3": Family({**_LATENT, "mlp_bias": "mlp_bias"}, read=_minicpm_fields, write=_written_minicpm),
}
