"""The formulas of PPO from human feedback, each a pure function with its source, and controllers of the KL.

Shapes: B responses, T response positions (right-padded). `mask` is 1.0 on the tokens chosen by the policy, and 0.0 on
tokens of an environment and on padding, without an effect on any result.

Sources: [PPO] Schulman et al. 2017, arXiv:1707.06347. [GAE] Schulman et al. 2016, arXiv:1506.02438. [RLHF] Ziegler
et al. 2019, arXiv:1909.08593, and Ouyang et al. 2022, arXiv:2203.02155. [KL] Schulman 2020, "Approximating KL
divergence", joschu.net/blog/kl-approx.html. [VC-PPO] Yuan et al. 2025, arXiv:2503.01491. [VAPO] Yue et al. 2025,
arXiv:2504.05118. [DAPO] Yu et al. 2025, arXiv:2503.14476. [RLOO] Ahmadian et al. 2024, arXiv:2402.14740. [TIS] Yao et
al. 2025, "Your efficient RL framework secretly brings you off-policy RL training", fengyao.notion.site/off-policy-rl.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hfllm.trainers.ppo.options import KL_ESTIMATORS

# Lambda for short responses, and the tokens that it looks over: the sum of its powers.
LAM, REACH = 0.95, 20

# ---- formulas ----


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: str = "k1") -> torch.Tensor:
    """Return the per-token estimate (B, T) of KL(policy || reference) from tokens sampled by the policy [KL].

    `k1` = log(pi/ref) is unbiased; `k2` = k1^2 / 2 has less variance and a small bias; `k3` = ref/pi - 1 + k1 is
    unbiased and never negative.

    Raises:
        ValueError: for an unknown estimator.
    """
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        return torch.exp(-log_ratio) - 1 + log_ratio
    raise ValueError(f"kl_estimator={estimator!r} is not one of {', '.join(KL_ESTIMATORS)}")


def last_token_index(mask: torch.Tensor) -> torch.Tensor:
    """Return the index (B,) of each row's last chosen token; 0 for a row without any."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return (positions * (mask > 0)).amax(dim=1)


