"""The gated delta rule (Yang et al. 2024, arXiv:2412.06464), and the short convolution before it.

A state of fixed size, (D, W) for each head, takes the place of all keys and values. Token t changes it and reads it:

    S_t = exp(g_t) S_{t-1} + k_t u_t',   u_t = b_t (v_t - exp(g_t) S_{t-1}' k_t),   o_t = S_t' q_t

(equation 10 there): the state forgets by `g`, and of a value it stores only what the key does not recall yet.

This file imports only torch, transformers and files beside it, and is uploaded to the Hub with modeling_hfllm.py.
Shapes: B batch, S sequence, H value heads, K query and key heads, D their size, W size of a value head, C tokens of a
chunk, F channels of the convolution.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .delta_chunks_hfllm import DeltaPiece, from_chunks, gated_delta_chunks, sequences_in_chunks, to_chunks
from .memory_hfllm import needs_autograd

Rule = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    chunk_size: int | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    packed: torch.Tensor | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the outputs (B, S, H, W), and the last state (B, H, D, W) if it is asked for.

    A text is read in pieces of a few chunks. Training keeps the state before each piece, and computes the piece again
    for its gradients. Compilers, `torch.func` and derivatives of derivatives get formulas without writes in place.
    Arguments are those of flash-linear-attention's `chunk_gated_delta_rule`:

    Args:
        query, key: (B, S, K, D); each serves H / K value heads.
        value: (B, S, H, W).
        g: (B, S, H), logarithms of what is kept of the state, at most 0.
        beta: (B, S, H), strength of the change.
        chunk_size: tokens C of a chunk; `None` is 32, or 64 where D is above 64.
        initial_state: (B, H, D, W), before the first token; `None` is zero.
        use_qk_l2norm_in_kernel: divide each query and key by its length first.
        packed: (B, S) or (1, S), the number of each token's sequence; the state is empty where one begins.
    """
    state = first_state(initial_state, query, key, value)
    inputs = (query, key, value, g, beta, state)
    settings = chunk_length(chunk_size, key), use_qk_l2norm_in_kernel
    # Autocast would round what the states are made of.
    with without_autocast(query):
        if torch.compiler.is_compiling() or needs_autograd():
            output, state = rule_of_piece(*inputs, before_first(packed), *settings)
        else:
            output, state = _InPieces.apply(*inputs, before_first(packed), *settings)
    return output, state.unflatten(0, (len(value), -1)) if output_final_state else None


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
    batch, heads, rows = value.shape[0], value.shape[2], value.shape[0] * value.shape[2]
    with without_autocast(query):
        state, outputs, groups = first_state(initial_state, query, key, value), [], heads // key.shape[2]
        pair = torch.stack((query, key)).to(state.dtype)
        if use_qk_l2norm_in_kernel:
            pair = pair * torch.rsqrt(pair.square().sum(-1, keepdim=True) + 1e-6)
        pair = pair if groups == 1 else pair.repeat_interleave(groups, dim=3)
        # The scores' factor on the outputs is the same as on the queries.
        q, k, v, decay, strength = (
            each.to(state.dtype).transpose(0, 1).reshape(value.shape[1], rows, 1, -1)
            for each in (*pair, value, g.exp(), beta)
        )
        for t in range(value.shape[1]):
            state = state * decay[t]
            state = torch.baddbmm(state, k[t].mT, (v[t] - k[t] @ state) * strength[t])
            outputs.append(q[t] @ state)
        output = torch.stack(outputs) * query.shape[-1] ** -0.5
        output = output.unflatten(1, (batch, heads)).squeeze(3).transpose(0, 1)
    return output.to(query.dtype), state.unflatten(0, (batch, heads)) if output_final_state else None


def without_autocast(states: torch.Tensor) -> AbstractContextManager[object]:
    """Return a context that keeps all precisions; the device "meta" knows none."""
    kind = states.device.type
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


