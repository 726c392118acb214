"""Give a text model image or audio input, by a tower and a projector before its decoder, and freeze some of these.

The classes are transformers' own, with the text model inside. A model of ours gets `HfllmForConditionalGeneration`,
Llava's class with our losses; the other layouts compute logits and losses by themselves, so a text model with a head
unsupported by them is refused there.
"""

import warnings
from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from torch import nn

from hfllm.errors import InputError, one_line, refuse, refuse_if
from hfllm.models.conversion.convert import refuse_other_table
from hfllm.models.conversion.tensor_layouts import with_prefix
from hfllm.models.devices import built_whole
from hfllm.models.family.configuration_hfllm import HfllmConfig
from hfllm.models.family.configuration_hfllm_vision import HfllmVisionConfig, configured_size, vectors_before_patches
from hfllm.models.loading.saved import refuse_quantized

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

# Computed only by our own composed class: fields of the head with their neutral values.
OF_HEAD = {"logit_scale": 1, "final_logit_softcapping": None, "lm_head_bias": False}
# The same, only in training.
OF_TRAINING = {"router_aux_loss_coef": 0, "loss_chunk_size": None}


def with_vision(
    model: "PreTrainedModel",
    vision: "PreTrainedConfig | PreTrainedModel",
    *,
    image_token_id: int,
    vision_feature_layer: int | list[int] = -1,
    vision_feature_select_strategy: str | None = None,
    projector_hidden_act: str = "gelu",
    config_class: "type[PreTrainedConfig] | None" = None,
    **fields: object,
) -> "PreTrainedModel":
    """Return a vision-language model: a vision tower, a new projector, and a copy of a causal language model.

    Text without images it continues as the language model does, to the bit. If the image token is new to the language
    model, its embeddings are extended, and `generate` never writes the image token.

    Args:
        model: an hfllm model, or a causal language model of transformers. It is not changed.
        vision: a trained tower, whose weights are copied, or the config of a new one.
        image_token_id: the token in prompts for every vector of an image: `processor.image_token_id`.
        vision_feature_layer: the layer read from the tower, -1 the last; -2 is usual for CLIP.
        vision_feature_select_strategy: `"full"` takes all of its vectors, `"default"` all but the first; `None` drops
            the first where it stands for the whole image, as in CLIP, ViT and DINOv2.
        projector_hidden_act: activation between the projector's two layers.
        config_class: another layout of transformers, such as `Idefics3Config`; `None` means Llava's. The three
            arguments above are then not used.
        fields: more fields of this config.

    Returns:
        An `HfllmForConditionalGeneration` for an hfllm model and Llava's layout, else transformers' class; in
        evaluation mode, and in the precision of `model`.

    Raises:
        InputError: for a model other than a causal language model, a quantized or wrapped one, or one with a head
            unsupported by the layout; and for fields refused by the config.
    """
    text, tower = _checked_text(model), _checked_tower(vision)
    is_ours = isinstance(text, HfllmConfig)
    if config_class is None:
        from transformers import LlavaConfig

        config_class = HfllmVisionConfig if is_ours else LlavaConfig
        strategy = vision_feature_select_strategy or ("default" if vectors_before_patches(tower) else "full")
        fields = {
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": strategy,
            "projector_hidden_act": projector_hidden_act,
            **fields,
        }
    return _composed(model, vision, "vision_config", config_class, "image_token", image_token_id, fields)


def with_audio(
    model: "PreTrainedModel",
    audio: "PreTrainedConfig | PreTrainedModel",
    *,
    audio_token_id: int,
    config_class: "type[PreTrainedConfig] | None" = None,
    **fields: object,
) -> "PreTrainedModel":
    """Return an audio-language model: an audio tower, a new projector, and a copy of a causal language model.

    Args:
        model: an hfllm model, or a causal language model of transformers. It is not changed.
        audio: a trained tower, whose weights are copied, or the config of a new one.
        audio_token_id: the token in prompts for every vector of a sound.
        config_class: the layout; `None` means `Qwen2AudioConfig`.
        fields: more fields of this config.
    """
    from transformers import Qwen2AudioConfig

    _checked_text(model)
    _checked_tower(audio)
    layout = config_class or Qwen2AudioConfig
    part = "encoder_config" if "encoder_config" in layout.sub_configs else "audio_config"
    return _composed(model, audio, part, layout, "audio_token", audio_token_id, fields)


