"""Configs of native transformers architectures as configs of hfllm, and back.

Whether a config can be expressed on the other side is tested by converting it there and back: a field that comes
back changed is named and refused.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import transformers
from huggingface_hub.errors import StrictDataclassError

from hfllm.errors import InputError
from hfllm.models import tensor_layouts as layouts
from hfllm.models.configuration_hfllm import HfllmConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Exceptions of configs that refuse a value; a missing key is a RoPE parameter.
BAD_CONFIG = (ValueError, KeyError, StrictDataclassError)
SHARED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings"),
    *("initializer_range", "pad_token_id", "bos_token_id", "eos_token_id", "attention_dropout"),
)
# These change training or storage, not what a loaded model computes, so losing them is accepted.
HARMLESS_OURS = {
    *("initializer_range", "residual_init", "use_cache", "loss_chunk_size", "attention_dropout", "hidden_dropout"),
    *("router_aux_loss_coef", "output_router_logits", "pad_token_id", "bos_token_id", "eos_token_id"),
}
HARMLESS_THEIRS = {
    *("initializer_range", "use_cache", "attention_dropout", "hidden_dropout", "classifier_dropout", "attn_pdrop"),
    *("resid_pdrop", "embd_pdrop", "router_aux_loss_coef", "output_router_logits", "router_jitter_noise"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "pretraining_tp", "reorder_and_upcast_attn"),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
    # Read in full, and written in one of several equivalent ways.
    *("is_decoder", "head_dim", "n_inner", "max_window_layers", "sliding_window", "layer_types"),
    *("num_ln_in_parallel_attn", "num_kv_heads", "multi_query", "parallel_attn"),
}


@dataclass(frozen=True)
class Family:
    """Conversion of one native architecture's config to hfllm, and back.

    Args:
        names: our field -> the native field with the same meaning, beyond `SHARED`.
        read: our other fields, from a native config.
        write: the native config's other fields, from ours.
        rules: tensors that are named or laid out differently.
        has_partial_rope: whether `partial_rotary_factor` has an effect there.
    """

    names: Mapping[str, str]
    read: Callable[["PreTrainedConfig"], dict[str, Any]] = lambda config: {}
    write: Callable[[HfllmConfig], dict[str, Any]] = lambda config: {}
    rules: Callable[[HfllmConfig], Iterator[layouts.Rule]] = lambda config: iter(())
    has_partial_rope: bool = False

    def ours(self, native: "PreTrainedConfig") -> HfllmConfig:
        names = {name: name for name in SHARED} | dict(self.names)
        # `head_dim` is None in some native configs and absent from others, which still accept it.
        values = {ours: getattr(native, theirs, None) for ours, theirs in names.items()}
        if values.get("rope_parameters"):
            rope = _plain_rope(values["rope_parameters"])
            if not self.has_partial_rope:
                rope.pop("partial_rotary_factor", None)
            values["rope_parameters"] = rope
        return HfllmConfig(**values | self.read(native))

    def theirs(self, config: HfllmConfig, native_class: type["PreTrainedConfig"]) -> "PreTrainedConfig":
        names = {name: name for name in SHARED} | dict(self.names)
        values = {theirs: getattr(config, ours) for ours, theirs in names.items()}
        if values.get("rope_parameters"):
            values["rope_parameters"] = dict(values["rope_parameters"])
            if self.has_partial_rope:
                # If absent, the native class takes another value.
                values["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
        return native_class(**values | self.write(config))


def _plain_rope(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy, since configs change theirs in place, without a factor that has no effect."""
    rope = dict(parameters)
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    return rope


# ---- the families ----

_LLAMA = {
    **{name: name for name in ("intermediate_size", "num_key_value_heads", "hidden_act", "max_position_embeddings")},
    **{"rope_parameters": "rope_parameters", "norm_eps": "rms_norm_eps", "head_dim": "head_dim"},
}
_LLAMA_BIASES = {**_LLAMA, "attention_bias": "attention_bias"}
_MISTRAL = {**_LLAMA, "sliding_window": "sliding_window"}
_EXPERTS = ("num_local_experts", "num_experts_per_tok", "router_aux_loss_coef")
_GPT_FIELDS = {
    **{"norm_type": "layernorm", "mlp_type": "plain", "position_embedding_type": "learned"},
    **{"attention_bias": True, "mlp_bias": True},
}
# The first GPT's "gelu" is the tanh approximation that transformers calls gelu_new elsewhere.
_OPENAI_ACTIVATIONS = {"gelu": "gelu_new", "swish": "silu"}


