"""The acceptance rule of speculative decoding, and its expected speedup (Leviathan et al. 2023, arXiv:2211.17192).

Shapes: B rows, G drafted tokens of each, V vocabulary size. Rows may have fewer than G drafted tokens; `counts` says
how many, and later entries are ignored.
"""

import torch


def residual(target_probs: torch.Tensor, draft_probs: torch.Tensor) -> torch.Tensor:
    """Return `norm(max(p - q, 0))`, from which a rejected token is replaced (section 2.3), shape (..., V).

    Where p and q are equal, tokens can be rejected only through rounding, and p itself is returned.
    """
    rest = (target_probs - draft_probs).clamp(min=0)
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total, target_probs)


def acceptance_probability(target_probs: torch.Tensor, draft_probs: torch.Tensor) -> torch.Tensor:
    """Return `min(1, p / q)` of drafted tokens, elementwise; q is above 0 for any token that was drawn."""
    return (target_probs / draft_probs).clamp(max=1.0)


def accept_sampled(
    draft_tokens: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_probs: torch.Tensor,
    counts: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept drafted tokens so that the output follows the target's distribution (algorithm 1 of the paper).

    Args:
        draft_tokens: (B, G), each drawn from the draft's distribution of its position.
        draft_probs: (B, G, V), those distributions q; `None` when each token was certain (q = 1), as for n-grams
            of the prompt.
        target_probs: (B, G + 1, V), the target's distributions p after the same temperature, top-k and top-p.
        counts: (B,) number of tokens that each row has drafted; by default G.
        generator: the source of randomness.

    Returns:
        How many of each row's tokens are accepted, (B,), and the next token, (B,): from the residual
        distribution after a rejection, from the target's own after the last draft.
    """
    rows, drafted = draft_tokens.shape
    device = target_probs.device
    counts = torch.full((rows,), drafted, device=device) if counts is None else counts
    chosen = draft_tokens.unsqueeze(-1)
    p_chosen = target_probs[:, :drafted].gather(-1, chosen).squeeze(-1)
    q_chosen = torch.ones_like(p_chosen) if draft_probs is None else draft_probs.gather(-1, chosen).squeeze(-1)
    draws = torch.rand(rows, drafted, generator=generator, device=device, dtype=target_probs.dtype)
    accepted = leading(draws < acceptance_probability(p_chosen, q_chosen), counts)
    at = accepted.view(-1, 1, 1)
    p = target_probs.gather(1, at.expand(-1, 1, target_probs.shape[-1])).squeeze(1)
    if drafted == 0:
        return accepted, draw(p, generator)
    at = at.clamp(max=drafted - 1)
    if draft_probs is None:
        q = torch.zeros_like(p).scatter_(1, draft_tokens.gather(1, at.squeeze(-1)), 1.0)
    else:
        q = draft_probs.gather(1, at.expand(-1, 1, p.shape[-1])).squeeze(1)
    rejected = (accepted < counts).unsqueeze(-1)
    return accepted, draw(torch.where(rejected, residual(p, q), p), generator)


def accept_greedy(
    draft_tokens: torch.Tensor, target_tokens: torch.Tensor, counts: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept drafted tokens as long as they are the target's own choice.

    Args:
        draft_tokens: (B, G).
        target_tokens: (B, G + 1), the most probable token at each position and after the last.
        counts: (B,) number of tokens that each row has drafted; by default G.

    Returns:
        How many of each row's tokens are accepted, (B,), and the target's next choice, (B,).
    """
    rows, drafted = draft_tokens.shape
    counts = torch.full((rows,), drafted, device=target_tokens.device) if counts is None else counts
    accepted = leading(draft_tokens == target_tokens[:, :drafted], counts)
    return accepted, target_tokens.gather(1, accepted.unsqueeze(1)).squeeze(1)


def leading(passes: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Count the leading `True` among the first `counts` of each row: (B, G) and (B,) to (B,)."""
    within = torch.arange(passes.shape[1], device=passes.device) < counts.unsqueeze(1)
    return (passes & within).long().cumprod(1).sum(1)


def draw(probs: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw one token from each row's distribution: (B, V) to (B,)."""
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)


def expected_tokens(alpha: float, gamma: float) -> float:
    """Return the expected tokens per run of the target: `(1 - alpha^(gamma + 1)) / (1 - alpha)` (equation 1).

    Args:
        alpha: probability that a drafted token is accepted, in [0, 1].
        gamma: drafted tokens, at least 0.
    """
    return float(gamma + 1) if alpha == 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)


def speedup(alpha: float, gamma: float, c: float) -> float:
    """Return the expected speedup over plain decoding, `expected_tokens / (gamma * c + 1)` (theorem 3.8).

    Args:
        alpha: probability that a drafted token is accepted.
        gamma: drafted tokens.
        c: time of one draft step, in runs of the target. The theorem assumes the target's time to be the same for
            gamma + 1 tokens as for one; if each additional token costs a share v of a run, use `c + v`.
    """
    return expected_tokens(alpha, gamma) / (gamma * c + 1)


def operations(alpha: float, gamma: float, c_hat: float) -> float:
    """Return the expected factor on operations, `(gamma * c_hat + gamma + 1) / expected_tokens` (theorem 3.11).

    Args:
        alpha: probability that a drafted token is accepted.
        gamma: drafted tokens.
        c_hat: operations of one draft step, relative to the target's for one token.
    """
    return (gamma * c_hat + gamma + 1) / expected_tokens(alpha, gamma)


def optimal_num_draft_tokens(alpha: float, c: float, maximum: int = 32) -> int:
    """Return the number of drafted tokens, from 0 to `maximum`, with the largest `speedup` (section 3.5).

    0 means that drafting does not pay, which holds if and only if `alpha <= c` (corollary 3.9).
    """
    return max(range(maximum + 1), key=lambda gamma: speedup(alpha, gamma, c))
