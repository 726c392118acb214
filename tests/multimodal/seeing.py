"""Tiny models that see, for the tests of this folder. Their text model has the tests' tokenizer."""

import torch
import transformers

import hfllm

IMAGE, PATCHES = 300, 16
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SIZES, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
TOWERS = {
    "siglip": lambda: transformers.SiglipVisionConfig(**WIDE),
    "clip": lambda: transformers.CLIPVisionConfig(**WIDE),
    "vit": lambda: transformers.ViTConfig(**WIDE),
    "dinov2": lambda: transformers.Dinov2Config(**SIZES, image_size=32, patch_size=8),
}
# The text models that the family has, in the ways that matter to what is around them.
TEXTS = {
    "dense": {},
    "experts": {"num_local_experts": 4},
    "gpt2": {
        "norm_type": "layernorm",
        "mlp_type": "plain",
        "position_embedding_type": "learned",
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "sliding": {"sliding_window": 8},
}
# Those whose head or embeddings do something of their own.
HEADS = {
    "scaled": {"logit_scale": 0.5, "final_logit_softcapping": 8.0, "attn_logit_softcapping": 20.0},
    "biased": {"lm_head_bias": True, "embedding_multiplier": 4.0},
    "chunked": {"loss_chunk_size": 5, "num_local_experts": 4, "logit_scale": 2.0},
}


def prompts(batch: int = 2, images: int = 1, words: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return rows with so many pictures, one right after the other."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, IMAGE, (batch, images * PATCHES + words), generator=generator)
    ids[:, 2 : 2 + images * PATCHES] = IMAGE
    pixels = torch.randn(batch * images, 3, 32, 32, generator=generator)
    return {"input_ids": ids} | ({"pixel_values": pixels} if images else {})


def seeing(
    text: transformers.PreTrainedModel, tower: str = "siglip", **options: object
) -> transformers.PreTrainedModel:
    """Return a text model with eyes, whose projector's vectors are as long as embeddings."""
    torch.manual_seed(1)
    model = hfllm.with_vision(text, TOWERS[tower](), image_token_id=IMAGE, **options)
    for name, weight in model.named_parameters():
        if "projector" in name and weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.3)
    return model