def _window(native: "PreTrainedConfig") -> int | None:
    """Return the sliding window of Qwen's configs, where all layers share one."""
    kinds = set(native.layer_types)
    if len(kinds) > 1:
        raise InputError(f"{native.model_type} with layer_types={native.layer_types} mixes full and sliding attention")
    return native.sliding_window if kinds == {"sliding_attention"} else None


def _qwen_window(config: HfllmConfig) -> dict[str, Any]:
    return {
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "max_window_layers": 0,
    }


def _falcon_fields(native: "PreTrainedConfig") -> dict[str, Any]:
    is_new = native.new_decoder_architecture
    norms = 1 if not is_new else native.num_ln_in_parallel_attn or 2
    key_heads = native.num_kv_heads if is_new else 1 if native.multi_query else native.num_attention_heads
    return {
        **{"norm_type": "layernorm", "mlp_type": "plain"},
        **{name: native.bias for name in ("attention_bias", "mlp_bias")},
        "num_key_value_heads": key_heads,
        "parallel_block": bool(is_new or native.parallel_attn),
        "shared_norm": norms == 1,
    }


def _falcon_write(config: HfllmConfig) -> dict[str, Any]:
    is_new = config.parallel_block and (not config.shared_norm or config.num_key_value_heads > 1)
    return {
        "alibi": False,
        "bias": config.attention_bias,
        "new_decoder_architecture": is_new,
        "multi_query": config.num_key_value_heads == 1,
        "num_kv_heads": config.num_key_value_heads if is_new else None,
        "parallel_attn": config.parallel_block,
        "num_ln_in_parallel_attn": (1 if config.shared_norm else 2) if is_new else None,
    }


# In the order in which `to_native` tries them.
FAMILIES = {
    "llama": Family(
        {**_LLAMA_BIASES, "mlp_bias": "mlp_bias"}, read=lambda native: {"attention_output_bias": native.attention_bias}
    ),
    "mistral": Family(_MISTRAL),
    "mixtral": Family({**_MISTRAL, **{name: name for name in _EXPERTS}}),
    "qwen2": Family(
        _LLAMA,
        read=lambda native: {
            "attention_bias": True,
            "attention_output_bias": False,
            "sliding_window": _window(native),
        },
        write=_qwen_window,
    ),
    "qwen3": Family(
        _LLAMA_BIASES,
        read=lambda native: {
            "qk_norm": True,
            "attention_output_bias": native.attention_bias,
            "sliding_window": _window(native),
        },
        write=_qwen_window,
    ),
    "gemma": Family(
        _LLAMA_BIASES,
        read=lambda native: {
            "norm_unit_offset": True,
            "embedding_multiplier": native.hidden_size**0.5,
            "attention_output_bias": native.attention_bias,
        },
    ),
    "cohere": Family(
        {**_LLAMA_BIASES, "norm_eps": "layer_norm_eps", "logit_scale": "logit_scale"},
        read=lambda native: {
            **{"norm_type": "layernorm", "norm_bias": False, "parallel_block": True},
            "attention_output_bias": native.attention_bias,
        },
        rules=layouts.rotary_pairs_rules,
    ),
    "gpt2": Family(
        {
            **{"hidden_act": "activation_function", "norm_eps": "layer_norm_epsilon", "intermediate_size": "n_inner"},
            **{"max_position_embeddings": "n_positions", "hidden_dropout": "resid_pdrop"},
            "attention_dropout": "attn_pdrop",
        },
        read=lambda native: {**_GPT_FIELDS, "intermediate_size": native.n_inner or 4 * native.n_embd},
        write=lambda config: {"embd_pdrop": config.hidden_dropout},
        rules=layouts.gpt2_rules,
    ),
    "openai-gpt": Family(
        {
            **{"norm_eps": "layer_norm_epsilon", "max_position_embeddings": "n_positions"},
            **{"hidden_dropout": "resid_pdrop", "attention_dropout": "attn_pdrop"},
        },
        read=lambda native: {
            **{**_GPT_FIELDS, "norm_placement": "post"},
            "hidden_act": _OPENAI_ACTIVATIONS.get(native.afn, native.afn),
        },
        write=lambda config: {
            # Any other activation comes back as gelu_new and is therefore refused.
            "afn": {"silu": "silu", "relu": "relu"}.get(config.hidden_act, "gelu"),
            "embd_pdrop": config.hidden_dropout,
        },
        rules=layouts.openai_rules,
    ),
    "gpt_neox": Family(
        {
            **{name: name for name in ("intermediate_size", "hidden_act", "max_position_embeddings")},
            **{name: name for name in ("rope_parameters", "attention_bias", "hidden_dropout")},
            "norm_eps": "layer_norm_eps",
        },
        read=lambda native: {
            **{"norm_type": "layernorm", "mlp_type": "plain", "mlp_bias": True, "shared_norm": False},
            "attention_output_bias": native.attention_bias,
            "parallel_block": native.use_parallel_residual,
        },
        write=lambda config: {"use_parallel_residual": config.parallel_block},
        rules=layouts.neox_rules,
        has_partial_rope=True,
    ),
    "falcon": Family(
        {
            **{"intermediate_size": "ffn_hidden_size", "hidden_act": "activation", "norm_eps": "layer_norm_epsilon"},
            **{name: name for name in ("max_position_embeddings", "rope_parameters", "hidden_dropout")},
        },
        read=_falcon_fields,
        write=_falcon_write,
        rules=layouts.falcon_rules,
    ),
}


