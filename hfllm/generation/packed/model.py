"""A decoder's forward pass for inference alone: the cache, the projections, the layers, and the model of them.

`generate` spends most of a small model's time between kernels: decorators, modules, hooks. A larger model's goes
into reading weights, where torch's default layout makes a pass over two to sixteen tokens 1.5 times as slow as a
pass over one. `PackedModel` calls only kernels, joins projections of the same states, and on a CPU weights
are packed for oneDNN, or rounded to int8 for drafts. It takes models of the family in evaluation mode, and native ones
of families that convert to it.

Shapes: B rows, Q new tokens of each, N = B * Q tokens, H query heads, K key-value heads, D head_dim, E hidden_size,
W visible columns of the cache, R rotated dimensions of a head, V vocabulary size.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import SiLUActivation
from transformers.cache_utils import Cache, CacheLayerMixin

from hfllm.errors import InputError, check_choice, refuse_if
from hfllm.generation.packed.forms import (
    Weights,
    changed_part,
    family_config,
    family_form,
    foreign_reason,
    named_parts,
)
from hfllm.models.family.attention_hfllm import rotate_heads, signed
from hfllm.models.family.layers_hfllm import HfllmMLP, HfllmRMSNorm
from hfllm.models.family.modeling_hfllm import HfllmDecoderLayer, HfllmForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hfllm.models.family.configuration_hfllm import HfllmConfig


# ---- ragged cache ----
#
# A key-value cache whose rows have different lengths.
#
# A row's token at position t is stored in column t. To roll a row back, only its length is reduced: later columns are
# masked by the query's position, and overwritten when the row reaches them again. Nothing is copied or moved,
# however many tokens each row accepts, and the memory is allocated once.
#
# Shapes: B rows, Q new tokens of each, K key-value heads, D head_dim, F numbers of a token's keys and values, C
# columns.


class RaggedLayer(CacheLayerMixin):
    """Keys and values of one layer, side by side; allocated at the first update, when their sizes are known."""

    is_sliding = False
    is_compileable = True

    def __init__(self, cache: "RaggedCache"):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Allocate memory for states of shape (B, K, Q, D)."""
        self.allocate(keys, len(keys), *((part.shape[1], part.shape[3]) for part in (keys, values)))

    def allocate(
        self, like: torch.Tensor, rows: int, key_sizes: tuple[int, int], value_sizes: tuple[int, int]
    ) -> None:
        """Allocate memory for this number and size of heads, on the device and in the dtype of `like`."""
        self.sizes = key_sizes, value_sizes
        # Zeros: a masked column with a NaN would still spoil the sum.
        self._look(like.new_zeros(rows, self.cache.capacity, sum(heads * size for heads, size in self.sizes)))
        self.is_initialized = True

    def _look(self, states: torch.Tensor) -> None:
        """Make the views for writing (by cell) and reading, (B, K, C, D), once and not at every token."""
        self.states, self.cells = states, states.flatten(0, 1)
        keys, values = (heads * size for heads, size in self.sizes)
        self.key_cells, self.value_cells = self.cells.narrow(1, 0, keys), self.cells.narrow(1, keys, values)
        self.keys = states.narrow(2, 0, keys).unflatten(-1, self.sizes[0]).transpose(1, 2)
        self.values = states.narrow(2, keys, values).unflatten(-1, self.sizes[1]).transpose(1, 2)

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows but these."""
        self._look(self.states[rows])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store (B, K, Q, D) in the current columns of the cache; return all (B, K, width, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        at = self.cache.cells.to(self.states.device)
        self.key_cells.index_copy_(0, at, key_states.transpose(1, 2).flatten(2).flatten(0, 1))
        self.value_cells.index_copy_(0, at, value_states.transpose(1, 2).flatten(2).flatten(0, 1))
        return self.visible()

    def store(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store concatenated keys and values, (B * Q, F), in memory already allocated."""
        self.cells.index_copy_(0, self.cache.cells, states)
        return self.visible()

    def visible(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of the visible columns, (B, K, width, D)."""
        width = self.cache.width
        return self.keys.narrow(2, 0, width), self.values.narrow(2, 0, width)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.width, 0

    def get_seq_length(self) -> int:
        return self.cache.width

    def get_max_length(self) -> int:
        return self.cache.capacity


class RaggedCache(Cache):
    """A cache with one `RaggedLayer` per layer of a model.

    Args:
        num_layers: layers of the model.
        capacity: number of columns C: the longest sequence with its drafts.
    """

    def __init__(self, num_layers: int, capacity: int):
        self.capacity, self.width = capacity, 0
        self.cells: torch.Tensor | None = None
        super().__init__(layers=[RaggedLayer(self) for _ in range(num_layers)])

    def set_cells(self, columns: torch.Tensor, width: int) -> None:
        """Set where the next tokens are stored: `columns` (B, Q), and how many columns are visible."""
        cells = columns
        if len(columns) > 1:
            cells = torch.arange(len(columns), device=columns.device).unsqueeze(1) * self.capacity + columns
        self.cells, self.width = cells.flatten(), width

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows but these."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keep(rows)

    def put(self, rows: torch.Tensor, other: "RaggedCache") -> None:
        """Overwrite the first columns of these rows by the rows of another cache."""
        for layer, its in zip(self.layers, other.layers, strict=True):
            if layer.is_initialized:
                layer.states[:, : other.capacity].index_copy_(0, rows, its.states)

    def part(self, begin: int, end: int) -> "RaggedCache":
        """Return a cache of the same memory for the rows from `begin` to `end` alone; all memory is allocated."""
        part = RaggedCache(len(self.layers), self.capacity)
        for own, layer in zip(part.layers, self.layers, strict=True):
            own.sizes, own.is_initialized = layer.sizes, True
            own._look(layer.states[begin:end])
        return part


# ---- projections ----
#
# Linear layers as plain functions over weights laid out for a few tokens at a time.
#
# Shapes: N tokens, I inputs, O outputs of all joined layers.


Function = Callable[[torch.Tensor], torch.Tensor]
# Takes (N, I) and, optionally, (N, O) to add to the result.
Projection = Callable[..., torch.Tensor]

# Smaller weights stay in the processor's cache, where the plain product has less overhead.
PACKED_FROM = 2**18
# The number of tokens in oneDNN's layout of weights; others work too.
PACKED_TOKENS = 8
LARGEST_INT8 = 127
FBGEMM = "fbgemm_linear_int8_weight_fp32_activation"


def joined(linears: Sequence[nn.Linear], int8: bool = False) -> Projection:
    """Join layers with the same input into one function, (N, I) to (N, O), with concatenated outputs.

    Its second argument, (N, O) if it is given, is added to the result, by some kernels in the same pass. On a CPU the
    weights are copied: joined, packed for oneDNN where they are large, or rounded to int8 with a scale per row.
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
    # As inputs times outputs a single row is multiplied in two thirds of the time, and many in the same.
    transposed = weight.t().contiguous()

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
    """Return a projection with int8 weights and a scale per row; inputs are quantized at every call."""
    is_fast = hasattr(torch, FBGEMM)
    scale = weight.abs().amax(dim=1) / (largest_weight() if is_fast else LARGEST_INT8)
    # A row of zeros has no magnitude, and any scale stores it.
    scale = scale.masked_fill(scale == 0, 1.0)
    values = (weight / scale[:, None]).round().to(torch.int8)
    product = _fbgemm(values) if is_fast else _int_mm(values)

    def function(states: torch.Tensor) -> torch.Tensor:
        output = product(states).mul_(scale)
        return output if bias is None else output.add_(bias)

    return added(function)


@cache
def largest_weight() -> int:
    """Return the largest weight in int8 whose products the fast kernels add without loss.

    Processors without VNNI add two products of an input and a weight in 16 bits, so half of the range is left there
    (a matrix of normal numbers was off by 14 % with all of it).
    """
    tokens = 64
    found = _fbgemm(torch.full((8, tokens), LARGEST_INT8, dtype=torch.int8))(torch.ones(1, tokens))
    return LARGEST_INT8 if found.min() > 0.99 * tokens * LARGEST_INT8 else LARGEST_INT8 // 2


def _fbgemm(values: torch.Tensor) -> Function:
    """Return the faster kernels, one scale for all inputs; torch warns at first use about their removal."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fbgemm.* is deprecated", UserWarning)
        packed, nothing = torch.fbgemm_pack_quantized_matrix(values), torch.zeros(len(values))
        multiply, settings = getattr(torch, FBGEMM), (values.sum(1, dtype=torch.int32), 1.0, 0, nothing)
        multiply(torch.zeros(1, values.shape[1]), values, packed, *settings)
    return lambda states: multiply(states, values, packed, *settings)


def _int_mm(values: torch.Tensor) -> Function:
    """Return the plain integer product, with a scale per token: half as fast, but not deprecated."""
    values = values.t()

    def product(states: torch.Tensor) -> torch.Tensor:
        step = states.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / LARGEST_INT8
        return torch._int_mm((states / step).round_().to(torch.int8), values).float().mul_(step)

    return product


# ---- layer ----
#
# One layer of a packed model: direct kernel calls on weights joined and laid out for them.
#
# Shapes: B rows, Q new tokens of each, N = B * Q tokens, H query heads, K key-value heads, D head_dim, E hidden_size,
# W visible columns of the cache, R rotated dimensions of a head.


# Rotations of all tokens: factors of complex pairs, or cosines and signed sines, both (B, Q, 1, R).
Rotation = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class PackedLayer:
    """`HfllmDecoderLayer.forward` over tokens (N, E), for every option of the family.

    Args:
        layer: the layer to pack.
        config: the model's config.
        make: function for joining linear layers into one function.
        turns: whether heads are rotated as complex numbers, see `interleaved_rotary`.
    """

    def __init__(
        self,
        layer: HfllmDecoderLayer,
        config: "HfllmConfig",
        make: Callable[[Sequence[nn.Linear]], Projection],
        turns: bool,
    ):
        attention = layer.self_attn
        self.kind, self.use_rope = layer.layer_type, attention.use_rope
        self.is_post, self.is_parallel = layer.norm_placement == "post", layer.parallel_block
        self.input_norm = norm_of(layer.input_layernorm)
        self.mlp_norm = None
        if not (layer.parallel_block and layer.shared_norm):
            self.mlp_norm = norm_of(layer.post_attention_layernorm)
        self.heads, self.key_heads, self.size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.scaling = attention.scaling
        query_and_key = [attention.q_proj, attention.k_proj]
        if turns:
            query_and_key = [paired(linear, config.head_dim) for linear in query_and_key]
        self.qkv = make([*query_and_key, attention.v_proj])
        self.o_proj = make([attention.o_proj])
        self.q_norm = None if attention.q_norm is None else norm_of(attention.q_norm)
        self.k_norm = None if attention.k_norm is None else norm_of(attention.k_norm)
        self.mlp = mlp_of(layer.mlp, make)

    def __call__(
        self,
        states: torch.Tensor,
        rows: int,
        rotation: Rotation | None,
        mask: torch.Tensor | None,
        cache: RaggedLayer,
    ) -> torch.Tensor:
        if self.is_post:
            attended = self.input_norm(self._attention(states, states, rows, rotation, mask, cache))
            return self.mlp_norm(self.mlp(attended, attended))
        normed = self.input_norm(states)
        attended = self._attention(normed, states, rows, rotation, mask, cache)
        if self.is_parallel:
            return self.mlp(normed if self.mlp_norm is None else self.mlp_norm(states), attended)
        return self.mlp(self.mlp_norm(attended), attended)

    def _attention(
        self,
        states: torch.Tensor,
        onto: torch.Tensor,
        rows: int,
        rotation: Rotation | None,
        mask: torch.Tensor | None,
        cache: RaggedLayer,
    ) -> torch.Tensor:
        heads, key_heads, size = self.heads, self.key_heads, self.size
        qkv = self.qkv(states)  # (N, (H + 2K) * D)
        self._turn(qkv, rows, rotation if self.use_rope else None)
        if not cache.is_initialized:
            cache.allocate(qkv, rows, (key_heads, size), (key_heads, size))
        key, value = cache.store(qkv[:, heads * size :])
        # The queries of heads with shared keys are stacked: (B, K, H / K * Q, D).
        query, groups, length = qkv[:, : heads * size], heads // key_heads, len(qkv) // rows
        if length == 1:
            query = query.view(rows, key_heads, groups, size)
        else:
            query = query.view(rows, length, key_heads, groups, size).permute(0, 2, 3, 1, 4).flatten(2, 3)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scaling)
        if length > 1:
            output = output.unflatten(2, (groups, length)).permute(0, 3, 1, 2, 4)
        return self.o_proj(output.reshape(rows * length, heads * size), onto)

    def _turn(self, qkv: torch.Tensor, rows: int, rotation: Rotation | None) -> None:
        """Normalize and rotate queries and keys, in place."""
        heads, key_heads, size = self.heads, self.key_heads, self.size
        if isinstance(rotation, torch.Tensor):
            pairs = torch.view_as_complex(qkv.view(len(qkv), heads + 2 * key_heads, size // 2, 2))
            (pairs[:, : heads + key_heads] if rotation.shape[1] == 1 else pairs).mul_(rotation)
            return
        qk = qkv.view(rows, -1, heads + 2 * key_heads, size)[:, :, : heads + key_heads]
        if self.q_norm is not None:
            qk.copy_(torch.cat((self.q_norm(qk[:, :, :heads]), self.k_norm(qk[:, :, heads:])), dim=2))
        if rotation is not None:
            qk.copy_(rotate_heads(qk, *rotation))


def interleaved_rotary(model: HfllmForCausalLM) -> bool:
    """Return whether a head's halves are stored as interleaved real and imaginary parts.

    Rotating them is then one product of complex numbers. It needs copies of the weights in this order, as there are on
    a CPU, and heads rotated as a whole and not normalized.
    """
    rotary, config = getattr(model.model, "rotary_emb", None), model.config
    if rotary is None or config.qk_norm or model.device.type != "cpu":
        return False
    return 2 * len(rotary.inv_freq) == config.head_dim and model.dtype in (torch.float32, torch.float64)


def paired(linear: nn.Linear, size: int) -> nn.Linear:
    """Return a copy whose outputs i and i + size / 2 of each head of that size are adjacent."""

    def order(tensor: torch.Tensor) -> nn.Parameter:
        return nn.Parameter(tensor.unflatten(0, (-1, 2, size // 2)).transpose(1, 2).flatten(0, 2), requires_grad=False)

    copy = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    copy.weight = order(linear.weight)
    if linear.bias is not None:
        copy.bias = order(linear.bias)
    return copy


def norm_of(norm: nn.Module) -> Function:
    """Return a norm as a function of its input alone."""
    if type(norm) is not HfllmRMSNorm or norm.unit_offset or norm.weight.dtype != torch.float32:
        return norm
    shape, eps = norm.weight.shape, norm.eps
    if norm.weight.device.type != "cpu":
        return lambda states: torch.rms_norm(states, shape, norm.weight, eps)
    # On a CPU `rms_norm` is eight kernels. x w sqrt(E) / sqrt(sum(x^2) + E eps) is the same in four.
    weight, floor = norm.weight.detach() * shape[0] ** 0.5, norm.weight.new_tensor((shape[0] * eps) ** 0.5)
    length = torch.linalg.vector_norm
    return lambda states: (states * weight).div_(torch.hypot(length(states, dim=-1, keepdim=True), floor))


def mlp_of(mlp: nn.Module, make: Callable[[Sequence[nn.Linear]], Projection]) -> Projection:
    """Return an MLP as a function of tokens (N, E) and of a summand; a mixture of experts is not changed."""
    if type(mlp) is not HfllmMLP:
        return added(mlp)
    activate = F.silu if isinstance(mlp.act_fn, (nn.SiLU, SiLUActivation)) else mlp.act_fn
    down = make([mlp.down_proj])
    if not mlp.is_gated:
        up = make([mlp.up_proj])
        return lambda states, onto: down(activate(up(states)), onto)
    both, width = make([mlp.gate_proj, mlp.up_proj]), mlp.gate_proj.out_features

    def gated(states: torch.Tensor, onto: torch.Tensor) -> torch.Tensor:
        gate, up = both(states).split(width, dim=-1)
        return down(activate(gate).mul_(up), onto)

    return gated


def additive(mask: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the additive mask for scores of stacked queries: (B, 1, Q, W) to (B, 1, groups * Q, W)."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    return bias.repeat(1, 1, groups, 1) if groups > 1 else bias


# ---- model ----


SCHEMES = ("exact", "int8")
# Whose hooks stay on a model after one request for hidden states, and do nothing until the next one.
CAPTURES_OUTPUTS = "transformers.utils.output_capturing"
# RoPE types whose angles do not depend on the length of the text.
FIXED_ROTARY = ("default", "linear", "llama3", "yarn")


class Output(NamedTuple):
    """The model output for the decoding loop: logits (B, Q, V), and the head's input (B, Q, E)."""

    logits: torch.Tensor
    states: torch.Tensor


def unsupported_reason(model: "PreTrainedModel") -> str | None:
    """Return why a model cannot run over packed weights, or `None` if it can."""
    if hasattr(model, "get_base_model"):
        return "it is wrapped by PEFT (merge_and_unload() gives a plain model)"
    is_native = not isinstance(model, HfllmForCausalLM)
    if is_native and (reason := foreign_reason(model)):
        return reason
    if model.training:
        return "the model is in training mode (call eval())"
    parts = named_parts(model)
    weights = [each for _, part in parts for each in part._parameters.values() if each is not None]
    devices = {weight.device for weight in weights}
    if any(device.type == "meta" for device in devices):
        return "some of its weights are offloaded"
    device = model.device.type
    if device != "cpu":
        return f"packed weights serve a CPU's kernels, and it is on {device}"
    if torch.is_autocast_enabled(device):
        return "autocast is on"
    if model.config._attn_implementation != "sdpa":
        return f"attn_implementation={model.config._attn_implementation!r} is not 'sdpa'"
    if reason := _unsupported_field(family_config(model)):
        return reason
    for name, module in parts:
        if (module._forward_hooks or module._forward_pre_hooks) and _has_hooks(module):
            return f"{name or 'the model'} has hooks"
        if is_native or not name.endswith(("_proj", "lm_head")):
            continue
        if type(module) is not nn.Linear:
            library = type(module).__module__.partition(".")[0]
            return f"{name} is a {type(module).__name__} of {library}, not a plain linear layer"
        if type(module.weight) is not nn.Parameter:
            return f"{name} has weights of type {type(module.weight).__name__}, not plain ones"
    if is_native and (reason := changed_part(model)):
        return reason
    if len(devices) > 1:
        return "its weights are on several devices"
    return None


def _has_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks, but for those that capture outputs for transformers."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", None) != CAPTURES_OUTPUTS for hook in hooks)


