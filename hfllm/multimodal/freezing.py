"""Which parts of a vision-language model learn: its tower or its decoder frozen, the projector always trained."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from hfllm.errors import InputError, refuse

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def freeze(model: "PreTrainedModel", vision: bool, text: bool) -> None:
    """Freeze the tower, or the decoder with its head; the parts between them are always trained.

    Args:
        vision: whether the tower stays as it is.
        text: whether the decoder does.
    """
    for flag, is_frozen in (("--freeze_vision", vision), ("--freeze_text", text)):
        is_idle = is_frozen and hasattr(model, "peft_config")
        refuse(is_idle, flag, "the model is an adapter, below which all weights are frozen")
    if not (vision or text):
        return
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    of_text = [decoder, *([] if head is None else [head])]
    if text:
        for part in of_text:
            part.requires_grad_(False)
    if vision:
        tower, width = _tower_of(model), model.get_input_embeddings().weight.shape[-1]
        inside = [] if _has_more(model.base_model, [tower, *of_text]) else _inner_projector(tower, width)
        tower.requires_grad_(False)
        for part in inside:
            part.requires_grad_(True)
    if vision and text and not _has_more(model, of_text, only_learned=True):
        raise InputError(
            f"--freeze_vision and --freeze_text: of a {type(model).__name__} nothing is left to learn, since it has "
            "no projector between tower and decoder: give one of them"
        )


def _has_more(model: nn.Module, parts: Sequence[nn.Module], only_learned: bool = False) -> bool:
    """Return whether a model has weights, or trainable weights, besides the weights of some parts."""
    part_ids = {id(weight) for part in parts for weight in part.parameters()}
    return any(
        id(weight) not in part_ids and (weight.requires_grad or not only_learned) for weight in model.parameters()
    )


def _inner_projector(tower: nn.Module, width: int) -> list[nn.Module]:
    """Return the parts of a tower projecting to the decoder, such as Qwen2-VL's merger; none for most towers.

    These are the parts after the stack of layers with a linear layer or a convolution onto the decoder's width:
    transformers' classes without a projector outside of the tower register them so.

    Args:
        width: of the decoder's embeddings.
    """
    parts = list(tower.children())
    stack = next((index for index, part in enumerate(parts) if isinstance(part, nn.ModuleList)), len(parts))

    def projects(part: nn.Module) -> bool:
        return any(
            isinstance(each, nn.Linear | nn.Conv2d) and each.weight.shape[0] == width for each in part.modules()
        )

    return [part for part in parts[stack + 1 :] if projects(part)]


def _tower_of(model: "PreTrainedModel") -> nn.Module:
    """Return the vision tower of a composed model."""
    # Without a tower it returns the model itself, or its base.
    result = model.base_model.get_encoder(modality="image")
    if result is model or result is model.base_model:
        raise InputError(f"--freeze_vision: no vision tower is known in a {type(model).__name__}")
    return result