# ---- configs ----


def config_from_native(native: "PreTrainedConfig") -> HfllmConfig:
    """Convert a native config to ours.

    Raises:
        InputError: when the family is unknown, or one of its fields has no counterpart; it is named.
    """
    family = FAMILIES.get(native.model_type)
    if family is None:
        known = ", ".join(FAMILIES)
        raise InputError(f"model_type {native.model_type!r} cannot be converted; these can: {known}")
    try:
        config = family.ours(native)
        back = family.theirs(config, type(native))
    except BAD_CONFIG as error:
        raise InputError(f"{native.model_type}: {' '.join(str(error).split())}") from error
    for name in sorted(_fields(native) - HARMLESS_THEIRS):
        if not _same(getattr(native, name), getattr(back, name)):
            raise InputError(
                f"{native.model_type} with {name}={getattr(native, name)!r} has no place in HfllmConfig, "
                f"only {getattr(back, name)!r} has"
            )
    _copy_labels(native, config)
    return config


def config_to_native(config: HfllmConfig, native_type: str | None = None) -> "PreTrainedConfig":
    """Return the equivalent native config: of `native_type`, or of the first family that can express it.

    Raises:
        InputError: when none can; the fields without a counterpart are named.
    """
    if native_type is not None and native_type not in FAMILIES:
        raise InputError(f"native type {native_type!r} is not one of {', '.join(FAMILIES)}")
    lost = {}
    for name in [native_type] if native_type else FAMILIES:
        native, lost[name] = _say(config, name)
        if not lost[name]:
            _copy_labels(config, native)
            return native
    nearest = min(lost, key=lambda name: len(lost[name]))
    fields = ", ".join(f"{field}={getattr(config, field)!r}" for field in lost[nearest])
    subject = (
        f"{nearest} has" if native_type else f"no native class can express this model; the nearest, {nearest}, has"
    )
    raise InputError(f"{subject} no place for {fields}")


def _say(config: HfllmConfig, native_type: str) -> "tuple[PreTrainedConfig | None, list[str]]":
    """Return the native config, and our fields that are lost in it."""
    family, native_class = FAMILIES[native_type], type(transformers.AutoConfig.for_model(native_type))
    try:
        native = family.theirs(config, native_class)
        back = family.ours(native)
    except BAD_CONFIG:
        # Values that the native class itself refuses, such as a width that its heads do not divide.
        return None, sorted(_fields(config))
    irrelevant = set(HARMLESS_OURS)
    if config.norm_type == "rmsnorm":
        irrelevant.add("norm_bias")
    if not config.parallel_block:
        irrelevant.add("shared_norm")
    if not config.num_local_experts:
        irrelevant.add("num_experts_per_tok")
    names = sorted(_fields(config) - irrelevant)
    return native, [name for name in names if not _same(getattr(config, name), getattr(back, name))]


def _same(one: object, other: object) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return _plain_rope(one) == _plain_rope(other)
    return one == other


def _fields(config: "PreTrainedConfig") -> set[str]:
    """Return the names of a config's own fields, without those of every config."""
    every = set(transformers.PreTrainedConfig().to_dict())
    return {name for name in type(config).__dataclass_fields__ if not name.startswith("_")} - every


def _copy_labels(source: "PreTrainedConfig", target: "PreTrainedConfig") -> None:
    for name in ("id2label", "label2id"):
        if getattr(source, name) is not None:
            setattr(target, name, dict(getattr(source, name)))
