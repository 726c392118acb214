"""Schemes to store a model's linear layers in fewer bits, their costs in time, and sensitivity to them.

Each scheme is a `quantization_config` of transformers, so its models are saved, loaded, pushed and given adapters
like any others. Embeddings, norms, the output head and experts of a mixture are not quantized.
"""

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypedDict

from hfllm.compression.int8 import OUTLIER_THRESHOLD, DynamicInt8Config, DynamicInt8Linear
from hfllm.data.packing import start_of
from hfllm.errors import InputError, check_choice, refuse_if
from hfllm.models.loading.saved import is_for_pictures, reason_of, refuse_quantized, saved_config, trusts_remote_code
from hfllm.models.loading.weights import load_weights_of
from hfllm.outputs.progress import progress

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.models.auto.auto_factory import _BaseAutoModelClass
    from transformers.utils.quantization_config import QuantizationConfigMixin

    MakeConfig = Callable[[torch.dtype, list[str] | None], QuantizationConfigMixin]
    ConvertLinear = Callable[[nn.Linear], nn.Module]


# Devices where bitsandbytes has kernels, or plain torch code instead.
BITSANDBYTES_DEVICES = ("cpu", "cuda", "xpu", "hpu")
# Its 4-bit kernel for CPUs with AVX512-BF16 lays out 32 rows at a time and wants whole blocks of 64 in each.
NF4_CPU_MULTIPLES = (64, 32)


@dataclass(frozen=True)
class Scheme:
    """A quantization scheme.

    Args:
        name: the name in flags.
        description: one line.
        make_config: dtype of the rest of the model, names of layers to skip (or `None` for the usual ones) ->
            `quantization_config` for `from_pretrained`.
        convert: a linear layer -> the same layer, quantized.
        devices: supported device types.
        library: required library, with the command to install it; `None` if torch is enough.
        cpu_multiples: required divisors of a layer's inputs and outputs on a CPU.
        skipped: layers not to quantize, by the patterns of transformers' `llm_int8_skip_modules`: the end of a
            name, or a regular expression for its beginning.
    """

    name: str
    description: str
    make_config: "MakeConfig"
    convert: "ConvertLinear"
    devices: tuple[str, ...]
    library: tuple[str, str] | None = None
    cpu_multiples: tuple[int, int] = (1, 1)
    skipped: tuple[str, ...] = ()

    def check(self, device: str | None = None) -> None:
        """Refuse the scheme where it cannot run.

        Args:
            device: device type; by default the type of `default_device`.

        Raises:
            InputError: when a library is missing, with the command to install it, or the device is not one of the
                scheme's.
        """
        device = default_device() if device is None else device
        if self.library and find_spec(self.library[0]) is None:
            raise InputError(f"scheme {self.name!r} needs {self.library[0]}: {self.library[1]}")
        if device not in self.devices:
            others = [scheme.name for scheme in SCHEMES.values() if device in scheme.devices]
            instead = f"; on {device}: {', '.join(others)}" if others else ""
            raise InputError(f"scheme {self.name!r} runs on {', '.join(self.devices)}, not on {device}{instead}")

    def fits(self, linear: "nn.Linear") -> bool:
        """Return whether the library can run this layer on the default device."""
        inputs, outputs = self.cpu_multiples if default_device() == "cpu" else (1, 1)
        return linear.in_features % inputs == 0 and linear.out_features % outputs == 0

    def left(self, model: "PreTrainedModel") -> list[str]:
        """Return the names of linear layers not quantized: `skipped`, and layers unsupported by the library.

        Raises:
            InputError: when these are all layers, or a pattern matches none.
        """
        from transformers.quantizers.quantizers_utils import should_convert_module

        names = linear_names(model)
        for pattern in self.skipped:
            if all(should_convert_module(name, [pattern]) for name in names):
                raise InputError(f"skipped layers: {pattern!r} names none of {', '.join(sorted(_kinds(names)))}")
        candidates = [name for name in names if should_convert_module(name, list(self.skipped))]
        refuse_if(not candidates, f"skipped layers: {', '.join(self.skipped)} are all; nothing is left to quantize")
        quantized = {name for name in candidates if self.fits(model.get_submodule(name))}
        inputs, outputs = self.cpu_multiples
        needed = f"layers with a multiple of {inputs} inputs and {outputs} outputs on a CPU"
        refuse_if(not quantized, f"scheme {self.name!r} needs {needed}; this model has none")
        return [name for name in names if name not in quantized]

    def load(self, name: str, **load_kwargs: Any) -> "PreTrainedModel":
        """Load a causal language or vision-language model from full weights and quantize it while loading.

        Args:
            name: folder or Hub id of the model.
            load_kwargs: arguments of `from_pretrained`.

        Raises:
            InputError: when the scheme cannot run here, or the model is quantized already or cannot be loaded.
        """
        self.check()
        try:
            config = saved_config(name, revision=load_kwargs.get("revision"))
            refuse_quantized(config, name)
            quantization = self._config_for(config, load_kwargs.get("dtype", config.dtype))
            settings = {**load_kwargs, "quantization_config": quantization}
            return load_weights_of(_auto_class(config), name, **settings)[0].eval()
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"model {name!r} could not be loaded as {self.name}: {reason_of(error)}") from error

    def _config_for(self, config: "PreTrainedConfig", dtype: "torch.dtype | str | None") -> "QuantizationConfigMixin":
        """Return the `quantization_config` for a model of this config."""
        import torch
        from transformers.quantizers.base import get_keys_to_not_convert

        with torch.device("meta"):
            model = _auto_class(config).from_config(config, trust_remote_code=trusts_remote_code())
        left = self.left(model)
        if isinstance(dtype, str):
            dtype = config.dtype if dtype == "auto" else getattr(torch, dtype)
        # Given names replace the usual ones, so they must include them.
        return self.make_config(dtype or torch.float32, [*get_keys_to_not_convert(model), *left] if left else None)


