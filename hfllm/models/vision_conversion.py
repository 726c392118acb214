"""Convert models with a vision tower between Llava's class around a native decoder and ours around an hfllm one.

The tower and the projector are the same modules in both; the decoder and the head are converted like a text model.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hfllm.errors import InputError
from hfllm.models.configuration_hfllm_vision import HfllmVisionConfig
from hfllm.models.layer_types_hfllm import longrope_limits
from hfllm.models.native_families import config_from_native, config_to_native

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlavaConfig, PreTrainedConfig

TRUNK, DECODER = "model.", "model.language_model."
# What Llava's class does not compute of a text model's head or embeddings, with the values that change nothing.
LEFT_OUT = {"logit_scale": 1, "final_logit_softcapping": None, "lm_head_bias": False, "embedding_multiplier": 1}
# Of the composed configs, beside their parts.
SHARED = (
    *("image_token_index", "image_seq_length", "projector_hidden_act", "vision_feature_select_strategy"),
    *("vision_feature_layer", "multimodal_projector_bias", "tie_word_embeddings"),
)


def vision_config_from_native(native: "LlavaConfig") -> HfllmVisionConfig:
    """Return our config of a model of Llava's class.

    Raises:
        InputError: when its text model cannot be converted; the field is named.
    """
    shared = {name: getattr(native, name) for name in SHARED}
    text = config_from_native(native.text_config)
    _refuse_left_out(text)
    return HfllmVisionConfig(vision_config=native.vision_config, text_config=text, **shared)


def vision_config_to_native(config: HfllmVisionConfig, native_type: str | None = None) -> "LlavaConfig":
    """Return Llava's config of our model, with a text model of `native_type` or of the first family that can be it.

    Raises:
        InputError: when none can, or Llava's class leaves out what its head does; the field is named.
    """
    from transformers import LlavaConfig

    _refuse_left_out(config.text_config)
    shared = {name: getattr(config, name) for name in SHARED}
    text = config_to_native(config.text_config, native_type)
    refuse_other_table(text, "Llava's class")
    return LlavaConfig(vision_config=config.vision_config, text_config=text, **shared)


def refuse_other_table(config: "PreTrainedConfig", layout: str) -> None:
    """Refuse a native text model whose head is tied to embeddings that composed classes do not find.

    They tie the head to `embed_tokens`, whatever the text model calls its table, and fail if that is `wte`.

    Args:
        config: of the text model.
        layout: for the message.

    Raises:
        InputError: naming the model type.
    """
    from transformers import AutoModelForCausalLM

    if not config.tie_word_embeddings or type(config) not in AutoModelForCausalLM._model_mapping:
        return
    tables = (AutoModelForCausalLM._model_mapping[type(config)]._tied_weights_keys or {}).values()
    if not all(name.endswith("embed_tokens.weight") for name in tables):
        raise InputError(
            f"{layout} cannot hold a text model of type {config.model_type!r} with tie_word_embeddings=True: it ties "
            "the head to a module named embed_tokens"
        )


def split_state(state: Mapping[str, "Tensor"], prefix: str) -> tuple[dict[str, "Tensor"], dict[str, "Tensor"]]:
    """Return the tensors of tower and projector, and those of the text model, named as in one of its own.

    Args:
        prefix: what the text model calls its trunk.
    """
    media = {name: tensor for name, tensor in state.items() if name.startswith(TRUNK) and not name.startswith(DECODER)}
    text = {name: tensor for name, tensor in state.items() if name not in media}
    return media, {name.replace(DECODER, f"{prefix}.", 1): tensor for name, tensor in text.items()}


def joined_state(media: Mapping[str, "Tensor"], text: Mapping[str, "Tensor"], prefix: str) -> dict[str, "Tensor"]:
    """Return the inverse of `split_state`."""
    begin = f"{prefix}."
    moved = {
        f"{DECODER}{name.removeprefix(begin)}" if name.startswith(begin) else name: tensor
        for name, tensor in text.items()
    }
    return {**media, **moved}


def _refuse_left_out(config: "PreTrainedConfig") -> None:
    for field, plain in LEFT_OUT.items():
        if (value := getattr(config, field)) != plain:
            raise InputError(f"Llava's class leaves out {field}={value} of its text model")
    if longrope_limits(config):
        raise InputError("Llava's class generates with keys of other factors where rope_type='longrope' changes them")
