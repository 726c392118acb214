"""Linear attention: the gated delta rule (Yang et al. 2024, arXiv:2412.06464), as OLMo Hybrid computes it.

A state of fixed size, (D, W) for each head, takes the place of all keys and values. Token t changes it and reads it:

    S_t = exp(g_t) S_{t-1} + k_t u_t',   u_t = b_t (v_t - exp(g_t) S_{t-1}' k_t),   o_t = S_t' q_t

(equation 10 there): the state forgets by `g`, and of a value it stores only what the key does not recall yet.

This file imports only torch, transformers and files beside it, and is uploaded to the Hub with modeling_hfllm.py.
Shapes: B batch, S sequence, H value heads, K query and key heads, D their size, W size of a value head, E hidden_size,
N chunks of C tokens, F channels of the convolution.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.integrations import use_kernel_func_from_hub_with_fallback, use_kernelized_func
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_hfllm import HfllmConfig

# Where no kernel runs, or fla has none.
PLAIN_DEVICES = ("cpu", "meta", "mps")


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    chunk_size: int = 64,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    packed: torch.Tensor | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the outputs (B, S, H, W), and the last state (B, H, D, W) if it is asked for.

    Within a chunk all u_t solve one triangular system (section 3.3 of the paper), so that only the states go from
    chunk to chunk one after another. Nothing is written in place, which makes the backward pass as long as the forward
    pass, and is traced as one graph. Arguments are those of flash-linear-attention's `chunk_gated_delta_rule`:

    Args:
        query, key: (B, S, K, D); each serves H / K value heads.
        value: (B, S, H, W).
        g: (B, S, H), logarithms of what is kept of the state, at most 0.
        beta: (B, S, H), strength of the change.
        chunk_size: tokens C of a chunk.
        initial_state: (B, H, D, W), before the first token; `None` is zero.
        use_qk_l2norm_in_kernel: divide each query and key by its length first.
        packed: (B, S) or (1, S), the number of each token's sequence; the state is empty where one begins.
    """
    batch, length, heads = value.shape[:3]
    dtype, size = query.dtype, min(chunk_size, length)
    # Autocast would round what the states are made of.
    with torch.autocast(query.device.type, enabled=False):
        query, key, value, g, beta = _by_head(query, key, value, g, beta, use_qk_l2norm_in_kernel)
        query, key, value, g, beta = (
            _chunks(each, size) for each in (query, key, value, g.unsqueeze(-1), beta.unsqueeze(-1))
        )
        sequence = None if packed is None else _sequences(packed, batch, heads, length, size)
        between, since, until, whole = _decays(g.squeeze(-1), sequence)
        system = (key * beta) @ key.mT * between
        both = torch.cat((value * beta, key * beta * since), dim=-1)
        solved = torch.linalg.solve_triangular(system, both, upper=False, unitriangular=True)
        fresh, recalled = solved.split((value.shape[-1], key.shape[-1]), dim=-1)
        state = key.new_zeros(batch * heads, key.shape[-1], value.shape[-1])
        if initial_state is not None:
            state = initial_state.to(key).flatten(0, 1)
        states, changes = [], []
        parts = (each.unbind(1) for each in (fresh, recalled, (key * until).mT, whole))
        for new, known, keys, kept in zip(*parts, strict=True):
            states.append(state)
            changes.append(torch.baddbmm(new, known, state, alpha=-1))
            state = torch.baddbmm(state * kept, keys, changes[-1])
        states, changes = torch.stack(states, dim=1), torch.stack(changes, dim=1)
        output = (query * since) @ states + (query @ key.mT * between) @ changes
        output = output.flatten(1, 2)[:, :length].unflatten(0, (batch, heads)).transpose(1, 2)
    return output.to(dtype), state.unflatten(0, (batch, heads)) if output_final_state else None


