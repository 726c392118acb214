"""Small members of every family, by their axes. Sizes come from the `make_config` fixture."""

_GPT = {
    "norm_type": "layernorm",
    "mlp_type": "plain",
    "hidden_act": "gelu_new",
    "position_embedding_type": "learned",
    "num_key_value_heads": 4,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
}
_PALM = {
    "norm_type": "layernorm",
    "norm_bias": False,
    "parallel_block": True,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
_NEOX = {
    "norm_type": "layernorm",
    "parallel_block": True,
    "shared_norm": False,
    "mlp_type": "plain",
    "hidden_act": "gelu",
    "num_key_value_heads": 4,
    "attention_bias": True,
    "mlp_bias": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}
FAMILIES = {
    "gpt1": {**_GPT, "norm_placement": "post"},
    "gpt2": {**_GPT, "residual_init": "gpt2"},
    "neox": _NEOX,
    "llama": {},
    "llama-tied": {"num_key_value_heads": 4, "tie_word_embeddings": True, "residual_init": "depth"},
    "mistral": {"sliding_window": 5},
    "palm": _PALM,
    "cohere": {**_PALM, "num_key_value_heads": 2, "logit_scale": 0.25},
    "gemma": {
        "norm_unit_offset": True,
        "hidden_act": "gelu_pytorch_tanh",
        "embedding_multiplier": 32**0.5,
        "head_dim": 16,
        "tie_word_embeddings": True,
    },
    "qwen2": {"attention_bias": True, "attention_output_bias": False},
    "qwen3": {"qk_norm": True, "head_dim": 16},
    "mixtral": {"num_local_experts": 4, "intermediate_size": 48},
    "mixtral-parallel-window": {"num_local_experts": 3, "parallel_block": True, "sliding_window": 5},
    "qwen2-moe": {
        "attention_bias": True,
        "attention_output_bias": False,
        "num_local_experts": 4,
        "norm_topk_prob": False,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "shared_expert_gate": True,
    },
    "glm4-moe": {
        "first_k_dense_replace": 1,
        "num_local_experts": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 32,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
        "residual_init": "depth",
    },
    "gemma3": {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 5,
        "qk_norm": True,
        "norm_placement": "both",
        "norm_unit_offset": True,
        "query_pre_attn_scalar": 24,
        "final_logit_softcapping": 20.0,
        "embedding_multiplier": 32**0.5,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        },
    },
    "olmo-hybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "norm_placement": "output",
        "qk_norm": True,
        "qk_norm_scope": "all_heads",
        "position_embedding_type": "none",
    },
    "deepseek": {
        **{"kv_lora_rank": 16, "q_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6},
        **{"num_key_value_heads": 4, "rope_interleave": True},
    },
    "llama4-chunks": {
        "layer_types": ["chunked_attention", "full_attention"],
        "attention_chunk_size": 5,
        "no_rope_layers": [1, 0],
    },
    "no-positions": {"hidden_act": "gelu", "position_embedding_type": "none"},
}
BERT = {**_GPT, "norm_placement": "post", "hidden_act": "gelu", "is_causal": False}
# As in Cohere 2, where only layers with a window know positions.
MIXED_LAYERS = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 5,
    "no_rope_layers": [1, 0],
}
