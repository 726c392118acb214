"""What a config.json of each architecture leaves unsaid, and shapes that papers name."""

from collections.abc import Callable, Mapping
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
_GPT_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
}
_DEEPSEEK_NAMES = {"n_routed_experts": "num_local_experts"}
# What transformers assumes where a config.json is silent.
_DEEPSEEK = {
    **{"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
    **{"num_local_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048},
    **{"first_k_dense_replace": 3, "n_group": 8, "topk_group": 4},
}
_GLM = {
    **{"num_local_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 1408},
    **{"first_k_dense_replace": 1, "attention_output_bias": False},
}
_QWEN2_MOE = {
    **{"attention_bias": True, "attention_output_bias": False, "shared_expert_gate": True, "num_experts_per_tok": 4},
    **{"num_experts": 60, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
}
# model_type of a config.json: its names of sizes if they differ, and the values implied by the type.
FAMILIES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "hfllm": ({}, {}),
    "llama": ({}, {}),
    "mistral": ({}, {"sliding_window": 4096}),
    "mixtral": ({}, {"num_local_experts": 8}),
    "qwen2": ({}, {"attention_bias": True, "attention_output_bias": False}),
    "qwen3": ({}, {"qk_norm": True}),
    "gemma": ({}, {"tie_word_embeddings": True}),
    "gpt2": (_GPT_NAMES, _GPT),
    "openai-gpt": (_GPT_NAMES, {**_GPT, "norm_placement": "post"}),
    "qwen3_moe": ({}, {"qk_norm": True}),
    "qwen2_moe": ({"qkv_bias": "attention_bias"}, _QWEN2_MOE),
    "glm4_moe": ({**_DEEPSEEK_NAMES, "use_qk_norm": "qk_norm"}, _GLM),
    "dots1": (_DEEPSEEK_NAMES, {"qk_norm": True}),
    "deepseek_v3": (_DEEPSEEK_NAMES, _DEEPSEEK),
}


# Those that have a window only if `use_sliding_window` says so, and which layers then have it, by their index and
# `max_window_layers`.
ONLY_IF_USED: dict[str, Callable[[int, int], bool]] = {
    **dict.fromkeys(("qwen2", "qwen3"), lambda index, first: index >= first),
    "qwen2_moe": lambda index, first: index % 2 == 0 and index < first,
    "qwen3_moe": lambda index, first: True,
}


def window_fields(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `layer_types` and the windows that some layer has, as the class of another family reads its config.json.

    Args:
        kind: its `model_type`.
        values: the fields, with what the type implies.

    Raises:
        InputError: for a `max_window_layers` that is no number.
    """
    window, kinds, number = values.get("sliding_window"), values.get("layer_types"), values.get("num_hidden_layers")
    if not values.get("use_sliding_window", kind not in ONLY_IF_USED):
        window = None
    elif kind in ONLY_IF_USED:
        first, window = values.get("max_window_layers", 28), values.get("sliding_window", 4096)
        if not isinstance(first, int):
            raise InputError(f"max_window_layers={first!r} must be a whole number")
        if kinds is None and window is not None and isinstance(number, int):
            slides = [ONLY_IF_USED[kind](index, first) for index in range(number)]
            kinds = ["sliding_attention" if each else "full_attention" for each in slides]
    found = {
        "sliding_window": window,
        "attention_chunk_size": values.get("attention_chunk_size"),
        "layer_types": kinds,
    }
    for name, field in WINDOWS.items():
        if isinstance(kinds, list) and name not in kinds:
            found[field] = None
    return found


def mlp_layers(values: Mapping[str, Any]) -> list[str] | None:
    """Return `mlp_layer_types` of a config that says in another way which layers have experts, `None` if all have.

    Args:
        values: a config.json, perhaps with `first_k_dense_replace` (DeepSeek), or `decoder_sparse_step` and
            `mlp_only_layers` (Qwen).

    Raises:
        InputError: for numbers that are none, or more dense layers than there are layers.
    """
    number = values.get("num_hidden_layers")
    first, step = values.get("first_k_dense_replace") or 0, values.get("decoder_sparse_step", 1)
    only = values.get("mlp_only_layers") or []
    if not isinstance(number, int) or not (first or step != 1 or only):
        return None
    if not isinstance(first, int) or not 0 <= first <= number:
        raise InputError(f"first_k_dense_replace={first!r} is more than num_hidden_layers={number}, or none")
    if not isinstance(step, int) or step < 1:
        raise InputError(f"decoder_sparse_step={step!r} must be a whole number of at least 1")
    sparse = [index >= first and (index + 1) % step == 0 and index not in only for index in range(number)]
    return ["sparse" if each else "dense" for each in sparse]


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
        **{"model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128},
        **{"vocab_size": 129280, "intermediate_size": 18432, "max_position_embeddings": 4096},
    },
}
