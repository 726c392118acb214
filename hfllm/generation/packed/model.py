"""The forward of a decoder without what training needs, over weights laid out for a few tokens at a time.

`generate` spends most of a small model's time between kernels: decorators, masks, modules, hooks. A larger one's goes
into reading weights, and there torch's default layout makes a run over two to sixteen tokens half again as slow as a
run over one. `PackedModel` calls kernels alone, projections that read the same states are one, and on a CPU weights
are packed for oneDNN, or rounded to int8 for drafts. Models of the family, in evaluation.

Shapes: B rows, Q new tokens of each, N = B * Q tokens, H query heads, K key-value heads, D head_dim, E hidden_size,
W columns of the cache that are looked at, R dimensions of a head that are turned, V vocabulary size.
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
from hfllm.models.modeling_hfllm import HfllmForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hfllm.generation.packed.ragged_cache import RaggedCache

# Elements of each matrix that are compared to see whether it has changed since it was copied; vectors are as a whole.
SAMPLE = 64
SCHEMES = ("exact", "int8")
# Scale types of rotary angles that do not depend on the length of the text.
FIXED_ROTARY = ("default", "linear", "llama3", "yarn")


class Output(NamedTuple):
    """What the loop reads of a model's output."""

    logits: torch.Tensor


def unsupported_reason(model: "PreTrainedModel") -> str | None:
    """Why a model cannot run over packed weights, or `None` if it can."""
    if not isinstance(model, HfllmForCausalLM):
        return f"{type(model).__name__} is not of the family (hfllm.from_native converts it)"
    if model.training:
        return "the model is in training mode (call eval())"
    if any(parameter.is_meta for parameter in model.parameters()):
        return "some of its weights are offloaded"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on"
    if model.config._attn_implementation != "sdpa":
        return f"attn_implementation={model.config._attn_implementation!r} is not 'sdpa'"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has hooks"
        if name.rpartition(".")[2].endswith(("_proj", "lm_head")) and type(module) is not nn.Linear:
            return f"{name} is a {type(module).__name__}, not a plain linear layer"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "its weights are on several devices"
    return None


_MADE: "WeakKeyDictionary[nn.Module, dict[str, PackedModel]]" = WeakKeyDictionary()


def packed_model(model: "PreTrainedModel", scheme: str = "exact") -> "PackedModel":
    """The model's packed form, made at the first call and again when its weights have changed.

    Args:
        model: of the family, in evaluation.
        scheme: `"exact"`, the model's own weights, or `"int8"`, rounded for drafts.

    Raises:
        InputError: where `unsupported_reason` names a reason.
    """
    reason = unsupported_reason(model)
    if reason:
        raise InputError(f"this model cannot decode over packed weights: {reason}")
    made = _MADE.setdefault(model, {})
    if scheme not in made or not made[scheme].is_current(model):
        # An older copy goes first, so that memory never holds both.
        made.pop(scheme, None)
        made[scheme] = PackedModel(model, scheme)
    return made[scheme]


