"""Native models as models of the family over the same weights, and whether weights have changed since.

A native model of a family that converts has the family's layers under other names. Its form is made at the first call
and kept as long as the model lives. Where it shares all weights, it follows them by itself. Another form has the very
parameters of the native model: it learns in its place.
"""

from collections.abc import Iterator
from copy import deepcopy
from operator import is_
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hfllm.errors import InputError, one_line
from hfllm.models.conversion.convert import config_from_native, in_family, ties_as_configured
from hfllm.models.conversion.families import FAMILIES, missing_part
from hfllm.models.family.layers_hfllm import is_unobserved
from hfllm.models.family.modeling_hfllm import HfllmForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hfllm.models.family.configuration_hfllm import HfllmConfig


# ---- changes of weights ----


# Elements per matrix compared to see whether it has changed since it was copied; vectors are compared whole.
SAMPLE = 64


class Weights:
    """The weights of a model at one time, to notice when they change; the model itself is not kept.

    Args:
        model: whose parameters and saved buffers these are.
        in_place: whether other values in the same memory are a change.
    """

    def __init__(self, model: nn.Module, in_place: bool = True):
        self.in_place = in_place
        self.known = [(each, _version(each), each.data_ptr(), self._sample(each)) for each in _tensors(model)]

    def are_those_of(self, model: nn.Module) -> bool:
        """Return whether the model's weights are still these.

        A change by `parameter.data` shows only in the values: some per matrix are compared.
        """
        now = list(_tensors(model))
        return len(now) == len(self.known) and all(
            each is known
            and each.data_ptr() == pointer
            and (not self.in_place or (_version(each) == version and torch.equal(_sample(each), sample)))
            for each, (known, version, pointer, sample) in zip(now, self.known, strict=True)
        )

    def _sample(self, tensor: torch.Tensor) -> torch.Tensor | None:
        return _sample(tensor) if self.in_place else None


