"""Linear attention: layers of the gated delta rule, as OLMo Hybrid computes them. The rule is in delta_rule_hfllm.py.

This file imports only torch, transformers and files next to it, and is uploaded to the Hub with modeling_hfllm.py.
Shapes: B batch, S sequence, H value heads, K query and key heads, D their size, W size of a value head, E hidden_size,
F channels of the convolution: queries, keys and values.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.integrations import use_kernel_func_from_hub_with_fallback, use_kernelized_func
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_hfllm import HfllmConfig
from .delta_rule_hfllm import (
    DeltaPiece,
    Rule,
    again,
    before_first,
    causal_conv,
    chunk_length,
    conv_of_last,
    conv_of_piece,
    first_state,
    gated_delta_rule,
    piece_length,
    recurrent_gated_delta_rule,
    rule_of_piece,
    without_autocast,
)
from .layers_hfllm import is_unobserved, needs_autograd

# Where no kernel runs, or fla has none.
PLAIN_DEVICES = ("cpu", "meta", "mps")


# As transformers' own models find them: kernels of the Hub where they are asked for, else an installed package.
fast_gated_delta_rule = use_kernel_func_from_hub_with_fallback("chunk_gated_delta_rule", "fla")(gated_delta_rule)
fast_recurrent_gated_delta_rule = use_kernel_func_from_hub_with_fallback("fused_recurrent_gated_delta_rule", "fla")(
    recurrent_gated_delta_rule
)
fast_causal_conv = use_kernel_func_from_hub_with_fallback("causal_conv1d_fn", "causal_conv1d")(causal_conv)


class HfllmRMSNormGated(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps) * silu(gate)`, with the precisions of OLMo Hybrid."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return gated_norm(hidden_states, self.weight, gate, self.eps)


def gated_norm(states: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the output of `HfllmRMSNormGated`."""
    normed = F.rms_norm(states.float(), weight.shape, eps=eps)
    return (weight * normed.to(states.dtype) * F.silu(gate.float())).to(states.dtype)