def first_state(
    state: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Return a state (B, H, D, W), or an empty one, as (B * H, D, W) in fp32 at least."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    if state is not None:
        return state.to(dtype).flatten(0, 1)
    return key.new_zeros(len(value) * value.shape[2], key.shape[3], value.shape[3], dtype=dtype)


def before_first(packed: torch.Tensor | None, tokens: int = 1) -> torch.Tensor | None:
    """Return (B, S) as (B, tokens + S): what is before the first token is of its sequence."""
    return packed if packed is None else torch.cat((packed[:, :1].expand(-1, tokens), packed), dim=1)


def chunk_length(chunk_size: int | None, key: torch.Tensor) -> int:
    """Return how many tokens a chunk of a text (B, S, K, D) has: fewer where the state is small."""
    return min(chunk_size or (32 if key.shape[-1] <= 64 else 64), key.shape[1])


def piece_length(chunk: int, rows: int) -> int:
    """Return how many tokens of so many rows of heads are computed at once.

    They are whole chunks, few enough for a CPU's cache, and at least 256 tokens, so that few states are kept.
    """
    return chunk * max(1, max(256, 4096 // rows) // chunk)


def rule_of_piece(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    packed: torch.Tensor | None,
    chunk: int,
    normalizes: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs and the last state (B * H, D, W) over a text or a piece of one, by formulas.

    Args:
        state: (B * H, D, W), in the precision to compute in; the other tensors are those of `gated_delta_rule`.
        packed: (B, 1 + S) or (1, 1 + S), from the token before on.
    """
    batch, length, heads = value.shape[:3]
    sequences = None if packed is None else sequences_in_chunks(packed, batch, heads, chunk)
    chunks = to_chunks(query, key, value, g, beta, state.dtype, chunk, normalizes)
    output, state = gated_delta_chunks(*chunks, state, sequences)
    return from_chunks(output, batch, length, heads).to(query.dtype), state


class _InPieces(torch.autograd.Function):
    """`rule_of_piece` for piece after piece, which keeps its inputs and the state before each piece."""

    @staticmethod
    def forward(ctx, query, key, value, g, beta, state, packed, chunk, normalizes):
        inputs, piece, memory = (query, key, value, g, beta), piece_length(chunk, len(state)), DeltaPiece()
        output, states = query.new_empty(value.shape), []
        for begin in range(0, value.shape[1], piece):
            states.append(state.clone())
            parts = [each[:, begin : begin + piece] for each in inputs]
            of_packed = None if packed is None else packed[:, begin : begin + piece + 1]
            output[:, begin : begin + piece], state = memory.run(*parts, state, of_packed, chunk, normalizes)
        ctx.save_for_backward(*inputs, torch.stack(states), packed)
        ctx.settings = chunk, normalizes
        return output, state.clone()

    @staticmethod
    def backward(ctx, grad, grad_state):
        *inputs, states, packed = ctx.saved_tensors
        chunk, normalizes = ctx.settings
        if torch.is_grad_enabled():
            settings = packed, chunk, normalizes
            return *again(rule_of_piece, (*inputs, states[0]), settings, (grad, grad_state)), None, None, None
        piece, memory = piece_length(chunk, states.shape[1]), DeltaPiece()
        grads = [torch.empty_like(each) for each in inputs]
        for index in reversed(range(len(states))):
            at = slice(index * piece, (index + 1) * piece)
            of_packed = None if packed is None else packed[:, at.start : at.stop + 1]
            parts = [each[:, at] for each in inputs]
            memory.run(*parts, states[index], of_packed, chunk, normalizes, needs_output=False)
            *of_chunks, grad_state = memory.backward(memory.copy("grad", grad[:, at], states.dtype, chunk), grad_state)
            memory.gradients(of_chunks, [each[:, at] for each in grads])
        return *grads, grad_state.clone(), None, None, None


def again(
    function: Callable[..., tuple[torch.Tensor, ...]],
    inputs: tuple[torch.Tensor, ...],
    settings: tuple[object, ...],
    grads: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, ...]:
    """Return gradients of a function's tensors that have derivatives themselves, computing the function again."""
    inputs = [each if each.requires_grad else each.detach().requires_grad_() for each in inputs]
    return torch.autograd.grad(function(*inputs, *settings), inputs, grads, create_graph=True)


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
    taps = weight.shape[-1]
    padded = F.pad(hidden_states.transpose(1, 2).to(weight.dtype), (0, 0, taps - 1, 0))
    packed = None if packed is None else F.pad(packed, (taps - 1, 0), value=-1)
    return conv_of_piece(padded, weight, bias, activation, packed).transpose(1, 2).to(hidden_states.dtype)


def conv_of_last(states: torch.Tensor, weight: torch.Tensor, activation: str) -> torch.Tensor:
    """Return `causal_conv` of the last token alone, (B, F, 1), from it and the ones before, (B, F, taps)."""
    mixed = (states.to(weight.dtype) * weight).sum(-1, keepdim=True)
    return ACT2FN[activation](mixed).to(states.dtype)


def conv_of_piece(
    states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    packed: torch.Tensor | None,
) -> torch.Tensor:
    """Return `causal_conv` of the last L tokens, (B, L, F).

    Args:
        states: (B, taps - 1 + L, F), the tokens before them included; and so `packed`.
    """
    taps = weight.shape[-1]
    length = states.shape[1] - taps + 1
    mixed = states[:, taps - 1 :] * weight[:, -1]
    for lag in range(1, taps):
        before = states[:, taps - 1 - lag : taps - 1 - lag + length]
        if packed is not None:
            same = packed[:, taps - 1 - lag : taps - 1 - lag + length] == packed[:, taps - 1 :]
            before = before * same.unsqueeze(-1)
        mixed = torch.addcmul(mixed, before, weight[:, -1 - lag])
    mixed = mixed if bias is None else mixed + bias
    return mixed if activation is None else ACT2FN[activation](mixed)
