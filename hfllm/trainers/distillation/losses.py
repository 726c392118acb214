"""Losses of a student against its teacher and against the data, in nats, summed over tokens.

With teacher `p` and student `q`, both softened by a temperature, the divergence at a token is (Agarwal et al. 2023,
arXiv:2306.13649, equation 1)

    beta = 0        KL(p || q)                                      forward: the student covers the teacher's outputs
    beta = 1        KL(q || p)                                      reverse: the student keeps to the teacher's modes
    between         beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q         Jensen-Shannon

and the loss `soft_weight * T^2 * divergence + hard_weight * cross-entropy` (Hinton et al. 2015, arXiv:1503.02531,
section 2: the soft targets' gradients shrink as 1 / T^2).

Shapes: N tokens, V vocabulary, E hidden size, K kept outcomes, M compared outcomes.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class LossSettings:
    """Settings of the distillation loss.

    Args:
        temperature: of both distributions in the divergence.
        beta: choice of the divergence, see above.
        soft_weight, hard_weight: weights of the divergence, times the squared temperature, and of the cross-entropy.
    """

    temperature: float = 3.0
    beta: float = 0.0
    soft_weight: float = 0.7
    hard_weight: float = 0.3


class Teacher(Protocol):
    """The distributions of a teacher at N tokens."""

    def take(self, rows: slice) -> "torch.Tensor | TopK":
        """Return its fp32 logits at some of the tokens, or their `TopK`."""
        ...


@dataclass(frozen=True)
class TeacherHead:
    """A loaded teacher: its logits are computed from its hidden states, for as many tokens at a time as requested.

    Args:
        hidden: (N, E), the teacher's hidden states.
        head: its output embedding.
        scale: factor on its logits.
    """

    hidden: torch.Tensor
    head: nn.Module
    scale: float = 1.0

    @torch.no_grad()
    def take(self, rows: slice) -> torch.Tensor:
        logits = self.head(self.hidden[rows]).float()
        return logits if self.scale == 1 else logits * self.scale


@dataclass(frozen=True)
class TeacherLogits:
    """All of a teacher's logits, (N, V)."""

    logits: torch.Tensor

    def take(self, rows: slice) -> torch.Tensor:
        return self.logits[rows].float()


@dataclass(frozen=True)
class TopK:
    """The K most likely tokens of a teacher at one temperature, and the total probability of all others.

    The student is compared on K + 1 outcomes, the last being "any other token". This is a lower bound of the full
    divergence, growing with K (the data-processing inequality), and is the full divergence once K is V.

    Args:
        log_probs: (N, K), log-probabilities.
        indices: (N, K), the tokens.
        rest: (N,), log-probability of all others; not used when K is V.
    """

    log_probs: torch.Tensor
    indices: torch.Tensor
    rest: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, logits: torch.Tensor, temperature: float, k: int) -> "TopK":
        """Return the top `k` of logits (N, V), or all if V is not larger."""
        log_probs = (logits.float() / temperature).log_softmax(-1)
        top_k = log_probs.topk(min(k, logits.shape[-1]), dim=-1)
        rest = log_probs.scatter_(1, top_k.indices, -math.inf).logsumexp(-1)
        return cls(top_k.values, top_k.indices, rest)

    def take(self, rows: slice) -> "TopK":
        return TopK(self.log_probs[rows], self.indices[rows], self.rest[rows])

    def outcomes(self, vocabulary: int) -> torch.Tensor:
        """Return the log-probabilities of the compared outcomes, (N, M)."""
        if self.log_probs.shape[-1] == vocabulary:
            return self.log_probs
        return torch.cat((self.log_probs, self.rest.unsqueeze(1)), 1)


