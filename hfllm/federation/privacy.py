"""Differential privacy of organisations and of rows, its accountant, and an attack as a test.

McMahan et al. 2018 (arXiv:1710.06963), algorithm 1 with a fixed denominator and equal weights: every change is clipped
to a norm S, changes are summed, Gaussian noise of standard deviation z S is added, and the sum is divided by the
expected number of participants, whoever came. Weights by tokens are left out on purpose: a count is data too.

The bound holds for a server trusted to clip and add the noise; `epsilon_of` computes it. The noise consists of
floating-point numbers, with gaps that can reveal the values added to them (Mironov 2012); nothing here guards against
this.
"""

import json
import math
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from hfllm.errors import InputError, one_line, refuse_if
from hfllm.federation.rounds import WeightedSum, norm
from hfllm.federation.updates import Expected, Update, read_tensors, replace_tensors
from hfllm.outputs.intervals import Interval
from hfllm.outputs.statistics import as_numbers, auroc_interval

# ---- privacy of organisations ----


def clipped(update: Update, clip_norm: float) -> tuple[Update, float]:
    """Return the update, scaled to at most this norm over all tensors together, and its former norm.

    Raises:
        InputError: for a clipping norm other than a number above 0.
    """
    check_clip_norm(clip_norm)
    length = norm(update.tensors)
    if length <= clip_norm:
        return update, length
    # In float64: rounded back, the norm could be above the bound.
    factor = clip_norm / length
    return replace(update, tensors={name: factor * value.double() for name, value in update.tensors.items()}), length


class ClippedSum:
    """Sum of clipped changes, with equal weights of organisations; the mean gets noise.

    It holds a single sum however many organisations there are.

    Args:
        clip_norm: S, the longest change over all tensors together.
        noise_multiplier: z; 0 only clips.
        participants: the denominator. With noise it is sampling rate times organisations, constant in all rounds.
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
        refuse_if(not participants > 0, f"expected_participants is {participants}; expected a number above 0")
        self.clip_norm, self.noise_multiplier, self.participants = clip_norm, noise_multiplier, participants
        self.generator = generator
        self._shapes = {name: value.shape for name, value in weights.items()}
        self._expected, self._total = Expected.of(weights, base_sha256), WeightedSum()

    def add(self, update: Update) -> None:
        """Clip an update, and add it."""
        self._expected.check(update)
        cut, _ = clipped(update, self.clip_norm)
        self._total.add(replace(cut, tensors={n: v.double() for n, v in cut.tensors.items()}, num_tokens=1))

    def average(self) -> dict[str, Tensor]:
        """Return the noisy mean, in float64; of no updates only the noise. Every call draws again: call it once."""
        count, deviation = len(self._total.organisations), self.noise_multiplier * self.clip_norm
        mean = self._total.average() if count else {}
        result = {}
        for name, shape in self._shapes.items():
            total = count * mean[name] if count else torch.zeros(shape, dtype=torch.float64)
            noise = deviation * normal(shape, self.generator) if deviation else 0.0
            result[name] = (total + noise) / self.participants
        return result

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
        InputError: for an unsuitable update, and numbers out of range.
    """
    total = ClippedSum(clip_norm, noise_multiplier, expected_participants, weights, base_sha256, generator)
    for update in updates:
        total.add(update)
    return total.average()


def check_clip_norm(clip_norm: float, name: str = "clip_norm") -> None:
    """Refuse a clipping norm other than a number above 0."""
    refuse_if(not (math.isfinite(clip_norm) and clip_norm > 0), f"{name} is {clip_norm}; expected a number above 0")


