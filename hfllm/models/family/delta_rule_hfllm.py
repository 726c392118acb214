"""The gated delta rule (Yang et al. 2024, arXiv:2412.06464), step by step and in chunks.

A state of fixed size, (D, W) per head, replaces all keys and values. Token t changes it and reads it:

    S_t = exp(g_t) S_{t-1} + k_t u_t',   u_t = b_t (v_t - exp(g_t) S_{t-1}' k_t),   o_t = S_t' q_t

(equation 10 there): the state forgets by `g`, and of a value it stores only the part not yet recalled by the key.

This file imports only torch, transformers and files next to it, and is uploaded to the Hub with modeling_hfllm.py.
Shapes: B batch, S sequence, H value heads, K query and key heads, D their size, W size of a value head, C tokens of a
chunk, F channels of the convolution.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .layers_hfllm import needs_autograd

# ---- the rule ----


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

    A text is read in pieces of a few chunks. Training keeps the state before every piece, and computes the piece again
    for its gradients. Compilers, `torch.func` and derivatives of derivatives get formulas without writes in place.
    Arguments are as in flash-linear-attention's `chunk_gated_delta_rule`:

    Args:
        query, key: (B, S, K, D); each serves H / K value heads.
        value: (B, S, H, W).
        g: (B, S, H), logarithms of the kept share of the state, at most 0.
        beta: (B, S, H), strength of the change.
        chunk_size: tokens C of a chunk; `None` is 32, or 64 where D is above 64.
        initial_state: (B, H, D, W), before the first token; `None` is zero.
        use_qk_l2norm_in_kernel: divide each query and key by its length first.
        packed: (B, S) or (1, S), the number of each token's sequence; the state is empty where one begins.
    """
    state = first_state(initial_state, query, key, value)
    inputs = (query, key, value, g, beta, state)
    settings = chunk_length(chunk_size, key), use_qk_l2norm_in_kernel
    # Autocast would round the inputs of the states.
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
    """Return the results of `gated_delta_rule`, by the formula above, token by token."""
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
    """Return (B, S) as (B, tokens + S): positions before the first token belong to its sequence."""
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
        state: (B * H, D, W), in the precision to compute in; the other tensors are as in `gated_delta_rule`.
        packed: (B, 1 + S) or (1, 1 + S), from the token before on.
    """
    batch, length, heads = value.shape[:3]
    sequences = None if packed is None else sequences_in_chunks(packed, batch, heads, chunk)
    chunks = to_chunks(query, key, value, g, beta, state.dtype, chunk, normalizes)
    output, state = gated_delta_chunks(*chunks, state, sequences)
    return from_chunks(output, batch, length, heads).to(query.dtype), state


class _InPieces(torch.autograd.Function):
    """`rule_of_piece` for piece after piece, keeping its inputs and the states before the pieces."""

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
    """Return every channel's own convolution with the tokens before, (B, F, S); before the first are zeros.

    A few products of shifted tensors are faster on a CPU than a grouped convolution, mostly in the backward pass.
    Arguments are as in causal-conv1d's function of this kind:

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
    """Return `causal_conv` of only the last token, (B, F, 1), from it and the ones before, (B, F, taps)."""
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


# ---- delta chunks ----
#
# The gated delta rule over a piece of a text, in chunks, with a backward pass by hand.
#
# Autograd would give every product new memory, forward and backward; on a CPU that takes longer than the products.
# Here all pieces of a text use the same memory, one after another, and the inputs of the backward pass are computed
# again. The state goes through the chunks by small products that stay in a CPU's cache.
#
# Shapes: B batch, L tokens of the piece, H value heads, K query and key heads, D their size, W size of a value head;
# N chunks of C tokens; R is B * H, and M is N * R with the chunks first.


# exp() of less is slow on a CPU; it is no state any more, and a normal number still.
LEAST_LOG = -80.0
# Strengths of zero become this, without a change of results: gradients are divided by them.
LEAST_BETA = 1e-25


