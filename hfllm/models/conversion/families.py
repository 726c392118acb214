"""The table of supported native architectures, the correspondence of their configs to ours, and unsupported ones."""

from typing import TYPE_CHECKING, Any

from hfllm.models.conversion import tensor_layouts
from hfllm.models.conversion.family_rows import (
    EXPERT_FAMILIES,
    LATENT_FAMILIES,
    LLAMA,
    LLAMA_BIASES,
    MIXED_FAMILIES,
    Family,
    layers_of,
    qwen_layers,
    written_layers,
)
from hfllm.models.family.configuration_fields_hfllm import expert_width
from hfllm.models.family.configuration_hfllm import HfllmConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


# ---- families of other layouts ----
#
# Rows of native architectures with a bias of the head, no scale of scores, or norms named otherwise.


# GPT-J's and Phi's block, with the bias of their heads.
_PARALLEL = {
    **{"norm_type": "layernorm", "mlp_type": "plain", "mlp_bias": True},
    **{"parallel_block": True, "lm_head_bias": True},
}
_KINDS = {"global": "full_attention", "local": "sliding_attention"}


def _gptj_fields(native: "PreTrainedConfig") -> dict[str, Any]:
    size = native.n_embd // native.n_head
    factor = (native.rotary_dim or size) / size
    return {
        **_PARALLEL,
        "intermediate_size": native.n_inner or 4 * native.n_embd,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}
        | ({} if factor == 1 else {"partial_rotary_factor": factor}),
    }


def _written_gptj(config: HfllmConfig) -> dict[str, Any]:
    factor = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
    return {"embd_pdrop": config.hidden_dropout, "rotary_dim": int(config.head_dim * factor)}


def _gpt_neo_fields(native: "PreTrainedConfig") -> dict[str, Any]:
    kinds = [_KINDS[kind] for kind in native.attention_layers]
    return {
        **{"norm_type": "layernorm", "mlp_type": "plain", "position_embedding_type": "learned"},
        **{"attention_bias": False, "attention_output_bias": True, "mlp_bias": True},
        # Scores there are plain products.
        "query_pre_attn_scalar": 1,
        "intermediate_size": native.intermediate_size or 4 * native.hidden_size,
        "layer_types": kinds,
        "sliding_window": native.window_size if "sliding_attention" in kinds else None,
    }


def _written_gpt_neo(config: HfllmConfig) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in _KINDS.items()}
    return {
        # An unknown type is refused by its name, when it comes back.
        "attention_types": [[[names.get(kind, "global") for kind in config.layer_types], 1]],
        "embed_dropout": config.hidden_dropout,
        **({} if config.sliding_window is None else {"window_size": config.sliding_window}),
    }


def _exaone4_fields(native: "PreTrainedConfig") -> dict[str, Any]:
    fields = layers_of(native)
    # With a window, the layers without one have no positions.
    positions = [int(native.sliding_window is None or kind != "full_attention") for kind in fields["layer_types"]]
    return {**fields, "no_rope_layers": positions, "norm_placement": "output", "qk_norm": True}


def _written_exaone4(config: HfllmConfig) -> dict[str, Any]:
    # A window without a layer means there: no layer has positions.
    unused = config.max_position_embeddings if config.no_rope_layers else None
    return {**written_layers(config), "sliding_window": config.sliding_window or unused}


OTHER_LAYOUTS = {
    "gptj": Family(
        {
            **{"hidden_act": "activation_function", "norm_eps": "layer_norm_epsilon", "intermediate_size": "n_inner"},
            **{"max_position_embeddings": "n_positions", "hidden_dropout": "resid_pdrop"},
            "attention_dropout": "attn_pdrop",
        },
        read=_gptj_fields,
        write=_written_gptj,
        rules=tensor_layouts.gptj_rules,
    ),
    "phi": Family(
        {
            **{name: name for name in ("intermediate_size", "num_key_value_heads", "hidden_act", "rope_parameters")},
            **{"max_position_embeddings": "max_position_embeddings", "norm_eps": "layer_norm_eps"},
            **{"hidden_dropout": "resid_pdrop", "qk_norm": "qk_layernorm"},
        },
        read=lambda native: {**_PARALLEL, "attention_bias": True},
        write=lambda config: {"embd_pdrop": config.hidden_dropout},
        rules=tensor_layouts.phi_rules,
        has_partial_rope=True,
    ),
    "gpt_neo": Family(
        {
            **{
                "hidden_act": "activation_function",
                "norm_eps": "layer_norm_epsilon",
                "hidden_dropout": "resid_dropout",
            },
            **{"intermediate_size": "intermediate_size", "max_position_embeddings": "max_position_embeddings"},
        },
        read=_gpt_neo_fields,
        write=_written_gpt_neo,
        rules=tensor_layouts.gpt_neo_rules,
        classifier="classifier",
        # Two ways to list the local layers, and a window possibly without any.
        idle=frozenset({"attention_types", "window_size", "resid_dropout", "embed_dropout", "intermediate_size"}),
    ),
    "exaone4": Family(LLAMA, read=_exaone4_fields, write=_written_exaone4, idle=frozenset({"sliding_window_pattern"})),
    "olmoe": Family(
        {
            **{**LLAMA_BIASES, "num_local_experts": "num_experts"},
            **{name: name for name in ("num_experts_per_tok", "router_aux_loss_coef", "norm_topk_prob")},
        },
        read=lambda native: {"qk_norm": True, "qk_norm_scope": "all_heads"},
    ),
    "glm4": Family(
        LLAMA_BIASES,
        read=lambda native: {"norm_placement": "both", "attention_output_bias": False},
        rules=tensor_layouts.glm4_rules,
        has_partial_rope=True,
    ),
}


