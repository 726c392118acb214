"""Linear layers as plain functions over weights laid out for a few tokens at a time.

Shapes: N tokens, I inputs, O outputs of all joined layers.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

Function = Callable[[torch.Tensor], torch.Tensor]
# Takes (N, I) and, optionally, (N, O) to add to the result.
Projection = Callable[..., torch.Tensor]

# Smaller weights stay in the processor's cache, where the plain product has less overhead.
PACKED_FROM = 2**18
# The number of tokens that oneDNN lays weights out for; others work too.
PACKED_TOKENS = 8
LARGEST_INT8 = 127
FBGEMM = "fbgemm_linear_int8_weight_fp32_activation"


def joined(linears: Sequence[nn.Linear], int8: bool = False) -> Projection:
    """Join layers that read the same input into one function, (N, I) to (N, O), with concatenated outputs.

    Its second argument, (N, O) if it is given, is added to the result, by some kernels in the same pass. On a CPU the
    weights are copied: joined, packed for oneDNN where they are large, or rounded to int8 with a scale for each row.
    Elsewhere the layers run one after the other on the original weights.
    """
    weights = [linear.weight.detach() for linear in linears]
    if weights[0].device.type != "cpu":
        return _one_by_one(linears)
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    bias = _joined_bias(linears)
    if int8:
        return _int8(weight, bias)
    if weight.numel() >= PACKED_FROM and packs(weight.dtype):
        return _packed(weight, bias)
    return _plain(weight, bias)


def packs(dtype: torch.dtype) -> bool:
    """Return whether oneDNN packs weights of this type on this machine."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def has_int8(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether there are int8 kernels for a small number of tokens: on x86, in float32."""
    return device.type == "cpu" and dtype == torch.float32 and "fbgemm" in torch.backends.quantized.supported_engines


def _one_by_one(linears: Sequence[nn.Linear]) -> Projection:
    if len(linears) == 1:
        only = linears[0]
        return added(lambda states: F.linear(states, only.weight, only.bias))
    return added(lambda states: torch.cat([F.linear(states, each.weight, each.bias) for each in linears], dim=-1))


def added(function: Function) -> Projection:
    """Return a function with the second argument of a projection."""
    return lambda states, onto=None: function(states) if onto is None else onto + function(states)


def _plain(weight: torch.Tensor, bias: torch.Tensor | None) -> Projection:
    # In half precision `addmm` would round once, but the model rounds the product and then the sum.
    if bias is not None or weight.dtype not in (torch.float32, torch.float64):
        return added(lambda states: F.linear(states, weight, bias))
    transposed = weight.t()

    def function(states: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        return torch.mm(states, transposed) if onto is None else torch.addmm(onto, states, transposed)

    return function


def _joined_bias(linears: Sequence[nn.Linear]) -> torch.Tensor | None:
    biases = [linear.bias for linear in linears]
    if all(bias is None for bias in biases):
        return None
    pairs = zip(linears, biases, strict=True)
    return torch.cat([each.weight.new_zeros(each.out_features) if bias is None else bias for each, bias in pairs])


def _packed(weight: torch.Tensor, bias: torch.Tensor | None) -> Projection:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_TOKENS)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return added(lambda states: multiply(states, packed, bias, "none", [], ""))


def _int8(weight: torch.Tensor, bias: torch.Tensor | None) -> Projection:
    """Return a projection with int8 weights and a scale per row; inputs are quantized at each call."""
    scale = weight.abs().amax(dim=1) / LARGEST_INT8
    # A row of zeros has no magnitude, and any scale stores it.
    scale = scale.masked_fill(scale == 0, 1.0)
    product = _fbgemm(weight / scale[:, None]) if hasattr(torch, FBGEMM) else _int_mm(weight / scale[:, None])

    def function(states: torch.Tensor) -> torch.Tensor:
        output = product(states).mul_(scale)
        return output if bias is None else output.add_(bias)

    return added(function)


def _fbgemm(weight: torch.Tensor) -> Function:
    """Return the faster kernels, one scale for all inputs; torch warns at first use that it will remove them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fbgemm.* is deprecated", UserWarning)
        values, offsets, step, zero = torch.fbgemm_linear_quantize_weight(weight)
        packed, nothing = torch.fbgemm_pack_quantized_matrix(values), torch.zeros(len(weight))
        multiply = getattr(torch, FBGEMM)
        multiply(torch.zeros(1, weight.shape[1]), values, packed, offsets, step, zero, nothing)
    return lambda states: multiply(states, values, packed, offsets, step, zero, nothing)


def _int_mm(weight: torch.Tensor) -> Function:
    """Return the plain integer product, with a scale per token: half as fast, but not deprecated."""
    values = weight.round().to(torch.int8).t()

    def product(states: torch.Tensor) -> torch.Tensor:
        step = states.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / LARGEST_INT8
        return torch._int_mm((states / step).round_().to(torch.int8), values).float().mul_(step)

    return product
