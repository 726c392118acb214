"""Rows of native architectures with a bias of the head, no scale of scores, or norms named otherwise."""

from typing import TYPE_CHECKING, Any

from hfllm.models import tensor_layouts
from hfllm.models.configuration_hfllm import HfllmConfig
from hfllm.models.mixed_family_rows import layers_of, written_layers
from hfllm.models.native_family import LLAMA, LLAMA_BIASES, Family

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

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
        # A type that it has not is refused by its name, when it comes back.
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
    # A window that no layer has says there that no layer has positions.
    unused = config.max_position_embeddings if config.no_rope_layers else None
    return {**written_layers(config), "sliding_window": config.sliding_window or unused}


MORE_FAMILIES = {
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
        # Two ways to say which layers are local, and a window that may have none.
        idle=frozenset({"attention_types", "window_size", "resid_dropout", "embed_dropout", "intermediate_size"}),
    ),
    "exaone4": Family(LLAMA, read=_exaone4_fields, write=_written_exaone4, idle=frozenset({"sliding_window_pattern"})),
    "olmoe": Family(
        {
            **{**LLAMA_BIASES, "num_local_experts": "num_experts"},
            **{name: name for name in ("num_experts_per_tok", "router_aux_loss_coef", "norm_topk_prob")},
        },
        read=lambda native: {
            **{"qk_norm": True, "qk_norm_scope": "all_heads", "attention_output_bias": native.attention_bias},
        },
    ),
    "glm4": Family(
        LLAMA_BIASES,
        read=lambda native: {"norm_placement": "both", "attention_output_bias": False},
        rules=tensor_layouts.glm4_rules,
        has_partial_rope=True,
    ),
}
