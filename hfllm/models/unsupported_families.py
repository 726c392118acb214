"""What architectures that do not convert have and `HfllmConfig` has not, to say why they are refused."""

# One thing that is missing, where there may be more. Read from the modeling code of transformers 5.24.
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


def missing_concept(model_type: str) -> str | None:
    """Return what a known architecture has and `HfllmConfig` has not, as a noun phrase; `None` for others."""
    return _BY_TYPE.get(model_type)
