"""Settings of generation that a saved model brings along, and that transformers would not save again."""

import warnings
from typing import TYPE_CHECKING

from hfllm.errors import InputError
from hfllm.models.loading import reason_of

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

# Without effect unless `do_sample` is true, and with one beam.
SAMPLING = ("temperature", "top_p", "top_k", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
BEAMS = ("early_stopping", "length_penalty")


def leave_out_idle_settings(model: "PreTrainedModel", whose: str) -> None:
    """Leave out settings of generation without effect, with which transformers loads a model and does not save it.

    Older models have them, such as a temperature without `do_sample`. A run would end with them after its training,
    without a model. What `generate` does by default stays the same.

    Args:
        model: just loaded; changed in place.
        whose: what to call it, such as `model 'name'`.

    Raises:
        InputError: when the settings cannot be saved even so.
    """
    config = getattr(model, "generation_config", None)
    if config is None or _fault(config) is None:
        return
    idle = [*(() if config.do_sample is True else SAMPLING), *(BEAMS if config.num_beams in (None, 1) else ())]
    given = [name for name in idle if getattr(config, name, None) is not None]
    for name in given:
        setattr(config, name, None)
    if fault := _fault(config):
        raise InputError(f"{whose}: its generation_config.json could not be saved again: {fault}")
    warnings.warn(
        f"{whose}: without effect in its generation_config.json, and left out: {', '.join(given)} (do_sample is "
        f"{config.do_sample}, num_beams {config.num_beams})",
        stacklevel=2,
    )


def _fault(config: "GenerationConfig") -> str | None:
    try:
        config.validate(strict=True)
    except ValueError as error:
        return reason_of(error)
    return None
