"""Embeddings, norms and MLPs of the hfllm family, and when they may save memory.

This file imports only torch, transformers and files next to it, and is uploaded to the Hub with modeling_hfllm.py.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as every_module
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN, SiLUActivation

from .configuration_hfllm import HfllmConfig

# ---- layers ----


class HfllmEmbedding(nn.Embedding):
    """Token embeddings times `embed_scale`, the config's `embedding_multiplier`.

    The factor is first rounded to the weights' precision, as in Gemma. PEFT reads it by this name.
    """

    def __init__(self, config: HfllmConfig):
        super().__init__(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_scale = float(config.embedding_multiplier)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        embeddings = super().forward(input_ids)
        if self.embed_scale == 1:
            return embeddings
        # On the CPU, as a GPU takes one number from there without waiting.
        return embeddings * torch.tensor(self.embed_scale, dtype=embeddings.dtype, device="cpu")


class HfllmScore(nn.Linear):
    """A head for scores, in its weights' precision within autocast: in bf16 near scores would be equal."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        kind = states.device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return super().forward(states)
        with torch.autocast(kind, enabled=False):
            return super().forward(states.to(self.weight.dtype))


class HfllmPositionEmbedding(nn.Embedding):
    """Learned absolute positions: a finite table, from (B, S) to (B, S, E)."""

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return super().forward(position_ids)
        try:
            return super().forward(position_ids)
        except IndexError:
            check_positions(position_ids, self.num_embeddings)
            raise


def check_positions(position_ids: torch.Tensor, size: int) -> None:
    """Raise a ValueError if a position is outside a table of this size. On a GPU this waits for the positions."""
    lowest, highest = (int(end) for end in position_ids.aminmax())
    if lowest < 0 or highest >= size:
        raise ValueError(
            f"position {min(lowest, 0) or highest} is outside the table of learned positions, which holds 0 to "
            f"{size - 1} (max_position_embeddings={size})"
        )


def rms_norm(states: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool) -> torch.Tensor:
    """Return `states / sqrt(mean(states^2) + eps) * weight`, normalized in fp32 at least.

    The result is rounded to the precision of `states` before the weights are multiplied, as in Llama. With
    `unit_offset` the factor is `1 + weight`, and it is multiplied before, as in Gemma.
    """
    if not unit_offset and states.dtype == weight.dtype == torch.float32:
        # Nothing to round: the same numbers in one call.
        return nn.functional.rms_norm(states, weight.shape, weight, eps)
    if not unit_offset:
        return weight * nn.functional.rms_norm(states, weight.shape, eps=eps)
    dtype = torch.promote_types(states.dtype, torch.float32)
    normed = nn.functional.rms_norm(states.to(dtype), weight.shape, 1.0 + weight.to(dtype), eps)
    return normed.to(states.dtype)


class _RMSNorm(torch.autograd.Function):
    """`rms_norm`, saving only its input for the backward pass."""

    @staticmethod
    def forward(ctx, states, weight, eps, unit_offset):
        ctx.save_for_backward(states, weight)
        ctx.eps, ctx.unit_offset = eps, unit_offset
        return rms_norm(states, weight, eps, unit_offset)

    @staticmethod
    def backward(ctx, grad):
        states, weight = ctx.saved_tensors
        # Elsewhere this kernel would be no gain, or round; and it cannot be derived again.
        is_fp32 = states.device.type == "cpu" and states.dtype == weight.dtype == grad.dtype == torch.float32
        if is_fp32 and not torch.is_grad_enabled():
            factor = 1.0 + weight if ctx.unit_offset else weight
            return *_rms_norm_gradients(grad, states, factor, ctx.eps, ctx.needs_input_grad[1]), None, None
        dtypes = states.dtype, weight.dtype
        dtype = torch.promote_types(states.dtype, torch.float32)
        states, weight, grad = states.to(dtype), weight.to(dtype), grad.to(dtype)
        inverse = torch.rsqrt(states.square().mean(-1, keepdim=True) + ctx.eps)
        normed, grad_states, grad_weight = states * inverse, None, None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed).reshape(-1, weight.shape[0]).sum(0).to(dtypes[1])
        if ctx.needs_input_grad[0]:
            grad = grad * (1.0 + weight if ctx.unit_offset else weight)
            along = (grad * normed).mean(-1, keepdim=True)
            grad_states = (torch.addcmul(grad, normed, along, value=-1) * inverse).to(dtypes[0])
        return grad_states, grad_weight, None, None


