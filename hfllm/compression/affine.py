"""Int8 in plain tensors: the reference of every scheme.

A number x is stored as the integer q = round(x / scale) + zero_point and read as scale * (q - zero_point). Schemes
differ in how many numbers share one scale, and whether zero_point is 0. The libraries' results are checked against
this file; the models are run by the libraries.

Shapes: O output features, I input features, N tokens.
"""

from dataclasses import dataclass

import torch

from hfllm.errors import InputError, check_choice, refuse_if

GRANULARITIES = ("tensor", "channel", "group")
# Magnitude from which an input feature counts as an outlier (Dettmers et al. 2022, section 3.2).
OUTLIER_THRESHOLD = 6.0


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix.

    Args:
        values_OI: integers, in int8 for up to 8 bits.
        scale, zero_point: of the groups, (O, groups, 1), (O, 1, 1) or (1, 1, 1).
        bits: of a value.
        float_columns: indices of the columns stored unquantized, (K,), or `None`.
        float_OK: the columns at these indices.
    """

    values_OI: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    bits: int
    float_columns: torch.Tensor | None = None
    float_OK: torch.Tensor | None = None

    def dequantize(self) -> torch.Tensor:
        """Return the dequantized matrix, (O, I) in the scale's dtype."""
        rows, columns = self.values_OI.shape
        groups = self.scale.shape[1]
        grouped = self.values_OI.reshape(rows, groups, columns // groups).to(self.scale.dtype)
        matrix = ((grouped - self.zero_point) * self.scale).reshape(rows, columns)
        if self.float_columns is not None:
            matrix[:, self.float_columns] = self.float_OK.to(matrix.dtype)
        return matrix

    def largest_error(self) -> torch.Tensor:
        """Return half a step of each entry's group, (O, I): the largest possible error of each entry."""
        rows, columns = self.values_OI.shape
        half = self.scale.expand(rows, self.scale.shape[1], 1) / 2
        bound = half.repeat_interleave(columns // self.scale.shape[1], dim=2).reshape(rows, columns).clone()
        if self.float_columns is not None:
            bound[:, self.float_columns] = 0
        return bound

    @property
    def nbytes(self) -> float:
        """Return the bytes of storage: values and zero points with their bits, scales and other columns unchanged."""
        rows, columns = self.values_OI.shape
        num_unquantized = 0 if self.float_columns is None else len(self.float_columns)
        size = rows * (columns - num_unquantized) * self.bits / 8 + self.scale.numel() * self.scale.element_size()
        if bool((self.zero_point != 0).any()):
            size += self.zero_point.numel() * self.bits / 8
        if self.float_columns is not None:
            size += self.float_OK.numel() * self.float_OK.element_size() + self.float_columns.numel() * 4
        return size


def quantize(
    matrix_OI: torch.Tensor,
    bits: int = 8,
    symmetric: bool = True,
    granularity: str = "channel",
    group_size: int | None = None,
    keep_columns: torch.Tensor | None = None,
) -> Quantized:
    """Quantize a matrix to integers of `bits` bits.

    Symmetric: scale = max |x| / (2^(bits-1) - 1), so that 0 stays 0 and the range is even. Asymmetric: the integers
    span [min x, max x], widened to hold 0, so that a one-sided range wastes no bit.

    Args:
        matrix_OI: float matrix, one row per output feature (or per token).
        bits: from 2 to 8.
        symmetric: whether the zero point is 0.
        granularity: shares a scale: the whole `tensor`, each row (`channel`), or runs of `group_size` entries of
            a row (`group`).
        group_size: entries of a group; must divide I.
        keep_columns: indices of columns to store unquantized; they do not affect the scale.

    Raises:
        InputError: for a setting outside of these.
    """
    groups = _groups(matrix_OI, bits, granularity, group_size)
    matrix = matrix_OI.float()
    if keep_columns is not None:
        matrix = matrix.clone()
        matrix[:, keep_columns] = 0
    grouped = matrix.reshape(matrix.shape[0], groups, -1)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if symmetric:
        low = -high
        scale = _reduced(grouped.abs(), granularity, "amax") / high
        zero_point = torch.zeros_like(scale)
    else:
        least = _reduced(grouped, granularity, "amin").clamp(max=0)
        most = _reduced(grouped, granularity, "amax").clamp(min=0)
        scale = (most - least) / (high - low)
        zero_point = (low - least / _positive(scale)).round().clamp(low, high)
    values = (grouped / _positive(scale) + zero_point).round().clamp(low, high)
    unquantized = None if keep_columns is None else matrix_OI[:, keep_columns].clone()
    return Quantized(values.reshape(matrix.shape).to(torch.int8), scale, zero_point, bits, keep_columns, unquantized)


def outlier_columns(tokens_NI: torch.Tensor, threshold: float = OUTLIER_THRESHOLD) -> torch.Tensor:
    """Return the indices of the input features with `threshold` or more in any token, (K,)."""
    return (tokens_NI.abs() >= threshold).any(dim=0).nonzero().flatten()


def int8_matmul(left_NI: torch.Tensor, right_OI: torch.Tensor) -> torch.Tensor:
    """Return the exact product of two int8 matrices, left @ right.T, (N, O) in int32."""
    if left_NI.device.type == "cpu":
        return left_NI.int() @ right_OI.int().T
    # No integer product on this device; float64 holds every sum of up to 2^38 products of int8.
    return (left_NI.double() @ right_OI.double().T).int()


def vectorwise_linear(
    tokens_NI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None = None,
    threshold: float = OUTLIER_THRESHOLD,
    exact_outlier_weights: bool = False,
) -> torch.Tensor:
    """Return x W^T + b as LLM.int8 computes it (Dettmers et al. 2022, arXiv:2208.07339, equation 8).

    Each token and each row of the weight has its own scale, their largest magnitude over 127 (vector-wise
    quantization); the product is of integers. Features with an outlier in any token are separated and multiplied in
    floating point; otherwise one large entry would take nearly all 127 steps of its token.

    Args:
        tokens_NI: the inputs.
        weight_OI: the weight, not quantized yet.
        bias_O: bias, added at the end.
        threshold: magnitude of an outlier; 0 means no outliers.
        exact_outlier_weights: multiply outliers with the original weight, as in the paper. By default with the
            dequantized int8 weight, as bitsandbytes does to store no second copy.

    Returns:
        (N, O) in float32.
    """
    tokens = tokens_NI.float()
    weight = quantize(weight_OI)
    columns = outlier_columns(tokens, threshold if threshold > 0 else torch.inf)
    # In bitsandbytes the ordinary entries of an outlier column still count in their tokens' scales.
    ordinary = tokens.masked_fill(tokens.abs() >= threshold, 0) if threshold > 0 else tokens
    inputs = quantize(ordinary)
    values_NI = inputs.values_OI.clone()
    values_NI[:, columns] = 0
    product = int8_matmul(values_NI, weight.values_OI).float()
    output = product * inputs.scale[:, 0] * weight.scale[:, 0].T
    source = weight_OI.float() if exact_outlier_weights else weight.dequantize()
    output += tokens[:, columns] @ source[:, columns].T
    return output if bias_O is None else output + bias_O.float()


def plant_outliers(tokens_NI: torch.Tensor, columns: torch.Tensor, sigmas: float) -> torch.Tensor:
    """Return a copy with `columns` of `sigmas` standard deviations in every token, with their original signs.

    Large transformers have such features: a few columns, the same in all tokens (Dettmers et al. 2022,
    section 4).
    """
    planted = tokens_NI.clone()
    planted[:, columns] = torch.sign(planted[:, columns]) * sigmas * tokens_NI.std()
    return planted


def _groups(matrix_OI: torch.Tensor, bits: int, granularity: str, group_size: int | None) -> int:
    """Return the number of groups per row."""
    refuse_if(matrix_OI.dim() != 2, f"a matrix is quantized, got {matrix_OI.dim()} dimension(s)")
    refuse_if(not 2 <= bits <= 8, f"bits={bits}: expected 2 to 8")
    check_choice(f"granularity={granularity!r}: expected one of", granularity, GRANULARITIES)
    if granularity != "group":
        refuse_if(group_size is not None, f"group_size={group_size} is for granularity='group', not {granularity!r}")
        return 1
    columns = matrix_OI.shape[1]
    if not group_size or group_size < 1 or columns % group_size:
        raise InputError(f"group_size={group_size}: expected a divisor of the {columns} columns")
    return columns // group_size


def _reduced(grouped: torch.Tensor, granularity: str, how: str) -> torch.Tensor:
    """Return the smallest or largest entry per scale: (O, groups, 1), or (1, 1, 1) of the whole tensor."""
    dims = (0, 1, 2) if granularity == "tensor" else (2,)
    return getattr(grouped, how)(dim=dims, keepdim=True)


def _positive(scale: torch.Tensor) -> torch.Tensor:
    """Return the scale, or 1 where all entries are 0, stored exactly by any scale."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))
