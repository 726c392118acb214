"""Dynamic int8, for serving on a CPU: int8 weights, inputs quantized on the fly, an integer product.

torch's own `quantize_dynamic` is faster still for small batches, but it is deprecated, the tensors it uses will be
removed (pytorch issue 184982), and its models cannot be saved by `save_pretrained`. This is the same idea with plain
int8 tensors and `torch._int_mm`, also used by bitsandbytes, with a scale per token instead of one for all. It uses
transformers' registries for quantizers: once hfllm is imported, `AutoModelForCausalLM.from_pretrained` loads saved
models.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

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
