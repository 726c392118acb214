"""Averages of LoRA adapters: a layer changes by the product B A, and means of products are not products of means.

    lora             averages A and B separately: wrong, by 13 percent of the mean change after 4 local steps in one
                     measurement, 22 after 8; exact after a single step from B = 0. Use it only to compare.
    lora_frozen_a    A stays as drawn, the same at every organisation: the mean of B A is (mean of B) A, exact, and
                     only B travels (Sun et al. 2024, arXiv:2403.12313).
    stacked          A and B below and next to each other: an adapter of rank sum(r_i), equal to the exact mean;
                     ranks may differ (Wang et al. 2024, arXiv:2409.05976). `compress` takes it back to a rank by SVD,
                     and reports the loss.

Factors have the form of PEFT's linear layers: `lora_A` (rank, in) and `lora_B` (out, rank).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hfllm.errors import InputError, refuse_if
from hfllm.federation.rounds import weighted_average
from hfllm.federation.updates import Update, rank_axis

if TYPE_CHECKING:
    from torch import nn


def freeze_a(model: "nn.Module") -> list[str]:
    """Stop training of every `lora_A`, and return the names of the still trained tensors, which travel.

    Raises:
        InputError: when the model has no LoRA factors.
    """
    names = [name for name, _ in model.named_parameters()]
    if not any(rank_axis(name) == 0 for name in names):
        raise InputError(
            "the average lora_frozen_a is one of LoRA adapters, and the model has none: use_peft adds one"
        )
    for name, parameter in model.named_parameters():
        if rank_axis(name) == 0:
            parameter.requires_grad_(False)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
    """Return the names of the factors A and B of every layer, by the layer's name.

    Raises:
        InputError: when one of the two is missing.
    """
    result: dict[str, dict[int, str]] = {}
    for name in tensors:
        axis = rank_axis(name)
        if axis is not None:
            layer = name.replace(".lora_A.", ".").replace(".lora_B.", ".").removesuffix(".weight")
            result.setdefault(layer, {})[axis] = name
    for layer, factors in result.items():
        if factors.keys() != {0, 1}:
            raise InputError(f"layer {layer} has one LoRA factor, {next(iter(factors.values()))}; expected both")
    return {layer: (factors[0], factors[1]) for layer, factors in result.items()}


def stacked(updates: Iterable[Update], scalings: Mapping[str, float] | None = None) -> dict[str, Tensor]:
    """Return one adapter whose product is the mean by tokens of the organisations' products, exactly.

    Args:
        updates: with the adapters themselves as factors; every organisation began at B = 0 in this round. Other
            tensors are averaged as changes.
        scalings: the factor of every organisation's products, lora_alpha / rank, by name; by default 1. The
            weights and these go into B, so the result's own factor is 1: load it with lora_alpha = rank.

    Returns:
        Factors of rank sum(r_i), in their precision.
    """
    updates = list(updates)
    total = sum(update.num_tokens for update in updates)
    # The same checks for all averages; the checks of factors hold for all dimensions but the rank.
    rest = weighted_average(map(_without_factors, updates)) if updates else weighted_average([])
    layers = pairs(updates[0].tensors)
    result: dict[str, Tensor] = dict(rest)
    for update in updates:
        _check_layers(update, updates[0])
    for a_name, b_name in layers.values():
        shares = [update.num_tokens / total * (scalings or {}).get(update.organisation, 1.0) for update in updates]
        scaled = [share * update.tensors[b_name] for share, update in zip(shares, updates, strict=True)]
        result[a_name] = torch.cat([update.tensors[a_name] for update in updates], 0)
        result[b_name] = torch.cat(scaled, 1)
    return result


def products(tensors: Mapping[str, Tensor], scaling: float = 1.0) -> dict[str, Tensor]:
    """Return the change B A of every layer, in float64, by the layer's name."""
    return {
        layer: scaling * tensors[b_name].double() @ tensors[a_name].double()
        for layer, (a_name, b_name) in pairs(tensors).items()
    }