class MixerSettings(NamedTuple):
    """Settings for `mix_piece`: widths of all keys and values, of one key and value head, activation, eps, chunk."""

    key_dim: int
    value_dim: int
    head_k_dim: int
    head_v_dim: int
    activation: str
    eps: float
    chunk: int

    def heads(self, mixed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the queries and keys (B, L, K, D) and values (B, L, H, W) of (B, L, F)."""
        parts = mixed.split((self.key_dim, self.key_dim, self.value_dim), dim=-1)
        sizes = self.head_k_dim, self.head_k_dim, self.head_v_dim
        return tuple(each.unflatten(-1, (-1, size)) for each, size in zip(parts, sizes, strict=True))


def mix_piece(
    mixed: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor,
    state: torch.Tensor,
    packed: torch.Tensor | None,
    settings: MixerSettings,
    rule: Rule = rule_of_piece,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the convolution's, the rule's and the norm's output (B, L, H, W), and the last state (B * H, D, W).

    Args:
        mixed: (B, taps - 1 + L, F), with the tokens before.
        g, beta: (B, L, H).
        gate: (B, L, H, W).
        weight: (F, taps).
        state: (B * H, D, W).
        packed: (B, 1 + L) or (1, 1 + L), from the token before on; longer where the convolution needs it.
        rule: the function that computes the piece.
    """
    inner = settings.heads(_convolved(mixed, weight, packed, settings))
    packed = None if packed is None else packed[:, -1 - gate.shape[1] :]
    output, state = rule(*inner, g, beta, state, packed, settings.chunk, True)
    return gated_norm(output, norm_weight, gate, settings.eps), state


def _convolved(
    mixed: torch.Tensor, weight: torch.Tensor, packed: torch.Tensor | None, settings: MixerSettings
) -> torch.Tensor:
    """Return the convolution of `mix_piece`'s tokens, (B, L, F)."""
    packed = None if packed is None else packed[:, -mixed.shape[1] :]
    return conv_of_piece(mixed.to(weight.dtype), weight, None, settings.activation, packed).to(mixed.dtype)


class _Mixer(torch.autograd.Function):
    """`mix_piece` for piece after piece of texts without a cache, keeping its inputs and a state per piece.

    So the tensors between a layer's projections never exist for a whole text.
    """

    @staticmethod
    def forward(ctx, mixed, g, beta, gate, weight, norm_weight, packed, settings):
        state = first_state(None, *settings.heads(mixed))
        output, states, memory = torch.empty_like(gate, dtype=mixed.dtype), [], DeltaPiece()
        for begin in range(0, mixed.shape[1], piece := piece_length(settings.chunk, len(state))):
            states.append(state.clone())
            part, of_packed, at = _with_taps(mixed, packed, begin, piece, weight)
            by_token = (each[:, at] for each in (g, beta, gate))
            output[:, at], state = mix_piece(
                part, *by_token, weight, norm_weight, state, of_packed, settings, memory.run
            )
        ctx.save_for_backward(mixed, g, beta, gate, weight, norm_weight, packed, torch.stack(states))
        ctx.settings = settings
        return output

    @staticmethod
    def backward(ctx, grad):
        *inputs, packed, states = ctx.saved_tensors
        settings = ctx.settings
        if torch.is_grad_enabled():
            return *_of_text(inputs, packed, settings, grad), None, None
        mixed, _, _, _, weight, norm_weight = inputs
        grads = [torch.zeros_like(inputs[0]), *map(torch.empty_like, inputs[1:4]), *map(torch.zeros_like, inputs[4:])]
        memory, piece = DeltaPiece(), piece_length(settings.chunk, states.shape[1])
        grad_state = torch.zeros_like(states[0])
        for index in reversed(range(len(states))):
            part, of_packed, at = _with_taps(mixed, packed, index * piece, piece, weight)
            leaves = part, *(each[:, at] for each in inputs[1:4]), weight, norm_weight
            outs = [each[:, at] for each in grads[1:3]]
            arguments = states[index], of_packed, settings, grad[:, at], grad_state, outs
            (of_mixed, of_gate, *of_weights), grad_state = _of_piece(memory, leaves, *arguments)
            begin = max(0, at.start - weight.shape[-1] + 1)
            whole = grads[0][:, begin : at.stop]
            whole += of_mixed[:, of_mixed.shape[1] - whole.shape[1] :]
            grads[3][:, at] = of_gate
            for whole, part in zip(grads[4:], of_weights, strict=True):
                whole += part
        return *grads, None, None


def _with_taps(
    mixed: torch.Tensor, packed: torch.Tensor | None, begin: int, piece: int, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, slice]:
    """Return a piece of a text with the tokens in the convolution of its first one, zeros where there are none."""
    taps, end = weight.shape[-1] - 1, min(begin + piece, mixed.shape[1])
    missing, first = max(0, taps - begin), max(0, begin - taps)
    part = F.pad(mixed[:, first:end], (0, 0, missing, 0))
    if packed is not None:
        # The rule asks for one token before, in any case.
        packed = before_first(packed[:, max(0, begin - max(taps, 1)) : end], max(0, max(taps, 1) - begin))
    return part, packed, slice(begin, end)


def _of_piece(
    memory: DeltaPiece,
    inputs: tuple[torch.Tensor, ...],
    state: torch.Tensor,
    packed: torch.Tensor | None,
    settings: MixerSettings,
    grad: torch.Tensor,
    grad_state: torch.Tensor,
    outs: list[torch.Tensor],
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Return the gradients of `mix_piece`'s mixed, gate, weight and norm_weight, and of its state.

    Args:
        outs: where to write the gradients of g and beta.
    """
    mixed, g, beta, gate, weight, norm_weight = (each.detach() for each in inputs)
    with torch.enable_grad():
        mixed, weight = mixed.requires_grad_(), weight.requires_grad_()
        inner = _convolved(mixed, weight, packed, settings)
    if packed is not None:
        packed = packed[:, -1 - grad.shape[1] :]
    output, _ = memory.run(*settings.heads(inner.detach()), g, beta, state, packed, settings.chunk, True)
    output = output.requires_grad_()
    with torch.enable_grad():
        gate, norm_weight = gate.requires_grad_(), norm_weight.requires_grad_()
        normed = gated_norm(output, norm_weight, gate, settings.eps)
    of_output, of_gate, of_norm = torch.autograd.grad(normed, (output, gate, norm_weight), grad)
    of_output = memory.copy("grad", of_output, state.dtype, settings.chunk)
    *of_chunks, grad_state = memory.backward(of_output, grad_state)
    of_inner = torch.empty_like(inner)
    memory.gradients(of_chunks, [*settings.heads(of_inner), *outs])
    of_mixed, of_weight = torch.autograd.grad(inner, (mixed, weight), of_inner)
    return (of_mixed, of_gate, of_weight, of_norm), grad_state


def _of_text(
    inputs: list[torch.Tensor], packed: torch.Tensor | None, settings: MixerSettings, grad: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of `_Mixer`'s tensors that have derivatives themselves."""

    def mix(mixed, g, beta, gate, weight, norm_weight):
        part, of_packed, _ = _with_taps(mixed, packed, 0, mixed.shape[1], weight)
        state = first_state(None, *settings.heads(mixed))
        return mix_piece(part, g, beta, gate, weight, norm_weight, state, of_packed, settings)[:1]

    return again(mix, tuple(inputs), (), (grad,))


@use_kernelized_func([fast_gated_delta_rule, fast_recurrent_gated_delta_rule, fast_causal_conv])
class HfllmGatedDeltaNet(nn.Module):
    """A layer of linear attention, with the names of OLMo Hybrid's."""

    def __init__(self, config: HfllmConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_k_dim, self.head_v_dim = config.linear_key_head_dim, config.linear_value_head_dim
        self.key_dim = config.linear_num_key_heads * self.head_k_dim
        self.value_dim = config.linear_num_value_heads * self.head_v_dim
        self.conv_kernel_size, self.allow_neg_eigval = config.linear_conv_kernel_dim, config.linear_allow_neg_eigval
        self.q_proj = nn.Linear(config.hidden_size, self.key_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.key_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.value_dim, bias=False)
        self.a_proj = nn.Linear(config.hidden_size, config.linear_num_value_heads, bias=False)
        self.b_proj = nn.Linear(config.hidden_size, config.linear_num_value_heads, bias=False)
        self.g_proj = nn.Linear(config.hidden_size, self.value_dim, bias=False)
        self.o_proj = nn.Linear(self.value_dim, config.hidden_size, bias=False)
        channels = 2 * self.key_dim + self.value_dim
        self.conv1d = nn.Conv1d(channels, channels, self.conv_kernel_size, groups=channels, bias=False)
        # In fp32 also in a model of half precision, as in OLMo Hybrid.
        self.A_log = nn.Parameter(torch.zeros(config.linear_num_value_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.zeros(config.linear_num_value_heads))
        self.o_norm = HfllmRMSNormGated(self.head_v_dim, eps=1e-5)
        sizes = self.key_dim, self.value_dim, self.head_k_dim, self.head_v_dim
        self._settings = MixerSettings(*sizes, config.hidden_act, self.o_norm.eps, chunk=0)

    @force_accelerate_hooks("conv1d")
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        packed: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Return the output (B, S, E).

        Args:
            hidden_states: (B, S, E).
            attention_mask: (B, S) with 0 for padding, whose states become zero; `None` where there is none.
            cache: with a layer for the state and the convolution's last tokens.
            packed: (B, S) or (1, S), the number of each token's sequence; needs `cache=None`.
        """
        if attention_mask is not None:
            hidden_states = (hidden_states * attention_mask.unsqueeze(-1)).to(hidden_states.dtype)
        mixed = torch.cat([each(hidden_states) for each in (self.q_proj, self.k_proj, self.v_proj)], dim=-1)
        # By head, as in the rule: gradients then come in the order expected by compiled code.
        steps, beta = (each(hidden_states).transpose(1, 2).contiguous() for each in (self.a_proj, self.b_proj))
        beta = beta.sigmoid() * (2.0 if self.allow_neg_eigval else 1.0)
        g = -self.A_log.float().exp().unsqueeze(-1) * F.softplus(steps.float() + self.dt_bias.unsqueeze(-1))
        g, beta = g.transpose(1, 2), beta.transpose(1, 2)
        gate = self.g_proj(hidden_states).unflatten(-1, (-1, self.head_v_dim))
        if cache is None and self._is_lean(hidden_states.device, packed):
            settings = self._settings._replace(chunk=chunk_length(None, mixed.unflatten(-1, (-1, self.head_k_dim))))
            weights = self.conv1d.weight.squeeze(1), self.o_norm.weight
            with without_autocast(mixed):
                output = _Mixer.apply(mixed, g, beta, gate, *weights, packed, settings)
        else:
            output = self.o_norm(self._rule(mixed, g, beta, cache, packed), gate)
        return self.o_proj(output.flatten(-2))

    def _rule(
        self,
        mixed: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        cache: Cache | None,
        packed: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the outputs of convolution and rule, (B, S, H, W), by kernels if there are any."""
        convolve, in_chunks, by_token = self._functions(mixed.device, packed)
        length, mixed, state = mixed.shape[1], mixed.transpose(1, 2), None
        if cache is not None:
            state = cache.get_recurrent_state(self.layer_idx)
            mixed = cache.update_conv_state(mixed, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
            mixed = mixed[..., -(length + self.conv_kernel_size - 1) :]
        weight = self.conv1d.weight.squeeze(1)
        is_next, activation = length == 1 and state is not None, self._settings.activation
        # A cache that records holds fewer tokens than the convolution reads, where the prompt was that short.
        if is_next and convolve is causal_conv and mixed.shape[-1] == self.conv_kernel_size:
            mixed = conv_of_last(mixed, weight, activation)
        else:
            mixed = convolve(mixed, weight, bias=None, activation=activation, packed=packed)[..., -length:]
        # After each of the tokens that may be undone the cache needs the state, which only the rule by token gives.
        kept = 0 if is_next else min(tokens_to_undo(cache, self.layer_idx), length)
        pieces = [(by_token if is_next else in_chunks, length - kept)] * (kept < length) + [(by_token, 1)] * kept
        inputs = (*self._settings.heads(mixed.transpose(1, 2)), g, beta)
        parts = zip(*(each.split([size for _, size in pieces], dim=1) for each in inputs), strict=True)
        outputs, states = [], []
        for (rule, _), (*heads, decay, strength) in zip(pieces, parts, strict=True):
            output, state = rule(
                *heads,
                g=decay,
                beta=strength,
                initial_state=state,
                output_final_state=cache is not None,
                use_qk_l2norm_in_kernel=True,
                packed=packed,
            )
            outputs.append(output)
            states.append(state)
        if cache is not None:
            cache.update_recurrent_state(states if kept else state, self.layer_idx)
        return torch.cat(outputs, dim=1) if kept else output

    def _is_lean(self, device: torch.device, packed: torch.Tensor | None) -> bool:
        """Return whether to read a text in pieces: there are no kernels, compilers, `torch.func` and hooks."""
        is_plain = device.type in PLAIN_DEVICES or packed is not None
        is_free = not torch.compiler.is_compiling() and not needs_autograd()
        return is_plain and is_free and type(self.o_norm) is HfllmRMSNormGated and is_unobserved(self.o_norm)

    @staticmethod
    def _functions(device: torch.device, packed: torch.Tensor | None) -> tuple[Callable[..., object], ...]:
        """Return convolution and rules: kernels, if there are any, except for packed rows and on a CPU."""
        if device.type in PLAIN_DEVICES or packed is not None:
            return causal_conv, gated_delta_rule, recurrent_gated_delta_rule
        return fast_causal_conv, fast_gated_delta_rule, fast_recurrent_gated_delta_rule


def tokens_to_undo(cache: Cache | None, layer_idx: int) -> int:
    """Return how many tokens may be undone by a cache that records them, as of transformers 5.25; else 0."""
    return cache.get_recurrent_states_to_keep(layer_idx) if hasattr(cache, "get_recurrent_states_to_keep") else 0


def init_gated_delta_net(module: HfllmGatedDeltaNet, config: HfllmConfig) -> None:
    """Draw decays as OLMo Hybrid does: rates between two limits, and steps evenly between the logarithms of two."""
    rates = torch.empty_like(module.A_log).uniform_(config.linear_a_log_min, config.linear_a_log_max)
    init.copy_(module.A_log, rates.log())
    least, most = math.log(config.linear_dt_min), math.log(config.linear_dt_max)
    steps = (torch.rand_like(module.dt_bias) * (most - least) + least).exp().clamp(min=config.linear_dt_init_floor)
    # The inverse of softplus.
    init.copy_(module.dt_bias, steps + torch.log(-torch.expm1(-steps)))