def idle_media_parameters(model: "PreTrainedModel", **inputs: "Tensor") -> list[str]:
    """Return the names of tower and projector weights without effect on the decoder's input: they cannot learn.

    They are in towers for uses of their own, such as the pooling head of SigLIP, or come after the layer in use.
    Freeze them (`requires_grad_(False)`) before training in several processes, which wait for every gradient. Found
    by one pass with gradients over a gray image.

    Args:
        inputs: arguments of `model.get_image_features` (or `get_audio_features`); none for a vision model with a tower
            of one size.
    """
    import torch

    features, inputs = _features_of(model, inputs)
    media = dict(_media_parameters(model))
    before = {name: weight.requires_grad for name, weight in media.items()}
    try:
        for weight in media.values():
            weight.requires_grad_(weight.is_floating_point())
        with torch.enable_grad():
            result = features(**inputs)
            pooled = getattr(result, "pooler_output", result)
            total = sum(each.float().sum() for each in ([pooled] if isinstance(pooled, torch.Tensor) else pooled))
        names = [name for name, weight in media.items() if weight.requires_grad]
        slopes = torch.autograd.grad(total, [media[name] for name in names], allow_unused=True)
    finally:
        for name, weight in media.items():
            weight.requires_grad_(before[name])
    return [name for name, slope in zip(names, slopes, strict=True) if slope is None]


def _features_of(model: "PreTrainedModel", inputs: dict[str, "Tensor"]) -> tuple[Any, dict[str, "Tensor"]]:
    import torch

    if hasattr(model, "get_audio_features") and not hasattr(model, "get_image_features"):
        return model.get_audio_features, inputs
    refuse_if(not hasattr(model, "get_image_features"), f"a {type(model).__name__} sees and hears nothing")
    if not inputs:
        tower = model.config.vision_config
        height, width = configured_size(tower) or (1, 1)
        pixels = torch.zeros(1, getattr(tower, "num_channels", 3), height, width, device=model.device)
        inputs = {"pixel_values": pixels.to(model.dtype)}
    return model.get_image_features, inputs


def _media_parameters(model: "PreTrainedModel") -> "list[tuple[str, nn.Parameter]]":
    """Return names and weights of all but the text model."""
    text = {id(weight) for weight in model.get_decoder().parameters()}
    head = model.get_output_embeddings()
    text |= set() if head is None else {id(weight) for weight in head.parameters()}
    return [(name, weight) for name, weight in model.named_parameters() if id(weight) not in text]


def _checked_text(model: "PreTrainedModel") -> "PreTrainedConfig":
    """Return the config of a model usable as the decoder of another."""
    from transformers import PreTrainedModel

    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"expected a causal language model, got a {name}; adapters must be merged into it first")
    if not name.endswith(("ForCausalLM", "LMHeadModel")):
        raise InputError(f"expected a causal language model (...ForCausalLM), got a {name}")
    refuse_quantized(model.config, model.config.name_or_path or name)
    return model.config


def _checked_tower(tower: object) -> "PreTrainedConfig":
    """Return the config of a tower."""
    from transformers import PreTrainedConfig, PreTrainedModel

    config = tower.config if isinstance(tower, PreTrainedModel) else tower
    if not isinstance(config, PreTrainedConfig):
        raise InputError(f"expected a tower, a model of transformers or its config, got {str(tower)[:80]!r}")
    return config