def normal(shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """Return standard normal numbers in float64, by default of the operating system's entropy.

    torch's generator on the CPU keeps 32 bits of a seed: a reader of the noisy weights could try all of them. Without
    `generator` every pair of numbers is made of 106 bits of its own (Box and Muller 1958).
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


# ---- row privacy ----
#
# Row-level differential privacy at an organisation: DP-SGD (Abadi et al. 2016, arXiv:1607.00133, algorithm 1).
#
# It is meant for rows where organisations are too few for client-level privacy (`ClippedSum`), and acts before the
# server sees anything. Every step draws every row by chance of its own (Poisson sampling), a condition of the
# accountant's bound; the gradient of a row is cut to norm C, and the sum of gradients gets Gaussian noise of standard
# deviation z C. It is divided by the *expected* number of rows of a step: the drawn number, and the tokens of a
# batch, are data too.
#
# Gradients by row are taken one row at a time: as slow as batches of one, right for every model whose rows do not mix.
# Draws and noise are of the operating system's entropy. How long a step takes is not hidden.


@dataclass(frozen=True)
class RowPrivacy:
    """How rows are protected.

    Args:
        clip_norm: C, the longest gradient of a row over all tensors together.
        noise_multiplier: z; 0 only clips.
        generator, rng: of tests and measurements; by default the operating system draws. A known seed takes the
            privacy away.

    Raises:
        InputError: for numbers out of range.
    """

    clip_norm: float
    noise_multiplier: float
    generator: torch.Generator | None = None
    rng: random.Random | None = None

    def __post_init__(self) -> None:
        check_clip_norm(self.clip_norm, "row_clip_norm")
        check_noise(self.noise_multiplier, "row_noise_multiplier")

    def draw(self, num_rows: int, batch_size: int) -> list[int]:
        """Return the rows of a step: every one by the chance `sampling_rate`, independently; maybe none."""
        rate, rng = sampling_rate(num_rows, batch_size), self.rng or random.SystemRandom()
        return [index for index in range(num_rows) if rng.random() < rate]


def sampling_rate(num_rows: int, batch_size: int) -> float:
    """Return the chance of every row to be in a step with `batch_size` expected rows."""
    return min(1.0, batch_size / num_rows)


class RowSum:
    """Sum of the gradients of single rows of one step, individually cut to a norm.

    Args:
        parameters: the trained parameters; their `grad` is read, cleared and in the end set.
        privacy: the norm and the noise.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], privacy: RowPrivacy):
        self.parameters, self.privacy = list(parameters), privacy
        # Apple's GPUs have no float64.
        devices = ["cpu" if each.device.type == "mps" else each.device for each in self.parameters]
        self._sums = [
            torch.zeros(each.shape, dtype=torch.float64, device=device)
            for each, device in zip(self.parameters, devices, strict=True)
        ]
        for each in self.parameters:
            # A gradient left by a failed step is another row's.
            each.grad = None

    @torch.no_grad()
    def take(self) -> None:
        """Add the gradient in the parameters, of one row, and clear it.

        One with infinite values or NaN adds nothing: it must not reach the others.
        """
        gradients = [
            None if each.grad is None else each.grad.to(total.device).double()
            for each, total in zip(self.parameters, self._sums, strict=True)
        ]
        squares = [value.square().sum() for value in gradients if value is not None]
        length = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
        if 0 < length < float("inf"):
            factor = min(1.0, self.privacy.clip_norm / length)
            for total, value in zip(self._sums, gradients, strict=True):
                if value is not None:
                    total.add_(value, alpha=factor)
        for each in self.parameters:
            each.grad = None

    @torch.no_grad()
    def set_gradient(self, expected: float) -> None:
        """Set the parameters' gradient to the noisy sum, divided by the expected number of rows of a step."""
        deviation = self.privacy.noise_multiplier * self.privacy.clip_norm
        for each, total in zip(self.parameters, self._sums, strict=True):
            noise = deviation * normal(each.shape, self.privacy.generator).to(total) if deviation else 0.0
            each.grad = ((total + noise) / expected).to(each)