def get_scheme(name: str, skipped: Sequence[str] = (), llm_int8_threshold: float = OUTLIER_THRESHOLD) -> Scheme:
    """Return the scheme called `name`.

    Args:
        skipped: layers not to quantize, see `Scheme`.
        llm_int8_threshold: magnitude from which `int8` multiplies an input feature in floating point. A lower
            value rounds less of the input, and takes longer; 0 means never. Other schemes have none.

    Raises:
        InputError: when there is no such scheme, or the threshold is negative.
    """
    check_choice(f"scheme {name!r} is not one of", name, SCHEMES)
    refuse_if(not llm_int8_threshold >= 0, f"llm_int8_threshold={llm_int8_threshold}: expected a number of at least 0")
    scheme = replace(SCHEMES[name], skipped=tuple(skipped))
    if name == "int8":
        make_config, convert = _int8(llm_int8_threshold)
        scheme = replace(scheme, make_config=make_config, convert=convert)
    return scheme


def default_device() -> str:
    """Return the device type for quantized models: the accelerator if there is one, else the CPU."""
    import torch

    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def quiet_bitsandbytes() -> None:
    """Silence the warning of its int8 layers at each run about computing in float16, as LLM.int8 should."""
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


# ---- what is quantized, and how large it is ----


def linear_names(model: "PreTrainedModel") -> list[str]:
    """Return the names of an unquantized model's linear layers to be quantized by the schemes.

    Raises:
        InputError: when there is none.
    """
    from torch import nn
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    # transformers' quantizers skip the output head, and layers tied to it.
    modules_to_not_convert = get_keys_to_not_convert(model)
    names = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and should_convert_module(name, modules_to_not_convert)
    ]
    if not names:
        raise InputError(
            f"a {type(model).__name__} has no linear layers to quantize; hfllm convert makes models of other "
            "families into the hfllm family, whose layers are"
        )
    return names


def _auto_class(config: "PreTrainedConfig") -> "type[_BaseAutoModelClass]":
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if is_for_pictures(config) else AutoModelForCausalLM


def _kinds(names: Sequence[str]) -> set[str]:
    """Return the last parts of layer names."""
    return {name.rpartition(".")[2] for name in names}


def stored_bytes(*modules: "nn.Module") -> int:
    """Return the saved bytes of the modules: weights, scales and others; shared tensors count once."""
    # Keep all at once: some are temporary, and a later one could reuse the address of a freed one.
    tensors = [tensor for module in modules for tensor in module.state_dict().values()]
    distinct = {(tensor.device, tensor.data_ptr(), tensor.numel()): tensor for tensor in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())


def linear_bytes(model: "PreTrainedModel", names: Sequence[str]) -> int:
    """Return the bytes of the layers called `names`."""
    return stored_bytes(*(model.get_submodule(name) for name in names))


# ---- the schemes ----


def _int8(threshold: float) -> "tuple[MakeConfig, ConvertLinear]":
    """Return config and layer of LLM.int8, with the magnitude from which an input feature is an outlier."""

    def config(dtype: "torch.dtype", skipped: list[str] | None) -> "QuantizationConfigMixin":
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold, llm_int8_skip_modules=skipped)

    def layer(linear: "nn.Linear") -> "nn.Module":
        import bitsandbytes

        quantized = bitsandbytes.nn.Linear8bitLt(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            has_fp16_weights=False,
            threshold=threshold,
        )
        weight = linear.weight.detach().cpu().clone()
        quantized.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        quantized.bias = linear.bias
        return quantized.to(linear.weight.device).train(linear.training)

    return config, layer


def _nf4(double: bool) -> "tuple[MakeConfig, ConvertLinear]":
    """Return config and layer of NF4, with quantized block scales if `double`."""

    def config(dtype: "torch.dtype", skipped: list[str] | None) -> "QuantizationConfigMixin":
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skipped,
        )

    def layer(linear: "nn.Linear") -> "nn.Module":
        import bitsandbytes

        quantized = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            compute_dtype=linear.weight.dtype,
            compress_statistics=double,
            quant_type="nf4",
        )
        quantized.weight = bitsandbytes.nn.Params4bit(
            linear.weight.detach().cpu().clone(), requires_grad=False, compress_statistics=double, quant_type="nf4"
        )
        quantized.bias = linear.bias
        return quantized.to(linear.weight.device).train(linear.training)

    return config, layer


