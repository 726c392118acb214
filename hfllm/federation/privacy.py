"""Client-level differential privacy: what any one organisation holds changes what the server learns only a little.

McMahan et al. 2018 (arXiv:1710.06963), algorithm 1 with a fixed denominator and equal weights: each change is clipped
to a norm S, changes are summed, Gaussian noise of standard deviation z S is added, and the sum is divided by the
expected number of participants, whoever came. Weights by tokens are left out on purpose: a count is data too.

The bound holds for a server that is trusted to clip and add the noise; `accountant` says what it is. The noise is one
of floating-point numbers, whose gaps can reveal what was added to them (Mironov 2012); nothing here guards against
that.
"""

import math
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hfllm.errors import InputError
from hfllm.federation.accountant import check_noise
from hfllm.federation.averaging import WeightedSum, norm
from hfllm.federation.updates import Expected, Update


def clipped(update: Update, clip_norm: float) -> tuple[Update, float]:
    """Return the update, scaled to at most this norm over all tensors together, and the norm that it had.

    Raises:
        InputError: for a clipping norm that is no number above 0.
    """
    check_clip_norm(clip_norm)
    length = norm(update.tensors)
    if length <= clip_norm:
        return update, length
    # In float64: rounded back, the norm could be above the bound.
    factor = clip_norm / length
    return replace(update, tensors={name: factor * value.double() for name, value in update.tensors.items()}), length


class ClippedSum:
    """Sum of clipped changes, in which each organisation counts alike; the mean gets noise.

    It holds a single sum however many organisations there are.

    Args:
        clip_norm: S, the longest change over all tensors together.
        noise_multiplier: z; 0 clips alone.
        participants: the denominator. With noise it is sampling rate times organisations, which no round may change.
        weights: the weights of the round, for names and shapes.
        base_sha256: of the base model.
        generator: of tests and measurements; by default the operating system draws. A known seed takes the privacy
            away.

    Raises:
        InputError: for numbers out of range.
    """

    def __init__(
        self,
        clip_norm: float,
        noise_multiplier: float,
        participants: float,
        weights: Mapping[str, Tensor],
        base_sha256: str,
        generator: torch.Generator | None = None,
    ):
        check_clip_norm(clip_norm)
        check_noise(noise_multiplier)
        if not participants > 0:
            raise InputError(f"expected_participants is {participants}; expected a number above 0")
        self.clip_norm, self.noise_multiplier, self.participants = clip_norm, noise_multiplier, participants
        self.generator = generator
        self._shapes = {name: value.shape for name, value in weights.items()}
        self._expected, self._total = Expected.of(weights, base_sha256), WeightedSum()

    def add(self, update: Update) -> None:
        """Clip an update, and add it.

        Raises:
            InputError: naming the organisation, for one that cannot be averaged.
        """
        self._expected.check(update)
        cut, _ = clipped(update, self.clip_norm)
        self._total.add(replace(cut, tensors={n: v.double() for n, v in cut.tensors.items()}, num_tokens=1))

    def average(self) -> dict[str, Tensor]:
        """Return the noisy mean, in float64; of no updates the noise alone. Each call draws anew: call it once."""
        count, deviation = len(self._total.organisations), self.noise_multiplier * self.clip_norm
        mean = self._total.average() if count else {}
        found = {}
        for name, shape in self._shapes.items():
            total = count * mean[name] if count else torch.zeros(shape, dtype=torch.float64)
            noise = deviation * normal(shape, self.generator) if deviation else 0.0
            found[name] = (total + noise) / self.participants
        return found

    def drift(self) -> float:
        """Return 0: the distance of changes to their mean would tell of them."""
        return 0.0


def private_average(
    updates: Iterable[Update],
    clip_norm: float,
    noise_multiplier: float,
    expected_participants: float,
    weights: Mapping[str, Tensor],
    base_sha256: str,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Return the noisy mean of clipped changes, in float64; see `ClippedSum`.

    Raises:
        InputError: for an update that cannot be averaged, and numbers out of range.
    """
    total = ClippedSum(clip_norm, noise_multiplier, expected_participants, weights, base_sha256, generator)
    for update in updates:
        total.add(update)
    return total.average()


def check_clip_norm(clip_norm: float, name: str = "clip_norm") -> None:
    """Refuse a clipping norm that is no number above 0.

    Raises:
        InputError: naming it.
    """
    if not (math.isfinite(clip_norm) and clip_norm > 0):
        raise InputError(f"{name} is {clip_norm}; expected a number above 0")


def normal(shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """Return standard normal numbers in float64, by default of the operating system's entropy.

    torch's generator on the CPU keeps 32 bits of a seed: who sees the noisy weights could try all of them. Without
    `generator` each pair of numbers is made of 106 bits of its own (Box and Muller 1958).
    """
    if generator is not None:
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    count = math.prod(shape)
    pairs = max((count + 1) // 2, 1)
    bits = torch.frombuffer(bytearray(os.urandom(16 * pairs)), dtype=torch.int64) & (2**53 - 1)
    # The first ones lie in (0, 1]: their logarithm is finite.
    first, second = ((bits + torch.tensor([1, 0]).repeat(pairs)).double() / 2**53).view(pairs, 2).unbind(1)
    radius, angle = (-2 * first.log()).sqrt(), 2 * math.pi * second
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count].view(tuple(shape))


def draw_participants(
    organisations: Sequence[str], sampling_rate: float, rng: random.Random | None = None
) -> list[str]:
    """Return who takes part in a round: each with this probability, independently, as the accountant assumes.

    Args:
        rng: by default the operating system's. Who takes part must stay unknown for the bound to hold.
    """
    rng = rng or random.SystemRandom()
    return [name for name in organisations if rng.random() < sampling_rate]
