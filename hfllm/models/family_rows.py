"""One row for each native architecture of transformers that converts: how its config says what ours says."""

from typing import TYPE_CHECKING, Any

from hfllm.models import tensor_layouts
from hfllm.models.configuration_hfllm import HfllmConfig
from hfllm.models.expert_family_rows import EXPERT_FAMILIES
from hfllm.models.expert_fields_hfllm import expert_width
from hfllm.models.latent_family_rows import LATENT_FAMILIES
from hfllm.models.mixed_family_rows import MIXED_FAMILIES, layers_of, qwen_layers
from hfllm.models.more_family_rows import MORE_FAMILIES
from hfllm.models.native_family import LLAMA, LLAMA_BIASES, Family

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# ---- the families ----

_MISTRAL = {**LLAMA, "sliding_window": "sliding_window"}
_ALL_BIASES = ("attention_bias", "attention_output_bias", "mlp_bias")
_EXPERTS = ("num_local_experts", "num_experts_per_tok", "router_aux_loss_coef")
_GPT_FIELDS = {
    **{"norm_type": "layernorm", "mlp_type": "plain", "position_embedding_type": "learned"},
    **{"attention_bias": True, "mlp_bias": True},
}
_GPT2 = {
    **{"hidden_act": "activation_function", "norm_eps": "layer_norm_epsilon", "intermediate_size": "n_inner"},
    **{"max_position_embeddings": "n_positions", "hidden_dropout": "resid_pdrop", "attention_dropout": "attn_pdrop"},
}
_LAYERNORM = {
    **{name: name for name in ("intermediate_size", "hidden_act", "max_position_embeddings", "rope_parameters")},
    **{"norm_eps": "layer_norm_eps", "hidden_dropout": "hidden_dropout"},
}
# The first GPT's "gelu" is the tanh approximation that transformers calls gelu_new elsewhere.
_OPENAI_ACTIVATIONS = {"gelu": "gelu_new", "swish": "silu"}


def _bigcode_fields(native: "PreTrainedConfig") -> dict[str, Any]:
    return {
        **_GPT_FIELDS,
        "intermediate_size": native.n_inner or 4 * native.n_embd,
        "num_key_value_heads": 1 if native.multi_query else native.n_head,
    }


def _falcon_fields(native: "PreTrainedConfig") -> dict[str, Any]:
    is_new = native.new_decoder_architecture
    norms = 1 if not is_new else native.num_ln_in_parallel_attn or 2
    key_heads = native.num_kv_heads if is_new else 1 if native.multi_query else native.num_attention_heads
    return {
        **{"norm_type": "layernorm", "mlp_type": "plain"},
        **{name: native.bias for name in ("attention_bias", "mlp_bias")},
        "num_key_value_heads": key_heads,
        "parallel_block": bool(is_new or native.parallel_attn),
        "shared_norm": norms == 1,
    }


def _original_context(config: HfllmConfig) -> dict[str, Any]:
    """Return Phi-3's own field for the context before scaling, which goes before that in `rope_parameters`."""
    name = "original_max_position_embeddings"
    return {name: (config.rope_parameters or {}).get(name, config.max_position_embeddings)}


def _falcon_write(config: HfllmConfig) -> dict[str, Any]:
    is_new = config.parallel_block and (not config.shared_norm or config.num_key_value_heads > 1)
    return {
        "alibi": False,
        "bias": config.attention_bias,
        "new_decoder_architecture": is_new,
        "multi_query": config.num_key_value_heads == 1,
        "num_kv_heads": config.num_key_value_heads if is_new else None,
        "parallel_attn": config.parallel_block,
        "num_ln_in_parallel_attn": (1 if config.shared_norm else 2) if is_new else None,
    }