# ---- the table of families ----


_MISTRAL = {**LLAMA, "sliding_window": "sliding_window"}
_LLAMA_ALL_BIASES = {**LLAMA_BIASES, "mlp_bias": "mlp_bias"}
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
# The first GPT's "gelu" is the tanh approximation, called gelu_new elsewhere in transformers.
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
    """Return Phi-3's own field for the context before scaling, preferred to the one in `rope_parameters`."""
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
    "llama": Family(_LLAMA_ALL_BIASES),
    "mistral": Family(_MISTRAL),
    "mixtral": Family(
        {**_MISTRAL, **{name: name for name in _EXPERTS}},
        write=lambda config: {"intermediate_size": expert_width(config)},
    ),
    **EXPERT_FAMILIES,
    "qwen2": Family(
        LLAMA,
        read=lambda native: {"attention_bias": True, "attention_output_bias": False, **layers_of(native)},
        write=qwen_layers,
    ),
    "qwen3": Family(
        LLAMA_BIASES,
        read=lambda native: {"qk_norm": True, **layers_of(native)},
        write=qwen_layers,
    ),
    "gemma": Family(
        LLAMA_BIASES,
        read=lambda native: {
            "norm_unit_offset": True,
            "embedding_multiplier": native.hidden_size**0.5,
        },
    ),
    "cohere": Family(
        {**LLAMA_BIASES, "norm_eps": "layer_norm_eps", "logit_scale": "logit_scale"},
        read=lambda native: {"norm_type": "layernorm", "norm_bias": False, "parallel_block": True},
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
        {**_LLAMA_ALL_BIASES, "norm_eps": "layer_norm_eps"},
        read=lambda native: {"norm_type": "layernorm", "mlp_type": "plain"},
    ),
    "arcee": Family(_LLAMA_ALL_BIASES, read=lambda native: {"mlp_type": "plain"}),
    "seed_oss": Family(
        {
            **{**_LLAMA_ALL_BIASES, "attention_output_bias": "attention_out_bias"},
            "hidden_dropout": "residual_dropout",
        },
    ),
    "helium": Family(
        _LLAMA_ALL_BIASES,
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
FAMILIES |= MIXED_FAMILIES | OTHER_LAYOUTS | LATENT_FAMILIES


# ---- unsupported families ----
#
# Parts of unsupported architectures absent from `HfllmConfig`, for saying why they are refused.


# One missing part, where there may be more. Read from the modeling code of transformers 5.24.
MISSING = {
    "queries, keys and values in shuffled parts of one tensor": ("codegen",),
    "a norm without weights": ("olmo", "nanochat"),
    "a norm of queries and keys after the rotary embedding": ("hunyuan_v1_dense", "hunyuan_v1_moe"),
    "factors on attention scores and on each block's output": ("hyperclovax",),
    "a norm inside attention and MLP": ("bitnet",),
    "a LayerNorm whose weights are stored minus one": ("nemotron",),
    "an activation with weights": ("apertus",),
    "embeddings that every layer reads": ("gemma3n", "gemma3n_text", "gemma4", "gemma4_text"),
    "ALiBi in place of positions": ("bloom", "mpt"),
    "learned positions that begin at 2, counted over the attention mask": ("opt", "biogpt"),
    "sinusoidal positions": ("ctrl", "xglm"),
    "relative positions": ("xlnet",),
    "attention sinks": ("gpt_oss", "mimo_v2_flash", "granite_swa", "flint"),
    "differences of attention maps": ("diffllama",),
    "a factor on each block's output": ("granite", "granitemoe", "granitemoeshared"),
    "latent attention of another form than DeepSeek-V3's": ("longcat_flash", "mistral4", "mistral_large4"),
    "an index of which tokens each token attends to": ("deepseek_v32", "glm_moe_dsa"),
    "a least sum of the weights of a token's experts": ("ernie4_5_moe",),
    "a sparse mixer as router": ("phimoe",),
    "a limit on queries, keys and values": ("dbrx",),
    "layers with another recurrent state than that of OLMo Hybrid": (
        *("mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "zamba", "zamba2", "nemotron_h", "granitemoehybrid"),
        *("falcon_h1", "recurrent_gemma", "rwkv", "xlstm", "qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe"),
        *("qwen3_5_moe_text", "kimi_linear", "minimax", "bailing_hybrid"),
    ),
    "convolutions in place of attention": ("lfm2", "lfm2_moe"),
    "token types and a norm of the embeddings": (
        *("bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie", "deberta", "deberta-v2", "distilbert"),
        *("albert", "mpnet", "rembert", "roformer", "megatron-bert", "data2vec-text"),
    ),
    "an encoder beside the decoder": (
        *("t5", "mt5", "umt5", "t5gemma", "bart", "mbart", "plbart", "mvp", "pegasus", "pegasus_x", "marian"),
        *("m2m_100", "blenderbot", "blenderbot-small", "prophetnet", "longt5", "led", "whisper"),
    ),
    "an encoder of images": (
        *(
            "gemma3",
            "llama4",
            "llava",
            "llava_next",
            "llava_onevision",
            "mistral3",
            "mllama",
            "paligemma",
            "idefics2",
            "idefics3",
        ),
        *("smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "aria"),
    ),
}
_BY_TYPE = {model_type: concept for concept, types in MISSING.items() for model_type in types}


def missing_part(model_type: object) -> str:
    """Return which part of a known architecture is absent from `HfllmConfig`, to end a phrase; empty for others."""
    concept = _BY_TYPE.get(model_type) if isinstance(model_type, str) else None
    return f" ({concept} has no place in HfllmConfig)" if concept else ""