def first_chosen(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the value (B,) at each row's first chosen token; that at the first position for a row without any."""
    return values.gather(1, (mask > 0).int().argmax(1, keepdim=True)).squeeze(1)


def full_kl(log_probabilities: torch.Tensor, ref_log_probabilities: torch.Tensor) -> torch.Tensor:
    """Return the exact KL(policy || reference) of next-token distributions (..., V): sum of p log(p / q)."""
    return (log_probabilities.exp() * (log_probabilities - ref_log_probabilities)).sum(-1)


def token_rewards(
    scores: torch.Tensor,
    kl: torch.Tensor,
    mask: torch.Tensor,
    kl_coef: float,
    token_scores: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return token rewards (B, T): `-kl_coef * kl`, and the score on the last chosen token ([RLHF] equation 2).

    Args:
        scores: (B,), one per response.
        kl: (B, T), from `kl_estimate` or `full_kl`.
        token_scores: (B, T), rewards given token by token.
    """
    rewards = -kl_coef * kl * mask
    if token_scores is not None:
        rewards = rewards + token_scores * mask
    at_end = torch.nn.functional.one_hot(last_token_index(mask), mask.shape[1]).to(mask.dtype) * mask
    return rewards + at_end * scores.unsqueeze(1)


def generalized_advantages(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    gamma: float,
    lam: float | torch.Tensor,
    value_lam: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return advantages and returns, each (B, T): A_t = sum_k (gamma * lam)^k delta_{t+k} ([GAE] equation 16).

    delta_t = r_t + gamma V_{t+1} - V_t, with V = 0 after the last chosen token; returns are A + V. Time counts chosen
    tokens: tokens of an environment between two of them are cut out, so t + 1 is the next one.

    Args:
        lam: of all responses, or of each (B,), as from `length_adaptive_lam`.
        value_lam: of the returns alone, which the critic learns; by default `lam` ([VC-PPO] section 4.2: with 1 they
            are what was earned, so that a late reward reaches the first token undiminished).
    """
    # The chosen tokens first, in their order: without an environment they are where they were.
    order = (mask > 0).long().argsort(dim=1, descending=True, stable=True)
    rewards, values, chosen = (tensor.gather(1, order) for tensor in (rewards, values, mask))
    values = values * chosen
    next_values = torch.cat((values[:, 1:], torch.zeros_like(values[:, :1])), dim=1)
    deltas = (rewards + gamma * next_values - values) * chosen
    advantages = _discounted_sums(deltas, gamma * lam) * chosen
    earned = advantages if value_lam is None else _discounted_sums(deltas, gamma * value_lam) * chosen
    results = advantages, (earned + values) * chosen
    advantages, returns = (torch.zeros_like(values).scatter(1, order, each) for each in results)
    return advantages, returns


def _discounted_sums(deltas: torch.Tensor, discount: float | torch.Tensor) -> torch.Tensor:
    """Return the sums over later positions (B, T), each discounted by its distance.

    Args:
        discount: for one position, of all rows or of each (B,).
    """
    if isinstance(discount, torch.Tensor):
        # The rows have matrices of their own: a loop takes T / B of their memory.
        total, sums = torch.zeros_like(deltas[:, 0]), torch.empty_like(deltas)
        for position in reversed(range(deltas.shape[1])):
            total = deltas[:, position] + discount.to(deltas.dtype) * total
            sums[:, position] = total
        return sums
    # One product with a triangular matrix instead of a loop over positions.
    positions = torch.arange(deltas.shape[1], device=deltas.device)
    distance = positions.unsqueeze(1) - positions  # (later, earlier)
    discounts = torch.where(distance >= 0, torch.tensor(discount, dtype=deltas.dtype) ** distance.clamp(min=0), 0.0)
    # TF32, a possible format on a GPU for products of fp32, would round each term to 11 bits.
    exact = torch.float64 if deltas.device.type == "cuda" else deltas.dtype
    return (deltas.to(exact) @ discounts.to(exact)).to(deltas.dtype)


def length_adaptive_lam(mask: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return lambda (B,) by the number l of chosen tokens: 1 - 1 / (alpha l), at least 0 ([VAPO] section 4.2).

    The weights lambda^k of the sum then add up to alpha l: the advantage of a token looks over a share of its
    response, however long that is, and not over the same 20 tokens (lambda .95).
    """
    return (1 - 1 / (alpha * mask.sum(1)).clamp(min=1.0)).to(mask.dtype)


def default_lam(mask: torch.Tensor) -> float | torch.Tensor:
    """Return .95, or lambda (B,) where a response is longer than the 20 tokens that this looks over.

    For l chosen tokens it then looks over l^2 / 20 of them, 1 - 20 / l^2: what comes l tokens later counts
    exp(-20 / l), nearly all of it in a long response, and with .95 nearly nothing.
    """
    # One number for all: the sums are then a product of matrices.
    lengths = mask.sum(1)
    return LAM if lengths.max() <= REACH else (1 - REACH / lengths.clamp(min=REACH) ** 2).to(mask.dtype)


def means_of_others(totals: torch.Tensor, size: int) -> torch.Tensor:
    """Return for each response (B,) the mean of the other answers to its prompt ([RLOO] equation 8).

    As a baseline it does not depend on the response itself, so that the gradient stays unbiased.

    Args:
        totals: (B,), what responses earn; those of a prompt stand side by side.
        size: answers to a prompt, at least 2.
    """
    groups = totals.view(-1, size)
    return ((groups.sum(1, keepdim=True) - groups) / (size - 1)).view(-1)


def importance_weights(
    logprobs: torch.Tensor, sampling_logprobs: torch.Tensor, mask: torch.Tensor, cap: float, level: str = "token"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pi / mu at the chosen tokens (B, T), at most `cap`, and 1.0 where that was capped ([TIS]).

    pi is the policy as it is trained, mu what responses were sampled from: another engine, precision or version of it.
    Capping bounds the variance of the gradient, and biases it towards mu where pi is much likelier.

    Args:
        level: "token" takes each token's own ratio, "sequence" the whole response's for all of its tokens.
    """
    log_ratio = (logprobs - sampling_logprobs) * mask
    if level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True) * mask
    limit = math.log(cap)
    return log_ratio.clamp(max=limit).exp() * mask, (log_ratio > limit).to(mask.dtype) * mask


def masked_whiten(
    values: torch.Tensor,
    mask: torch.Tensor,
    shift_mean: bool = True,
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda total: total,
) -> torch.Tensor:
    """Scale `values` to unit variance, and zero mean if `shift_mean`, over the chosen tokens of the *global* batch.

    Args:
        reduce: sums a tensor over processes; the identity for one process.
    """
    count, total = reduce(torch.stack((mask.sum(), (values * mask).sum())))
    mean = total / count.clamp(min=1)
    variance = reduce(((values - mean).square() * mask).sum()) / (count - 1).clamp(min=1)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    cliprange: float,
    dual_clip: float | None = None,
    cliprange_high: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the clipped surrogate, negated and *summed* over chosen tokens, and the number clipped ([PPO], eq. 7).

    The caller divides both by the tokens of the whole mini-batch, so the split into micro-batches does not matter.

    Args:
        mask: may hold a weight in place of 1.
        dual_clip: bound on the ratio where the advantage is negative (Ye et al. 2020, arXiv:1912.09729, equation 5).
        cliprange_high: the upper range, by default `cliprange`; a larger one lets rare tokens with a positive
            advantage rise faster ([DAPO] equation 10).
    """
    ratio = torch.exp((logprobs - old_logprobs) * (mask > 0))
    highest = 1 + (cliprange if cliprange_high is None else cliprange_high)
    unclipped, clipped = advantages * ratio, advantages * ratio.clamp(1 - cliprange, highest)
    surrogate = torch.minimum(unclipped, clipped)
    if dual_clip is not None:
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, dual_clip * advantages), surrogate)
    return -(surrogate * mask).sum(), ((clipped < unclipped) * mask).sum()


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    cliprange_value: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return half the squared value error, the larger of clipped and unclipped, *summed*, and the number clipped.

    Clipping around the rollout's values follows the original PPO and RLHF implementations; `None` turns it off.
    """
    unclipped = (values - returns).square()
    if cliprange_value is None:
        return 0.5 * (unclipped * mask).sum(), torch.zeros((), device=mask.device)
    clipped_values = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    clipped = (clipped_values - returns).square()
    return 0.5 * (torch.maximum(unclipped, clipped) * mask).sum(), ((clipped > unclipped) * mask).sum()


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return 1 - Var(returns - values) / Var(returns) over chosen tokens: 1 for a perfect critic, 0 for a constant."""
    real = mask > 0
    if real.sum() < 2:
        return torch.zeros((), device=values.device)
    variance = returns[real].var()
    return 1 - (returns - values)[real].var() / variance.clamp(min=1e-8)


# ---- controllers ----
#
# Values adapted by PPO from rollout to rollout: the weight of the KL penalty and the scale of the rewards.


@dataclass
class KLController:
    """Weight of the KL penalty: fixed, or steered towards a KL (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).

    Args:
        coefficient: the current weight.
        target: target KL in nats per response; `None` keeps the weight.
        horizon: episodes over which the weight may change by a fifth.
    """

    coefficient: float
    target: float | None = None
    horizon: int = 10_000

    def update(self, kl: float, episodes: int) -> None:
        """Update the weight by the mean KL of a rollout of `episodes` episodes."""
        if self.target is None:
            return
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        # A rollout with more episodes than the horizon counts as one of the horizon's length.
        self.coefficient *= 1 + error * min(episodes / self.horizon, 1.0)


@dataclass
class RunningMoments:
    """Mean and variance of all numbers seen, merged batch by batch (Chan et al. 1979, equations 2.1)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def std(self) -> float:
        """Return the standard deviation, or 1 while the variance is 0."""
        variance = self.squares / self.count if self.count else 0.0
        return math.sqrt(variance) if variance > 0 else 1.0

    def update(self, count: float, total: float, total_of_squares: float) -> None:
        """Add numbers, given their count, sum and sum of squares."""
        if count == 0:
            return
        mean = total / count
        squares = max(total_of_squares - count * mean * mean, 0.0)
        everything, gap = self.count + count, mean - self.mean
        self.squares += squares + gap * gap * self.count * count / everything
        self.mean += gap * count / everything
        self.count = everything
