"""Configs of native transformers architectures as configs of hfllm, and back.

Whether a config can be expressed on the other side is tested by converting it there and back: a field that comes
back changed is named and refused.
"""

import dataclasses
from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import transformers
from huggingface_hub.errors import StrictDataclassError

from hfllm.errors import InputError
from hfllm.models.configuration_hfllm import HfllmConfig
from hfllm.models.expert_family_rows import WIDTHS, irrelevant_fields
from hfllm.models.family_rows import FAMILIES
from hfllm.models.layer_types_hfllm import SPARSE_SIZES, has_sparse_sizes
from hfllm.models.native_family import Family, plain_rope
from hfllm.models.unsupported_families import missing_concept

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Exceptions of configs that refuse a value; a missing key is a RoPE parameter.
BAD_CONFIG = (ValueError, KeyError, StrictDataclassError)
# These change training or storage, not what a loaded model computes, so losing them is accepted.
HARMLESS_OURS = {
    *("initializer_range", "residual_init", "use_cache", "loss_chunk_size", "attention_dropout", "hidden_dropout"),
    *("router_aux_loss_coef", "output_router_logits", "pad_token_id", "bos_token_id", "eos_token_id"),
    *("classifier_dropout", "router_bias_update_rate"),
}
HARMLESS_THEIRS = {
    *("initializer_range", "use_cache", "attention_dropout", "hidden_dropout", "classifier_dropout", "attn_pdrop"),
    *("resid_pdrop", "embd_pdrop", "residual_dropout", "embedding_dropout", "router_aux_loss_coef"),
    *("output_router_logits", "router_jitter_noise", "pad_token_id", "bos_token_id", "eos_token_id"),
    *("pretraining_tp", "reorder_and_upcast_attn", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
    # Read in full, and written in one of several equivalent ways.
    *("is_decoder", "head_dim", "n_inner", "max_window_layers", "sliding_window", "use_sliding_window"),
    *("layer_types", "num_ln_in_parallel_attn", "num_kv_heads", "multi_query", "parallel_attn"),
}
# Sizes that every config.json names, and the largest that are no typing error.
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
LARGEST, MAX_LAYERS = 10**9, 10**5
# A value in a message is cut at this many characters.
LONGEST_VALUE = 80


def config_from_native(native: "PreTrainedConfig") -> HfllmConfig:
    """Convert a native config to ours.

    Raises:
        InputError: when the family is unknown, with what it has and we have not if that is known; or when one of its
            fields has no counterpart; it is named.
    """
    family = FAMILIES.get(native.model_type)
    if family is None:
        concept = missing_concept(native.model_type)
        reason = f" ({concept} has no place in HfllmConfig)" if concept else ""
        known = ", ".join(FAMILIES)
        raise InputError(f"model_type {native.model_type!r} cannot be converted{reason}; these can: {known}")
    try:
        config = family.ours(native)
        back = family.theirs(config, type(native))
    except BAD_CONFIG as error:
        raise InputError(f"{native.model_type}: {_one_line(error)}") from error
    for name in sorted(_fields(native) - HARMLESS_THEIRS - family.idle):
        for lost in _differences(name, getattr(native, name), getattr(back, name)):
            raise InputError(
                f"{native.model_type} with {lost.name}={lost.value} has no place in HfllmConfig, only {lost.kept} has"
            )
    _copy_labels(native, config)
    return config


def fields_from_native(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return our fields of the model that a config.json of another architecture describes, for who counts it.

    Args:
        values: its content. What it leaves out is as transformers' class has it, except for the four sizes that every
            model has.

    Raises:
        InputError: when the family cannot be converted, a size is missing or is none, or a field has no counterpart.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        concept = missing_concept(kind) if isinstance(kind, str) else None
        reason = f" ({concept} has no place in HfllmConfig)" if concept else ""
        raise InputError(f"model_type {kind!r} is not one of hfllm, {', '.join(FAMILIES)}{reason}")
    native_class = transformers.CONFIG_MAPPING[kind]
    for name in SIZES:
        theirs = native_class.attribute_map.get(name, name)
        found = name if values.get(name) is not None else theirs
        if values.get(found) is None:
            raise InputError(f"{theirs} is missing")
        if not isinstance(values[found], int) or isinstance(values[found], bool) or not 1 <= values[found] <= LARGEST:
            raise InputError(
                f"{found}={values[found]!r} must be a whole number of at least 1, and at most {LARGEST:,}"
            )
        if name == "num_hidden_layers" and values[found] > MAX_LAYERS:
            # The native classes make lists of them.
            raise InputError(f"{found}={values[found]} must be at most {MAX_LAYERS:,}")
    try:
        config = config_from_native(native_class.from_dict(deepcopy(dict(values))))
    except InputError:
        raise
    except (*BAD_CONFIG, TypeError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{kind}: {_one_line(error)}") from error
    fields = _fields(config) | {"tie_word_embeddings"}
    return {name: value for name, value in config.to_dict().items() if name in fields}


def config_to_native(
    config: HfllmConfig, native_type: str | None = None, auto_class: str = "AutoModelForCausalLM"
) -> "PreTrainedConfig":
    """Return the equivalent native config: of `native_type`, or of the first family that can express it.

    Args:
        auto_class: of the head, which the family must have.

    Raises:
        InputError: when none can; the fields without a counterpart are named, with the value that they would have
            there.
    """
    if native_type is not None and native_type not in FAMILIES:
        raise InputError(f"native type {native_type!r} is not one of {', '.join(FAMILIES)}")
    if has_sparse_sizes(config) and config._attn_implementation in (None, "sparse"):
        sizes = ", ".join(f"{name}={getattr(config, name, None)}" for name in SPARSE_SIZES)
        raise InputError(
            f"no native class has sparse attention ({sizes}): load the model with attn_implementation='sdpa' to write "
            "it as one of full attention"
        )
    reasons: dict[str, list[str]] = {}
    for name in [native_type] if native_type else FAMILIES:
        try:
            native, lost = _said(config, FAMILIES[name], name)
        except BAD_CONFIG as error:
            # Values that the native class itself refuses, such as a width that its heads do not divide.
            if native_type:
                raise InputError(f"{name} refuses this model: {_one_line(error)}") from error
            continue
        reasons[name] = [f"{each.name}={each.value} (it has {each.kept})" for each in lost]
        if type(native) not in getattr(transformers, auto_class)._model_mapping:
            reasons[name].append(f"the head of {auto_class}")
        if not reasons[name]:
            _copy_labels(config, native)
            return native
    if not reasons:
        raise InputError(f"no native class takes this model's sizes; the classes are {', '.join(FAMILIES)}")
    nearest = min(reasons, key=lambda name: len(reasons[name]))
    subject = (
        f"{nearest} has" if native_type else f"no native class can express this model; the nearest, {nearest}, has"
    )
    raise InputError(f"{subject} no place for {', '.join(reasons[nearest])}")


@dataclasses.dataclass(frozen=True)
class _Lost:
    """A field whose `value` came back as `kept`, both as text."""

    name: str
    value: str
    kept: str


def _said(config: HfllmConfig, family: Family, native_type: str) -> "tuple[PreTrainedConfig, list[_Lost]]":
    """Return the native config, and our fields that are lost in it."""
    native = family.theirs(config, transformers.CONFIG_MAPPING[native_type])
    back = family.ours(native)
    irrelevant = set(HARMLESS_OURS)
    if config.norm_type == "rmsnorm":
        irrelevant.add("norm_bias")
    if "linear_attention" not in config.layer_types:
        irrelevant |= {name for name in _fields(config) if name.startswith("linear_")}
    if not config.qk_norm:
        irrelevant.add("qk_norm_scope")
    if not config.parallel_block:
        irrelevant.add("shared_norm")
    irrelevant |= irrelevant_fields(config)
    if len({*config.layer_types, *back.layer_types}) > 1 and len(set(config.layer_types)) == 1:
        # The window says so already.
        irrelevant.add("layer_types")
    names = sorted(_fields(config) - irrelevant)
    return native, [
        lost for name in names for lost in _differences(name, _said_of(config, name), _said_of(back, name))
    ]


def _said_of(config: HfllmConfig, name: str) -> object:
    """Return the value of our field, or what it means where there are several ways to say that."""
    return WIDTHS[name](config) if name in WIDTHS else getattr(config, name)


def _differences(name: str, one: object, other: object) -> list[_Lost]:
    """Return where two values of a field differ: of a dictionary, the entries that do."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        one, other = plain_rope(one), plain_rope(other)
        keys = [key for key in sorted({*one, *other}) if one.get(key) != other.get(key)]
        return [_Lost(f"{name}.{key}", _shown(one.get(key)), _shown(other.get(key))) for key in keys]
    return [] if one == other else [_Lost(name, _shown(one), _shown(other))]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def _fields(config: "PreTrainedConfig") -> set[str]:
    """Return the names of a config's own fields, without those of every config and without class variables."""
    every = set(transformers.PreTrainedConfig().to_dict())
    return {field.name for field in dataclasses.fields(config) if not field.name.startswith("_")} - every


def _copy_labels(source: "PreTrainedConfig", target: "PreTrainedConfig") -> None:
    for name in ("id2label", "label2id"):
        if getattr(source, name) is not None:
            setattr(target, name, dict(getattr(source, name)))
    target.problem_type = source.problem_type


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