def recurrent_gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what `gated_delta_rule` returns, by the formula above, token by token."""
    batch, heads, dtype = value.shape[0], value.shape[2], query.dtype
    with torch.autocast(query.device.type, enabled=False):
        parts = _by_head(query, key, value, g, beta, use_qk_l2norm_in_kernel)
        state = parts[1].new_zeros(batch * heads, key.shape[-1], value.shape[-1])
        if initial_state is not None:
            state = initial_state.to(state).flatten(0, 1)
        outputs = []
        for q, k, v, decay, strength in zip(*(each.unbind(1) for each in parts), strict=True):
            state = state * decay.exp()[:, None, None]
            change = (v.unsqueeze(1) - k.unsqueeze(1) @ state) * strength[:, None, None]
            state = torch.baddbmm(state, k.unsqueeze(2), change)
            outputs.append(q.unsqueeze(1) @ state)
        output = torch.cat(outputs, dim=1).unflatten(0, (batch, heads)).transpose(1, 2)
    return output.to(dtype), state.unflatten(0, (batch, heads)) if output_final_state else None


def _by_head(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, normalizes: bool
) -> tuple[torch.Tensor, ...]:
    """Return all five as (B * H, S, ...) in fp32 at least, queries divided by sqrt(D)."""
    groups = value.shape[2] // key.shape[2]
    if groups > 1:
        query, key = (each.repeat_interleave(groups, dim=2) for each in (query, key))
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key, value, g, beta = (
        each.to(dtype).transpose(1, 2).flatten(0, 1) for each in (query, key, value, g, beta)
    )
    if normalizes:
        query, key = (each * torch.rsqrt(each.square().sum(-1, keepdim=True) + 1e-6) for each in (query, key))
    return query * query.shape[-1] ** -0.5, key, value, g, beta


def _chunks(states: torch.Tensor, size: int) -> torch.Tensor:
    """Return (B * H, S, D) as (B * H, N, C, D), with zeros after the last token, which change no state."""
    return F.pad(states, (0, 0, 0, -states.shape[1] % size)).unflatten(1, (-1, size))


def _sequences(packed: torch.Tensor, batch: int, heads: int, length: int, size: int) -> torch.Tensor:
    """Return the number of each token's sequence as (B * H, N, C)."""
    packed = F.pad(packed.expand(batch, -1), (0, -length % size), value=-1)
    return packed.unflatten(1, (-1, size)).repeat_interleave(heads, dim=0)


