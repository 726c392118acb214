"""Configuration of a vision-language model with an hfllm decoder: Llava's, with an `HfllmConfig` as its text."""

import os

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.llava.configuration_llava import LlavaConfig

from .configuration_hfllm import HfllmConfig

AUTO_MAP = {
    "AutoConfig": "configuration_hfllm_vision.HfllmVisionConfig",
    "AutoModel": "modeling_hfllm_vision.HfllmVisionModel",
    "AutoModelForImageTextToText": "modeling_hfllm_vision.HfllmForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_hfllm_vision.HfllmForConditionalGeneration",
    "AutoModelForSequenceClassification": "modeling_hfllm_vision.HfllmVisionForSequenceClassification",
}


@strict
class HfllmVisionConfig(LlavaConfig):
    """Architecture of an hfllm decoder with a vision tower and a projector, as in Llava (arXiv:2310.03744).

    Args:
        vision_config: of the tower, one of transformers' (SigLIP, CLIP, DINOv2, ViT ...).
        text_config: an `HfllmConfig` of a causal model.
        image_token_index: the token in a prompt for one vector of an image; also `image_token_id`.
        vision_feature_layer: the layer of the tower to read, or several, with their vectors joined; negative
            numbers count from the last, number -1.
        vision_feature_select_strategy: `"full"` takes all vectors of this layer, `"default"` all but the first, which
            in CLIP and ViT represents the whole image.
        projector_hidden_act: activation between the projector's two layers.
        multimodal_projector_bias: whether these have biases.

    Raises:
        StrictDataclassError: (of huggingface_hub) when a value or a combination of values is invalid; the message
            names the field.
    """

    model_type = "hfllm_vision"
    sub_configs_defaults = {**LlavaConfig.sub_configs_defaults, "text_config": SubConfigSpec(config_class=HfllmConfig)}

    def __post_init__(self, **kwargs):
        text_config = self.text_config
        kind = (
            text_config.get("model_type", "hfllm")
            if isinstance(text_config, dict)
            else getattr(text_config, "model_type", "hfllm")
        )
        if kind != "hfllm":
            # Its fields would be read as ours.
            raise ValueError(f"text_config must be that of an hfllm model, got model_type={kind!r}")
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: object) -> None:
        """Save as the base class does; if code is saved with the weights, `auto_map` names all classes."""
        if self._auto_class is not None:
            self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, **kwargs)

    def validate_architecture(self):
        """Refuse invalid fields and combinations. `@strict` calls it once the fields are set."""
        text, vision = self.text_config, self.vision_config
        if not text.is_causal:
            raise ValueError("text_config must have is_causal=True, got False")
        if not 0 <= self.image_token_index < text.vocab_size:
            raise ValueError(f"image_token_index={self.image_token_index} must be a token below {text.vocab_size}")
        for field in ("hidden_size", "num_hidden_layers", "patch_size"):
            if not isinstance(getattr(vision, field, None), (int, list, tuple)):
                raise ValueError(f"vision_config of model_type={vision.model_type!r} has no {field}: it is no tower")
        chosen, last = self.vision_feature_layer, vision.num_hidden_layers
        for layer in chosen if isinstance(chosen, list) else [chosen]:
            if not -last - 1 <= layer <= last:
                raise ValueError(
                    f"vision_feature_layer={layer} must lie from {-last - 1} to {last}, the tower's layers"
                )
        if isinstance(chosen, list) and not chosen:
            raise ValueError("vision_feature_layer=[] must name a layer")


# Towers with positions for images of any size.
FLEXIBLE = ("pixtral", "dinov2", "dinov2_with_registers", "dinov3_vit", "siglip2_vision_model")
# Towers with vectors before the ones of patches: one of the whole image, and registers.
WITH_CLASS_VECTOR = ("clip_vision_model", "dinov2", "dinov2_with_registers", "dinov3_vit", "vit", "deit")


def picture_size(config: PreTrainedConfig) -> tuple[int, int] | None:
    """Return height and width of the images for a tower, or `None` if it takes others too.

    Args:
        config: of the tower.
    """
    return None if config.model_type in FLEXIBLE else configured_size(config)


def configured_size(config: PreTrainedConfig) -> tuple[int, int] | None:
    """Return height and width of images in a tower's config (`image_size`), or `None` if it names none."""
    size = getattr(config, "image_size", None)
    return size if size is None else (size, size) if isinstance(size, int) else (size[0], size[1])


def vectors_before_patches(config: PreTrainedConfig) -> int:
    """Return the number of vectors of a tower before the ones of patches."""
    if config.model_type not in WITH_CLASS_VECTOR:
        return 0
    return 1 + (getattr(config, "num_register_tokens", None) or 0)


__all__ = ["HfllmVisionConfig"]