def _composed(
    model: "PreTrainedModel",
    tower: "PreTrainedConfig | PreTrainedModel",
    part: str,
    config_class: "type[PreTrainedConfig]",
    token: str,
    token_id: int,
    fields: dict[str, object],
) -> "PreTrainedModel":
    import torch
    from huggingface_hub.errors import StrictDataclassError

    text = deepcopy(model.config)
    tower_config = deepcopy(getattr(tower, "config", tower))
    text.vocab_size = max(text.vocab_size, token_id + 1)
    token_id_name = config_class.attribute_map.get(f"{token}_id", f"{token}_id")
    try:
        config = config_class(**{part: tower_config, "text_config": text, token_id_name: token_id, **fields})
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        reason = one_line(error, None).rpartition("ValueError: ")[2]
        raise InputError(f"{config_class.__name__}: {reason}") from error
    model_class = _class_of(config)
    if not isinstance(config, HfllmVisionConfig):
        _refuse_lost_head(model.config, model_class.__name__)
        refuse_other_table(model.config, model_class.__name__)
    with built_whole():
        with torch.device("meta"):
            plan = model_class(config)
        state = _text_state(model, plan, rows=text.vocab_size)
        if isinstance(tower, torch.nn.Module):
            state |= with_prefix(tower.state_dict(), _module_name(type(tower), plan))
        composite = _loaded(model_class, config, state, model.dtype)
    composite.generation_config = deepcopy(model.generation_config)
    # It stands for features of an image or a sound: written by the model, it would stand for nothing.
    composite.generation_config.suppress_tokens = sorted(
        {*(composite.generation_config.suppress_tokens or ()), token_id}
    )
    return composite


def _class_of(config: "PreTrainedConfig") -> "type[PreTrainedModel]":
    from transformers import AutoModelForMultimodalLM

    if type(config) not in AutoModelForMultimodalLM._model_mapping:
        raise InputError(f"{type(config).__name__} is no layout of a model that sees or hears and writes text")
    return AutoModelForMultimodalLM._model_mapping[type(config)]


def _refuse_lost_head(config: "PreTrainedConfig", layout: str) -> None:
    """Refuse a head unsupported by a layout of transformers, and warn of losses left out by it."""
    if not isinstance(config, HfllmConfig):
        return
    for field, plain in OF_HEAD.items():
        if (value := getattr(config, field)) != plain:
            raise InputError(f"{layout} leaves out {field}={value}: its text model must have {field}={plain}")
    for field, plain in OF_TRAINING.items():
        if value := getattr(config, field):
            warnings.warn(f"{layout} trains without {field}={value}, as if it were {plain}", stacklevel=4)


def _text_state(model: "PreTrainedModel", plan: "PreTrainedModel", rows: int) -> "dict[str, Tensor]":
    """Return the language model's tensors by their names in `plan`, with `rows` rows of embeddings and of the head."""
    trunk, head = model.base_model, model.get_output_embeddings()
    tables = {id(each.weight) for each in (model.get_input_embeddings(), head)}
    if getattr(head, "bias", None) is not None:
        tables.add(id(head.bias))
    state_dict = model.state_dict(keep_vars=True)
    state = {name: _extended(each, rows) if id(each) in tables else each.detach() for name, each in state_dict.items()}
    whole = _module_name(type(model), plan, is_needed=False)
    if whole is not None:
        return with_prefix(state, whole)
    begin, index = f"{model.base_model_prefix}.", _module_name(type(trunk), plan)
    of_trunk = {name.removeprefix(begin): each for name, each in state.items() if name.startswith(begin)}
    named = {id(module): name for name, module in plan.named_modules()}
    mine = next(name for name, module in model.named_modules() if module is head)
    of_head = {name.removeprefix(f"{mine}."): each for name, each in state.items() if name.startswith(f"{mine}.")}
    return with_prefix(of_trunk, index) | with_prefix(of_head, named[id(plan.get_output_embeddings())])


def _extended(table: "Tensor", rows: int) -> "Tensor":
    """Return a table with more rows; every new one is the mean of all."""
    import torch

    table = table.detach()
    missing = rows - len(table)
    if missing <= 0:
        return table
    mean = table.float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat((table, mean.expand(missing, *table.shape[1:])))