def _decays(g: torch.Tensor, sequence: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Return what is kept of a state between times within each chunk.

    Args:
        g: (B * H, N, C).
        sequence: (B * H, N, C), as of `_sequences`: between two of them nothing is kept.

    Returns:
        From token to later token (B * H, N, C, C), later ones in rows; from the chunk's beginning to each token, and
        from each token to the chunk's end, (B * H, N, C, 1); and over the whole chunk, (B * H, N, 1, 1).
    """
    total = g.cumsum(-1)
    future = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).triu(1)
    between = total.unsqueeze(-1) - total.unsqueeze(-2)
    since, until, whole = total, total[..., -1:] - total, total[..., -1:]
    if sequence is not None:
        last = sequence[..., -1:]
        # Of the token before the chunk. Before the first chunk there is none, and an empty state.
        before = torch.cat((sequence[:, :1, :1], last[:, :-1]), dim=1)
        future = future | (sequence.unsqueeze(-1) != sequence.unsqueeze(-2))
        since = since.masked_fill(sequence != before, -torch.inf)
        until = until.masked_fill(sequence != last, -torch.inf)
        whole = whole.masked_fill(last != before, -torch.inf)
    between = between.masked_fill(future, -torch.inf)
    return between.exp(), since.exp().unsqueeze(-1), until.exp().unsqueeze(-1), whole.exp().unsqueeze(-1)


def causal_conv(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    packed: torch.Tensor | None = None,
    **kwargs: object,
) -> torch.Tensor:
    """Return each channel's own convolution with the tokens before, (B, F, S); before the first are zeros.

    A few products of shifted tensors are faster on a CPU than a grouped convolution, mostly in the backward pass.
    Arguments are those of causal-conv1d's function of this kind:

    Args:
        hidden_states: (B, F, S).
        weight: (F, taps); the last is the token's own.
        activation: a name in transformers' activations.
        packed: (B, S) or (1, S), the number of each token's sequence; of others a token sees zeros.
    """
    taps, states = weight.shape[-1], hidden_states.transpose(1, 2).to(weight.dtype)
    length, shifted = states.shape[1], F.pad(states, (0, 0, taps - 1, 0))
    mixed = states * weight[:, -1]
    for lag in range(1, taps):
        before = shifted[:, taps - 1 - lag : taps - 1 - lag + length]
        if packed is not None:
            same = F.pad(packed, (lag, 0), value=-1)[:, :length] == packed
            before = before * same.unsqueeze(-1)
        mixed = torch.addcmul(mixed, before, weight[:, -1 - lag])
    mixed = mixed if bias is None else mixed + bias
    mixed = mixed if activation is None else ACT2FN[activation](mixed)
    return mixed.transpose(1, 2).to(hidden_states.dtype)


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
        dtype = hidden_states.dtype
        states = F.rms_norm(hidden_states.float(), self.weight.shape, eps=self.eps)
        return (self.weight * states.to(dtype) * F.silu(gate.float())).to(dtype)


@use_kernelized_func([fast_gated_delta_rule, fast_recurrent_gated_delta_rule, fast_causal_conv])
class HfllmGatedDeltaNet(nn.Module):
    """A layer of linear attention, with the names of OLMo Hybrid's."""

    def __init__(self, config: HfllmConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_k_dim, self.head_v_dim = config.linear_key_head_dim, config.linear_value_head_dim
        self.key_dim = config.linear_num_key_heads * self.head_k_dim
        self.value_dim = config.linear_num_value_heads * self.head_v_dim
        self.conv_kernel_size = config.linear_conv_kernel_dim
        self.allow_neg_eigval, self.activation = config.linear_allow_neg_eigval, config.hidden_act
        self.q_proj = nn.Linear(config.hidden_size, self.key_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.key_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.value_dim, bias=False)
        self.a_proj = nn.Linear(config.hidden_size, config.linear_num_value_heads, bias=False)
        self.b_proj = nn.Linear(config.hidden_size, config.linear_num_value_heads, bias=False)
        self.g_proj = nn.Linear(config.hidden_size, self.value_dim, bias=False)
        self.o_proj = nn.Linear(self.value_dim, config.hidden_size, bias=False)
        channels = 2 * self.key_dim + self.value_dim
        self.conv1d = nn.Conv1d(channels, channels, self.conv_kernel_size, groups=channels, bias=False)
        self.A_log = nn.Parameter(torch.zeros(config.linear_num_value_heads))
        self.dt_bias = nn.Parameter(torch.zeros(config.linear_num_value_heads))
        self.o_norm = HfllmRMSNormGated(self.head_v_dim, eps=1e-5)

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
        convolve, in_chunks, by_token = self._functions(hidden_states.device, packed)
        batch, length, _ = hidden_states.shape
        mixed = torch.cat([each(hidden_states) for each in (self.q_proj, self.k_proj, self.v_proj)], dim=-1)
        mixed, state = mixed.transpose(1, 2), None
        if cache is not None:
            state = cache.get_recurrent_state(self.layer_idx)
            mixed = cache.update_conv_state(mixed, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
            mixed = mixed[..., -(length + self.conv_kernel_size - 1) :]
        weight = self.conv1d.weight.squeeze(1)
        mixed = convolve(mixed, weight, bias=None, activation=self.activation, packed=packed)[..., -length:]
        sizes = (self.key_dim, self.key_dim, self.value_dim)
        query, key, value = mixed.transpose(1, 2).split(sizes, dim=-1)
        query, key = (each.unflatten(-1, (-1, self.head_k_dim)) for each in (query, key))
        # By head, as the rule takes them: gradients then come in the order that compiled code expects.
        steps, beta = (each(hidden_states).transpose(1, 2).contiguous() for each in (self.a_proj, self.b_proj))
        beta = beta.sigmoid() * (2.0 if self.allow_neg_eigval else 1.0)
        g = -self.A_log.float().exp().unsqueeze(-1) * F.softplus(steps.float() + self.dt_bias.unsqueeze(-1))
        rule = by_token if length == 1 and state is not None else in_chunks
        output, state = rule(
            query,
            key,
            value.unflatten(-1, (-1, self.head_v_dim)),
            g=g.transpose(1, 2),
            beta=beta.transpose(1, 2),
            initial_state=state,
            output_final_state=cache is not None,
            use_qk_l2norm_in_kernel=True,
            packed=packed,
        )
        if cache is not None:
            cache.update_recurrent_state(state, self.layer_idx)
        output = self.o_norm(output, self.g_proj(hidden_states).view_as(output))
        return self.o_proj(output.reshape(batch, length, -1))

    @staticmethod
    def _functions(device: torch.device, packed: torch.Tensor | None) -> tuple[Callable[..., object], ...]:
        """Return convolution and rules: kernels, if there are any, except for packed rows and on a CPU."""
        if device.type in PLAIN_DEVICES or packed is not None:
            return causal_conv, gated_delta_rule, recurrent_gated_delta_rule
        return fast_causal_conv, fast_gated_delta_rule, fast_recurrent_gated_delta_rule


def init_gated_delta_net(module: HfllmGatedDeltaNet, config: HfllmConfig) -> None:
    """Draw decays as OLMo Hybrid does: rates between two limits, and steps evenly between the logarithms of two."""
    rates = torch.empty_like(module.A_log).uniform_(config.linear_a_log_min, config.linear_a_log_max)
    init.copy_(module.A_log, rates.log())
    least, most = math.log(config.linear_dt_min), math.log(config.linear_dt_max)
    steps = (torch.rand_like(module.dt_bias) * (most - least) + least).exp().clamp(min=config.linear_dt_init_floor)
    # The inverse of softplus.
    init.copy_(module.dt_bias, steps + torch.log(-torch.expm1(-steps)))
