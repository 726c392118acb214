"""The forward pass of a decoder, for inference only, over weights laid out for a few tokens at a time.

`generate` spends most of a small model's time between kernels: decorators, modules, hooks. A larger model's goes
into reading weights, where torch's default layout makes a pass over two to sixteen tokens 1.5 times as slow as a
pass over one. `PackedModel` calls only kernels, joins projections that read the same states, and on a CPU weights
are packed for oneDNN, or rounded to int8 for drafts. It takes models of the family in evaluation mode.

Shapes: B rows, Q new tokens of each, N = B * Q tokens, H query heads, K key-value heads, D head_dim, E hidden_size,
W visible columns of the cache, R rotated dimensions of a head, V vocabulary size.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F

from hfllm.errors import InputError
from hfllm.generation.packed.layer import PackedLayer, Rotation, additive, interleaved_rotary, norm_of
from hfllm.generation.packed.projections import Projection, has_int8, joined
from hfllm.models.family.attention_hfllm import signed
from hfllm.models.family.modeling_hfllm import HfllmForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hfllm.generation.packed.ragged_cache import RaggedCache
    from hfllm.models.family.configuration_hfllm import HfllmConfig

# Elements of each matrix compared to see whether it has changed since it was copied; vectors are compared whole.
SAMPLE = 64
SCHEMES = ("exact", "int8")
# Whose hooks stay on a model that was asked for hidden states once, and do nothing unless it is asked again.
CAPTURES_OUTPUTS = "transformers.utils.output_capturing"
# RoPE types whose angles do not depend on the length of the text.
FIXED_ROTARY = ("default", "linear", "llama3", "yarn")


class Output(NamedTuple):
    """The model output that the decoding loop reads."""

    logits: torch.Tensor


def unsupported_reason(model: "PreTrainedModel") -> str | None:
    """Return why a model cannot run over packed weights, or `None` if it can."""
    if hasattr(model, "get_base_model"):
        return "it is wrapped by PEFT (merge_and_unload() gives a plain model)"
    if not isinstance(model, HfllmForCausalLM):
        return f"{type(model).__name__} is not of the family (hfllm.from_native converts it)"
    if model.training:
        return "the model is in training mode (call eval())"
    if any(parameter.is_meta for parameter in model.parameters()):
        return "some of its weights are offloaded"
    if model.device.type not in ("cpu", "meta"):
        return f"packed weights serve a CPU's kernels, and it is on {model.device.type}"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on"
    if model.config._attn_implementation != "sdpa":
        return f"attn_implementation={model.config._attn_implementation!r} is not 'sdpa'"
    reason = _unsupported_field(model.config)
    if reason:
        return reason
    for name, module in model.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if any(getattr(hook, "__module__", None) != CAPTURES_OUTPUTS for hook in hooks):
            return f"{name or 'the model'} has hooks"
        if not name.rpartition(".")[2].endswith(("_proj", "lm_head")):
            continue
        if type(module) is not nn.Linear:
            library = type(module).__module__.partition(".")[0]
            return f"{name} is a {type(module).__name__} of {library}, not a plain linear layer"
        if type(module.weight) is not nn.Parameter:
            return f"{name} has weights of type {type(module.weight).__name__}, not plain ones"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "its weights are on several devices"
    return None


def _unsupported_field(config: "HfllmConfig") -> str | None:
    """Return which option of the family packed layers do not have, or `None`."""
    for kind in ("linear_attention", "chunked_attention"):
        if kind in config.layer_types:
            return f"it has layers of type {kind}"
    if config.kv_lora_rank is not None:
        return f"it has latent attention (kv_lora_rank={config.kv_lora_rank})"
    if config.rotary_types():
        return "its types of layers have rotary parameters of their own"
    if config.norm_placement not in ("pre", "post"):
        return f"norm_placement={config.norm_placement!r} is not 'pre' or 'post'"
    if config.qk_norm and config.qk_norm_scope != "head":
        return f"qk_norm_scope={config.qk_norm_scope!r} is not 'head'"
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name) is not None:
            return f"{name}={getattr(config, name)} is not None"
    return None


_MADE: "WeakKeyDictionary[nn.Module, dict[str, PackedModel]]" = WeakKeyDictionary()


def packed_model(model: "PreTrainedModel", scheme: str = "exact") -> "PackedModel":
    """Return the model's packed form, made at the first call and again when its weights have changed.

    Args:
        model: of the family, in evaluation mode.
        scheme: `"exact"`, the model's own weights, or `"int8"`, rounded for drafts.

    Raises:
        InputError: with the reason, if `unsupported_reason` gives one.
    """
    reason = unsupported_reason(model)
    if reason:
        raise InputError(f"this model cannot decode over packed weights: {reason}")
    made = _MADE.setdefault(model, {})
    if scheme not in made or not made[scheme].is_current(model):
        # An older copy is removed first, so that memory never holds both.
        made.pop(scheme, None)
        made[scheme] = PackedModel(model, scheme)
    return made[scheme]


class PackedModel:
    """A model of the family for decoding over a `RaggedCache`; called like the model.

    Args:
        model: of the family, in evaluation mode.
        scheme: see `packed_model`. On a CPU the copies take as much memory as the weights, a quarter of it in int8,
            elsewhere none, since the weights are used directly.
    """

    def __init__(self, model: HfllmForCausalLM, scheme: str = "exact"):
        if scheme not in SCHEMES:
            raise InputError(f"scheme {scheme!r} is not one of {', '.join(SCHEMES)}")
        if scheme == "int8" and not has_int8(model.dtype, model.device):
            raise InputError("int8 drafts need a float32 model on an x86 processor; use another draft")
        # Never keep the model itself, which its own entry in `_MADE` would then keep alive.
        self.trunk, config, self.logit_scale = model.model, model.config, model.config.logit_scale
        self.sources = [(each, _version(each), each.data_ptr(), _sample(each)) for each in model.parameters()]

        def make(linears: Sequence[nn.Linear]) -> Projection:
            return joined(linears, int8=scheme == "int8")

        self.turns = interleaved_rotary(model)
        with torch.inference_mode(False), torch.no_grad():
            layers = model.model.layers[: config.num_hidden_layers]
            self.layers = [PackedLayer(layer, config, make, self.turns) for layer in layers]
            self.kinds = list(dict.fromkeys(layer.kind for layer in self.layers))
            self.head = make([model.lm_head])
            self.norm = norm_of(model.model.norm)
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.tables: tuple[torch.Tensor, ...] | None = None

    def is_current(self, model: HfllmForCausalLM) -> bool:
        """Return whether the weights are still those that were copied.

        A change by `parameter.data` shows only in the values: some of each matrix are compared.
        """
        now = list(model.parameters())
        return len(now) == len(self.sources) and all(
            each is parameter
            and each.data_ptr() == pointer
            and _version(each) == version
            and torch.equal(_sample(each), sample)
            for each, (parameter, version, pointer, sample) in zip(now, self.sources, strict=True)
        )

    def first(self, layers: int) -> "PackedModel":
        """Return the same model with only its first layers; nothing is copied."""
        shorter = object.__new__(PackedModel)
        shorter.__dict__.update(vars(self))
        shorter.layers = self.layers[:layers]
        return shorter

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None,
        position_ids: torch.Tensor,
        cache: "RaggedCache",
        logits_to_keep: int = 0,
        **unused: object,
    ) -> Output:
        """Return logits (B, Q, V), or those of the last `logits_to_keep` tokens.

        Args:
            input_ids: (B, Q).
            attention_mask: (B, 1, Q, W), true where a token is visible, or one for each type of layer; `None` if all
                are visible.
            position_ids: (B, Q).
            cache: the cache, which knows where to store the tokens.
        """
        rows, length = input_ids.shape
        states, rotation = self._embed(input_ids, position_ids, cache)
        states = states.flatten(0, 1)
        masks = attention_mask if isinstance(attention_mask, dict) else dict.fromkeys(self.kinds, attention_mask)
        groups = self.heads // self.key_heads
        masks = {kind: mask if mask is None else additive(mask, groups, states.dtype) for kind, mask in masks.items()}
        for layer, kept in zip(self.layers, cache.layers, strict=False):
            states = layer(states, rows, rotation, masks[layer.kind], kept)
        if logits_to_keep and logits_to_keep < length:
            states = states.view(rows, length, -1)[:, -logits_to_keep:].flatten(0, 1)
        logits = self.head(self.norm(states))
        if self.logit_scale != 1:
            logits = logits * self.logit_scale
        return Output(logits.view(rows, -1, logits.shape[-1]))

    def _embed(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, cache: "RaggedCache"
    ) -> tuple[torch.Tensor, Rotation | None]:
        """Return the first layer's input (B, Q, E), and the rotation of its heads if there is one."""
        states = self.trunk.embed_tokens(input_ids)
        rotary = getattr(self.trunk, "rotary_emb", None)
        if rotary is None:
            return self.trunk._embed(states, position_ids)
        if rotary.rope_type not in FIXED_ROTARY:
            cosines, sines = (part.unsqueeze(2) for part in _rotation(rotary, states, position_ids))
        else:
            tables = self._rotary_tables(states, rotary, cache.capacity)
            cosines, sines = (F.embedding(position_ids, table).unsqueeze(2) for table in tables)
        return states, self._turn(cosines, sines) if self.turns else (cosines, sines)

    def _rotary_tables(self, states: torch.Tensor, rotary: nn.Module, positions: int) -> tuple[torch.Tensor, ...]:
        """Return cosines and signed sines of at least that many positions, each (positions, R)."""
        if self.tables is None or len(self.tables[0]) < positions:
            every = torch.arange(2 ** (positions - 1).bit_length(), device=states.device).unsqueeze(0)
            self.tables = tuple(part[0].contiguous() for part in _rotation(rotary, states, every))
        return self.tables

    def _turn(self, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        """Return rotations as complex numbers (B * Q, H + 2K, D / 2), 1 for values: one product rotates all heads.

        For prompts (B * Q, 1, D / 2), to save memory.
        """
        half = cosines.shape[-1] // 2
        # Take the second halves: the sines of the first halves are negated.
        turns = torch.complex(cosines[..., half:], sines[..., half:]).flatten(0, 1)
        if cosines.shape[1] > 1:
            return turns
        stay = torch.ones_like(turns[:, :, :1])
        turned = self.heads + self.key_heads
        return torch.cat((turns.expand(-1, turned, -1), stay.expand(-1, self.key_heads, half)), dim=1)


def _rotation(
    rotary: nn.Module, states: torch.Tensor, position_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and signed sines, each (B, Q, R), as `rotate_heads` takes them."""
    cosines, sines = rotary(states, position_ids)
    return cosines, signed(sines)


def _version(parameter: nn.Parameter) -> int:
    return 0 if parameter.is_inference() else parameter._version


def _sample(parameter: nn.Parameter) -> torch.Tensor:
    flat = parameter.detach().flatten()
    if parameter.dim() == 1:
        return flat.clone()
    return flat[:: max(1, len(flat) // SAMPLE)].clone()