def named_parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return `model.named_modules()`, in a third of the time, since every call of `generate` asks."""
    parts, seen, stack = [], set(), [("", model)]
    while stack:
        prefix, module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        parts.append((prefix, module))
        children = [(name, child) for name, child in module._modules.items() if child is not None]
        stack += [(f"{prefix}.{name}" if prefix else name, child) for name, child in reversed(children)]
    return parts


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the parameters and the saved buffers; a shared one as often as it has a name."""
    for _, module in named_parts(model):
        yield from (each for each in module._parameters.values() if each is not None)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield buffer


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().flatten()
    if tensor.dim() <= 1:
        return flat.clone()
    return flat[:: max(1, len(flat) // SAMPLE)].clone()


# ---- forms ----


class _Config:
    """A native config as one of the family, or the reason why there is none; made again after an edit."""

    def __init__(self, native: "PreTrainedModel"):
        self.fields, self.ours, self.reason = deepcopy(vars(native.config)), None, None
        try:
            self.ours = config_from_native(native.config)
        except InputError as error:
            self.reason = one_line(error)

    def is_of(self, native: "PreTrainedModel") -> bool:
        return vars(native.config) == self.fields


class _Form:
    """A form with what it was made of."""

    def __init__(self, native: "PreTrainedModel", config: _Config):
        self.model, self.config = in_family(native, config.ours), config
        memory = {each.untyped_storage().data_ptr() for each in native.parameters()}
        is_shared = all(each.untyped_storage().data_ptr() in memory for each in self.model.parameters())
        self.weights = Weights(native, in_place=not is_shared)


_CONFIGS: "WeakKeyDictionary[nn.Module, _Config]" = WeakKeyDictionary()
_FORMS: "WeakKeyDictionary[nn.Module, _Form]" = WeakKeyDictionary()


def family_form(model: "PreTrainedModel") -> HfllmForCausalLM:
    """Return a model as one of the family: itself, or its form, made at the first call.

    It is made again when a weight was replaced, when the config was edited, and, where some of its tensors are copies,
    when any weight has changed.

    Args:
        model: without a `foreign_reason`.

    Raises:
        InputError: see `in_family`.
    """
    if isinstance(model, HfllmForCausalLM):
        return model
    config, form = _config_of(model), _FORMS.get(model)
    if form is not None and form.config is config and form.weights.are_those_of(model):
        return form.model
    # An older form is removed first: memory never holds both.
    del form
    _FORMS.pop(model, None)
    with torch.inference_mode(False), torch.no_grad():
        _FORMS[model] = _Form(model, config)
    return _FORMS[model].model


def family_config(model: "PreTrainedModel") -> "HfllmConfig":
    """Return the config of `family_form(model)`, which is not made for this."""
    return model.config if isinstance(model, HfllmForCausalLM) else _config_of(model).ours


def _config_of(native: "PreTrainedModel") -> _Config:
    known = _CONFIGS.get(native)
    if known is None or not known.is_of(native):
        known = _CONFIGS[native] = _Config(native)
    return known


# ---- forms that learn ----


class _Learner:
    """A form with the parameters of a native model, or `None`, and the parts of which it was made."""

    def __init__(self, native: "PreTrainedModel", modules: list[nn.Module]):
        self.modules, self.parameters, self.fields = modules, _parameters(modules), deepcopy(vars(native.config))
        self.form = None
        if foreign_reason(native) is None and changed_part(native) is None:
            form = in_family(native, family_config(native))
            self.form = form if _take_parameters(form, native) and _computes_by_token(form) else None

    def is_of(self, native: "PreTrainedModel", modules: list[nn.Module]) -> bool:
        """Return whether the native model has the same parts still."""
        parts = (self.modules, modules), (self.parameters, _parameters(modules))
        is_same = all(len(known) == len(now) and all(map(is_, known, now)) for known, now in parts)
        return is_same and vars(native.config) == self.fields


_LEARNERS: "WeakKeyDictionary[nn.Module, _Learner]" = WeakKeyDictionary()


def learning_form(model: "PreTrainedModel") -> "PreTrainedModel":
    """Return a native model's form with the same parameters, to compute its states and gradients; else the model.

    On a CPU the family computes a batch in less time: no padding, no beginning twice, norms in fewer kernels. Its
    logits are the native model's up to the order of sums. The model itself runs where someone would notice that it did
    not: hooks, adapters, dropout, checkpointing, engines, a compiler.
    """
    if isinstance(model, HfllmForCausalLM) or hasattr(model, "get_base_model") or model.device.type != "cpu":
        return model
    if torch.compiler.is_compiling() or model.dtype not in EXACT:
        return model
    modules = list(model.modules())
    if not is_unobserved(*modules) or any(_differs(each, model.training) for each in modules):
        return model
    learner = _LEARNERS.get(model)
    if learner is None or not learner.is_of(model, modules):
        _LEARNERS.pop(model, None)
        with torch.inference_mode(False), torch.no_grad():
            learner = _LEARNERS[model] = _Learner(model, modules)
    if learner.form is None:
        return model
    if learner.form.training != model.training:
        learner.form.train(model.training)
    return learner.form


def _parameters(modules: list[nn.Module]) -> list[nn.Parameter | None]:
    return [parameter for module in modules for parameter in module._parameters.values()]


def _differs(module: nn.Module, is_training: bool) -> bool:
    """Return whether a module does what its form does not: checkpointing, or leaving out states by chance."""
    fields = vars(module)
    drops = is_training and (fields.get("attention_dropout") or (isinstance(module, nn.Dropout) and module.p))
    return bool(drops or fields.get("gradient_checkpointing"))


def _take_parameters(form: HfllmForCausalLM, native: nn.Module) -> bool:
    """Put the native parameters into a form over the same memory; return whether these are all of both."""

    def view(tensor: torch.Tensor) -> tuple:
        return tensor.data_ptr(), tensor.shape, tensor.stride()

    own = {view(each): each for each in native.parameters()}
    for module in form.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                # A part of a tensor, or a copy, is none.
                module._parameters[name] = own.get(view(parameter), parameter)
    return {*map(id, form.parameters())} == {*map(id, native.parameters())}


def _computes_by_token(form: HfllmForCausalLM) -> bool:
    """Return whether a form leaves out padding in training."""
    with torch.enable_grad():
        form.train()
        result = form.model.computes_by_token
    form.eval()
    return result


# ---- what has a form ----


def foreign_reason(model: "PreTrainedModel") -> str | None:
    """Return why a model that is not of the family has no form, or `None` if it has; its parts are not looked at."""
    name, kind = type(model).__name__, getattr(getattr(model, "config", None), "model_type", None)
    # A class that is registered or derived may have code of its own.
    if not type(model).__module__.startswith("transformers.models."):
        return f"{name} is not of the family, nor a class of transformers that converts to it"
    if kind not in FAMILIES:
        # Of Llava around one, the converted model is none of text alone either.
        return f"{name} is not of the family: model_type {kind!r} does not convert to it{missing_part(kind)}"
    causal = AutoModelForCausalLM._model_mapping
    if type(model.config) not in causal or causal[type(model.config)] is not type(model):
        return f"{name} is not the causal language model of its family"
    if reason := _config_of(model).reason:
        return f"{name} is not of the family: {reason}"
    if not ties_as_configured(model):
        return "its head and embeddings are not tied as its config says"
    sizes = {len(each.weight) for each in (model.get_input_embeddings(), model.get_output_embeddings())}
    if sizes != {_config_of(model).ours.vocab_size}:
        return "its head or embeddings have another size than its config says"
    return None


# Where the parts of a plain native model come from: not quantized, not adapted, not wrapped.
PLAIN = ("torch.nn.modules.", "transformers.models.", "transformers.pytorch_utils", "transformers.activations")
# Of these types the family's logits are the native model's, up to the order of sums.
EXACT = (torch.float32, torch.float64)


def changed_part(model: "PreTrainedModel") -> str | None:
    """Return which part of a native model differs from what its class and config say, or `None`."""
    for name, module in model.named_modules():
        if not type(module).__module__.startswith(PLAIN):
            library = type(module).__module__.partition(".")[0]
            return f"{name} is a {type(module).__name__} of {library}, not a plain layer"
        if name and "forward" in vars(module):
            return f"{name} has a forward of its own"
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter:
            return f"{name} is of type {type(parameter).__name__}, not a plain weight"
        # In half precision the classes round at other places, and greedy tokens differ now and then.
        if parameter.dtype not in EXACT:
            return f"{name} is in {parameter.dtype}: a native model is decoded as one of the family in float32"
    return None