def _unsupported_field(config: "HfllmConfig") -> str | None:
    """Return an option of the family unsupported by packed layers, or `None`."""
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
        model: of the family, or a native one that converts to it, in evaluation mode.
        scheme: `"exact"`, the model's own weights, or `"int8"`, rounded for drafts.
    """
    reason = unsupported_reason(model)
    refuse_if(reason, f"this model cannot decode over packed weights: {reason}")
    copies = _MADE.setdefault(model, {})
    if scheme in copies and not copies[scheme].is_current(model):
        # Older copies are removed first: memory never holds both.
        copies.clear()
    form = family_form(model)
    if scheme not in copies or copies[scheme].trunk is not form.model:
        copies[scheme] = PackedModel(form, scheme, model)
    return copies[scheme]


def release(model: "PreTrainedModel") -> None:
    """Free the packed forms of a model that is about to change: the next call makes new ones."""
    _MADE.pop(model, None)


class PackedModel:
    """A model of the family for decoding over a `RaggedCache`; called like the model.

    Args:
        model: of the family, in evaluation mode.
        scheme: see `packed_model`. On a CPU the copies take as much memory as the weights, a quarter of it in int8,
            elsewhere none, since the weights are used directly.
        source: the native model whose weights these are, if there is one: where they change.

    Attributes:
        config: of the family, also for a native model.
    """

    def __init__(self, model: HfllmForCausalLM, scheme: str = "exact", source: "PreTrainedModel | None" = None):
        check_choice(f"scheme {scheme!r} is not one of", scheme, SCHEMES)
        if scheme == "int8" and not has_int8(model.dtype, model.device):
            raise InputError("int8 drafts need a float32 model on an x86 processor; use another draft")
        # Never keep the model itself, which its own entry in `_MADE` would then keep alive.
        self.trunk, self.config, self.logit_scale = model.model, model.config, model.config.logit_scale
        self.weights, config = Weights(model if source is None else source), model.config

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

    def is_current(self, model: "PreTrainedModel") -> bool:
        """Return whether the weights are still the copied ones."""
        return self.weights.are_those_of(model)

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
        cache: RaggedCache,
        logits_to_keep: int = 0,
        **unused: object,
    ) -> Output:
        """Return logits (B, Q, V), or only of the last `logits_to_keep` tokens.

        Args:
            input_ids: (B, Q).
            attention_mask: (B, 1, Q, W), true where a token is visible, or one per type of layer; `None` if all
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
        for layer, layer_cache in zip(self.layers, cache.layers, strict=False):
            states = layer(states, rows, rotation, masks[layer.kind], layer_cache)
        if logits_to_keep and logits_to_keep < length:
            states = states.view(rows, length, -1)[:, -logits_to_keep:].flatten(0, 1)
        states = self.norm(states)
        logits = self.head(states)
        if self.logit_scale != 1:
            logits = logits * self.logit_scale
        return Output(*(part.view(rows, -1, part.shape[-1]) for part in (logits, states)))

    def _embed(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, cache: RaggedCache
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
        """Return cosines and signed sines of at least this many positions, both (positions, R)."""
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
    """Return cosines and signed sines, both (B, Q, R), in the form of `rotate_heads`."""
    cosines, sines = rotary(states, position_ids)
    return cosines, signed(sines)
