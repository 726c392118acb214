"""What `HfllmConfig` accepts, and shapes that papers name."""

from collections.abc import Mapping
from typing import Any

from hfllm.errors import InputError

# What `HfllmConfig` accepts; it cannot be asked without importing transformers.
CHOICES = {
    "norm_type": ("rmsnorm", "layernorm"),
    "norm_placement": ("pre", "post", "output", "both"),
    "qk_norm_scope": ("head", "all_heads"),
    "mlp_type": ("gated", "plain"),
    "position_embedding_type": ("rope", "learned", "none"),
}
LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "linear_attention")
# The types that do not see everything, each with the field that says how much.
WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
MLP_LAYER_TYPES = ("dense", "sparse")

_GPT = {
    "norm_type": "layernorm",
    "mlp_type": "plain",
    "position_embedding_type": "learned",
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
}


def mlp_layers(values: Mapping[str, Any]) -> list[str] | None:
    """Return `mlp_layer_types` of a config that says by `first_k_dense_replace` which layers have experts.

    `None` means that all have, if there are experts.

    Raises:
        InputError: for a number that is none, or more dense layers than there are layers.
    """
    number, first = values.get("num_hidden_layers"), values.get("first_k_dense_replace") or 0
    if not isinstance(number, int) or not first:
        return None
    if not isinstance(first, int) or not 0 <= first <= number:
        raise InputError(f"first_k_dense_replace={first!r} is more than num_hidden_layers={number}, or none")
    return ["dense"] * first + ["sparse"] * (number - first)


def _megatron(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    return {**_GPT, **sizes, "vocab_size": 51200, "max_position_embeddings": 2048}


# Published shapes that are no preset of the family: the ten models of Narayanan et al. 2021 (arXiv:2104.04473,
# table 1), the first of which are smaller versions of the last, MT-NLG (arXiv:2201.11990), and DeepSeek-V3.
NAMED_SHAPES: dict[str, dict[str, Any]] = {
    "megatron-1.7b": _megatron(24, 2304, 24),
    "megatron-3.6b": _megatron(30, 3072, 32),
    "megatron-7.5b": _megatron(36, 4096, 32),
    "megatron-18b": _megatron(40, 6144, 48),
    "megatron-39b": _megatron(48, 8192, 64),
    "megatron-76b": _megatron(60, 10240, 80),
    "megatron-145b": _megatron(80, 12288, 96),
    "megatron-310b": _megatron(96, 16384, 128),
    "megatron-530b": _megatron(105, 20480, 128),
    "gpt3-1t": _megatron(128, 25600, 160),
    # Without the module that predicts a second token (arXiv:2412.19437, section 4.2).
    "deepseek-v3": {
        **{"hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "vocab_size": 129280},
        **{"intermediate_size": 18432, "max_position_embeddings": 4096},
        **{"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
        **{"v_head_dim": 128, "num_local_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8},
        **{"moe_intermediate_size": 2048, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4},
        **{"scoring_func": "sigmoid", "topk_method": "noaux_tc", "routed_scaling_factor": 2.5},
    },
}