def divergence(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> torch.Tensor:
    """Return the divergence per row of log-probabilities (N, M) of the teacher and the student, (N,)."""
    return _divergence_and_slope(log_p, log_q, beta, needs_slope=False)[0]


def _divergence_and_slope(
    log_p: torch.Tensor, log_q: torch.Tensor, beta: float, needs_slope: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the divergence, and q times its derivative by q up to a multiple of q, cancelled by a softmax."""
    if beta == 0:
        p = log_p.exp()
        return (p * (log_p - log_q)).sum(-1), (-p if needs_slope else None)
    q = log_q.exp()
    if beta == 1:
        slope = q * (log_q - log_p)
        return slope.sum(-1), slope
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    slope = (1 - beta) * q * (log_q - log_m)
    return slope.sum(-1) + beta * (log_p.exp() * (log_p - log_m)).sum(-1), slope


def token_losses(
    logits: torch.Tensor, targets: torch.Tensor, teacher: "torch.Tensor | TopK | None", settings: LossSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the divergence and the cross-entropy, summed over tokens, by autograd on the student's logits (N, V).

    Args:
        targets: (N,), token ids.
        teacher: its logits (N, V), or its `TopK` at the same temperature; without one the divergence is 0.
    """
    logits = logits.float()
    hard = nn.functional.cross_entropy(logits, targets, reduction="sum")
    if teacher is None:
        return torch.zeros_like(hard), hard
    log_q = (logits / settings.temperature).log_softmax(-1)
    if isinstance(teacher, TopK):
        log_p, top_k_log_q = teacher.outcomes(logits.shape[-1]), log_q.gather(1, teacher.indices)
        if log_p.shape[-1] > top_k_log_q.shape[-1]:
            rest = log_q.scatter(1, teacher.indices, -math.inf).logsumexp(-1, keepdim=True)
            top_k_log_q = torch.cat((top_k_log_q, rest), 1)
        log_q = top_k_log_q
    else:
        log_p = (teacher / settings.temperature).log_softmax(-1)
    return divergence(log_p, log_q, settings.beta).sum(), hard


def combined(soft: torch.Tensor, hard: torch.Tensor, settings: LossSettings) -> torch.Tensor:
    """Return the loss, from the divergence and the cross-entropy."""
    return settings.soft_weight * settings.temperature**2 * soft + settings.hard_weight * hard


def _losses_and_gradient(
    scores: torch.Tensor,
    targets: torch.Tensor,
    teacher: "torch.Tensor | TopK | None",
    settings: LossSettings,
    needs_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return `token_losses` and the gradient of the loss by the logits `scores` (N, V); they are overwritten."""
    column, grad = targets.unsqueeze(1), None
    partition = scores.logsumexp(-1, keepdim=True)
    hard = (partition - scores.gather(1, column)).sum()
    if needs_gradient and (settings.hard_weight or teacher is None):
        # Of the cross-entropy: probabilities minus targets.
        grad = (scores - partition).exp_().mul_(settings.hard_weight)
        grad.scatter_add_(1, column, grad.new_full((1, 1), -settings.hard_weight).expand_as(column))
    if teacher is None:
        return torch.zeros_like(hard), hard, grad
    log_q = scores.div_(settings.temperature).log_softmax(-1)
    if isinstance(teacher, TopK):
        soft, slope = _top_k_gradient(log_q, teacher, settings.beta, needs_gradient)
    else:
        log_p = (teacher / settings.temperature).log_softmax(-1)
        soft, slope = _full_gradient(log_p, log_q, settings.beta, needs_gradient)
    if needs_gradient:
        # T^2 from the scale of the soft targets, 1 / T from the softened logits.
        weight = settings.soft_weight * settings.temperature
        grad = slope.mul_(weight) if grad is None else grad.add_(slope, alpha=weight)
    return soft.sum(), hard, grad


def _full_gradient(
    log_p: torch.Tensor, log_q: torch.Tensor, beta: float, needs_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the divergence per row on all outcomes, and its gradient by the softened logits (N, V).

    `log_p` and `log_q` (N, V) are overwritten: a pass over so many numbers takes about a tenth of the head's product.
    """
    if beta == 0:
        p = log_p.exp()
        soft = log_p.sub_(log_q).mul_(p).sum(-1)
        return soft, log_q.exp_().sub_(p) if needs_gradient else None
    soft, slope = _divergence_and_slope(log_p, log_q, beta, needs_gradient)
    if needs_gradient:
        slope = slope.addcmul_(log_q.exp_(), slope.sum(-1, keepdim=True), value=-1)
    return soft, slope


def _top_k_gradient(
    log_q: torch.Tensor, teacher: TopK, beta: float, needs_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the divergence per row on the kept outcomes, and its gradient by the softened logits (N, V).

    `log_q` (N, V) is overwritten.
    """
    log_p, top_k_log_q = teacher.outcomes(log_q.shape[-1]), log_q.gather(1, teacher.indices)
    has_rest, outcomes = log_p.shape[-1] > top_k_log_q.shape[-1], top_k_log_q
    if has_rest:
        rest = log_q.scatter_(1, teacher.indices, -math.inf).logsumexp(-1, keepdim=True)
        outcomes = torch.cat((top_k_log_q, rest), 1)
    soft, slope = _divergence_and_slope(log_p, outcomes, beta, needs_gradient)
    if not needs_gradient:
        return soft, None
    slope = slope - outcomes.exp() * slope.sum(-1, keepdim=True)
    if has_rest:
        # The gradient of "any other token" is divided among its tokens by their probabilities.
        log_q.sub_(rest).exp_().mul_(slope[:, -1:])
    return soft, log_q.scatter_(1, teacher.indices, slope[:, : top_k_log_q.shape[-1]])


class _LinearDistillation(torch.autograd.Function):
    """The loss of a linear head, computed per chunk of tokens together with its gradient."""

    @staticmethod
    def forward(ctx, hidden_NE, weight_VE, targets_N, teacher, settings, chunk_size):
        needs_grad, trains_head = any(ctx.needs_input_grad), ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden_NE) if needs_grad else None
        grad_weight = None
        soft, hard = torch.zeros((2,), dtype=torch.float32, device=hidden_NE.device)
        for start in range(0, len(hidden_NE), chunk_size):
            rows = slice(start, start + chunk_size)
            scores = nn.functional.linear(hidden_NE[rows], weight_VE)
            dtype = scores.dtype
            terms = _losses_and_gradient(
                scores.float(), targets_N[rows], teacher and teacher.take(rows), settings, needs_grad
            )
            soft, hard = soft + terms[0], hard + terms[1]
            del scores
            if not needs_grad:
                continue
            grad = terms[2].to(dtype)
            grad_hidden[rows] = grad @ weight_VE
            if not trains_head:
                continue
            hidden = hidden_NE[rows].to(grad.dtype)
            if grad_weight is None:
                grad_weight = (grad.t() @ hidden).float()
            elif grad.dtype == grad_weight.dtype:
                grad_weight.addmm_(grad.t(), hidden)
            else:
                grad_weight += grad.t() @ hidden
        if trains_head and grad_weight is None:
            grad_weight = torch.zeros_like(weight_VE, dtype=torch.float32)
        ctx.gradients = grad_hidden, grad_weight, weight_VE.dtype
        ctx.mark_non_differentiable(soft, hard)
        return combined(soft, hard, settings), soft, hard

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, *unused: torch.Tensor | None):
        # In place, since a copy of the head's gradient would be the largest tensor here; this works only once.
        if ctx.gradients is None:
            raise RuntimeError("the chunked loss has one backward pass only: use loss_chunk_size=0 to keep the graph")
        (grad_hidden, grad_weight, dtype), ctx.gradients = ctx.gradients, None
        grad_weight = grad_weight if grad_weight is None else grad_weight.mul_(grad_output).to(dtype)
        return grad_hidden.mul_(grad_output), grad_weight, None, None, None, None


def linear_distillation(
    hidden: torch.Tensor,
    head: nn.Module,
    targets: torch.Tensor,
    teacher: Teacher | None,
    settings: LossSettings,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss of `head(hidden)`, summed over tokens, without holding all logits of either model at once.

    Args:
        hidden: (N, E), the student's hidden states, times the factor on its logits if it has one.
        head: its output embedding.
        targets: (N,), token ids; tokens without a target are removed beforehand.
        teacher: the teacher's distributions at the same tokens; without one the loss is only the cross-entropy.
        chunk_size: tokens at a time; peak memory is a few matrices of as many rows of logits, and one gradient of
            the head.

    Returns:
        The loss; and, without a gradient, the divergence and the cross-entropy in it.
    """
    weight = head.weight
    is_plain = type(head) is nn.Linear and head.bias is None and type(weight) is nn.Parameter
    # A wrapped (LoRA), hooked (offloading) or sharded (ZeRO-3) head must be called as a module.
    if is_plain and "forward" not in vars(head) and weight.shape == (head.out_features, head.in_features):
        if not torch.is_grad_enabled():
            # The function cannot see this, and would compute unused gradients, one of the head's size.
            hidden, weight = hidden.detach(), weight.detach()
        return _LinearDistillation.apply(hidden, weight, targets, teacher, settings, chunk_size)

    def chunk_losses(hidden: torch.Tensor, targets: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        teacher_chunk = teacher and teacher.take(slice(start, start + len(targets)))
        return token_losses(head(hidden), targets, teacher_chunk, settings)

    # With no tokens there is one empty chunk, so the head's weights are in the graph on every process.
    parts = [
        checkpoint(chunk_losses, hidden[start : start + chunk_size], targets[start : start + chunk_size], start,
                   use_reentrant=False)
        for start in range(0, max(len(targets), 1), chunk_size)
    ]  # fmt: skip
    soft, hard = (sum(part[index] for part in parts) for index in (0, 1))
    return combined(soft, hard, settings), soft.detach(), hard.detach()