def _module_name(module_class: "type[nn.Module]", plan: "PreTrainedModel", is_needed: bool = True) -> str | None:
    """Return the name of the one module of a class in `plan`."""
    name = next((name for name, module in plan.named_modules() if type(module) is module_class), None)
    refuse_if(name is None and is_needed, f"a {type(plan).__name__} has no place for a {module_class.__name__}")
    return name


def _loaded(
    model_class: "type[PreTrainedModel]", config: "PreTrainedConfig", state: "dict[str, Tensor]", dtype: object
) -> "PreTrainedModel":
    """Return a model with copies of these tensors and new ones for the others."""
    from transformers.utils import logging

    level, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # It would warn about the new projector.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, report = model_class.from_pretrained(
            None,
            config=config,
            state_dict={name: tensor.clone() for name, tensor in state.items()},
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=False,
        )
    finally:
        logging.set_verbosity(level)
        if has_bar:
            logging.enable_progress_bar()
    lost = sorted({*report["unexpected_keys"], *(str(key[0]) for key in report["mismatched_keys"])})
    refuse_if(lost, f"{model_class.__name__} has no place for {len(lost)} tensors: {', '.join(lost[:3])}")
    return model.eval()


# ---- which parts learn: the tower or the decoder frozen, the projector always trained ----


def freeze(model: "PreTrainedModel", vision: bool, text: bool) -> None:
    """Freeze the tower, or the decoder with its head; the parts between them are always trained.

    Args:
        vision: whether the tower stays as it is.
        text: whether the decoder does.
    """
    for flag, is_frozen in (("--freeze_vision", vision), ("--freeze_text", text)):
        is_idle = is_frozen and hasattr(model, "peft_config")
        refuse(is_idle, flag, "the model is an adapter, below which all weights are frozen")
    if not (vision or text):
        return
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    of_text = [decoder, *([] if head is None else [head])]
    if text:
        for part in of_text:
            part.requires_grad_(False)
    if vision:
        tower, width = _tower_of(model), model.get_input_embeddings().weight.shape[-1]
        inside = [] if _has_more(model.base_model, [tower, *of_text]) else _inner_projector(tower, width)
        tower.requires_grad_(False)
        for part in inside:
            part.requires_grad_(True)
    if vision and text and not _has_more(model, of_text, only_learned=True):
        raise InputError(
            f"--freeze_vision and --freeze_text: of a {type(model).__name__} nothing is left to learn, since it has "
            "no projector between tower and decoder: give one of them"
        )


def _has_more(model: nn.Module, parts: Sequence[nn.Module], only_learned: bool = False) -> bool:
    """Return whether a model has weights, or trainable weights, besides the weights of some parts."""
    part_ids = {id(weight) for part in parts for weight in part.parameters()}
    return any(
        id(weight) not in part_ids and (weight.requires_grad or not only_learned) for weight in model.parameters()
    )


def _inner_projector(tower: nn.Module, width: int) -> list[nn.Module]:
    """Return the parts of a tower projecting to the decoder, such as Qwen2-VL's merger; none for most towers.

    These are the parts after the stack of layers with a linear layer or a convolution onto the decoder's width:
    transformers' classes without a projector outside of the tower register them so.

    Args:
        width: of the decoder's embeddings.
    """
    parts = list(tower.children())
    stack = next((index for index, part in enumerate(parts) if isinstance(part, nn.ModuleList)), len(parts))

    def projects(part: nn.Module) -> bool:
        return any(
            isinstance(each, nn.Linear | nn.Conv2d) and each.weight.shape[0] == width for each in part.modules()
        )

    return [part for part in parts[stack + 1 :] if projects(part)]


def _tower_of(model: "PreTrainedModel") -> nn.Module:
    """Return the vision tower of a composed model."""
    # Without a tower it returns the model itself, or its base.
    result = model.base_model.get_encoder(modality="image")
    if result is model or result is model.base_model:
        raise InputError(f"--freeze_vision: no vision tower is known in a {type(model).__name__}")
    return result
