"""Merge saved PEFT adapters into the weights of their base models."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hfllm.errors import InputError
from hfllm.models.adapters import SavedAdapter, embeddings_of, load_base, put_on, put_under_head
from hfllm.models.stored import refuse_quantized

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

Dtypes = Mapping[str, "torch.dtype"]


def load_to_merge(
    adapter: SavedAdapter, auto_class: "type[_BaseAutoModelClass]", **kwargs: object
) -> tuple["PeftModel", Dtypes, bool]:
    """Load an adapter on its base in single precision, so that merging rounds once, at the end.

    Args:
        kwargs: arguments of `from_pretrained`.

    Returns:
        The model, the precision that each of the base's weights is stored in, and whether it has a new head.

    Raises:
        InputError: when either cannot be loaded or they do not fit, or the base is quantized.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from hfllm.models.precision import cast_weights

    adapter.check()
    model, has_new_head = load_base(adapter, auto_class, **{**kwargs, "dtype": "auto"})
    refuse_quantized(model.config, adapter.base)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    _untie(model, adapter)
    # A language model's adapter below a head for scores.
    writes = auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText)
    is_headless = not writes and adapter.task in (None, "CAUSAL_LM")
    put = put_under_head if is_headless and not adapter.brings_head else put_on
    return put(cast_weights(model, torch.float32), adapter), dtypes, has_new_head


def merge(adapted: "PeftModel", dtypes: Dtypes, dtype: "str | torch.dtype | None" = "auto") -> "PreTrainedModel":
    """Return the model with the adapter merged into its weights.

    Args:
        adapted: in single precision, from `load_to_merge`; not to be used any more.
        dtypes: the precision of the base's weights.
        dtype: of the result; `auto` is the base's.

    Raises:
        InputError: when this kind of adapter cannot be merged, or the result is not finite.
    """
    import torch

    try:
        model = adapted.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        kind = adapted.peft_config[adapted.active_adapter].peft_type
        raise InputError(f"an adapter of the kind {getattr(kind, 'value', kind)} cannot be merged: {error}") from error
    if hasattr(model, "peft_config"):
        del model.peft_config
    wanted = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    stored = next(iter(dtypes.values()))
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, stored) if wanted in (None, "auto") else wanted)
    return model.requires_grad_(True)


def load_merged(
    adapter: SavedAdapter,
    auto_class: "type[_BaseAutoModelClass]",
    dtype: "str | torch.dtype | None" = "auto",
    **kwargs: object,
) -> "PreTrainedModel":
    """Load an adapter's base with the adapter merged into it. Its `has_new_head` is that of `load_scorer`.

    Raises:
        InputError: see `load_to_merge` and `merge`.
    """
    adapted, dtypes, has_new_head = load_to_merge(adapter, auto_class, **kwargs)
    model = merge(adapted, dtypes, dtype)
    model.has_new_head = has_new_head
    model.name_or_path = model.config._name_or_path = adapter.name
    return model.eval()


def _untie(model: "PreTrainedModel", adapter: SavedAdapter) -> None:
    """Give a model with tied embeddings a head of its own if the adapter changes only one of the two.

    Merged into the tied weight, what was trained on one would change the other as well.
    """
    from torch import nn

    head, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = head is not None and head.weight is inputs.weight
    paths = embeddings_of(model)
    # PEFT trains single tokens in both at once.
    keys = [key for key in adapter.weights() if ".token_adapter." not in key and "trainable_tokens" not in key]
    is_touched = any(
        f".{path}." in f"{key}." and not key.endswith("base_layer.weight") for path in paths for key in keys
    )
    if not (is_tied and is_touched) or adapter.settings.get("ensure_weight_tying"):
        return
    head.weight = nn.Parameter(head.weight.detach().clone())
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {
        name: other
        for name, other in model.all_tied_weights_keys.items()
        if not any(name == f"{path}.weight" for path in paths)
    }
