"""The average of organisations' updates, weighted by their target tokens.

One step of gradient descent at each organisation, on a loss that is a mean over its tokens, is then exactly the step
on all rows at once: the gradient of the mean over all tokens is the mean of gradients weighted by tokens. Weighted by
rows, it is another step wherever organisations' rows differ in length (McMahan et al. 2017, arXiv:1602.05629).

Sums are held in float64 and added in the order of arrival: transports hand updates over in the order of the round's
participants, so that the same updates give the same bits.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from hfllm.errors import InputError
from hfllm.federation.updates import Expected, Update


class WeightedSum:
    """Running sum of updates, so that a server holds a single one however many organisations there are.

    Args:
        expected: what every update must be like; by default like the first.
    """

    def __init__(self, expected: Expected | None = None):
        self.expected = expected
        self.organisations: list[str] = []
        self.num_tokens = 0
        self.num_rows = 0
        self._sums: dict[str, Tensor] = {}
        self._squares = 0.0

    def add(self, update: Update) -> None:
        """Add an update.

        Raises:
            InputError: in one line that names the organisation: a second update of it, NaN, other names, shapes,
                precision or base model, no tokens. The sum is then as before.
        """
        if update.organisation in self.organisations:
            raise InputError(f"organisation {update.organisation!r} sent two updates in a round")
        expected = self.expected or Expected.of(update.tensors, update.base_sha256)
        expected.check(update)
        self.expected = expected
        for name, tensor in update.tensors.items():
            value = tensor.to("cpu", torch.float64)
            self._squares += update.num_tokens * float(value.square().sum())
            if name in self._sums:
                self._sums[name].add_(value, alpha=update.num_tokens)
            else:
                self._sums[name] = value * update.num_tokens
        self.organisations.append(update.organisation)
        self.num_tokens += update.num_tokens
        self.num_rows += update.num_rows

    def average(self) -> dict[str, Tensor]:
        """Return the mean by tokens, in float64.

        Raises:
            InputError: before any update was added.
        """
        if not self.organisations:
            raise InputError("no organisation sent an update that can be averaged; at least 1 is needed")
        return {name: total / self.num_tokens for name, total in self._sums.items()}

    def drift(self) -> float:
        """Return how far organisations moved apart: the root of the mean squared distance to the mean, by tokens.

        It is 0 when all sent the same change. No second pass: it is the mean of squares less the square of the mean.
        """
        mean = self.average()
        return math.sqrt(max(self._squares / self.num_tokens - norm(mean) ** 2, 0.0))


def weighted_average(updates: Iterable[Update], expected: Expected | None = None) -> dict[str, Tensor]:
    """Return the mean of updates by their target tokens, in float64; see `WeightedSum`.

    Raises:
        InputError: for no updates, and for one that cannot be averaged.
    """
    total = WeightedSum(expected)
    for update in updates:
        total.add(update)
    return total.average()


def norm(tensors: Mapping[str, Tensor]) -> float:
    """Return the Euclidean norm of all values together."""
    return math.sqrt(sum(float(tensor.to(torch.float64).square().sum()) for tensor in tensors.values()))


def distances(updates: Iterable[Update], average: Mapping[str, Tensor]) -> dict[str, float]:
    """Return each organisation's distance to the mean, by name."""
    return {
        update.organisation: norm({name: tensor.double() - average[name] for name, tensor in update.tensors.items()})
        for update in updates
    }