class AnsweredRounds:
    """The last change sent by an organisation, in a file: a round is answered once, or again by the same bits.

    A round trained again has new noise: both answers together have less noise than the accountant counts.

    Args:
        path: of the file.
        num_rounds: number of counted rounds.
        settings: the settings behind the privacy count, such as a hash of the flags and of the number of rows; rounds
            under others are refused.
    """

    def __init__(self, path: Path, num_rounds: int, settings: str = ""):
        self.path, self.num_rounds, self.settings = path, num_rounds, settings

    def load(self, number: int, question: str) -> dict[str, Tensor] | None:
        """Return the answer to an answered round, `None` for a round still to be answered.

        Args:
            number: of the round.
            question: the inputs of the answer, such as a hash of the weights and the settings.

        Raises:
            InputError: for an uncounted round, or a round answered to another question.
        """
        if not 1 <= number <= self.num_rounds:
            raise InputError(f"round {number}: the privacy of {self.num_rounds} rounds was counted, not of this one")
        if not self.path.exists():
            return None
        try:
            answer, metadata = read_tensors(self.path)
            record = json.loads(metadata["answered"])
            last, last_question, settings = int(record["round"]), record["question"], record["settings"]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.path} is damaged ({one_line(error, 100)}), so that it is not known which rounds "
                "were answered: remove it to spend the privacy of a run anew"
            ) from None
        if number > last and settings == self.settings:
            return None
        if number == last and question == last_question:
            return answer
        raise InputError(
            f"round {number}: round {last} was answered to other weights or settings, and a second answer would spend "
            f"privacy that is not counted; remove {self.path} to begin another run, whose privacy adds to this one's"
        )

    def keep(self, number: int, question: str, answer: Mapping[str, Tensor]) -> None:
        """Keep the answer to a round, before it is sent."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        record = {"round": number, "question": question, "settings": self.settings}
        replace_tensors(self.path, answer, {"answered": json.dumps(record)})


# ---- accountant ----
#
# How much a run reveals: Renyi differential privacy of the subsampled Gaussian mechanism, converted to epsilon.
#
# In every round every organisation takes part with probability q, independently of others; the sum of their changes,
# individually clipped to norm S, gets Gaussian noise of standard deviation z S. Mironov, Talwar and Zhang 2019
# (arXiv:1908.10530), theorem 4: the Renyi divergence of order a between outcomes with and without one organisation is
# log(A) / (a - 1) with
#
#     A = E over x ~ N(0, z^2) of (1 - q + q exp((2x - 1) / (2 z^2)))^a
#
# The integral is taken by the trapezoid rule, whose error falls exponentially for such a function; rounds add up.
# Orders become epsilon by Canonne, Kamath and Steinke 2020 (arXiv:2004.00010, proposition 12), or by Mironov's older,
# looser rule (2017, arXiv:1702.07476, proposition 3), the rule of older tables.


# The orders of TensorFlow Privacy and opacus; the large ones are for little privacy loss.
ORDERS = (*(1 + tenth / 10 for tenth in range(1, 100)), *range(12, 64))
# Points per standard deviation of the noise, and standard deviations on each side.
DENSITY, REACH = 32, 12
MOST = 10**9


def epsilon_of(
    sampling_rate: float, noise_multiplier: float, rounds: int, delta: float, conversion: str = "canonne"
) -> float:
    """Return the epsilon of a run: (epsilon, delta)-differential privacy of every organisation's whole data.

    Args:
        sampling_rate: probability of an organisation's participation in a round; 1 when all do.
        noise_multiplier: standard deviation of the noise on the sum, in units of the clipping norm; 0 gives infinity.
        delta: probability of a failure of the bound; well below 1 / organisations.
        conversion: canonne, or mironov for the looser bound.

    Raises:
        InputError: for a number out of range.
    """
    refuse_if(not 0 < sampling_rate <= 1, f"sampling_rate is {sampling_rate}; expected above 0 and at most 1")
    check_noise(noise_multiplier)
    refuse_if(not 0 < delta < 1, f"delta is {delta}; expected between 0 and 1")
    refuse_if(rounds < 0, f"rounds is {rounds}; expected 0 or more")
    is_known = conversion in ("canonne", "mironov")
    refuse_if(not is_known, f"conversion is {conversion!r}; expected canonne or mironov")
    if rounds == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    orders = np.array(ORDERS)
    divergences = rounds * np.array(renyi_divergences(sampling_rate, noise_multiplier))
    if conversion == "mironov":
        bounds = divergences - math.log(delta) / (orders - 1)
    else:
        bounds = divergences - (math.log(delta) + np.log(orders)) / (orders - 1) + np.log1p(-1 / orders)
    return max(float(bounds.min()), 0.0)


def check_noise(noise_multiplier: float, name: str = "noise_multiplier") -> None:
    """Refuse a noise multiplier other than a number from 0."""
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise InputError(f"{name} is {noise_multiplier}; expected 0 or more")


@lru_cache(maxsize=4096)
def renyi_divergences(sampling_rate: float, noise_multiplier: float) -> tuple[float, ...]:
    """Return the Renyi divergence of one round at all of `ORDERS`."""
    if sampling_rate == 1:
        return tuple(order / (2 * noise_multiplier**2) for order in ORDERS)
    return tuple(_log_moment(order, sampling_rate, noise_multiplier) / (order - 1) for order in ORDERS)


def _log_moment(order: float, rate: float, noise: float) -> float:
    """Return log A of the formula above."""
    # The integrand peaks near 0 and near `order`, both as wide as the noise.
    count = math.ceil(DENSITY * (order / noise + 2 * REACH))
    x, step = np.linspace(-REACH * noise, order + REACH * noise, count + 1, retstep=True)
    log_density = -0.5 * (x / noise) ** 2 - math.log(noise * math.sqrt(2 * math.pi)) + math.log(step)
    log_power = order * np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * x - 1) / (2 * noise**2))
    top = float((log_density + log_power).max())
    if top < 1:
        # A is near 1: its distance from 1 is summed, to keep its digits. Where the power is large, 1 is not.
        near = np.exp(log_density) * np.expm1(np.minimum(log_power, 1))
        far = np.exp(log_density + log_power) - np.exp(log_density)
        return math.log1p(float(np.where(log_power > 1, far, near).sum()))
    return top + math.log(float(np.exp(log_density + log_power - top).sum()))


# ---- before a run ----


def check_budget(
    num_organisations: int,
    participants: int,
    rounds: int,
    noise_multiplier: float,
    delta: float,
    max_epsilon: float | None = None,
) -> float:
    """Return the epsilon of a run, or refuse it before it starts.

    Args:
        num_organisations: every one takes part in a round with probability participants / num_organisations.
        participants: expected number in a round.
        max_epsilon: the user's maximum; by default none.

    Raises:
        InputError: when epsilon would be larger, with the number of organisations, of rounds and the noise that would
            separately meet the bound with all else as it is; and for numbers out of range.
    """
    asked = f"{participants} participants a round of {num_organisations} organisations"
    refuse_if(not 1 <= participants <= num_organisations, f"{asked}: expected 1 to all of them")
    most = _bound(max_epsilon)

    def epsilon(organisations: int, rounds: int, noise: float) -> float:
        return epsilon_of(participants / organisations, noise, rounds, delta)

    run = (num_organisations, rounds, noise_multiplier)
    if (result := epsilon(*run)) > most:
        ways = _ways_to_meet(most, epsilon, run, f"organisations of which {participants} take part")
        raise InputError(
            f"epsilon would be {result:.3g} at delta {delta:g}, above max_epsilon {most:g}, for {num_organisations} "
            f"organisations with {participants} a round, {rounds} rounds and noise multiplier {noise_multiplier:g}; "
            f"{ways}"
        )
    return result


def check_row_budget(
    num_rows: Mapping[str, int],
    batch_size: int,
    rounds: int,
    local_steps: int,
    noise_multiplier: float,
    delta: float,
    max_epsilon: float | None = None,
) -> dict[str, float]:
    """Return for every organisation the epsilon of one of its rows in a run, or refuse the run before it starts.

    All rounds are counted, also where an organisation takes part in some of them only.

    Args:
        num_rows: rows of every organisation; a row is in a step with probability batch_size / rows, independently.
        batch_size: expected rows of a step.
        local_steps: optimizer steps of a round.
        noise_multiplier: standard deviation of the noise on a step's sum, in units of the rows' clipping norm.
        max_epsilon: the user's maximum; by default none.
    """

    def epsilon(rows: int, rounds: int, noise: float) -> float:
        return epsilon_of(sampling_rate(rows, batch_size), noise, rounds * local_steps, delta)

    most = _bound(max_epsilon)
    largest, fewest = max(num_rows, key=num_rows.__getitem__), min(num_rows, key=num_rows.__getitem__)
    if not delta * num_rows[largest] < 1:
        raise InputError(
            f"delta is {delta:g}, and organisation {largest!r} has {num_rows[largest]:,} rows; expected below 1 / "
            "rows: one row in so many might be told in full"
        )
    result = {name: epsilon(rows, rounds, noise_multiplier) for name, rows in num_rows.items()}
    few, worst = num_rows[fewest], result[fewest]
    if worst > most:
        ways = _ways_to_meet(most, epsilon, (few, rounds, noise_multiplier), "rows in each organisation", "row ")
        raise InputError(
            f"the row-level epsilon of organisation {fewest!r} would be {worst:.3g} at delta {delta:g}, above "
            f"max_epsilon {most:g}, for {few:,} rows, batches of {batch_size}, {rounds} rounds of {local_steps} steps "
            f"and row noise multiplier {noise_multiplier:g}; {ways}"
        )
    return result


def noise_to_signal(num_values: int, noise_multiplier: float, participants: int) -> float:
    """Return the norm of the noise on the mean change, in units of the largest possible norm of the mean.

    It is z sqrt(d) / n for d values and n participants: above 1, noise is most of the server's step. An adapter of
    158,080 values with 6 organisations and z = 1 has 66.
    """
    return noise_multiplier * math.sqrt(num_values) / participants


def _bound(max_epsilon: float | None) -> float:
    """Return the largest epsilon of a run by the user's maximum."""
    most = math.inf if max_epsilon is None else max_epsilon
    refuse_if(not most > 0, f"max_epsilon is {max_epsilon}; expected a number above 0")
    return most


