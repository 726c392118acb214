"""Client-level differential privacy: what any one organisation holds changes what the server learns only a little.

McMahan et al. 2018 (arXiv:1710.06963), algorithm 1 with a fixed denominator and equal weights: each change is clipped
to a norm S, changes are summed, Gaussian noise of standard deviation z S is added, and the sum is divided by the
expected number of participants, whoever came. Weights by tokens are left out on purpose: a count is data too.

The bound holds for a server that is trusted to clip and add the noise; `accountant` says what it is. The noise is one
of floating-point numbers, whose gaps can reveal what was added to them (Mironov 2012); nothing here guards against
that.
"""

import math
import random
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hfllm.errors import InputError
from hfllm.federation.averaging import WeightedSum, norm
from hfllm.federation.updates import Expected, Update


def clipped(update: Update, clip_norm: float) -> tuple[Update, float]:
    """Return the update, scaled to at most this norm over all tensors together, and the norm that it had.

    Raises:
        InputError: for a clipping norm that is no number above 0.
    """
    if not (math.isfinite(clip_norm) and clip_norm > 0):
        raise InputError(f"clip_norm is {clip_norm}; expected a number above 0")
    length = norm(update.tensors)
    if length <= clip_norm:
        return update, length
    # In float64: rounded back, the norm could be above the bound.
    factor = clip_norm / length
    return replace(update, tensors={name: factor * value.double() for name, value in update.tensors.items()}), length


def private_average(
    updates: Iterable[Update],
    clip_norm: float,
    noise_multiplier: float,
    expected_participants: float,
    weights: Mapping[str, Tensor],
    base_sha256: str,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Return the noisy mean of clipped changes, in float64.

    Args:
        updates: of those that came; none of them is as good as any.
        noise_multiplier: z; 0 clips alone.
        expected_participants: the denominator: sampling rate times organisations, which no round may change.
        weights: the weights of the round, for names and shapes.
        base_sha256: of the base model.
        generator: by default one whose seed nobody knows. A known seed takes the privacy away.

    Raises:
        InputError: for an update that cannot be averaged, and numbers out of range.
    """
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise InputError(f"noise_multiplier is {noise_multiplier}; expected 0 or more")
    if not expected_participants > 0:
        raise InputError(f"expected_participants is {expected_participants}; expected a number above 0")
    generator = generator or secret_generator()
    expected = Expected.of(weights, base_sha256)
    total = WeightedSum()
    for update in updates:
        expected.check(update)
        cut, _ = clipped(update, clip_norm)
        in_double = {name: value.double() for name, value in cut.tensors.items()}
        total.add(replace(cut, tensors=in_double, num_tokens=1))
    count = len(total.organisations)
    mean = total.average() if count else {name: torch.zeros(value.shape).double() for name, value in weights.items()}
    deviation = noise_multiplier * clip_norm
    return {
        name: (max(count, 1) * value + deviation * torch.randn(value.shape, generator=generator, dtype=torch.float64))
        / expected_participants
        for name, value in mean.items()
    }


def secret_generator() -> torch.Generator:
    """Return a generator that was seeded by the operating system."""
    generator = torch.Generator()
    generator.manual_seed(secrets.randbits(63))
    return generator


def draw_participants(
    organisations: Sequence[str], sampling_rate: float, rng: random.Random | None = None
) -> list[str]:
    """Return who takes part in a round: each with this probability, independently, as the accountant assumes.

    Args:
        rng: by default the operating system's. Who takes part must stay unknown for the bound to hold.
    """
    rng = rng or random.SystemRandom()
    return [name for name in organisations if rng.random() < sampling_rate]