def in_chunks(states: torch.Tensor, size: int, groups: int = 1) -> torch.Tensor:
    """Return (B, L, K, D) as (M, C, D), with heads repeated `groups` times.

    After the last token there are zeros, without an effect on the state.
    """
    if states.shape[1] % size:
        states = F.pad(states, (0, 0, 0, 0, 0, -states.shape[1] % size))
    states = states.unflatten(1, (-1, size))
    if groups > 1:
        states = states.repeat_interleave(groups, dim=3)
    return states.permute(1, 0, 3, 2, 4).flatten(0, 2)


def from_chunks(states: torch.Tensor, batch: int, length: int, heads: int, groups: int = 1) -> torch.Tensor:
    """Return (M, C, D), an output of `in_chunks`, as its input (B, L, K, D), summed over the `groups` of a head."""
    states = states.unflatten(0, (-1, batch, heads)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]
    return states.unflatten(2, (-1, groups)).sum(3) if groups > 1 else states


def to_chunks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    dtype: torch.dtype,
    chunk: int,
    normalizes: bool,
) -> tuple[torch.Tensor, ...]:
    """Return the arguments of `gated_delta_chunks`, queries divided by sqrt(D)."""
    groups = value.shape[2] // key.shape[2]
    query, key, value, g, beta = (each.to(dtype) for each in (query, key, value, g, beta))
    if normalizes:
        query, key = (each * torch.rsqrt(each.square().sum(-1, keepdim=True) + 1e-6) for each in (query, key))
    query, key = (in_chunks(each, chunk, groups) for each in (query * query.shape[-1] ** -0.5, key))
    g, beta = (in_chunks(each.unsqueeze(-1), chunk) for each in (g, beta))
    return query, key, in_chunks(value, chunk), g.squeeze(-1), beta