def _rms_norm_gradients(grad, states, factor, eps, trains_weight):
    """Return the gradients (..., E) of the states and (E,) of the factor, by torch's one kernel for layer norms.

    A layer norm whose mean is 0 differs in one term, subtracted there and added here: the mean of `grad * factor`.
    """
    size = factor.shape[0]
    length = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
    inverse = length.square_().div_(size).add_(eps).rsqrt_()
    given, needed = (torch.zeros_like(inverse), inverse, factor, None), [True, trains_weight, False]
    grad_states, grad_factor, _ = torch.ops.aten.native_layer_norm_backward(grad, states, [size], *given, needed)
    mean = torch.mv(grad.reshape(-1, size), factor / size).view(inverse.shape)
    return grad_states.addcmul_(mean, inverse), grad_factor


class HfllmRMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` (Zhang & Sennrich 2019, equation 4). See `rms_norm`."""

    def __init__(self, size: int, eps: float, unit_offset: bool = False):
        super().__init__()
        self.unit_offset = unit_offset
        self.weight = nn.Parameter(torch.zeros(size) if unit_offset else torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normalize = _RMSNorm.apply if saves_memory() else rms_norm
        return normalize(hidden_states, self.weight, self.eps, self.unit_offset)


def build_norm(config: HfllmConfig, size: int) -> nn.Module:
    """Return the norm chosen by the config, over the last dimension, of this size."""
    if config.norm_type == "rmsnorm":
        return HfllmRMSNorm(size, config.norm_eps, config.norm_unit_offset)
    return nn.LayerNorm(size, eps=config.norm_eps, bias=config.norm_bias)


def layer_norms(config: HfllmConfig, layer_type: str) -> tuple[str, list[str]]:
    """Return where a layer's norms stand, and their names: of OLMo 2 and Gemma 2 where outputs are normalized.

    Layers of linear attention normalize their inputs, also among layers with normalized outputs (OLMo Hybrid).
    """
    if config.norm_placement == "output" and layer_type != "linear_attention":
        return "output", ["post_attention_layernorm", "post_feedforward_layernorm"]
    if config.parallel_block and config.shared_norm:
        return "pre", ["input_layernorm"]
    names = ["input_layernorm", "post_attention_layernorm"]
    if config.norm_placement == "both":
        return "both", [*names, "pre_feedforward_layernorm", "post_feedforward_layernorm"]
    return "post" if config.norm_placement == "post" else "pre", names


class _GatedDown(torch.autograd.Function):
    """`linear(silu(gate) * up, weight, bias)`, saving only its inputs for the backward pass."""

    @staticmethod
    def forward(ctx, up, gate, weight, bias):
        ctx.save_for_backward(up, gate, weight, bias)
        return nn.functional.linear(nn.functional.silu(gate).mul_(up), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        up, gate, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Somebody derives the gradients again.
            output = nn.functional.linear(nn.functional.silu(gate) * up, weight, bias)
            return _gradients(output, (up, gate, weight, bias), ctx.needs_input_grad, grad)
        activated, inner = nn.functional.silu(gate), grad @ weight
        grad_weight, grad_bias = None, None
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[2]:
            grad_weight = rows.t() @ (activated * up).reshape(-1, weight.shape[1])
        if ctx.needs_input_grad[3]:
            grad_bias = rows.sum(0)
        grad_up = activated.mul_(inner)
        return grad_up, torch.ops.aten.silu_backward(inner.mul_(up), gate), grad_weight, grad_bias


class HfllmMLP(nn.Module):
    """`down(act(gate(x)) * up(x))` when gated, `down(act(up(x)))` when plain.

    Attributes:
        recompute: in training, save only the outputs of `gate_proj` and `up_proj` for the backward pass, and compute
            the input of `down_proj` from them again: the same gradients in half of the memory, when gated. It is off
            by itself where it would be noticed: hooks or adapters on `act_fn` or `down_proj`, `torch.func`,
            forward-mode derivatives; and in `torch.compile`. Set it to False, on one MLP or on this class, to save
            everything.
    """

    recompute = True

    def __init__(self, config: HfllmConfig, intermediate_size: int | None = None):
        super().__init__()
        hidden = config.hidden_size
        width = config.intermediate_size if intermediate_size is None else intermediate_size
        self.is_gated = config.mlp_type == "gated"
        if self.is_gated:
            self.gate_proj = nn.Linear(hidden, width, bias=config.mlp_bias)
        self.up_proj = nn.Linear(hidden, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, hidden, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.plain_types = nn.Linear, type(self.act_fn)
        self._is_silu = self.is_gated and type(self.act_fn) in (nn.SiLU, SiLUActivation)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = [self.up_proj(hidden_states), *([self.gate_proj(hidden_states)] if self.is_gated else [])]
        if not (self.training and self.recompute and saves_memory() and self._is_plain()):
            return self._down(*wide)
        if self._is_silu:
            down = cast_for_autocast(wide[0], self.down_proj.weight, self.down_proj.bias)
            with without_cpu_autocast(wide[0]):
                if is_exact(*wide, down[0]):
                    return _GatedDown.apply(*wide, *down)
        return checkpoint(self._down, *wide, use_reentrant=False, preserve_rng_state=False)

    def _is_plain(self) -> bool:
        # A wrapped layer may have its own dropout (LoRA), not to be drawn twice.
        return (type(self.down_proj), type(self.act_fn)) == self.plain_types and is_unobserved(
            self.down_proj, self.act_fn
        )

    def _down(self, up: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        inner = self.act_fn(up if gate is None else gate)
        if gate is None:
            return self.down_proj(inner)
        # In place where nobody can have kept it, as a hook or an identity would: much new memory takes time.
        is_ours = inner.numel() > 2**16 and inner is not gate and not torch.is_grad_enabled()
        if is_ours and is_unobserved(self.act_fn) and not needs_autograd():
            return self.down_proj(inner.mul_(up))
        return self.down_proj(inner * up)


# ---- memory ----
#
# When a layer saves less for the backward pass than autograd does, and computes the rest again.


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)


def saves_memory() -> bool:
    """Return whether to save less for the backward pass than autograd does; a compiler decides this itself."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and not needs_autograd()


def needs_autograd() -> bool:
    """Return whether `torch.func` or forward-mode derivatives are at work; they need the formulas of autograd."""
    if torch.compiler.is_compiling():
        return False
    # There is no public question for either. Where a release of torch lacks these names, the formulas of autograd are
    # right in any case; they only take more memory.
    are_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", None)
    level = getattr(forward_ad, "_current_level", None)
    return are_transforms_active is None or level is None or are_transforms_active() or level >= 0


def without_cpu_autocast(states: torch.Tensor) -> AbstractContextManager:
    """Return a context without autocast if `states` are on a CPU, else one that changes nothing."""
    is_on = states.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return torch.autocast("cpu", enabled=False) if is_on else nullcontext()


# Half-precision products of a CPU take kernels made for each number of rows, which takes about as long as the product.
ROWS = 64


def missing_rows(count: int, device: torch.device, multiple: int | None = None) -> int:
    """Return by how many rows a product within a CPU's autocast falls short of a number for which it has a kernel.

    Batches without padding have another number of tokens each time: rounded up, a dozen of kernels serves all.

    Args:
        multiple: of which the numbers with a kernel are, by default `ROWS`.
    """
    is_half = device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return -count % (multiple or ROWS) if is_half else 0


def cast_for_autocast(states: torch.Tensor, *weights: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Return weights in the precision of `states` where a CPU's autocast would cast them, else themselves."""
    if states.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return list(weights)
    return [None if weight is None else weight.to(states.dtype) for weight in weights]


def is_exact(*tensors: torch.Tensor) -> bool:
    """Return whether a product of these plain tensors has their precision: one for all of them, without autocast."""
    first = tensors[0]
    device = first.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return False
    return all(type(each) in (torch.Tensor, nn.Parameter) and each.dtype == first.dtype for each in tensors)


def _gradients(output, inputs, needed, grad):
    """Return the gradients of the needed inputs by autograd, themselves with a graph, and `None` for the others."""
    wanted = [each for each, is_needed in zip(inputs, needed, strict=True) if is_needed]
    found = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
    return tuple(next(found) if is_needed else None for is_needed in needed)


def is_unobserved(*modules: nn.Module) -> bool:
    """Return whether running these modules twice, or changing their outputs, is not observed by anyone.

    Hooks would observe it: they count calls and keep outputs. So may a replaced `forward` (offloading, kernels) or
    weights gathered for every call (ZeRO-3).
    """
    # Where torch has another place for its hooks, there may be some.
    if any(getattr(every_module, name, True) for name in _GLOBAL_HOOKS):
        return False
    return not any(
        "forward" in vars(module)
        or any(getattr(module, name, True) for name in _HOOKS)
        or any(hasattr(parameter, "ds_id") for parameter in module._parameters.values())
        for module in modules
    )
