"""Extend a model beyond its trained length, by other frequencies of its rotary positions.

The types are as in transformers' `rope_parameters`; `ntk` is a higher `rope_theta`, not a type of its own:

    linear   positions are divided by the factor (position interpolation, Chen et al. 2023, arXiv:2306.15595)
    ntk      theta * factor^(R / (R - 2)), R rotated dimensions of a head: the slowest frequency is divided by the
             factor, the fastest stays (Peng et al. 2023, arXiv:2309.00071, section 3.1)
    dynamic  the same, by as much as the text at hand needs; texts of the trained length stay as they were
    yarn     fast frequencies stay, slow ones are divided, and scores are sharpened (the same paper, section 3)
    llama3   fast frequencies stay, slow ones are divided, as in Llama 3.1
"""

from copy import copy, deepcopy
from typing import TYPE_CHECKING

from hfllm.errors import InputError, check_choice, one_line, refuse_if
from hfllm.flags import ABOVE_ONE, at_least, check_number
from hfllm.models.loading.saved import max_length_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

ROPE_TYPES = ("linear", "ntk", "dynamic", "yarn", "llama3")
# Of Llama 3.1: wavelengths above the trained length / 1 are divided by the factor, wavelengths below length / 4 stay.
LLAMA3_FREQUENCIES = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
FULL = "full_attention"


def extended_config(
    config: "PreTrainedConfig", rope_type: str, factor: float, original_length: int | None = None
) -> "PreTrainedConfig":
    """Return a copy of a config whose rotary positions are made for `factor` times the length.

    Where each type of layer has parameters of its own (Gemma 3), only the ones of full attention change: the others
    never look further than their window. A `dynamic` config keeps its `max_position_embeddings`, the length where
    transformers begins to scale; the others get the new length.

    Args:
        config: of a decoder with rotary positions, not extended before.
        rope_type: one of `ROPE_TYPES`.
        factor: how many times longer, above 1.
        original_length: tokens of the longest training text; `None` means its
            `max_position_embeddings`.

    Raises:
        InputError: for a model without rotary positions in full attention, already extended positions, an
            unknown type or one refused by the model's class, or a factor not above 1.
    """
    check_choice(f"--rope_type {rope_type!r} is not one of", rope_type, ROPE_TYPES)
    check_number("factor", factor, ABOVE_ONE)
    length = max_length_of(config) if original_length is None else original_length
    if length is None:
        raise InputError(
            "--original_max_position_embeddings is needed: the model's config has no max_position_embeddings"
        )
    check_number("original_max_position_embeddings", length, at_least(2))
    extended = deepcopy(config)
    text = extended.get_text_config(decoder=True)
    name = _extended_part(text, length * factor)
    rope = text.rope_parameters if name is None else text.rope_parameters[name]
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rotated = int(head * rope.get("partial_rotary_factor", 1.0))
    changed = _extended_rope(rope, rope_type, factor, length, rotated)
    text.rope_parameters = changed if name is None else {**text.rope_parameters, name: changed}
    text.max_position_embeddings = length if rope_type == "dynamic" else int(length * factor)
    _check_valid(text, rope_type)
    return extended


def _check_valid(config: "PreTrainedConfig", rope_type: str) -> None:
    """Refuse settings that the model's own class would refuse at saving, after the training."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        if hasattr(config, "validate"):
            config.validate()
    except (KeyError, ValueError, StrictDataclassError) as error:
        kind, reason = config.model_type, one_line(error.__cause__ or error, 300)
        raise InputError(f"--rope_type {rope_type}: a model of type {kind} refuses it: {reason}") from None


def extend_model(model: "PreTrainedModel", extended: "PreTrainedConfig") -> None:
    """Give a model the rotary positions of `extended_config`, in place; its weights stay.

    Raises:
        InputError: for a model with rotary positions made in an unknown way.
    """
    config, new = model.config.get_text_config(decoder=True), extended.get_text_config(decoder=True)
    config.rope_parameters, config.max_position_embeddings = new.rope_parameters, new.max_position_embeddings
    result = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child).__name__.endswith("RotaryEmbedding") and _is_of(child, config, name)
    ]
    refuse_if(not result, f"a model of type {config.model_type} has no rotary embedding that can be rebuilt")
    for parent, name, child in result:
        alone = config
        if child.config is not config:
            alone = copy(config)
            alone.rope_parameters = config.rope_parameters[name]
        device = next(child.buffers()).device
        setattr(parent, name, type(child)(config=alone).to(device))


def _is_of(rotary: "nn.Module", config: "PreTrainedConfig", name: str) -> bool:
    """Return whether a rotary embedding is the text's, and not the images'; ours by layer type have a copy."""
    own = getattr(rotary, "config", None)
    return own is config or (type(own) is type(config) and name in (getattr(config, "layer_types", None) or ()))


def _extended_part(config: "PreTrainedConfig", new_length: float) -> str | None:
    """Return the layer type whose rotary parameters are extended, or `None` if all layers share them.

    Without `layer_types` all layers have the window, as in Mistral, Phi-3 and Starcoder 2.
    """
    what = f"a model of type {config.model_type}"
    rope = getattr(config, "rope_parameters", None)
    if not rope or getattr(config, "position_embedding_type", "rope") != "rope":
        raise InputError(f"{what} has no rotary positions (rope_parameters), which alone can be extended")
    kinds = list(getattr(config, "layer_types", None) or ())
    rotated = getattr(config, "no_rope_layers", None) or [1] * len(kinds)
    far = {kind for kind, is_rotated in zip(kinds, rotated, strict=False) if is_rotated} - {"linear_attention"}
    window = None if getattr(config, "use_sliding_window", True) is False else getattr(config, "sliding_window", None)
    is_near = not far - {"sliding_attention", "chunked_attention"} if kinds else (window or new_length) < new_length
    if is_near:
        raise InputError(
            f"{what} cannot be extended by its positions: none of its layers with rotary positions sees further than "
            f"its window ({'layer_types, no_rope_layers' if kinds else f'sliding_window={window}'})"
        )
    if "rope_theta" in rope or "rope_type" in rope:
        return None
    refuse_if(FULL not in rope, f"rope_parameters of {what} has {', '.join(rope)}, and none for {FULL}")
    return FULL


def _extended_rope(rope: dict, rope_type: str, factor: float, length: int, rotated: int) -> dict:
    before = rope.get("rope_type", "default")
    if before != "default":
        raise InputError(
            f"rope_parameters: rope_type={before!r} has been extended already; only 'default' positions can be"
        )
    if rope_type in ("ntk", "dynamic") and rotated < 4:
        raise InputError(
            f"--rope_type {rope_type} needs at least 4 rotated dimensions in a head, this model has {rotated}"
        )
    if rope_type == "ntk":
        return {**rope, "rope_theta": rope["rope_theta"] * factor ** (rotated / (rotated - 2))}
    # Default positions ignore these two, but they would scale the scores of a model loaded with others.
    remaining = {name: value for name, value in rope.items() if name not in ("mscale", "mscale_all_dim")}
    new = {**remaining, "rope_type": rope_type, "factor": float(factor)}
    if rope_type in ("yarn", "llama3"):
        new["original_max_position_embeddings"] = length
    return {**new, **LLAMA3_FREQUENCIES} if rope_type == "llama3" else new