def compress(adapter: Mapping[str, Tensor], rank: int) -> tuple[dict[str, Tensor], float]:
    """Return the nearest adapter of a lower rank, and how far it is: |BA - B'A'| / |BA| over all layers together.

    By the truncated SVD of a layer's product (Eckart and Young 1936), whose square root goes into both factors. The
    product itself is never made: with B = Q R and A^T = P S, it has the singular values of R S^T.

    Args:
        rank: of the result; a layer whose product has a lower one is filled with zeros.

    Raises:
        InputError: for a rank below 1.
    """
    refuse_if(rank < 1, f"the rank of a compressed adapter is {rank}; expected at least 1")
    result, lost, whole = dict(adapter), 0.0, 0.0
    for a_name, b_name in pairs(adapter).values():
        a, b = adapter[a_name].double(), adapter[b_name].double()
        (q, r), (p, s) = torch.linalg.qr(b), torch.linalg.qr(a.T)
        u, values, vt = torch.linalg.svd(r @ s.T, full_matrices=False)
        lost += float(values[rank:].square().sum())
        whole += float(values.square().sum())
        root = values[:rank].sqrt()
        kept_b, kept_a = (q @ u)[:, :rank] * root, root[:, None] * (vt @ p.T)[:rank]
        missing = rank - len(root)
        kept_b = torch.nn.functional.pad(kept_b, (0, missing))
        kept_a = torch.nn.functional.pad(kept_a, (0, 0, 0, missing))
        result[a_name], result[b_name] = kept_a.to(adapter[a_name].dtype), kept_b.to(adapter[b_name].dtype)
    return result, math.sqrt(lost / whole) if whole else 0.0


def factors_error(received: Mapping[str, Tensor], updates: Sequence[Update], scaling: float = 1.0) -> float:
    """Return the relative error of averaging factors separately.

    It is |mean(B A) - mean(B) mean(A)| / |mean(B A) - received B A|.

    Args:
        received: the organisations' initial factors.
        updates: changes of the factors.
    """
    total = sum(update.num_tokens for update in updates)
    apart = weighted_average(updates)
    wrong = products({name: value.double() + apart[name] for name, value in received.items()}, scaling)
    before, exact = products(received, scaling), {layer: torch.zeros_like(value) for layer, value in wrong.items()}
    for trained in _trained(received, updates):
        for layer, value in products(trained.tensors, scaling).items():
            exact[layer] += trained.num_tokens / total * value
    error = sum(float((exact[layer] - wrong[layer]).square().sum()) for layer in exact)
    moved = sum(float((exact[layer] - before[layer]).square().sum()) for layer in exact)
    return math.sqrt(error / moved) if moved else 0.0


def _trained(received: Mapping[str, Tensor], updates: Iterable[Update]) -> Iterator[Update]:
    for update in updates:
        yield replace(
            update, tensors={name: received[name].double() + change for name, change in update.tensors.items()}
        )


def _without_factors(update: Update) -> Update:
    return replace(update, tensors={name: value for name, value in update.tensors.items() if rank_axis(name) is None})


def _check_layers(update: Update, first: Update) -> None:
    """Refuse factors of other layers, widths or precision than the first organisation's, and NaN."""
    whose = f"organisation {update.organisation!r}"
    if update.tensors.keys() != first.tensors.keys():
        other = sorted(update.tensors.keys() ^ first.tensors.keys())[0]
        raise InputError(f"{whose} and {first.organisation!r} differ in {other}: expected adapters of the same layers")
    for a_name, b_name in pairs(update.tensors).values():
        a, b = update.tensors[a_name], update.tensors[b_name]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise InputError(f"{whose}: {a_name} {list(a.shape)} and {b_name} {list(b.shape)} are no pair of factors")
        for name, axis in ((a_name, 1), (b_name, 0)):
            mine, other = update.tensors[name], first.tensors[name]
            if mine.shape[axis] != other.shape[axis] or mine.dtype != other.dtype:
                raise InputError(f"{whose} sent {name} of the width {mine.shape[axis]}; expected {other.shape[axis]}")
            if not torch.isfinite(mine).all():
                raise InputError(f"{whose} sent {name} with NaN or infinite values; expected finite ones")
