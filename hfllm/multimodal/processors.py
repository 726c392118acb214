"""Processors that write a conversation with pictures as tokens and pixels, for models that `with_vision` makes."""

from typing import TYPE_CHECKING

from hfllm.data.tokenizer import text_of_macro
from hfllm.errors import InputError
from hfllm.models.family.configuration_hfllm_vision import configured_size, picture_size, vectors_before_patches

if TYPE_CHECKING:
    from transformers import (
        BaseImageProcessor,
        LlavaProcessor,
        PreTrainedConfig,
        PreTrainedTokenizerBase,
        ProcessorMixin,
    )

IMAGE_TOKEN = "<|image|>"
# Of the towers whose published weights were trained with colors of their own mean and spread.
IMAGE_PROCESSORS = {
    "clip_vision_model": "CLIPImageProcessorPil",
    "siglip_vision_model": "SiglipImageProcessorPil",
    "dinov2": "BitImageProcessorPil",
}


def vision_processor(
    tokenizer: "PreTrainedTokenizerBase",
    vision_config: "PreTrainedConfig",
    *,
    image_token: str = IMAGE_TOKEN,
    vision_feature_select_strategy: str | None = None,
    chat_template: str | None = None,
    image_processor: "BaseImageProcessor | None" = None,
) -> "LlavaProcessor":
    """Return the processor of a model with pictures: texts and pictures in, tokens and pixels out.

    It writes as many image tokens for a picture as the tower gives vectors of it. Its pictures are resized to the
    tower's size, whatever their own, by PIL; torchvision is not needed.

    Args:
        tokenizer: of the text model. The image token is added to it if it has none.
        vision_config: of the tower.
        image_token: a special token.
        vision_feature_select_strategy: as in `with_vision`.
        chat_template: one that writes `image_token` for a part `{"type": "image"}`; `None` takes the tokenizer's, and
            teaches it that if it is ours.
        image_processor: instead of the one that fits the tower.

    Returns:
        A processor that `AutoProcessor` loads again.

    Raises:
        InputError: for a tower without a size and a patch, a tokenizer whose chat template does not take pictures, or
            an image processor of another size.
    """
    from transformers import LlavaProcessor

    patch, size = getattr(vision_config, "patch_size", None), configured_size(vision_config)
    if not isinstance(patch, int) or size is None:
        kind = getattr(vision_config, "model_type", type(vision_config).__name__)
        raise InputError(f"the config of {kind!r} has no image_size and patch_size: it is no tower for pictures")
    _add_special(tokenizer, image_token)
    template = chat_template or picture_template(tokenizer, image_token)
    before = vectors_before_patches(vision_config)
    processor = LlavaProcessor(
        image_processor or _image_processor(vision_config.model_type, size),
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy=vision_feature_select_strategy or ("default" if before else "full"),
        chat_template=template,
        image_token=image_token,
        num_additional_image_tokens=before,
    )
    if image_processor is not None:
        check_processor(processor, vision_config)
    return processor


def picture_template(tokenizer: "PreTrainedTokenizerBase", image_token: str = IMAGE_TOKEN) -> str:
    """Return a tokenizer's chat template, with `image_token` for each part `{"type": "image"}` of a message.

    Templates of this package, which refuse pictures, are taught that; others must know it.

    Raises:
        InputError: for a template that writes no picture, or none.
    """
    template, macro = tokenizer.chat_template or "", text_of_macro()
    refuses = "{%- if part is not mapping or part['type'] != 'text'"
    if macro in template:
        shows = f"{{%- if part is mapping and part['type'] == 'image' -%}}{{{{- '{image_token}' -}}}}{{%- el"
        taught = macro.replace(refuses, shows + refuses.removeprefix("{%- "))
        taught = taught.replace(
            "{{- part['text'] -}}", "{%- if part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
        )
        template = template.replace(macro, taught)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
    try:
        text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False) if template else ""
    # It may refuse anything in its own words.
    except Exception as error:
        text = str(error)
    if image_token not in text or "a" not in text:
        raise InputError(
            f"the tokenizer's chat template does not write {image_token} for a picture: give chat_template=, one that "
            "does so for {'type': 'image'}"
        )
    return template


