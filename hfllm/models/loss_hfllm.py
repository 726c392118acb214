"""The cross-entropy of a language model's head, computed per chunk of tokens without all logits at once.

This file imports only torch and a file beside it, and is uploaded to the Hub with modeling_hfllm.py. Shapes: N tokens,
E hidden_size, V vocab_size.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .memory_hfllm import is_unobserved, needs_autograd


class _LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of a linear head, computed per chunk of tokens together with its gradient."""

    @staticmethod
    def forward(ctx, hidden_NE, weight_VE, targets_N, chunk_size, label_smoothing, ignore_index, softcap, has_grad):
        needs_grad, trains_head = has_grad and any(ctx.needs_input_grad), ctx.needs_input_grad[1]
        grad_hidden, grad_weight = torch.empty_like(hidden_NE), None
        total = torch.zeros((), dtype=torch.float32, device=hidden_NE.device)
        for start in range(0, len(hidden_NE), chunk_size):
            rows = slice(start, start + chunk_size)
            kept = (targets_N[rows] != ignore_index).unsqueeze(1)
            column = targets_N[rows].unsqueeze(1).where(kept, 0)
            scores = nn.functional.linear(hidden_NE[rows], weight_VE)
            capped = None if softcap is None else torch.tanh(scores / softcap)
            scores = scores if softcap is None else softcap * capped
            dtype, scores = scores.dtype, nn.functional.log_softmax(scores, dim=-1, dtype=torch.float32)
            score = scores.gather(1, column)
            if label_smoothing:
                score = (1 - label_smoothing) * score + label_smoothing * scores.mean(-1, keepdim=True)
            total -= (score * kept).sum()
            if not needs_grad:
                continue
            # The gradient with respect to the logits: probabilities minus targets.
            grad = scores.exp_()
            if label_smoothing:
                grad -= label_smoothing / len(weight_VE)
            grad.scatter_add_(1, column, grad.new_full((1, 1), label_smoothing - 1).expand_as(column))
            if capped is not None:
                # The derivative of c * tanh(x / c) is 1 - tanh(x / c)^2.
                grad *= 1 - capped.square()
            grad = grad.to(dtype)
            grad_hidden[rows] = (grad @ weight_VE) * kept
            if not trains_head:
                continue
            hidden = (hidden_NE[rows] * kept).to(grad.dtype)
            if grad_weight is None:
                grad_weight = (grad.t() @ hidden).float()
            elif grad.dtype == grad_weight.dtype:
                grad_weight.addmm_(grad.t(), hidden)
            else:
                grad_weight += grad.t() @ hidden
        ctx.gradients = grad_hidden, grad_weight, weight_VE.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        # In place, since a copy of the head's gradient would be the largest tensor here; this works only once.
        if ctx.gradients is None:
            raise RuntimeError("the chunked loss has one backward pass only: use loss_chunk_size=0 to keep the graph")
        (grad_hidden, grad_weight, dtype), ctx.gradients = ctx.gradients, None
        grad_weight = grad_weight if grad_weight is None else grad_weight.mul_(grad_output).to(dtype)
        return grad_hidden.mul_(grad_output), grad_weight, *(None,) * 6


def linear_cross_entropy(
    hidden_NE: torch.Tensor,
    head: nn.Linear,
    targets_N: torch.Tensor,
    chunk_size: int,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    softcap: float | None = None,
) -> torch.Tensor:
    """Return the cross-entropy of `head(hidden)`, summed over tokens, without holding all logits at once.

    Peak memory is that of `chunk_size` rows of logits and one gradient of the head.

    Args:
        hidden_NE: the inputs of the head.
        head: a linear layer; one that is wrapped, hooked or sharded is called as a module.
        targets_N: the index of each row's target.
        chunk_size: rows at a time.
        label_smoothing: share of the target spread over all tokens.
        ignore_index: the target of rows that do not count.
        softcap: soft limit c of the logits, `c * tanh(logits / c)`; `None` means no limit.

    Raises:
        ValueError: for a negative `chunk_size`.
    """
    if chunk_size < 0:
        raise ValueError(f"loss_chunk_size must be at least 0 or None, got {chunk_size}")
    weight, settings = head.weight, (chunk_size, label_smoothing, ignore_index, softcap, torch.is_grad_enabled())
    is_plain = type(head) is nn.Linear and head.bias is None and type(weight) is nn.Parameter
    is_plain = is_plain and weight.shape == (head.out_features, head.in_features)
    runs_once = needs_autograd() or not is_unobserved(head)
    if is_plain and not runs_once:
        return _LinearCrossEntropy.apply(hidden_NE, weight, targets_N, *settings)

    def chunk_loss(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        options = {"reduction": "sum", "label_smoothing": label_smoothing, "ignore_index": ignore_index}
        scores = head(hidden)
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        return nn.functional.cross_entropy(scores.float(), targets, **options)

    chunks = zip(hidden_NE.split(chunk_size), targets_N.split(chunk_size), strict=True)
    if runs_once:
        return sum(chunk_loss(*chunk) for chunk in chunks)
    return sum(checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks)
