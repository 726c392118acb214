"""Int8: dynamic int8 for serving on a CPU, and the affine arithmetic of every scheme as a reference.

Dynamic int8 has int8 weights, inputs quantized on the fly, and an integer product.

torch's own `quantize_dynamic` is faster still for small batches, but it is deprecated, the tensors it uses will be
removed (pytorch issue 184982), and its models cannot be saved by `save_pretrained`. This is the same idea with plain
int8 tensors and `torch._int_mm`, also used by bitsandbytes, with a scale per token instead of one for all. It uses
transformers' registries for quantizers: once hfllm is imported, `AutoModelForCausalLM.from_pretrained` loads saved
models.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from hfllm.errors import InputError, check_choice, refuse_if

METHOD = "hfllm_int8"
LARGEST = 127


class DynamicInt8Linear(nn.Linear):
    """A linear layer with an int8 weight and a float32 scale per row.

    In training, or where a gradient must pass, the weight is dequantized, so an adapter on it can learn; otherwise
    inputs are quantized per token and multiplied as integers.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`; `dtype` is the bias's.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        # (1, out, in): a program without hfllm fails at the shape; otherwise it would read the integers as the weight.
        empty = torch.empty(1, out_features, in_features, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(empty, requires_grad=False)
        self.scale = nn.Parameter(torch.empty(out_features, dtype=torch.float32, device=device), requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "DynamicInt8Linear":
        """Quantize a layer; its bias is shared."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, "meta", linear.weight.dtype)
        values, scale = quantize_rows(linear.weight.detach())
        layer.weight, layer.scale = (
            nn.Parameter(values[None], requires_grad=False),
            nn.Parameter(scale, requires_grad=False),
        )
        layer.bias = linear.bias
        return layer.train(linear.training)

    def reset_parameters(self) -> None:
        """Do nothing: the weight comes from a layer or a file."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features), in the input's dtype."""
        passes_gradient = torch.is_grad_enabled() and input.requires_grad
        if self.training or passes_gradient or input.device.type != "cpu":
            return F.linear(input, self.dequantized().to(input.dtype), self.bias)
        values, steps = quantize_rows(input.reshape(-1, self.in_features))
        product = torch._int_mm(values, self.weight[0].T).float()
        output = product.mul_(steps[:, None]).mul_(self.scale).to(input.dtype)
        if self.bias is not None:
            output += self.bias
        return output.reshape(*input.shape[:-1], self.out_features)

    def dequantized(self) -> torch.Tensor:
        """Return the dequantized weight, in float32."""
        return self.weight[0].float() * self.scale[:, None]


def quantize_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 values, and a float32 scale per row: its largest magnitude over 127."""
    scale = matrix.abs().amax(dim=1).float() / LARGEST
    # A row of zeros has no magnitude, and any scale stores it.
    divisor = scale.masked_fill(scale == 0, 1.0)
    return (matrix / divisor[:, None]).round_().to(torch.int8), scale


@register_quantization_config(METHOD)
class DynamicInt8Config(QuantizationConfigMixin):
    """`quantization_config` of this scheme.

    Args:
        modules_to_not_convert: names of layers not to quantize; by default the head, and layers tied to it.
    """

    def __init__(self, modules_to_not_convert: list[str] | None = None, **kwargs: object):
        self.quant_method = METHOD
        self.modules_to_not_convert = modules_to_not_convert


class _QuantizeRows(ConversionOps):
    """Conversion of a weight while loading it from a file."""

    def __init__(self, hf_quantizer: HfQuantizer):
        self.hf_quantizer = hf_quantizer

    def convert(
        self, input_dict: dict[str, torch.Tensor | list[torch.Tensor]], full_layer_name: str, **kwargs: object
    ) -> dict[str, torch.Tensor]:
        (weight,) = input_dict.values()
        values, scale = quantize_rows(weight[0] if isinstance(weight, list) else weight)
        return {full_layer_name: values[None], f"{full_layer_name.removesuffix('weight')}scale": scale}


@register_quantizer(METHOD)
class DynamicInt8Quantizer(HfQuantizer):
    """Replaces linear layers before weights are loaded, and quantizes the unquantized ones."""

    requires_calibration = False
    quantized_element_size = 1
    is_trainable = True
    is_compileable = True

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: object) -> bool:
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, DynamicInt8Linear) and name == "weight" and not self.pre_quantized

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: object) -> None:
        modules_to_not_convert = self.get_modules_to_not_convert(
            model, self.quantization_config.modules_to_not_convert, model._keep_in_fp32_modules
        )
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and should_convert_module(name, modules_to_not_convert):
                shape = (module.in_features, module.out_features, module.bias is not None)
                model.set_submodule(name, DynamicInt8Linear(*shape, "meta", module.weight.dtype))

    def is_serializable(self) -> bool:
        return True

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeRows(self)


# ---- the reference of every scheme, in plain tensors ----
#
# A number x is stored as the integer q = round(x / scale) + zero_point and read as scale * (q - zero_point). Schemes
# differ in how many numbers share one scale, and whether zero_point is 0. The libraries' results are checked against
# these functions; the models are run by the libraries.
#
# Shapes: O output features, I input features, N tokens.

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
