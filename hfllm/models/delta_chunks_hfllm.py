"""The gated delta rule over a piece of a text, in chunks, with a backward pass by hand.

Autograd would give every product new memory, forward and backward; on a CPU that takes longer than the products. Here
all pieces of a text use the same memory, one after another, and what the backward pass needs is computed again.

This file imports only torch, and is uploaded to the Hub with modeling_hfllm.py.
Shapes: B batch, L tokens of the piece, H value heads, K query and key heads, D their size, W size of a value head;
N chunks of C tokens; R is B * H, and M is N * R with the chunks first.
"""

import torch
from torch.nn import functional as F

# exp() of less is slow on a CPU; it is no state any more, and a normal number still.
LEAST_LOG = -80.0


def in_chunks(states: torch.Tensor, size: int, groups: int = 1) -> torch.Tensor:
    """Return (B, L, K, D) as (M, C, D), each head `groups` times.

    After the last token there are zeros, which change no state.
    """
    if states.shape[1] % size:
        states = F.pad(states, (0, 0, 0, 0, 0, -states.shape[1] % size))
    states = states.unflatten(1, (-1, size))
    if groups > 1:
        states = states.repeat_interleave(groups, dim=3)
    return states.permute(1, 0, 3, 2, 4).flatten(0, 2)


def from_chunks(states: torch.Tensor, batch: int, length: int, heads: int, groups: int = 1) -> torch.Tensor:
    """Return what `in_chunks` makes (M, C, D) of as (B, L, K, D), summed over each head's `groups`."""
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
    """Return the number of each token's sequence, (M, C), and that of the token before each chunk, (M, 1).

    Args:
        packed: (B, 1 + L) or (1, 1 + L), from the token before the piece on.
    """
    packed = packed.expand(batch, -1)
    tokens = F.pad(packed[:, 1:], (0, -(packed.shape[1] - 1) % size), value=-1).unflatten(1, (-1, size))
    before = torch.cat((packed[:, :1], tokens[:, :-1, -1]), dim=1).unsqueeze(-1)
    return tuple(each.transpose(0, 1).repeat_interleave(heads, dim=1).flatten(0, 1) for each in (tokens, before))


