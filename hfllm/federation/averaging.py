"""The average of organisations' updates, weighted by their target tokens.

One step of gradient descent at each organisation, on a loss that is a mean over its tokens, is then exactly the step
on all rows at once: the gradient of the mean over all tokens is the mean of gradients weighted by tokens. Weighted by
rows, it is another step wherever organizations' rows differ in length (McMahan et al. 2017, arXiv:1602.05629). A step
of Adam is no linear function of the gradient: the mean of such steps is another one.

Sums are held in float64 and added in the order of arrival: transports hand updates over in the order of the round's
participants, so that the same updates give the same bits.

A single update can move a mean by any length. `RobustSum` bounds each by the median length of its round, and has the
median and the trimmed mean, coordinate by coordinate, in place of the mean (Yin et al. 2018, arXiv:1803.01650).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import repeat

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
            InputError: see `check`. The sum is then as before.
        """
        self.check(update)
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

    def check(self, update: Update) -> None:
        """Refuse an update that cannot be added; the first one that can says what the others must be like.

        Raises:
            InputError: in one line that names the organization: a second update of it, NaN, other names, shapes,
                precision or base model, no tokens.
        """
        if update.organisation in self.organisations:
            raise InputError(f"organisation {update.organisation!r} sent two updates in a round")
        expected = self.expected or Expected.of(update.tensors, update.base_sha256)
        expected.check(update)
        self.expected = expected

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


MEAN, MEDIAN, TRIMMED_MEAN = AGGREGATIONS = ("mean", "median", "trimmed_mean")
# How many times the typical length an update may have, and the share of values that are cut off at each end.
MAX_NORM_RATIO, TRIM = 2.0, 0.2


class RobustSum:
    """Updates of a round that are bounded before they are averaged: one organization alone does not own the mean.

    An update that is longer than `max_norm_ratio` times the typical length, over all tensors together, is scaled to
    that (norm bounding, Sun et al. 2019, arXiv:1911.07963). Typical is the median of the round's lengths, of an even
    number the smaller one in the middle. Where that is 0 it is `earlier_norm`, or without one the median of what is
    not 0. Of two updates it is the middle one of both and `earlier_norm`, or without one the shorter; a single update
    is measured by `earlier_norm` only, and by nothing without it. Where no update is too long the mean has the bits of
    `WeightedSum`.

    All updates of the round are held in memory, in their precision.

    Args:
        expected: what every update must be like; by default like the first.
        aggregation: mean (by tokens), or by coordinate, organizations counting alike, median or trimmed_mean.
        trim: share of the updates that the trimmed mean leaves out at each end; of three or more at least one.
        max_norm_ratio: see above; 0 bounds nothing.

    Attributes:
        earlier_norm: the typical length of the round before, 0 if none is known, which is the default.
        bounded: of each organization whose update was too long, its length and the bound, in words; once averaged.
        typical_norm: the typical length of the bounded updates, 0 where nothing tells it; once averaged.

    Raises:
        InputError: for settings out of range.
    """

    def __init__(
        self,
        expected: Expected | None = None,
        aggregation: str = MEAN,
        trim: float = TRIM,
        max_norm_ratio: float = MAX_NORM_RATIO,
    ):
        check_robust(aggregation, trim, max_norm_ratio)
        self.aggregation, self.trim, self.max_norm_ratio = aggregation, trim, max_norm_ratio
        self.earlier_norm = 0.0
        self.bounded: dict[str, str] = {}
        self.typical_norm = 0.0
        self._total, self._updates = WeightedSum(expected), []
        self._norms: list[float] = []
        self._drift = 0.0

    def add(self, update: Update) -> None:
        """Add an update; see `WeightedSum.check` for what is refused."""
        self._total.check(update)
        self._total.organisations.append(update.organisation)
        self._updates.append(update)
        self._norms.append(six_digits(norm(update.tensors)))

    def average(self) -> dict[str, Tensor]:
        """Return the mean, median or trimmed mean of the bounded updates, in float64.

        Raises:
            InputError: before any update was added.
        """
        factors = self._factors()
        if self.aggregation == MEAN or not self._updates:
            total = WeightedSum()
            for update, factor in zip(self._updates, factors, strict=True):
                total.add(replace(update, tensors={name: _scaled(update, name, factor) for name in update.tensors}))
            average = total.average()
            self._drift = total.drift()
            return average
        average, squares = {}, 0.0
        for name in self._updates[0].tensors:
            values = torch.stack(list(map(_scaled, self._updates, repeat(name), factors)))
            average[name] = self._middle(values)
            squares += float((values - average[name]).square().sum())
        self._drift = math.sqrt(squares / len(factors))
        return average

    def drift(self) -> float:
        """Return how far the bounded updates lie from the average: the root of the mean square; once averaged."""
        return self._drift

    def _factors(self) -> list[float]:
        """Return what each update is multiplied by: 1 where it is not too long."""
        typical = typical_norm(self._norms, self.earlier_norm)
        most = math.inf if typical is None or not self.max_norm_ratio else self.max_norm_ratio * typical
        self.typical_norm = typical_norm([min(length, most) for length in self._norms]) or 0.0
        lengths = dict(zip((update.organisation for update in self._updates), self._norms, strict=True))
        self.bounded = {
            name: f"a norm of {length:.3g}, scaled to {most:.3g}" for name, length in lengths.items() if length > most
        }
        return [most / length if length > most else 1.0 for length in self._norms]

    def _middle(self, values: Tensor) -> Tensor:
        """Return the median or trimmed mean over the first axis."""
        count = len(values)
        cut = (count - 1) // 2 if self.aggregation == MEDIAN else max(int(self.trim * count), int(count > 2))
        return values.sort(0).values[cut : count - cut].mean(0)