# In the order in which `to_native` tries them.
FAMILIES = {
    "llama": Family(
        {**LLAMA_BIASES, "mlp_bias": "mlp_bias"}, read=lambda native: {"attention_output_bias": native.attention_bias}
    ),
    "mistral": Family(_MISTRAL),
    "mixtral": Family(
        {**_MISTRAL, **{name: name for name in _EXPERTS}},
        write=lambda config: {"intermediate_size": expert_width(config)},
    ),
    **EXPERT_FAMILIES,
    "qwen2": Family(
        LLAMA,
        read=lambda native: {
            "attention_bias": True,
            "attention_output_bias": False,
            **layers_of(native),
        },
        write=qwen_layers,
    ),
    "qwen3": Family(
        LLAMA_BIASES,
        read=lambda native: {
            "qk_norm": True,
            "attention_output_bias": native.attention_bias,
            **layers_of(native),
        },
        write=qwen_layers,
    ),
    "gemma": Family(
        LLAMA_BIASES,
        read=lambda native: {
            "norm_unit_offset": True,
            "embedding_multiplier": native.hidden_size**0.5,
            "attention_output_bias": native.attention_bias,
        },
    ),
    "cohere": Family(
        {**LLAMA_BIASES, "norm_eps": "layer_norm_eps", "logit_scale": "logit_scale"},
        read=lambda native: {
            **{"norm_type": "layernorm", "norm_bias": False, "parallel_block": True},
            "attention_output_bias": native.attention_bias,
        },
        rules=tensor_layouts.rotary_pairs_rules,
    ),
    "gpt2": Family(
        _GPT2,
        read=lambda native: {**_GPT_FIELDS, "intermediate_size": native.n_inner or 4 * native.n_embd},
        write=lambda config: {"embd_pdrop": config.hidden_dropout},
        rules=tensor_layouts.gpt2_rules,
        classifier="classifier",
    ),
    "gpt_bigcode": Family(
        _GPT2,
        read=_bigcode_fields,
        write=lambda config: {"embd_pdrop": config.hidden_dropout, "multi_query": config.num_key_value_heads == 1},
        rules=tensor_layouts.bigcode_rules,
        classifier="classifier",
    ),
    "openai-gpt": Family(
        {
            **{"norm_eps": "layer_norm_epsilon", "max_position_embeddings": "n_positions"},
            **{"hidden_dropout": "resid_pdrop", "attention_dropout": "attn_pdrop"},
        },
        read=lambda native: {
            **{**_GPT_FIELDS, "norm_placement": "post"},
            "hidden_act": _OPENAI_ACTIVATIONS.get(native.afn, native.afn),
        },
        write=lambda config: {
            # Any other activation comes back as gelu_new and is therefore refused.
            "afn": {"silu": "silu", "relu": "relu"}.get(config.hidden_act, "gelu"),
            "embd_pdrop": config.hidden_dropout,
        },
        rules=tensor_layouts.openai_rules,
    ),
    "gpt_neox": Family(
        {
            **{name: name for name in ("intermediate_size", "hidden_act", "max_position_embeddings")},
            **{name: name for name in ("rope_parameters", "attention_bias", "hidden_dropout")},
            "norm_eps": "layer_norm_eps",
        },
        read=lambda native: {
            **{"norm_type": "layernorm", "mlp_type": "plain", "mlp_bias": True, "shared_norm": False},
            "attention_output_bias": native.attention_bias,
            "parallel_block": native.use_parallel_residual,
        },
        write=lambda config: {"use_parallel_residual": config.parallel_block},
        rules=tensor_layouts.neox_rules,
        has_partial_rope=True,
        classifier="classifier",
    ),
    "falcon": Family(
        {
            **{"intermediate_size": "ffn_hidden_size", "hidden_act": "activation", "norm_eps": "layer_norm_epsilon"},
            **{name: name for name in ("max_position_embeddings", "rope_parameters", "hidden_dropout")},
        },
        read=_falcon_fields,
        write=_falcon_write,
        rules=tensor_layouts.falcon_rules,
        classifier="classifier",
    ),
    "starcoder2": Family(
        {
            **{**LLAMA, "norm_eps": "norm_epsilon", "sliding_window": "sliding_window"},
            "hidden_dropout": "residual_dropout",
        },
        read=lambda native: {
            **{"norm_type": "layernorm", "mlp_type": "plain"},
            **{name: native.use_bias for name in _ALL_BIASES},
        },
        write=lambda config: {"use_bias": config.attention_bias, "embedding_dropout": config.hidden_dropout},
        rules=tensor_layouts.starcoder2_rules,
    ),
    "phi3": Family(
        {**_MISTRAL, "hidden_dropout": "resid_pdrop"},
        write=lambda config: {"embd_pdrop": config.hidden_dropout, **_original_context(config)},
        rules=tensor_layouts.phi3_rules,
        has_partial_rope=True,
        reads_again=True,
        # Read from `rope_parameters`, where it has an effect.
        idle=frozenset({"original_max_position_embeddings"}),
    ),
    "stablelm": Family(
        {
            **{**_LAYERNORM, "num_key_value_heads": "num_key_value_heads", "attention_bias": "use_qkv_bias"},
            "parallel_block": "use_parallel_residual",
        },
        read=lambda native: {"norm_type": "layernorm", "attention_output_bias": False},
        has_partial_rope=True,
    ),
    "persimmon": Family(
        {**_LAYERNORM, "qk_norm": "qk_layernorm"},
        read=lambda native: {
            **{"norm_type": "layernorm", "mlp_type": "plain"},
            **dict.fromkeys(_ALL_BIASES, True),
        },
        rules=tensor_layouts.persimmon_rules,
        has_partial_rope=True,
    ),
    "jais2": Family(
        {**LLAMA_BIASES, "mlp_bias": "mlp_bias", "norm_eps": "layer_norm_eps"},
        read=lambda native: {
            **{"norm_type": "layernorm", "mlp_type": "plain", "attention_output_bias": native.attention_bias},
        },
    ),
    "arcee": Family(
        {**LLAMA_BIASES, "mlp_bias": "mlp_bias"},
        read=lambda native: {"mlp_type": "plain", "attention_output_bias": native.attention_bias},
    ),
    "seed_oss": Family(
        {
            **{**LLAMA_BIASES, "mlp_bias": "mlp_bias", "attention_output_bias": "attention_out_bias"},
            "hidden_dropout": "residual_dropout",
        },
    ),
    "helium": Family(
        {**LLAMA_BIASES, "mlp_bias": "mlp_bias"},
        read=lambda native: {"attention_output_bias": False},
        rules=tensor_layouts.rotary_pairs_rules,
    ),
    "glm": Family(
        LLAMA_BIASES,
        read=lambda native: {"attention_output_bias": False},
        rules=tensor_layouts.glm_rules,
        has_partial_rope=True,
    ),
    "ernie4_5": Family(
        LLAMA,
        read=lambda native: {"attention_dropout": 0.0, **{name: native.use_bias for name in _ALL_BIASES}},
        write=lambda config: {"use_bias": config.attention_bias},
        rules=tensor_layouts.rotary_pairs_rules,
    ),
}
# These have configs of their own for the class of Llama.
FAMILIES |= {name: FAMILIES["llama"] for name in ("exaone", "internlm3", "iquestcoder")}
FAMILIES |= MIXED_FAMILIES | MORE_FAMILIES | LATENT_FAMILIES