def sequences_in_chunks(packed: torch.Tensor, batch: int, heads: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sequence number of each token, (M, C), and of the token before each chunk, (M, 1).

    Args:
        packed: (B, 1 + L) or (1, 1 + L), from the token before the piece on.
    """
    packed = packed.expand(batch, -1)
    tokens = F.pad(packed[:, 1:], (0, -(packed.shape[1] - 1) % size), value=-1).unflatten(1, (-1, size))
    before = torch.cat((packed[:, :1], tokens[:, :-1, -1]), dim=1).unsqueeze(-1)
    return tuple(each.transpose(0, 1).repeat_interleave(heads, dim=1).flatten(0, 1) for each in (tokens, before))


def decays(g: torch.Tensor, sequences: tuple[torch.Tensor, torch.Tensor] | None) -> tuple[torch.Tensor, ...]:
    """Return the kept share of a state between times within a chunk.

    Args:
        g: (M, C).
        sequences: from `sequences_in_chunks`: between two of them nothing is kept.

    Returns:
        From token to later token (M, C, C), later ones in rows; from the chunk's beginning to each token, and from
        each token to the chunk's end, (M, C, 1); and over the whole chunk, (M, 1, 1).
    """
    total = g.cumsum(-1).unsqueeze(-1)
    between, ends = total - total.mT, (total, total[:, -1:] - total, total[:, -1:])
    between, *ends = (each.clamp(LEAST_LOG, 0).exp() for each in (between, *ends))
    is_kept = torch.ones(g.shape[-1], g.shape[-1], dtype=g.dtype, device=g.device).tril()
    if sequences is not None:
        tokens, before = (each.unsqueeze(-1) for each in sequences)
        last = tokens[:, -1:]
        is_kept = is_kept * (tokens == tokens.mT)
        ends = [
            decay * same for decay, same in zip(ends, (tokens == before, tokens == last, last == before), strict=True)
        ]
    return between * is_kept, *ends


def gated_delta_chunks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    sequences: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs (M, C, W) and the last state (R, D, W), by formulas for autograd and for compilers.

    Within a chunk all u_t solve one triangular system (arXiv:2412.06464, section 3.3). So the state after a chunk is
    a matrix times the one before, plus another, and only these go from chunk to chunk one after another.

    Args:
        query, key: (M, C, D); value: (M, C, W); g: (M, C); beta: (M, C, 1); state: (R, D, W).
    """
    rows, width = len(state), value.shape[-1]
    between, since, until, whole = decays(g, sequences)
    strong = key * beta
    unit = torch.eye(key.shape[1], dtype=key.dtype, device=key.device)
    system = strong @ key.mT * between
    inverse = torch.linalg.solve_triangular(system, unit, upper=False, unitriangular=True, left=False)
    solved = inverse @ torch.cat((value * beta, strong * since), dim=-1)
    added, lost = ((key * until).mT @ solved).split((width, key.shape[-1]), dim=-1)
    transitions = torch.eye(key.shape[-1], dtype=key.dtype, device=key.device) * whole - lost
    states = []
    for new, matrix in zip(added.unflatten(0, (-1, rows)), transitions.unflatten(0, (-1, rows)), strict=True):
        states.append(state)
        state = torch.baddbmm(new, matrix, state)
    states = torch.cat(states)
    fresh, recalled = solved.split((width, key.shape[-1]), dim=-1)
    changes = fresh - recalled @ states
    return (query * since) @ states + (query @ key.mT * between) @ changes, state


class DeltaPiece:
    """The rule over a piece of a text and its derivatives, in memory reused by the next piece.

    Results stay right until the next call. For each chunk, with the decays of `decays`, S and S' the states before and
    after it, U the changes that the formulas above call so, B the diagonal matrix of beta, and Y = U / beta:

        Y = (I + M B)^-1 (V - since K S),   S' = whole S + (until B K)' Y,   O = since Q S + P B Y,

    where M is the strictly lower part of `between * K K'`, and P is `between * Q K'`. The inverse multiplies only
    values, not keys too. The gradients of Y and V are, backward from the last chunk,

        dY = (P B)' dO + (until B K) dS',   dV = (I + M B)^-T dY,   dS = whole dS' + (since Q)' dO - (since K)' dV.

    Gradients of the decays need no matrices: for beta it is `sum(dV Y) / beta`, and as O and V - Y are in proportion
    to the kept share since the beginning of the chunk, for its logarithm it is `sum(dO O) - sum(dV V)`, where
    `sum(dO O)` is `sum(dQ Q)`; and in the last token also `sum(dS' S')`.
    """

    def __init__(self):
        self.memory: dict[str, torch.Tensor] = {}

    def _get(self, name: str, like: torch.Tensor, *shape: int) -> torch.Tensor:
        buffer = self.memory.get(name)
        if buffer is None or buffer.shape != shape:
            buffer = self.memory[name] = like.new_empty(shape)
        return buffer

    def _bmm(self, name: str, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        out = self._get(name, first, len(first), first.shape[1], second.shape[2])
        return torch.bmm(first, second, out=out)

    def _mul(self, name: str, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return torch.mul(first, second, out=self._get(name, first, *first.shape))

    def run(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        state: torch.Tensor,
        packed: torch.Tensor | None,
        chunk: int,
        normalizes: bool,
        needs_output: bool = True,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return the results of `rule_of_piece`, and keep the inputs of `backward` and `gradients`."""
        batch, length, heads = value.shape[:3]
        sequences = None if packed is None else sequences_in_chunks(packed, batch, heads, chunk)
        chunks = self.read(query, key, value, g, beta, state.dtype, chunk, normalizes)
        output, state = self.forward(*chunks, state, sequences, needs_output)
        return (from_chunks(output, batch, length, heads).to(query.dtype) if needs_output else None), state

    def copy(self, name: str, states: torch.Tensor, dtype: torch.dtype, size: int, groups: int = 1) -> torch.Tensor:
        """Return the result of `in_chunks`, in a precision."""
        batch, length, heads, width = states.shape
        if length % size:
            states = F.pad(states, (0, 0, 0, 0, 0, -length % size))
        states = states.unflatten(1, (-1, size)).permute(1, 0, 3, 2, 4).unsqueeze(3)
        buffer = self.memory.get(name)
        shape = len(states) * batch * heads * groups, size, width
        if buffer is None or buffer.shape != shape or buffer.dtype != dtype:
            buffer = self.memory[name] = states.new_empty(shape, dtype=dtype)
        buffer.view(-1, batch, heads, groups, size, width).copy_(states)
        return buffer

    def read(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        dtype: torch.dtype,
        chunk: int,
        normalizes: bool,
    ) -> tuple[torch.Tensor, ...]:
        """Return the results of `to_chunks`, and keep the inputs of `gradients`."""
        batch, length, heads = value.shape[:3]
        groups, self.factors, pair = heads // key.shape[2], [], []
        self.layout = batch, length, heads, groups
        for name, states, scale in (("query", query, query.shape[-1] ** -0.5), ("key", key, 1.0)):
            factor = scale
            if normalizes:
                squares = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=dtype).square_()
                factor = in_chunks(squares.add_(1e-6).rsqrt_().mul_(scale), chunk, groups)
            self.factors.append((factor, scale))
            chunks = self.copy(name, states, dtype, chunk, groups)
            pair.append(chunks if name == "key" and not normalizes else chunks.mul_(factor))
        g, beta = (in_chunks(each.unsqueeze(-1).to(dtype), chunk) for each in (g, beta))
        return *pair, self.copy("value", value, dtype, chunk), g.squeeze(-1), beta

    def gradients(self, grads: list[torch.Tensor], outs: list[torch.Tensor]) -> None:
        """Write the gradients of `read`'s tensors, from the gradients of its results, which are lost."""
        batch, length, heads, groups = self.layout
        of_query, of_key, of_value, of_g, of_beta = grads
        for states, grad, along, (factor, scale) in zip(
            self.inputs[:2], (of_query, of_key), self.along, self.factors, strict=True
        ):
            if torch.is_tensor(factor):
                grad.addcmul_(states, along / -(scale**2))
            grad.mul_(factor)
        counts = groups, groups, 1, 1, 1
        for out, grad, count in zip(
            outs, (of_query, of_key, of_value, of_g.unsqueeze(-1), of_beta), counts, strict=True
        ):
            out.copy_(from_chunks(grad, batch, length, heads, count).view_as(out))

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        state: torch.Tensor,
        sequences: tuple[torch.Tensor, torch.Tensor] | None = None,
        needs_output: bool = True,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return the results of `gated_delta_chunks`, and keep the inputs of `backward`."""
        (number, length, size), width, rows = key.shape, value.shape[-1], len(state)
        beta = torch.where(beta.abs() < LEAST_BETA, LEAST_BETA, beta)
        decay_mask, since, until, whole = self._decays(g, sequences)
        self.inputs, self.scales = (query, key, value, beta), (since, until.mul_(beta), whole)
        decay_mask.mul_(beta.mT).tril_()
        inner = self._get("inner", key, 2, number, length, length)
        torch.bmm(query, key.mT, out=inner[0])
        torch.bmm(key, key.mT, out=inner[1])
        inner.mul_(decay_mask)
        unit = torch.eye(length, dtype=key.dtype, device=key.device)
        self.inverse = torch.linalg.solve_triangular(inner[1], unit, upper=False, unitriangular=True, left=False)
        reading, asking = self._mul("reading", query, since), self._mul("asking", key, since)
        ending = self._mul("ending", key, until)
        states = self._get("states", key, number + rows, size, width)
        states[:rows] = state
        changes = self._get("changes", key, number, length, width)
        missing = self._get("missing", key, rows, length, width)
        each_state = _steps(states, rows)
        of_chunk = (value, asking, self.inverse, changes, ending.mT, whole)
        steps = zip(*(_steps(each, rows) for each in of_chunk), each_state[:-1], each_state[1:], strict=True)
        for new, scaled_keys, inverse, change, end, share, before, after in steps:
            torch.baddbmm(new, scaled_keys, before, alpha=-1, out=missing)
            torch.bmm(inverse, missing, out=change)
            torch.mul(before, share, out=after).baddbmm_(end, change)
        if not needs_output:
            return None, each_state[-1]
        return self._bmm("output", reading, states[:-rows]).baddbmm_(inner[0], changes), each_state[-1]

    def _decays(
        self, g: torch.Tensor, sequences: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, ...]:
        """Return the results of `decays`, but with arbitrary finite values in the columns of later tokens."""
        total = g.cumsum(-1).unsqueeze(-1)
        between = torch.sub(total, total.mT, out=self._get("between", g, *g.shape, g.shape[-1]))
        between, *ends = (
            each.clamp_(LEAST_LOG, 0).exp_() for each in (between, total.clone(), total[:, -1:] - total, total[:, -1:])
        )
        if sequences is not None:
            tokens, before = (each.unsqueeze(-1) for each in sequences)
            last = tokens[:, -1:]
            between.mul_(tokens == tokens.mT)
            for decay, same in zip(ends, (tokens == before, tokens == last, last == before), strict=True):
                decay.mul_(same)
        return between, *ends

    def backward(self, grad: torch.Tensor, grad_state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the gradients of `forward`'s query, key, value, g, beta and state.

        Args:
            grad: (M, C, W), of the outputs; grad_state: (R, D, W), of the last state.
        """
        (query, key, value, beta), (since, until, _), rows = self.inputs, self.scales, len(grad_state)
        inner, between, states, changes = (self.memory[name] for name in ("inner", "between", "states", "changes"))
        negative, ends = self._of_values(grad, grad_state)
        of_inner, before, after = self._get("of_inner", key, *inner.shape), states[:-rows], ends[rows:]
        torch.bmm(grad, changes.mT, out=of_inner[0])
        torch.bmm(negative, changes.mT, out=of_inner[1]).diagonal(dim1=1, dim2=2).zero_()
        of_asked, of_known = of_inner.mul_(between)
        of_query = self._bmm("of_query", grad, before.mT).mul_(since).baddbmm_(of_asked, key)
        of_key = self._bmm("of_key", negative, before.mT).mul_(since).baddbmm_(of_known, key)
        of_key.baddbmm_(of_known.mT, key).baddbmm_(of_asked.mT, query)
        of_key.addcmul_(self._bmm("of_ending", changes, after.mT), until)
        pairs = (of_query, query), (of_key, key)
        self.along = [self._mul("product", *pair).sum(-1, keepdim=True) for pair in pairs]
        total = self.along[0].squeeze(-1) + self._mul("wide", negative, value).sum(-1)
        total[:, -1] += self._mul("state", states[rows:], after).sum((-1, -2))
        of_beta = self._mul("wide", negative, changes).sum(-1, keepdim=True).neg_().div_(beta)
        return of_query, of_key, negative.neg_(), total.flip(-1).cumsum(-1).flip(-1), of_beta, ends[:rows]

    def _of_values(self, grad: torch.Tensor, grad_state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return -dV (M, C, W), and the gradients of the states before each chunk and of the last, (M + R, D, W)."""
        inner, reading, asking, ending = (self.memory[name] for name in ("inner", "reading", "asking", "ending"))
        rows, (_, _, whole) = len(grad_state), self.scales
        of_changes = self._bmm("of_changes", inner[0].mT, grad)
        ends, negative = (
            self._get("ends", grad, *self.memory["states"].shape),
            self._get("negative", grad, *grad.shape),
        )
        # First, as it may be the result of the call before, in the same memory.
        ends[-rows:] = grad_state
        torch.bmm(reading.mT, grad, out=ends[:-rows])
        each_end = _steps(ends, rows)
        of_chunk = (of_changes, ending, self.inverse.mT, negative, asking.mT, whole)
        steps = zip(*(_steps(each, rows) for each in of_chunk), each_end[:-1], each_end[1:], strict=True)
        for change, end, inverse, minus, scaled_keys, share, before, after in reversed(list(steps)):
            change.baddbmm_(end, after)
            torch.baddbmm(change, inverse, change, beta=0, alpha=-1, out=minus)
            before.addcmul_(after, share).baddbmm_(scaled_keys, minus)
        return negative, ends


def _steps(states: torch.Tensor, rows: int) -> tuple[torch.Tensor, ...]:
    """Return (N * R, ...) as N tensors (R, ...)."""
    return states.unflatten(0, (-1, rows)).unbind()
