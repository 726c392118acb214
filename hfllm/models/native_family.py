"""How one native architecture's config says what ours says: the form of a row, and names that many rows share."""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfllm.models import tensor_layouts
from hfllm.models.configuration_hfllm import HfllmConfig
from hfllm.models.layer_types_hfllm import longrope_limits

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
        rules: tensors that are named or laid out differently.
        has_partial_rope: whether `partial_rotary_factor` has an effect there.
        classifier: what the head of its token classifier is called.
        reads_again: whether its generation reads the text again where the factors of `longrope` change, as ours does;
            others keep keys of both kinds.
        idle: native fields without effect on the models that convert.
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
        # `head_dim` is None in some native configs and absent from others, which still accept it.
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
            ValueError: for values that the native class refuses, or would misread.
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
    """Return a copy, since configs change theirs in place, without what has no effect.

    That is a factor of 1, and whatever stands beside dictionaries by layer type, where a config that was given one
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
LLAMA_BIASES = {**LLAMA, "attention_bias": "attention_bias"}
