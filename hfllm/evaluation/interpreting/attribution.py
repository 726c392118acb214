"""Which tokens of a prompt make an answer likely: gradient x input, and integrated gradients.

Both attribute the logit of the answer, above that of another one where there is one, to the vectors of the tokens.
Integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365, equation 1) sum up to the difference between the
prompt and a baseline, but for the error of the integral, which is returned beside them; it is
large where a function jumps, as one that chooses experts does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hfllm.errors import InputError
from hfllm.evaluation.interpreting.hooks import Parts, hooked, last_logits
from hfllm.evaluation.interpreting.prompts import FactPrompt, batch_of

GRADIENT_X_INPUT, INTEGRATED_GRADIENTS = "gradient_x_input", "integrated_gradients"
METHODS = (GRADIENT_X_INPUT, INTEGRATED_GRADIENTS)


@dataclass(frozen=True)
class Attribution:
    """What each token adds to the logit of an answer.

    Args:
        scores: (S,), in logits.
        change: the logit of the prompt less that of the baseline, which integrated gradients sum up to.
    """

    scores: torch.Tensor
    change: float

    @property
    def gap(self) -> float:
        """How far the sum of the scores is from `change`: the error of the integral, in logits."""
        return abs(float(self.scores.sum()) - self.change)


def mean_vector(parts: Parts) -> torch.Tensor:
    """Return the mean of all tokens' vectors (E,): a baseline that is no token.

    A vector of zeros is a bad one: an RMSNorm reads the same at all points between it and a token.
    """
    size = parts.embeddings.weight.shape[0]
    ids = torch.arange(size, device=parts.model.device)[None]
    with torch.no_grad():
        return parts.embeddings(ids)[0].float().mean(0)


def attribute(
    parts: Parts,
    prompt: FactPrompt,
    method: str = INTEGRATED_GRADIENTS,
    other: int | None = None,
    baseline: torch.Tensor | None = None,
    steps: int = 32,
    batch_size: int = 16,
) -> Attribution:
    """Return what each token of a prompt adds to the logit of its value.

    Args:
        method: one of `METHODS`.
        other: a token above whose logit that of the value is taken; by default the value's logit alone.
        baseline: (E,), the vector that stands for no token; by default `mean_vector`.
        steps: points of the integral, by Gauss and Legendre.
        batch_size: points in one pass.

    Raises:
        InputError: for an unknown method.
    """
    if method not in METHODS:
        raise InputError(f"attribution method {method!r} is not one of {', '.join(METHODS)}")
    vectors = _vectors(parts, prompt)
    start = (mean_vector(parts) if baseline is None else baseline.to(vectors)).expand_as(vectors)
    ends = _logits(parts, prompt, other, torch.stack([start, vectors]))
    change = float(ends[1] - ends[0])
    if method == GRADIENT_X_INPUT:
        scores = (_gradients(parts, prompt, other, vectors[None])[0] * vectors).sum(-1)
        return Attribution(scores.cpu(), change)
    points, weights = (torch.tensor(each, dtype=torch.float) for each in np.polynomial.legendre.leggauss(steps))
    points, weights = ((points + 1) / 2).to(vectors.device), (weights / 2).to(vectors.device)
    total = torch.zeros_like(vectors)
    for first in range(0, steps, batch_size):
        some = points[first : first + batch_size, None, None]
        gradients = _gradients(parts, prompt, other, start + some * (vectors - start))
        total += (weights[first : first + batch_size, None, None] * gradients).sum(0)
    return Attribution((total * (vectors - start)).sum(-1).cpu(), change)


def _vectors(parts: Parts, prompt: FactPrompt) -> torch.Tensor:
    """Return the vectors (S, E) of a prompt's tokens, in 32 bits."""
    ids, _ = batch_of([prompt], parts.model.device)
    with torch.no_grad():
        return parts.embeddings(ids)[0].float()


def _forward(parts: Parts, prompt: FactPrompt, other: int | None, vectors: torch.Tensor) -> torch.Tensor:
    """Return what is attributed, (N,), with the vectors (N, S, E) in place of the tokens'."""
    ids, last = batch_of([prompt] * len(vectors), parts.model.device)
    with hooked([(parts.embeddings, lambda output: vectors.to(output.dtype))]):
        logits = last_logits(parts, ids, last)
    return logits[:, prompt.value] - (0.0 if other is None else logits[:, other])


def _logits(parts: Parts, prompt: FactPrompt, other: int | None, vectors: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return _forward(parts, prompt, other, vectors)


def _gradients(parts: Parts, prompt: FactPrompt, other: int | None, vectors: torch.Tensor) -> torch.Tensor:
    """Return the gradients (N, S, E); those of the model's own parameters stay as they are."""
    vectors = vectors.detach().requires_grad_()
    with torch.enable_grad():
        total = _forward(parts, prompt, other, vectors).sum()
    return torch.autograd.grad(total, vectors)[0].float()


def captum_scores(
    parts: Parts,
    prompt: FactPrompt,
    method: str = "LayerIntegratedGradients",
    other: int | None = None,
    **options: object,
) -> torch.Tensor:
    """Return the scores (S,) of the tokens by a method of captum that looks at one layer, the embeddings.

    Args:
        method: the name of a class of `captum.attr`, such as `LayerIntegratedGradients` or `LayerGradientXActivation`.
        other: as for `attribute`.
        options: of its `attribute`, such as `n_steps` or `baselines`.

    Raises:
        InputError: when captum is not installed, or has no such class.
    """
    try:
        from captum import attr
    except ImportError:
        raise InputError("captum is not installed: pip install 'hfllm[interpret]'") from None
    if not method.startswith("Layer") or not hasattr(attr, method):
        known = ", ".join(sorted(name for name in attr.__all__ if name.startswith("Layer")))
        raise InputError(f"captum has no method {method!r} for a layer; these it has: {known}")

    def forward(ids: torch.Tensor) -> torch.Tensor:
        last = torch.full((len(ids),), ids.shape[1] - 1, device=ids.device)
        logits = last_logits(parts, ids, last)
        return logits[:, prompt.value] - (0.0 if other is None else logits[:, other])

    ids, _ = batch_of([prompt], parts.model.device)
    with torch.enable_grad():
        found = getattr(attr, method)(forward, parts.embeddings).attribute(ids, **options)
    return found[0].float().sum(-1).detach().cpu()


def strongest(scores: torch.Tensor, among: Sequence[int], size: Callable[[float], float] = abs) -> int:
    """Return the place, of some, whose score is largest."""
    return max(among, key=lambda place: size(float(scores[place])))
