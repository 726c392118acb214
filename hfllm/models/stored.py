"""Inspect a saved model before reading its weights: where it is, whether it is quantized, and its modules."""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hfllm.errors import InputError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

# Arguments of `from_pretrained` that locate a model, for its config and an adapter's.
LOCATION = ("revision", "cache_dir", "token", "subfolder", "local_files_only", "force_download", "proxies")


def location_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that locate a model."""
    return {name: settings[name] for name in LOCATION if settings.get(name) is not None}


def quantization_of(config: "PreTrainedConfig") -> dict[str, Any]:
    """Return the `quantization_config` of a model's config as a dictionary, empty in full precision."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None or isinstance(quantization, dict):
        return quantization or {}
    return quantization.to_dict()


def quantization_method(config: "PreTrainedConfig") -> str | None:
    """Return the quantization method of a model, such as `bitsandbytes`; `None` if it is in full precision."""
    quantization = quantization_of(config)
    method = quantization.get("quant_method") or ("unknown" if quantization else None)
    return getattr(method, "value", method)


def refuse_quantized(config: "PreTrainedConfig", name: str) -> None:
    """Refuse a model that is already quantized: its full weights are lost.

    Raises:
        InputError: if it is.
    """
    method = quantization_method(config)
    if method is not None:
        raise InputError(
            f"model {name!r} is quantized already ({method}): name the model in full precision that it was made from"
        )


def empty_model(config: "PreTrainedConfig", task_type: str = "CAUSAL_LM") -> "PreTrainedModel":
    """Build a causal language model without weights, or one with another head.

    Args:
        task_type: of the head, as PEFT names it, or `IMAGE_TEXT` for one that writes about pictures.

    Raises:
        InputError: when transformers has no such model for this config.
    """
    import torch
    import transformers

    kind = {
        "SEQ_CLS": "SEQUENCE_CLASSIFICATION",
        "TOKEN_CLS": "TOKEN_CLASSIFICATION",
        "QUESTION_ANS": "QUESTION_ANSWERING",
        "IMAGE_TEXT": "IMAGE_TEXT_TO_TEXT",
    }.get(task_type, "CAUSAL_LM")
    try:
        with torch.device("meta"):
            # By the constructor, which DeepSpeed does not intercept.
            return getattr(transformers, f"MODEL_FOR_{kind}_MAPPING")[type(config)](config)
    except (KeyError, ValueError, ImportError) as error:
        what = "causal language model" if kind == "CAUSAL_LM" else f"model for {kind.lower().replace('_', ' ')}"
        reason = str(error).splitlines()[0]
        raise InputError(f"a {what} of type {config.model_type} cannot be made: {reason}") from None


def is_for_pictures(config: "PreTrainedConfig | None") -> bool:
    """Return whether a saved model reads pictures beside its tokens; all that ask it of a config ask here.

    Some types, such as Gemma 3, are those of a causal language model to transformers, too; they see all the same.
    """
    from transformers import AutoModelForImageTextToText

    mapping = AutoModelForImageTextToText._model_mapping
    return type(config) in mapping and reads_pictures(mapping[type(config)])


def reads_pictures(model: "nn.Module | type[nn.Module]") -> bool:
    """Return whether a model, or a class, reads pictures; with an adapter, the model below it."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "pixel_values" in inspect.signature(model.forward).parameters