def _dynamic_config(dtype: "torch.dtype", skipped: list[str] | None) -> "QuantizationConfigMixin":
    return DynamicInt8Config(modules_to_not_convert=skipped)


_BITSANDBYTES = ("bitsandbytes", "pip install 'hfllm[int8]'")
SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            "int8",
            "LLM.int8: a scale per row and token, outlier features apart (bitsandbytes)",
            *_int8(OUTLIER_THRESHOLD),
            BITSANDBYTES_DEVICES,
            _BITSANDBYTES,
        ),
        Scheme(
            "nf4",
            "16 levels at a normal distribution's quantiles, a scale for 64 weights (bitsandbytes)",
            *_nf4(double=False),
            BITSANDBYTES_DEVICES,
            _BITSANDBYTES,
            NF4_CPU_MULTIPLES,
        ),
        Scheme(
            "nf4_double",
            "nf4 whose scales are in 8 bits themselves (bitsandbytes)",
            *_nf4(double=True),
            BITSANDBYTES_DEVICES,
            _BITSANDBYTES,
            NF4_CPU_MULTIPLES,
        ),
        Scheme(
            "dynamic",
            "int8 weights and inputs, a scale per row and token, for serving on a CPU",
            _dynamic_config,
            DynamicInt8Linear.from_linear,
            ("cpu",),
        ),
    )
}


# ---- measure ----
#
# Measure a quantized model: agreement with the original, and speed.


def token_windows(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], max_length: int) -> list["torch.Tensor"]:
    """Return each text's first `max_length` tokens as a row, (1, T), after the document token if there is one.

    Raises:
        InputError: when no text has a token to predict.
    """
    import torch

    rows = [start_of(tokenizer) + ids for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    windows = [torch.tensor([row[:max_length]]) for row in rows if len(row) > 1]
    refuse_if(not windows, f"{len(texts)} text(s) without a token to predict")
    return windows


def greedy_tokens(model: "PreTrainedModel", windows: Sequence["torch.Tensor"]) -> "torch.Tensor":
    """Return the most likely next token at every position of the windows, concatenated, (N,) on the CPU."""
    import torch

    with torch.inference_mode():
        return torch.cat(
            [model(input_ids=ids.to(model.device), use_cache=False).logits[0].argmax(-1).cpu() for ids in windows]
        )


def agreement(before: "torch.Tensor", after: "torch.Tensor") -> float:
    """Return the share of positions with the same most likely next token."""
    return (before == after).float().mean().item()


def speeds(
    models: Mapping[str, "PreTrainedModel"],
    prompt_tokens: int = 128,
    batch_size: int = 4,
    new_tokens: int = 32,
    rounds: int = 5,
) -> dict[str, dict[str, float]]:
    """Measure tokens per second of reading a prompt and of generating, per model.

    The models take turns within each round, so a busy machine affects them equally; the median round is reported.

    Args:
        models: label -> model in eval mode; all with one vocabulary.
        prompt_tokens: tokens per random prompt, of `batch_size` prompts.
        new_tokens: tokens generated by one sequence after a prompt, each in its own run.

    Returns:
        Label -> `prefill` (batch_size prompts at once) and `decode` (one sequence), in tokens per second.
    """
    import torch

    seconds: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in models}
    # The first round of each warms up.
    for round_number in range(rounds + 1):
        for name, model in models.items():
            generator = torch.Generator().manual_seed(round_number)
            words = model.config.get_text_config(decoder=True).vocab_size
            ids = torch.randint(words, (batch_size, prompt_tokens), generator=generator)
            # A token that stands for an image would require an image.
            ids[torch.isin(ids, torch.tensor(_places(model)))] = 0
            took = _timed(model, ids.to(model.device), new_tokens)
            if round_number:
                for phase, value in took.items():
                    seconds[name][phase].append(value)
    tokens = {"prefill": batch_size * prompt_tokens, "decode": new_tokens}
    return {
        name: {phase: tokens[phase] / statistics.median(values) for phase, values in phases.items()}
        for name, phases in seconds.items()
    }


def _places(model: "PreTrainedModel") -> list[int]:
    """Return the ids of tokens for images or sounds."""
    names = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id")
    result = [getattr(model.config, name, None) for name in names]
    return [number for number in result if isinstance(number, int)]


def _timed(model: "PreTrainedModel", ids: "torch.Tensor", new_tokens: int) -> dict[str, float]:
    """Return the seconds to read the prompts, and to generate `new_tokens` after the first."""
    import torch

    def now() -> float:
        if model.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    with torch.inference_mode():
        began = now()
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
        read = now()
        output = model(input_ids=ids[:1], use_cache=True, logits_to_keep=1)
        started = now()
        for _ in range(new_tokens):
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            output = model(input_ids=token, cache=output.cache, use_cache=True)
        return {"prefill": read - began, "decode": now() - started}


# ---- sensitivity: quantize one part of a model at a time and measure the loss ----

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
    for part, names in progress(groups.items(), unit=by):
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