def _ways_to_meet(
    bound: float, epsilon: Callable[[int, int, float], float], run: tuple[int, int, float], what: str, kind: str = ""
) -> str:
    """Return in words what would separately meet a bound, with all else as it is.

    Args:
        epsilon: by a number of organisations or rows, by rounds and by noise.
        run: these three of the run.
        what: the number, in words.
        kind: of the noise, such as "row ".
    """
    number, rounds, noise = run
    larger = _smallest(lambda count: epsilon(count, rounds, noise) <= bound, number)
    # The maximum of rounds is one less than the smallest excessive number.
    too_many = _smallest(lambda count: epsilon(number, count, noise) > bound, 0)
    most = (too_many or 0) - 1
    # Less noise than the given amount does not meet it; the computation for little noise takes long.
    hundredths = _smallest(lambda count: epsilon(number, rounds, count / 100) <= bound, max(int(100 * noise), 1))
    ways = [
        f"{larger:,} {what}" if larger else "",
        f"{most:,} round{'s' if most > 1 else ''}" if most > 0 else "",
        f"a {kind}noise multiplier of {hundredths / 100:.2f}" if hundredths else "",
    ]
    listed = ", or ".join(filter(None, ways))
    return f"each of these would meet it: {listed}" if listed else f"no number of {what.split()[0]} or rounds would"