def _scaled(update: Update, name: str, factor: float) -> Tensor:
    return factor * update.tensors[name].to("cpu", torch.float64)


def typical_norm(norms: Sequence[float], earlier: float = 0.0) -> float | None:
    """Return the length that the updates of a round are measured by, `None` where nothing tells; see `RobustSum`.

    Args:
        norms: of all updates.
        earlier: the typical length of the round before, 0 if there is none.
    """
    lengths = sorted(norms)
    if len(lengths) < 3 or not lengths[(len(lengths) - 1) // 2]:
        # Zeros tell nothing of how long the others may be.
        lengths = [each for each in lengths if each > 0]
        if earlier and lengths:
            lengths = sorted([*lengths, earlier]) if len(norms) == len(lengths) == 2 else [earlier]
    return lengths[(len(lengths) - 1) // 2] if lengths else None


def check_robust(aggregation: str, trim: float, max_norm_ratio: float) -> None:
    """Refuse what no robust average can follow.

    Raises:
        InputError: naming the flag.
    """
    if aggregation not in AGGREGATIONS:
        raise InputError(f"--aggregation {aggregation!r}: expected one of {', '.join(AGGREGATIONS)}")
    if not 0 <= trim < 0.5:
        raise InputError(f"--trim {trim}: expected a share of at least 0, below 0.5")
    if max_norm_ratio != 0 and not (math.isfinite(max_norm_ratio) and max_norm_ratio >= 1):
        raise InputError(f"--max_norm_ratio {max_norm_ratio}: expected a number of at least 1, or 0 for no bound")


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


def six_digits(value: float) -> float:
    """Return a figure without the digits in which sums differ by where tensors lie in memory."""
    return float(f"{value:.6g}")


def distances(updates: Iterable[Update], average: Mapping[str, Tensor]) -> dict[str, float]:
    """Return each organisation's distance to the mean, by name."""
    return {
        update.organisation: norm({name: tensor.double() - average[name] for name, tensor in update.tensors.items()})
        for update in updates
    }