class PackedModel:
    """A model of the family for decoding over a `RaggedCache`; called as the model is.

    Args:
        model: of the family, in evaluation.
        scheme: see `packed_model`. The copies take the weights' memory once more on a CPU, a quarter of it in int8,
            and nothing elsewhere, where the weights are used as they are.
    """

    def __init__(self, model: HfllmForCausalLM, scheme: str = "exact"):
        if scheme not in SCHEMES:
            raise InputError(f"scheme {scheme!r} is not one of {', '.join(SCHEMES)}")
        if scheme == "int8" and not has_int8(model.dtype, model.device):
            raise InputError("int8 drafts need a float32 model on an x86 processor; use another draft")
        # Never the model itself, which would then be kept by its own entry in `_MADE`.
        self.trunk, config, self.logit_scale = model.model, model.config, model.config.logit_scale
        self.sources = [(each, _version(each), each.data_ptr(), _sample(each)) for each in model.parameters()]

        def make(linears: Sequence[nn.Linear]) -> Projection:
            return joined(linears, int8=scheme == "int8")

        self.turns = interleaved_rotary(model)
        with torch.inference_mode(False), torch.no_grad():
            layers = model.model.layers[: config.num_hidden_layers]
            self.layers = [PackedLayer(layer, config, make, self.turns) for layer in layers]
            self.head = make([model.lm_head])
            self.norm = norm_of(model.model.norm)
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.tables: tuple[torch.Tensor, ...] | None = None

    def is_current(self, model: HfllmForCausalLM) -> bool:
        """Whether the weights are those that were copied.

        A change by `parameter.data` leaves no trace but the values: some of each are compared.
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
        """The same with its first layers only; nothing is copied."""
        shorter = object.__new__(PackedModel)
        shorter.__dict__.update(vars(self))
        shorter.layers = self.layers[:layers]
        return shorter

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        cache: "RaggedCache",
        logits_to_keep: int = 0,
        **unused: object,
    ) -> Output:
        """Logits (B, Q, V), or those of the last `logits_to_keep` tokens.

        Args:
            input_ids: (B, Q).
            attention_mask: (B, 1, Q, W), true where a token is seen; `None` where all are.
            position_ids: (B, Q).
            cache: knows where the tokens go.
        """
        rows, length = input_ids.shape
        states, rotation = self._embed(input_ids, position_ids, cache)
        states = states.flatten(0, 1)
        if attention_mask is not None:
            attention_mask = additive(attention_mask, self.heads // self.key_heads, states.dtype)
        for layer, kept in zip(self.layers, cache.layers, strict=False):
            states = layer(states, rows, rotation, attention_mask, kept)
        if logits_to_keep and logits_to_keep < length:
            states = states.view(rows, length, -1)[:, -logits_to_keep:].flatten(0, 1)
        logits = self.head(self.norm(states))
        if self.logit_scale != 1:
            logits = logits * self.logit_scale
        return Output(logits.view(rows, -1, logits.shape[-1]))

    def _embed(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, cache: "RaggedCache"
    ) -> tuple[torch.Tensor, Rotation | None]:
        """The first layer's input (B, Q, E), and how its heads are turned, if they are."""
        states = self.trunk.embed_tokens(input_ids)
        rotary = getattr(self.trunk, "rotary_emb", None)
        if rotary is None:
            return self.trunk._embed(states, position_ids)
        if rotary.rope_type not in FIXED_ROTARY:
            cosines, sines = (part.transpose(1, 2) for part in rotary(states, position_ids))
        else:
            tables = self._rotary_tables(states, rotary, cache.capacity)
            cosines, sines = (F.embedding(position_ids, table).unsqueeze(2) for table in tables)
        return states, self._turn(cosines, sines) if self.turns else (cosines, sines)

    def _rotary_tables(self, states: torch.Tensor, rotary: nn.Module, positions: int) -> tuple[torch.Tensor, ...]:
        """Cosines and sines of that many positions at least, each (positions, R)."""
        if self.tables is None or len(self.tables[0]) < positions:
            every = torch.arange(2 ** (positions - 1).bit_length(), device=states.device).unsqueeze(0)
            self.tables = tuple(part[0, 0].contiguous() for part in rotary(states, every))
        return self.tables

    def _turn(self, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        """As complex numbers (B * Q, H + 2K, D / 2), 1 for the values: one product turns all that there is.

        Of prompts (B * Q, 1, D / 2), which take no more memory for more heads.
        """
        half = cosines.shape[-1] // 2
        # The second halves: the sines of the first ones are negated (`HfllmRotaryEmbedding`).
        turns = torch.complex(cosines[..., half:], sines[..., half:]).flatten(0, 1)
        if cosines.shape[1] > 1:
            return turns
        stay = torch.ones_like(turns[:, :, :1])
        turned = self.heads + self.key_heads
        return torch.cat((turns.expand(-1, turned, -1), stay.expand(-1, self.key_heads, half)), dim=1)


def _version(parameter: nn.Parameter) -> int:
    return 0 if parameter.is_inference() else parameter._version


def _sample(parameter: nn.Parameter) -> torch.Tensor:
    flat = parameter.detach().flatten()
    if parameter.dim() == 1:
        return flat.clone()
    return flat[:: max(1, len(flat) // SAMPLE)].clone()
