"""Transformers' composed classes on tiny sizes, each with what it reads: `LAYOUTS[name](text)` for a text model.

A case is (config class, tower's config, more fields, inputs). The text model's vocabulary has at least 300 tokens, and
the token of pictures or sounds is 5.
"""

from collections.abc import Callable

import torch
import transformers
from transformers.models.granite_speech.configuration_granite_speech import GraniteSpeechEncoderConfig
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.voxtral.configuration_voxtral import VoxtralEncoderConfig

import hfllm

TOKEN = 5
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
WIDE = {**SIZES, "intermediate_size": 32, "image_size": 16, "patch_size": 4}
EARS = {"num_mel_bins": 8, "max_source_positions": 20}


def ids(places: int) -> torch.Tensor:
    rows = torch.randint(10, 300, (2, places + 8), generator=torch.Generator().manual_seed(0))
    rows[:, 2 : 2 + places] = TOKEN
    return rows


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def seen(places: int, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids(places), "pixel_values": pixels(2, 3, 16, 16), **inputs}


SQUARE = torch.tensor([[16, 16]] * 2)
SIGLIP = transformers.SiglipVisionConfig(**WIDE)
LLAVA = {"vision_feature_layer": -1}
ATTENDED = torch.ones(2, 40, dtype=torch.long)

# name: (config class or None for the default, tower, fields, inputs)
SEEING = {
    "llava-siglip": (None, SIGLIP, {}, seen(16)),
    "llava-dinov2": (None, transformers.Dinov2Config(**SIZES, image_size=16, patch_size=4), {}, seen(16)),
    "llava-vit": (None, transformers.ViTConfig(**WIDE), {}, seen(16)),
    "idefics3": (
        transformers.Idefics3Config,
        Idefics3VisionConfig(**WIDE),
        {"scale_factor": 2, "pad_token_id": 0},
        seen(4, pixel_values=pixels(2, 1, 3, 16, 16)),
    ),
    "smolvlm": (
        transformers.SmolVLMConfig,
        SmolVLMVisionConfig(**WIDE),
        {"scale_factor": 2, "pad_token_id": 0},
        seen(4, pixel_values=pixels(2, 1, 3, 16, 16)),
    ),
    "mistral3": (
        transformers.Mistral3Config,
        transformers.PixtralVisionConfig(**WIDE, head_dim=8),
        {"spatial_merge_size": 2, "vision_feature_layer": -1},
        seen(4, image_sizes=SQUARE),
    ),
    "lfm2-vl": (
        transformers.Lfm2VlConfig,
        transformers.Siglip2VisionConfig(
            **SIZES, intermediate_size=32, patch_size=4, num_patches=16, vision_use_head=False
        ),
        {"downsample_factor": 2, "projector_hidden_size": 32},
        seen(
            4,
            pixel_values=pixels(2, 16, 48),
            spatial_shapes=torch.tensor([[4, 4]] * 2),
            pixel_attention_mask=torch.ones(2, 16, dtype=torch.long),
        ),
    ),
    "internvl": (
        transformers.InternVLConfig,
        InternVLVisionConfig(**{**WIDE, "image_size": [16, 16], "patch_size": [4, 4]}),
        {"downsample_ratio": 0.5},
        seen(4),
    ),
    "llava-onevision": (
        transformers.LlavaOnevisionConfig,
        SIGLIP,
        {"image_grid_pinpoints": [[16, 16]]},
        seen(16 + 16 + 4, pixel_values=pixels(2, 2, 3, 16, 16), image_sizes=SQUARE),
    ),
    "aya-vision": (transformers.AyaVisionConfig, SIGLIP, {"downsample_factor": 2}, seen(4)),
}
HEARING = {
    "voxtral": (
        transformers.VoxtralConfig,
        VoxtralEncoderConfig(**SIZES, **EARS, intermediate_size=64, vocab_size=10),
        {},
        {"input_ids": ids(5), "input_features": pixels(2, 8, 40)},
    ),
    "qwen2-audio": (
        None,
        transformers.Qwen2AudioEncoderConfig(
            d_model=16, encoder_ffn_dim=32, encoder_layers=1, encoder_attention_heads=2, **EARS
        ),
        {},
        {"input_ids": ids(10), "input_features": pixels(2, 8, 40), "feature_attention_mask": ATTENDED},
    ),
    "granite-speech": (
        transformers.GraniteSpeechConfig,
        GraniteSpeechEncoderConfig(
            input_dim=8,
            num_layers=1,
            hidden_dim=16,
            num_heads=2,
            dim_head=8,
            output_dim=10,
            context_size=20,
            max_pos_emb=32,
        ),
        {
            "projector_config": transformers.Blip2QFormerConfig(
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                encoder_hidden_size=16,
            ),
            "downsample_rate": 5,
            "window_size": 15,
            "has_lora_adapter": False,
        },
        {
            "input_ids": ids(9),
            "input_features": pixels(2, 45, 8),
            "input_features_mask": torch.ones(2, 9, dtype=torch.bool),
        },
    ),
}


def compose(name: str, text: transformers.PreTrainedModel) -> tuple[transformers.PreTrainedModel, dict]:
    """Return a text model in a layout, and inputs."""
    torch.manual_seed(0)
    config_class, tower, fields, inputs = (SEEING | HEARING)[name]
    make: Callable = hfllm.with_vision if name in SEEING else hfllm.with_audio
    token = {"image_token_id": TOKEN} if name in SEEING else {"audio_token_id": TOKEN}
    return make(text, tower, config_class=config_class, **token, **fields), dict(inputs)
