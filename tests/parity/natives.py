"""Small native models of every family that converts, with random weights, norms and biases included."""

import torch
import transformers

_SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
_GPT = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "eos_token_id": 2}


def _rope(kind, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


NATIVES = {
    "llama": ("llama", _GROUPED),
    "llama-biases": ("llama", {**_GROUPED, "attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "llama-tied": ("llama", {**_GROUPED, "tie_word_embeddings": True}),
    "code-llama": ("llama", {**_GROUPED, **_rope("default", rope_theta=1e6)}),
    "llama-linear": ("llama", {**_GROUPED, **_rope("linear", factor=2.0)}),
    "llama-dynamic": ("llama", {**_GROUPED, "max_position_embeddings": 16, **_rope("dynamic", factor=2.0)}),
    "llama-yarn": (
        "llama",
        {**_GROUPED, **_rope("yarn", factor=4.0, original_max_position_embeddings=32)},
    ),
    "llama-llama3": (
        "llama",
        {
            **_GROUPED,
            **_rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        },
    ),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": 5}),
    "mistral-no-window": ("mistral", {**_GROUPED, "sliding_window": None}),
    "mixtral": ("mixtral", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": ("qwen3_moe", {**_GROUPED, **_EXPERTS}),
    "qwen3-moe-window": (
        "qwen3_moe",
        {**_GROUPED, **_EXPERTS, "use_sliding_window": True, "sliding_window": 5, "attention_bias": True}
        | {"tie_word_embeddings": True, "head_dim": 16},
    ),
    "qwen2": ("qwen2", _GROUPED),
    "qwen2-window": ("qwen2", {**_GROUPED, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 16}),
    "gemma": ("gemma", {**_GROUPED, "head_dim": 16}),
    "cohere": ("cohere", _GROUPED),
    # PaLM is Cohere's block with one key-value head and plain logits.
    "palm": ("cohere", {**_GROUPED, "num_key_value_heads": 1, "logit_scale": 1.0}),
    "gpt1": ("openai-gpt", _GPT),
    "gpt2": ("gpt2", {**_GPT, "bos_token_id": 1}),
    "gpt2-wide": ("gpt2", {**_GPT, "n_inner": 48, "activation_function": "gelu", "tie_word_embeddings": False}),
    "neox": ("gpt_neox", {**_SIZES, "intermediate_size": 64}),
    "neox-whole-heads": (
        "gpt_neox",
        {**_SIZES, "intermediate_size": 64, **_rope("default", partial_rotary_factor=1.0)},
    ),
    "neox-sequential": ("gpt_neox", {**_SIZES, "intermediate_size": 64, "use_parallel_residual": False}),
    "falcon-7b": ("falcon", _SIZES),
    "falcon-40b": ("falcon", {**_SIZES, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": (
        "falcon",
        {**_SIZES, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-sequential": ("falcon", {**_SIZES, "multi_query": False, "parallel_attn": False, "bias": True}),
}

NATIVES |= {
    "bigcode": ("gpt_bigcode", {**_GPT, "bos_token_id": 1}),
    "bigcode-all-heads": ("gpt_bigcode", {**_GPT, "bos_token_id": 1, "multi_query": False, "n_inner": 48}),
    "starcoder2": ("starcoder2", _GROUPED),
    "starcoder2-window": (
        "starcoder2",
        {
            **_GROUPED,
            "sliding_window": 5,
            "use_bias": False,
            "tie_word_embeddings": False,
            **_rope("linear", factor=2.0),
        },
    ),
    "phi3": ("phi3", {**_GROUPED, "tie_word_embeddings": True}),
    "phi3-long": (
        "phi3",
        {
            **{**_GROUPED, "original_max_position_embeddings": 16, "sliding_window": 20},
            **_rope("longrope", short_factor=[1.0, 1.5], long_factor=[2.0, 3.0], partial_rotary_factor=0.5),
        },
    ),
    "stablelm": ("stablelm", _GROUPED),
    "stablelm-parallel": (
        "stablelm",
        {**_GROUPED, "use_parallel_residual": True, "use_qkv_bias": True, "tie_word_embeddings": True},
    ),
    "persimmon": ("persimmon", {**_SIZES, "intermediate_size": 48}),
    "persimmon-no-norms": (
        "persimmon",
        {**_SIZES, "intermediate_size": 48, "qk_layernorm": False, **_rope("default", partial_rotary_factor=1.0)},
    ),
    "arcee": ("arcee", {**_GROUPED, "attention_bias": True, "mlp_bias": True}),
    "seed-oss": ("seed_oss", {**_GROUPED, "head_dim": 16, "attention_out_bias": True}),
    "jais2": ("jais2", {**_GROUPED, "head_dim": 16}),
    "glm": ("glm", {**_GROUPED, "head_dim": 16, "tie_word_embeddings": True}),
    "glm-whole-heads": ("glm", {**_GROUPED, "head_dim": 8, **_rope("default", partial_rotary_factor=1.0)}),
    "ernie": ("ernie4_5", {**_GROUPED, "head_dim": 16, "use_bias": True}),
    "exaone": ("exaone", {**_GROUPED, "attention_bias": True}),
    "internlm3": ("internlm3", {**_GROUPED, "head_dim": 16}),
    "iquestcoder": ("iquestcoder", {**_GROUPED, "head_dim": 16, "mlp_bias": True}),
    "helium": ("helium", {**_GROUPED, "head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen2-yarn": (
        "qwen2",
        {**_GROUPED, "tie_word_embeddings": True, **_rope("yarn", factor=4.0, original_max_position_embeddings=32)},
    ),
    "gemma-untied": ("gemma", {**_GROUPED, "head_dim": 16, "attention_bias": True, "tie_word_embeddings": False}),
    "neox-tied": (
        "gpt_neox",
        {**_SIZES, "intermediate_size": 64, "attention_bias": False, "tie_word_embeddings": True},
    ),
    "falcon-untied": ("falcon", {**_SIZES, "tie_word_embeddings": False, "bias": True, "ffn_hidden_size": 48}),
}


_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
NATIVES |= {
    "qwen2-mixed": ("qwen2", {**_GROUPED, **_KINDS, "use_sliding_window": True}),
    "qwen3-mixed": (
        "qwen3",
        {**_GROUPED, "head_dim": 16, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "smollm3": (
        "smollm3",
        {**_GROUPED, "no_rope_layers": [1, 0], "attention_bias": True, "tie_word_embeddings": False},
    ),
    "smollm3-window": (
        "smollm3",
        {**_GROUPED, "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 5, "mlp_bias": True},
    ),
    "llama4": (
        "llama4_text",
        {**_GROUPED, "head_dim": 16, "no_rope_layers": [1, 0], "attention_chunk_size": 5, "intermediate_size_mlp": 48}
        | {"use_qk_norm": False, "attn_temperature_tuning": False, "moe_layers": []},
    ),
    "ministral": ("ministral", {**_GROUPED, **_KINDS, "head_dim": 16}),
    "cwm": ("cwm", {**_GROUPED, **_KINDS, "head_dim": 16}),
    "cohere2": ("cohere2", {**_GROUPED, **_KINDS, "attention_bias": True}),
    "gemma2": (
        "gemma2",
        {**_GROUPED, "head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0}
        | {"final_logit_softcapping": 3.0},
    ),
    "gemma2-uncapped": (
        "gemma2",
        {**_GROUPED, **_KINDS, "head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": None}
        | {"final_logit_softcapping": None, "tie_word_embeddings": False, "attention_bias": True},
    ),
    "gemma3": (
        "gemma3_text",
        {**_GROUPED, **_KINDS, "head_dim": 16, "query_pre_attn_scalar": 24}
        | {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            }
        },
    ),
    "olmo2": ("olmo2", {**_GROUPED, "attention_bias": True}),
    "olmo3": ("olmo3", {**_GROUPED, **_KINDS}),
    "olmo3-long": (
        "olmo3",
        {
            **{**_GROUPED, **_KINDS, "tie_word_embeddings": True},
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
                | {"original_max_position_embeddings": 32},
            },
        },
    ),
}

NATIVES |= {
    "gptj": ("gptj", {**_GPT, "bos_token_id": 1, "n_head": 2, "rotary_dim": 8}),
    "gptj-tied": ("gptj", {**_GPT, "bos_token_id": 1, "rotary_dim": 8, "n_inner": 48, "tie_word_embeddings": True}),
    "phi": ("phi", _GROUPED),
    "phi-norms": ("phi", {**_GROUPED, "qk_layernorm": True, "tie_word_embeddings": True}),
    "gpt-neo": (
        "gpt_neo",
        {**_SIZES, "num_heads": 4, "num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 5},
    ),
    "exaone4": ("exaone4", {**_GROUPED, **_KINDS}),
    "exaone4-no-window": (
        "exaone4",
        {**_GROUPED, "sliding_window": None, "layer_types": ["full_attention"] * 2, "tie_word_embeddings": True},
    ),
    "olmoe": ("olmoe", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}),
    "olmoe-raw": ("olmoe", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False}),
    "glm4": ("glm4", {**_GROUPED, "head_dim": 16, "tie_word_embeddings": True}),
}

_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
NATIVES |= {
    "olmo-hybrid": ("olmo_hybrid", {**_GROUPED, **_HYBRID, "rope_parameters": {"rope_theta": None}}),
    "olmo-hybrid-rope": (
        "olmo_hybrid",
        {**_GROUPED, **_HYBRID, **_rope("default"), "linear_num_key_heads": 2, "linear_key_head_dim": 8}
        | {"linear_conv_kernel_dim": 3, "linear_allow_neg_eigval": False, "linear_value_head_dim": 6},
    ),
}

_LATENT = {
    **{**_GROUPED, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 12},
    **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6},
}
# DeepSeek multiplies its scores by a factor of its own where positions are scaled.
_MSCALE = {"factor": 40.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.7}
NATIVES |= {
    "deepseek-v3": ("deepseek_v3", {**_LATENT, "first_k_dense_replace": 2, **_rope("yarn", **_MSCALE)}),
    "deepseek-v3-plain": (
        "deepseek_v3",
        {**_LATENT, "first_k_dense_replace": 2, "rope_interleave": False, "q_lora_rank": None, "attention_bias": True}
        | {"tie_word_embeddings": True, "v_head_dim": 14},
    ),
    "deepseek-v2": (
        "deepseek_v2",
        {**_LATENT, "first_k_dense_replace": 2, "mlp_bias": True, "attention_bias": True, **_rope("yarn", **_MSCALE)},
    ),
    # With a padding token, the native class sets the embedding of that to 0 whenever it is loaded.
    "youtu": ("youtu", {**_LATENT, "initializer_range": 0.02, "pad_token_id": None}),
    "minicpm3": (
        "minicpm3",
        {**_LATENT, "scale_depth": None, "scale_emb": 12, "dim_model_base": 8, "tie_word_embeddings": True},
    ),
}
_ROUTED = {
    **{**_GROUPED, "n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 24},
    **{"num_experts_per_tok": 3, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2},
    **{"routed_scaling_factor": 1.5, "norm_topk_prob": True},
}
NATIVES |= {
    "qwen3-moe-mixed": ("qwen3_moe", {**_GROUPED, **_EXPERTS, "norm_topk_prob": False, "decoder_sparse_step": 2}),
    "qwen2-moe": (
        "qwen2_moe",
        {**_GROUPED, **_EXPERTS, "norm_topk_prob": False, "shared_expert_intermediate_size": 40},
    ),
    "qwen2-moe-mixed": (
        "qwen2_moe",
        {**_GROUPED, **_EXPERTS, **_KINDS, "use_sliding_window": True, "shared_expert_intermediate_size": 40}
        | {"mlp_only_layers": [0], "qkv_bias": False},
    ),
    "glm4-moe": ("glm4_moe", {**_ROUTED, "use_qk_norm": True, "attention_bias": True, "head_dim": 16}),
    "glm4-moe-plain": (
        "glm4_moe",
        {**_ROUTED, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    ),
    "dots1": ("dots1", {**_ROUTED, **_KINDS, "head_dim": 16, "n_shared_experts": 2}),
}

_ROUTED_LATENT = {**_ROUTED, **_LATENT}
NATIVES |= {
    "deepseek-v3-experts": ("deepseek_v3", {**_ROUTED_LATENT, **_rope("yarn", **_MSCALE)}),
    "deepseek-v2-experts": ("deepseek_v2", {**_ROUTED_LATENT, "topk_method": "group_limited_greedy"}),
    "glm4-moe-lite": ("glm4_moe_lite", {**_ROUTED_LATENT, "mlp_layer_types": ["dense", "sparse"]}),
}

# One dictionary where the class wants one by type of layer, which it then keeps beside its own; and a rotation over
# whole heads that leaves a part of them as it is.
_PROPORTIONAL = {**_GROUPED, "head_dim": 16, **_rope("proportional", partial_rotary_factor=0.25)}
NATIVES |= {
    "gemma3-flat": ("gemma3_text", {**_GROUPED, **_KINDS, "head_dim": 16, **_rope("linear", factor=4.0)}),
    "olmo3-flat": ("olmo3", {**_GROUPED, **_KINDS, **_rope("default")}),
    "glm-proportional": ("glm", _PROPORTIONAL),
    "glm4-proportional": ("glm4", _PROPORTIONAL),
}

# One of each architecture.
ONE_OF_EACH = list({model_type: name for name, (model_type, _) in reversed(NATIVES.items())}.values())


def build(name, auto_class=transformers.AutoModelForCausalLM, **more):
    """The native model, every parameter away from its initial value; `more` are fields of its config."""
    model_type, values = NATIVES[name]
    torch.manual_seed(0)
    model = auto_class.from_config(transformers.AutoConfig.for_model(model_type, **values, **more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.1)
    return model
