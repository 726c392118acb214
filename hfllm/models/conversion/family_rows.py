"""A row of the table of native families: how one architecture's config becomes ours, and names that rows share.

The rows themselves: `families.py` has those of Llama's kind, `mixed_families.py` those with layers of several types,
norms in other places, experts or latent attention. A row goes where its like are.
`to_native` tries them in the order of `families.FAMILIES`.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfllm.models.conversion import tensor_layouts
from hfllm.models.family.configuration_fields_hfllm import longrope_limits
from hfllm.models.family.configuration_hfllm import HfllmConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


SHARED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings"),
    *("initializer_range", "pad_token_id", "bos_token_id", "eos_token_id", "attention_dropout"),
)


@dataclass(frozen=True)
class Family:
    """Conversion of one native architecture's config to hfllm, and back.

    Args:
        names: our field -> the native field with the same meaning, beyond `SHARED`.
        read: our other fields, from a native config.
        write: the native config's other fields, from ours.
        rules: tensors with other names or layouts.
        has_partial_rope: whether `partial_rotary_factor` has an effect there.
        classifier: the name of the head of its token classifier.
        reads_again: whether its generation reads the text again where the factors of `longrope` change, as ours does;
            others keep keys of both kinds.
        idle: native fields without effect on the supported models.
    """

    names: Mapping[str, str]
    read: Callable[["PreTrainedConfig"], dict[str, Any]] = lambda config: {}
    write: Callable[[HfllmConfig], dict[str, Any]] = lambda config: {}
    rules: Callable[[HfllmConfig], Iterator[tensor_layouts.Rule]] = lambda config: iter(())
    has_partial_rope: bool = False
    classifier: str = "score"
    reads_again: bool = False
    idle: frozenset[str] = frozenset()

    def ours(self, native: "PreTrainedConfig") -> HfllmConfig:
        names = {name: name for name in SHARED} | dict(self.names)
        # `head_dim` is None in some native configs and absent from others, but still accepted there.
        values = {ours: getattr(native, theirs, None) for ours, theirs in names.items()}
        if values.get("rope_parameters"):
            rope = plain_rope(values["rope_parameters"])
            for each in (rope, *(part for part in rope.values() if isinstance(part, dict))):
                if not self.has_partial_rope:
                    each.pop("partial_rotary_factor", None)
            values["rope_parameters"] = rope
        return HfllmConfig(**values | self.read(native))

    def theirs(self, config: HfllmConfig, native_class: type["PreTrainedConfig"]) -> "PreTrainedConfig":
        """Return the native config.

        Raises:
            ValueError: for values refused by the native class, or misread by it.
        """
        names = {name: name for name in SHARED} | dict(self.names)
        values = {theirs: getattr(config, ours) for ours, theirs in names.items()}
        if values.get("rope_parameters"):
            values["rope_parameters"] = deepcopy(dict(values["rope_parameters"]))
            if self.has_partial_rope:
                # If absent, the native class takes another value.
                values["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
        if longrope_limits(config) and not self.reads_again:
            raise ValueError("rope_type='longrope' has no place there: generation keeps keys of other factors")
        written = self.write(config)
        if config.rotary_types() and "rope_parameters" not in written:
            raise ValueError("rope_parameters by layer type have no place there")
        return native_class(**values | written)


def plain_rope(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy, since configs change theirs in place, without entries of no effect.

    These are a factor of 1, and other entries next to dictionaries by layer type, where a config made with one
    dictionary keeps it.
    """
    by_type = {name: dict(value) for name, value in parameters.items() if isinstance(value, Mapping)}
    rope = by_type or dict(parameters)
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    return rope


# ---- names ----

LLAMA = {
    **{name: name for name in ("intermediate_size", "num_key_value_heads", "hidden_act", "max_position_embeddings")},
    **{"rope_parameters": "rope_parameters", "norm_eps": "rms_norm_eps", "head_dim": "head_dim"},
}
# The bias of attention's output follows this one, unless a family says otherwise.
LLAMA_BIASES = {**LLAMA, "attention_bias": "attention_bias"}


# ---- layers of several types ----


def layers_of(native: "PreTrainedConfig") -> dict[str, Any]:
    """Return our fields of a native config with a type per layer. A window without a layer is none."""
    kinds = list(native.layer_types)
    return {"layer_types": kinds, "sliding_window": native.sliding_window if "sliding_attention" in kinds else None}


def written_layers(config: HfllmConfig) -> dict[str, Any]:
    """Return the inverse of `layers_of`.

    Raises:
        ValueError: for types absent from its families; their configs would accept the name, but not build the layer.
    """
    refuse_other_types(config, "full_attention", "sliding_attention")
    return {"layer_types": list(config.layer_types), "sliding_window": config.sliding_window}


def written_windows(config: HfllmConfig) -> dict[str, Any]:
    """Return `written_layers` for a class that makes the mask of a window even without a layer for it."""
    return {**written_layers(config), "sliding_window": config.sliding_window or config.max_position_embeddings}


def refuse_other_types(config: HfllmConfig, *kinds: str) -> None:
    """Raise a ValueError, with its name, for a type of layer outside `kinds`."""
    for kind in config.layer_types:
        if kind not in kinds:
            raise ValueError(f"layer_types with {kind!r} have no place there")


def qwen_layers(config: HfllmConfig) -> dict[str, Any]:
    """Return the fields of Qwen's configs for layers, where a window needs a switch too."""
    return {**written_layers(config), "use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