def _smallest(holds: Callable[[int], bool], start: int) -> int | None:
    """Return the smallest number from `start` on for a condition that holds from there on."""
    low, high = start - 1, max(start, 1)
    while not holds(high):
        low, high = high, high * 2
        if high > MOST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


# ---- membership ----
#
# Leaks of a trained model about its rows: canaries, random texts, some of them trained on and others not.
#
# Carlini et al. 2019, "The Secret Sharer" (arXiv:1802.08232): the exposure of a canary is log2 of the number of
# possible texts, less log2 of its rank among them by loss; here among the held-out texts. A membership
# test by losses only (Yeom et al. 2018, arXiv:1709.01604) has the area under its ROC curve as figure: 1/2 where
# nothing can be distinguished, also the figure of a model trained on none of them: the control.


LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Canaries:
    """Random texts, drawn alike: one organisation's training texts, and texts outside of all training."""

    trained: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class Leak:
    """Results from the losses of canaries.

    Args:
        auroc: for distinguishing trained from held-out ones by lower loss, with its interval.
        exposure: mean over trained ones, in bits.
        most_exposure: of one with a lower loss than all held-out ones.
        no_exposure: mean exposure of a model without training on them.
    """

    auroc: Interval
    exposure: float
    most_exposure: float
    no_exposure: float


def make_canaries(trained: int, held_out: int, seed: int, length: int = 12, alphabet: str = LETTERS) -> Canaries:
    """Return distinct random texts, always the same for a seed.

    Args:
        trained: number of texts to insert into the rows of an organisation.
        held_out: number of others, for the comparison.
        length: characters, in groups of four.
    """
    rng, texts = random.Random(f"canaries {seed}"), set()
    if trained < 1 or held_out < 1 or length < 1 or len(alphabet) ** length < 4 * (trained + held_out):
        raise InputError(
            f"canaries: {trained} trained and {held_out} held out, of {length} characters; expected 1 or more of "
            "each, and texts long enough to be rare"
        )
    ordered: list[str] = []
    while len(ordered) < trained + held_out:
        drawn = "".join(rng.choices(alphabet, k=length))
        text = " ".join(drawn[start : start + 4] for start in range(0, length, 4))
        if text not in texts:
            texts.add(text)
            ordered.append(text)
    return Canaries(tuple(ordered[:trained]), tuple(ordered[trained:]))


def measure_leak(trained: Sequence[float], held_out: Sequence[float], level: float = 0.95) -> Leak:
    """Return the results from the losses of canaries.

    Args:
        trained: loss of every trained canary; the same sum or mean for all.
        held_out: of every other one.
        level: of the interval.

    Raises:
        InputError: for no losses, and NaN.
    """
    inside, outside = (
        as_numbers(trained, "losses of trained canaries"),
        as_numbers(held_out, "losses of held-out ones"),
    )
    losses = [*inside.tolist(), *outside.tolist()]
    labels = [0] * len(inside) + [1] * len(outside)
    count = len(outside)
    # The canary itself is part of its ranking; a tie counts half.
    ranks = [1 + float((outside < loss).sum()) + 0.5 * float((outside == loss).sum()) for loss in inside]
    exposures = [math.log2(count + 1) - math.log2(rank) for rank in ranks]
    chance = sum(math.log2(count + 1) - math.log2(rank) for rank in range(1, count + 2)) / (count + 1)
    return Leak(auroc_interval(losses, labels, level), sum(exposures) / len(exposures), math.log2(count + 1), chance)
