"""Load models that give one number per sequence or per token, for rewards and values."""

import json
from pathlib import Path

from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import find_adapter_config_file

from hfllm.errors import InputError
from hfllm.models.adapters import find_adapter, load_apart
from hfllm.models.merging import load_merged
from hfllm.models.stored import location_of
from hfllm.models.weights import load_weights_of

AutoClass = type[AutoModelForSequenceClassification] | type[AutoModelForTokenClassification]


def load_scorer(
    name: str, auto_class: AutoClass = AutoModelForSequenceClassification, **kwargs: object
) -> PreTrainedModel:
    """Load a model with one label. Its `has_new_head` says whether its head is random, as for a language model.

    Args:
        name: name of a model, or of an adapter, which is merged into its base model; a quantized base keeps it apart.
        kwargs: arguments of `from_pretrained`.

    Raises:
        InputError: when its head has another number of labels.
    """
    # Otherwise a mismatch would raise a long error that does not name the model.
    kwargs = {"num_labels": 1, "ignore_mismatched_sizes": True, **kwargs}
    adapter = find_adapter(name, **location_of(kwargs))
    if adapter is not None and not adapter.stays_apart(**kwargs):
        return load_merged(adapter, auto_class, **kwargs)
    if adapter is None:
        model, info = load_weights_of(auto_class, name, **kwargs)
    else:
        model, info = load_apart(adapter, auto_class, **kwargs)
    for key, saved, _ in sorted(info["mismatched_keys"]):
        raise InputError(f"model {name!r}: {key} is of the shape {tuple(saved)}; expected one label (num_labels=1)")
    model.has_new_head = _has_new_head(model, info["missing_keys"])
    return model


def scorer_class(name: str, **kwargs: object) -> AutoClass:
    """Return the auto class for a saved model or adapter: for tokens if it was saved as such, else for sequences."""
    if (adapter := find_adapter_config_file(name, **kwargs)) is not None:
        is_for_tokens = json.loads(Path(adapter).read_text()).get("task_type") == "TOKEN_CLS"
    else:
        fields, _ = PreTrainedConfig.get_config_dict(name, **kwargs)
        is_for_tokens = (fields.get("architectures") or [""])[0].endswith("ForTokenClassification")
    return AutoModelForTokenClassification if is_for_tokens else AutoModelForSequenceClassification


def _has_new_head(model: PreTrainedModel, missing: set[str]) -> bool:
    if not getattr(model, "_hf_peft_config_loaded", False):
        return any(not name.startswith(f"{model.base_model_prefix}.") for name in missing)
    # Missing keys of the base model are not known: the head comes with the adapter, or the base was saved with one.
    is_saved = any(".modules_to_save." in name for name, _ in model.named_parameters())
    return not is_saved and not (model.config.architectures or [""])[0].endswith("Classification")
