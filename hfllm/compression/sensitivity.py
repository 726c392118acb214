"""Sensitivity to quantization: quantize one part of a model at a time and measure the loss."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypedDict

from hfllm.compression.schemes import Scheme, linear_names
from hfllm.errors import check_choice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARTS = ("linear", "layer", "kind")


class PartRow(TypedDict):
    """The effect of quantizing only one part of a model.

    Attributes:
        part: its name.
        layers: number of linear layers in it.
        weights: number of their weights.
        loss_change: in the unit of the loss.
        loss_change_per_million: the same per million weights; shows where more bits help most.
    """

    part: str
    layers: int
    weights: int
    loss_change: float
    loss_change_per_million: float


def group_linears(names: Sequence[str], by: str) -> dict[str, list[str]]:
    """Group the names of linear layers quantized together.

    Args:
        by: `linear` each alone; `layer` those of a decoder layer; `kind` those with the same name in their layer,
            such as `mlp.down_proj`.

    Raises:
        InputError: for another value.
    """
    check_choice(f"sensitivity by {by!r}: expected one of", by, PARTS)
    groups: dict[str, list[str]] = {}
    for name in names:
        layer, kind = split_name(name)
        groups.setdefault({"linear": name, "layer": layer, "kind": kind}[by], []).append(name)
    return groups


def split_name(name: str) -> tuple[str, str]:
    """`model.layers.3.mlp.down_proj` -> (`model.layers.3`, `mlp.down_proj`); a name without a number is both."""
    words = name.split(".")
    numbers = [index for index, word in enumerate(words) if word.isdecimal()]
    if not numbers or numbers[0] == len(words) - 1:
        return name, name
    return ".".join(words[: numbers[0] + 1]), ".".join(words[numbers[0] + 1 :])


@contextmanager
def quantized_in_place(model: "PreTrainedModel", names: Sequence[str], scheme: Scheme) -> Iterator[None]:
    """Quantize these layers within the context, and restore the model afterwards."""
    originals = {name: model.get_submodule(name) for name in names}
    try:
        for name, layer in originals.items():
            model.set_submodule(name, scheme.convert(layer))
        yield
    finally:
        for name, layer in originals.items():
            model.set_submodule(name, layer)


def sensitivity(
    model: "PreTrainedModel", scheme: Scheme, loss_of: Callable[["PreTrainedModel"], float], by: str = "layer"
) -> list[PartRow]:
    """Measure the change of loss from quantizing only one part of a model, for each part.

    Args:
        model: in full precision; it is not changed.
        scheme: of the quantized parts.
        loss_of: the loss of a model in eval mode, such as its nats per token on held-out text; no gradient is kept.
        by: `linear`, `layer` or `kind`, see `group_linears`.

    Returns:
        One row per part, the worst first.

    Raises:
        InputError: when `by` is another value, or the scheme cannot run here.
    """
    import torch

    scheme.check(model.device.type)
    left = set(scheme.left(model))
    groups = group_linears([name for name in linear_names(model) if name not in left], by)
    # Layers passing gradients dequantize their weights, and would not show the effect of integers.
    with torch.no_grad():
        reference, rows = loss_of(model), []
    for part, names in groups.items():
        weights = sum(model.get_submodule(name).weight.numel() for name in names)
        with torch.no_grad(), quantized_in_place(model, names, scheme):
            change = loss_of(model) - reference
        rows.append(
            {
                "part": part,
                "layers": len(names),
                "weights": weights,
                "loss_change": change,
                "loss_change_per_million": change / weights * 1e6,
            }
        )
    return sorted(rows, key=lambda row: -row["loss_change"])


def changes_by_part(rows: Sequence[PartRow]) -> dict[str, float]:
    """Return part -> change of loss, for a plot."""
    return {row["part"]: row["loss_change"] for row in rows}