def check_processor(processor: "ProcessorMixin", vision_config: "PreTrainedConfig") -> None:
    """Refuse a processor that makes pictures of another size than a tower takes, or counts its vectors otherwise.

    Args:
        processor: of Llava's layout.
        vision_config: of the tower.

    Raises:
        InputError: with both values.
    """
    patch = getattr(processor, "patch_size", None)
    if patch != vision_config.patch_size:
        raise InputError(f"the processor has patch_size={patch} and the vision tower {vision_config.patch_size}")
    made, size = made_size(processor.image_processor), configured_size(vision_config)
    if made is not None and size is not None and made != size:
        raise _of_another_size(made, size)
    before, counted = vectors_before_patches(vision_config), processor.num_additional_image_tokens
    if before != counted:
        raise InputError(
            f"the processor has num_additional_image_tokens={counted} and the vision tower {before} vectors before "
            "those of patches"
        )


def check_fit(processor: "ProcessorMixin", config: "PreTrainedConfig") -> None:
    """Refuse a processor of Llava's layout whose pictures, or whose image tokens, are not those that a model takes.

    Others, and towers whose vectors are not known, are left to the model.

    Args:
        config: of the model.

    Raises:
        InputError: with both values.
    """
    tower = getattr(config, "vision_config", None)
    if config.model_type not in ("hfllm_vision", "llava") or type(processor).__name__ != "LlavaProcessor":
        return
    size, made = picture_size(tower), made_size(processor.image_processor)
    if size is not None and made is not None and made != size:
        raise _of_another_size(made, size)
    if tower.model_type not in (*IMAGE_PROCESSORS, "vit"):
        return
    if processor.patch_size != tower.patch_size:
        raise InputError(
            f"the processor has patch_size={processor.patch_size} and the vision tower {tower.patch_size}"
        )
    # Of each `"default"` leaves out one.
    more = vectors_before_patches(tower) - (config.vision_feature_select_strategy == "default")
    counted = processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
    if counted != more:
        raise InputError(
            f"the processor writes {counted:+} image tokens beside those of patches and the model has {more:+} "
            "vectors (vision_feature_select_strategy, num_additional_image_tokens)"
        )


def check_template(processor: "ProcessorMixin", name: str) -> None:
    """Refuse a processor without a chat template that writes a question about a picture.

    Args:
        name: of its model.

    Raises:
        InputError: naming the model.
    """
    from PIL import Image

    whose = f"model {name!r}: its processor"
    if not processor.chat_template:
        raise InputError(
            f"{whose} has no chat template, by which conversations with pictures are written: save it with one, as "
            "hfllm.vision_processor makes it"
        )
    shown = {"type": "image", "image": Image.new("RGB", (64, 64))}
    asked = [{"role": "user", "content": [shown, {"type": "text", "text": "a"}]}]
    try:
        processor.apply_chat_template(asked, tokenize=True, return_dict=True, add_generation_prompt=True)
    # A template may refuse anything in its own words.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{whose} cannot write a question about a picture by its chat template: {reason}") from None


def _of_another_size(made: tuple[int, int], size: tuple[int, int]) -> InputError:
    return InputError(
        f"the processor makes pictures of {made[0]}x{made[1]} pixels and the vision tower takes {size[0]}x{size[1]} "
        "(image_size)"
    )


def made_size(image_processor: "BaseImageProcessor") -> tuple[int, int] | None:
    """Return height and width of the pictures that an image processor makes, or `None` if they vary."""
    is_cropped = getattr(image_processor, "do_center_crop", False)
    size = getattr(image_processor, "crop_size" if is_cropped else "size", None)
    height, width = (getattr(size, name, None) for name in ("height", "width"))
    return None if height is None or width is None else (height, width)


def _image_processor(model_type: str, size: tuple[int, int]) -> "BaseImageProcessor":
    import transformers

    kind = getattr(transformers, IMAGE_PROCESSORS.get(model_type, "ViTImageProcessorPil"))
    exact = {"height": size[0], "width": size[1]}
    return kind(size=exact, do_center_crop=False, do_convert_rgb=True)


def _add_special(tokenizer: "PreTrainedTokenizerBase", token: str) -> None:
    from transformers import AddedToken

    if token not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