def decays(g: torch.Tensor, sequences: tuple[torch.Tensor, torch.Tensor] | None) -> tuple[torch.Tensor, ...]:
    """Return what is kept of a state between times within each chunk.

    Args:
        g: (M, C).
        sequences: those of `sequences_in_chunks`: between two of them nothing is kept.

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
            kept * same for kept, same in zip(ends, (tokens == before, tokens == last, last == before), strict=True)
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
    a matrix times the one before, plus another, and these alone go from chunk to chunk one after another.

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
    kept = torch.eye(key.shape[-1], dtype=key.dtype, device=key.device) * whole - lost
    states = []
    for new, matrix in zip(added.unflatten(0, (-1, rows)), kept.unflatten(0, (-1, rows)), strict=True):
        states.append(state)
        state = torch.baddbmm(new, matrix, state)
    states = torch.cat(states)
    fresh, recalled = solved.split((width, key.shape[-1]), dim=-1)
    changes = fresh - recalled @ states
    return (query * since) @ states + (query @ key.mT * between) @ changes, state


class DeltaPiece:
    """What `gated_delta_chunks` computes, in memory that the next piece uses again; and its derivatives.

    Results stay right until the next call. The names are those of the formulas there.
    """

    def __init__(self):
        self.memory: dict[str, torch.Tensor] = {}

    def _get(self, name: str, like: torch.Tensor, *shape: int) -> torch.Tensor:
        held = self.memory.get(name)
        if held is None or held.shape != shape:
            held = self.memory[name] = like.new_empty(shape)
        return held

    def _bmm(self, name: str, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        out = self._get(name, first, len(first), first.shape[1], second.shape[2])
        return torch.bmm(first, second, out=out)

    def _mul(self, name: str, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return torch.mul(first, second, out=self._get(name, first, *first.shape))

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
        """Return what `to_chunks` returns, and keep what `gradients` needs."""
        batch, length, heads = value.shape[:3]
        groups, self.factors = heads // key.shape[2], []
        self.layout = batch, length, heads, groups
        pair = []
        for states, scale in ((query, query.shape[-1] ** -0.5), (key, 1.0)):
            factor, chunks = None, in_chunks(states.to(dtype), chunk, groups)
            if normalizes:
                factor = self._mul("square", chunks, chunks).sum(-1, keepdim=True).add_(1e-6).rsqrt_()
            self.factors.append((factor, scale))
            pair.append(torch.mul(chunks, scale if factor is None else factor * scale))
        g, beta = (in_chunks(each.unsqueeze(-1).to(dtype), chunk) for each in (g, beta))
        return *pair, in_chunks(value.to(dtype), chunk), g.squeeze(-1), beta

    def gradients(self, *grads: torch.Tensor) -> list[torch.Tensor]:
        """Return the gradients of `read`'s tensors from those of its results."""
        batch, length, heads, groups = self.layout
        results = []
        for states, grad, (factor, scale) in zip(self.inputs[:2], grads[:2], self.factors, strict=True):
            if factor is not None:
                along = self._mul("square", grad, states).sum(-1, keepdim=True).div_(-(scale**2))
                grad = grad.addcmul_(states, along).mul_(factor * scale)
            else:
                grad = grad * scale
            results.append(from_chunks(grad, batch, length, heads, groups))
        results.append(from_chunks(grads[2], batch, length, heads))
        of_g, of_beta = (
            from_chunks(grads[3].unsqueeze(-1), batch, length, heads),
            from_chunks(grads[4], batch, length, heads),
        )
        return [*results, of_g.squeeze(-1), of_beta.squeeze(-1)]

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
        """Return what `gated_delta_chunks` returns, and keep what `backward` needs."""
        (number, length, size), width, rows = key.shape, value.shape[-1], len(state)
        self.inputs, self.decays = (query, key, value, beta), decays(g, sequences)
        between, since, until, whole = self.decays
        # Products with the same matrix are one product.
        pair = self._get("pair", key, number, 2 * length, size)
        pair[:, :length] = query
        strong = torch.mul(key, beta, out=pair[:, length:])
        inner = self._bmm("inner", pair, key.mT)
        inner.unflatten(1, (2, length)).mul_(between.unsqueeze(1))
        both = self._get("both", key, number, length, width + size)
        torch.mul(value, beta, out=both[..., :width])
        torch.mul(strong, since, out=both[..., width:])
        unit = torch.eye(length, dtype=key.dtype, device=key.device)
        self.inverse = torch.linalg.solve_triangular(
            inner[:, length:], unit, upper=False, unitriangular=True, left=False
        )
        solved = self._bmm("solved", self.inverse, both)
        moved = self._bmm("moved", self._mul("ending", key, until).mT, solved)
        kept = torch.eye(size, dtype=key.dtype, device=key.device) * whole
        kept = torch.sub(kept, moved[..., width:], out=self._get("kept", key, number, size, size))
        added, kept = moved[..., :width].unflatten(0, (-1, rows)), kept.unflatten(0, (-1, rows))
        states = self._get("states", key, len(kept) + 1, rows, size, width)
        states[0] = state
        for new, matrix, before, after in zip(added, kept, states[:-1], states[1:], strict=True):
            torch.baddbmm(new, matrix, before, out=after)
        before = states[:-1].flatten(0, 1)
        changes = self._get("changes", key, number, length, width)
        torch.baddbmm(solved[..., :width], solved[..., width:], before, alpha=-1, out=changes)
        beginning = self._mul("beginning", query, since)
        if not needs_output:
            return None, states[-1]
        return self._bmm("output", beginning, before).baddbmm_(inner[:, :length], changes), states[-1]

    def backward(self, grad: torch.Tensor, grad_state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the gradients of `forward`'s query, key, value, g, beta and state.

        Args:
            grad: (M, C, W), of the outputs; grad_state: (R, D, W), of the last state.
        """
        (_, key, value, beta), (between, since, until, whole) = self.inputs, self.decays
        (number, length, _), width, rows = key.shape, value.shape[-1], len(grad_state)
        names = ("pair", "inner", "both", "solved", "ending", "kept", "states", "changes", "beginning")
        pair, inner, both, solved, ending, kept, states, changes, beginning = (self.memory[name] for name in names)
        before, halves = states[:-1].flatten(0, 1), (slice(length), slice(length, None))
        # Gradients of the outputs, and below of the changes.
        grads = self._get("grads", key, number, 2 * length, width)
        grads[:, halves[0]] = grad
        changed = torch.bmm(inner[:, halves[0]].mT, grad, out=grads[:, halves[1]])
        shares = self._bmm("shares", beginning.mT, grad).baddbmm_(solved[..., width:].mT, changed, alpha=-1)
        ends = self._get("ends", key, *states.shape)
        ends[-1] = grad_state
        shares, matrices = shares.unflatten(0, (-1, rows)), kept.unflatten(0, (-1, rows)).mT
        for index in range(len(shares) - 1, -1, -1):
            torch.baddbmm(shares[index], matrices[index], ends[index + 1], out=ends[index])
        after = ends[1:].flatten(0, 1)
        changed.baddbmm_(ending, after)
        of_beginning, of_recalled = self._bmm("of_states", grads, before.mT).split(length, dim=1)
        of_solved = self._get("of_solved", key, *solved.shape)
        of_solved[..., :width] = changed
        torch.neg(of_recalled, out=of_solved[..., width:])
        of_both = self._bmm("of_both", self.inverse.mT, of_solved)
        of_values, of_reads = of_both[..., :width], of_both[..., width:]
        of_inner = self._get("of_inner", key, *inner.shape)
        torch.bmm(grad, changes.mT, out=of_inner[:, halves[0]])
        torch.bmm(of_both, solved.mT, out=of_inner[:, halves[1]]).neg_().tril_(-1)
        # Every decay is exp() of a sum of g: a gradient times the decay itself is that of the sum.
        logs = self._mul("logs", of_inner, inner).unflatten(1, (2, length)).sum(1)
        of_inner.unflatten(1, (2, length)).mul_(between.unsqueeze(1))
        of_pair = self._get("of_pair", key, *pair.shape)
        torch.mul(of_beginning, since, out=of_pair[:, halves[0]])
        torch.mul(of_reads, since, out=of_pair[:, halves[1]])
        of_query, of_strong = of_pair.baddbmm_(of_inner, key).split(length, dim=1)
        of_ending = self._bmm("of_ending", changes, after.mT)
        of_key = self._bmm("of_key", of_inner.mT, pair).addcmul_(of_strong, beta).addcmul_(of_ending, until)
        of_beta = self._mul("product", of_strong, key).sum(-1, keepdim=True)
        of_beta += self._mul("wide", of_values, value).sum(-1, keepdim=True)
        ended = self._mul("product", of_ending, ending).sum(-1)
        total = logs.sum(-1) - logs.sum(-2) - ended
        total += self._mul("product", of_beginning, beginning).addcmul_(of_reads, both[..., width:]).sum(-1)
        total[:, -1] += ended.sum(-1) + self._mul("state", before, after).sum((-1, -2)) * whole[:, 0, 0]
        return (
            of_query,
            of_key,
            self._mul("of_value", of_values, beta),
            total.flip(-1).cumsum(-1).flip(-1),
            of_beta,
            ends[0],
        )
