"""What a saved model is, told before its weights are read: quantized, an adapter on another model, its modules."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Arguments of `from_pretrained` that say where a model lies, for its config and for an adapter's.
LOCATION = ("revision", "cache_dir", "token", "subfolder", "local_files_only", "force_download", "proxies")


def location_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings of `from_pretrained` that say where a model lies."""
    return {name: settings[name] for name in LOCATION if settings.get(name) is not None}


def adapter_base(name: str, **location: object) -> str | None:
    """The model that an adapter is on, which is loaded in its place; `None` if `name` is no adapter, or not there.

    Args:
        location: of `name`, as `from_pretrained` takes it.
    """
    from transformers.utils import find_adapter_config_file

    try:
        found = find_adapter_config_file(name, **location)
    except OSError:
        return None
    # A folder that has both is a whole model.
    if found is None or Path(name, "config.json").exists():
        return None
    return json.loads(Path(found).read_text(encoding="utf-8")).get("base_model_name_or_path")


def quantization_of(config: "PreTrainedConfig") -> dict[str, Any]:
    """The `quantization_config` of a model's config as a dictionary, empty if the model is in full precision."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None or isinstance(quantization, dict):
        return quantization or {}
    return quantization.to_dict()


def quantization_method(config: "PreTrainedConfig") -> str | None:
    """How a model is quantized, such as `bitsandbytes`; `None` if it is in full precision."""
    quantization = quantization_of(config)
    method = quantization.get("quant_method") or ("unknown" if quantization else None)
    return getattr(method, "value", method)


def refuse_quantized(config: "PreTrainedConfig", name: str) -> None:
    """Refuse a model that is quantized already: its full weights are gone.

    Raises:
        InputError: if it is.
    """
    method = quantization_method(config)
    if method is not None:
        raise InputError(
            f"model {name!r} is quantized already ({method}): name the model in full precision that it was made from"
        )


def empty_model(config: "PreTrainedConfig") -> "PreTrainedModel":
    """A causal language model that has no weights.

    Raises:
        InputError: when transformers has none of this config.
    """
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        with torch.device("meta"):
            # By the constructor, which DeepSpeed leaves alone.
            return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    except (KeyError, ValueError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"a causal language model of type {config.model_type} cannot be made: {reason}") from None
