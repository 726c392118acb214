"""How much a run reveals: Renyi differential privacy of the subsampled Gaussian mechanism, converted to epsilon.

In each round every organisation takes part with probability q, independently of others; the sum of their changes, each
clipped to norm S, gets Gaussian noise of standard deviation z S. Mironov, Talwar and Zhang 2019 (arXiv:1908.10530),
theorem 4: the Renyi divergence of order a between outcomes with and without one organisation is log(A) / (a - 1) with

    A = E over x ~ N(0, z^2) of (1 - q + q exp((2x - 1) / (2 z^2)))^a

That integral is taken by the trapezoid rule, whose error falls exponentially for such a function; rounds add up.
Orders become epsilon by Canonne, Kamath and Steinke 2020 (arXiv:2004.00010, proposition 12), or by Mironov's older,
looser rule (2017, arXiv:1702.07476, proposition 3), with which older tables were made.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np

from hfllm.errors import InputError

# Those of TensorFlow Privacy and opacus; the large ones are for little privacy loss.
ORDERS = (*(1 + tenth / 10 for tenth in range(1, 100)), *range(12, 64))
# Points per standard deviation of the noise, and standard deviations on each side.
DENSITY, REACH = 32, 12
MOST = 10**9


def epsilon_of(
    sampling_rate: float, noise_multiplier: float, rounds: int, delta: float, conversion: str = "canonne"
) -> float:
    """Return the epsilon of a run: (epsilon, delta)-differential privacy of each organisation's whole data.

    Args:
        sampling_rate: probability that an organisation takes part in a round; 1 when all do.
        noise_multiplier: standard deviation of the noise on the sum, in units of the clipping norm; 0 gives infinity.
        delta: probability that the bound fails; well below 1 / organisations.
        conversion: canonne, or mironov for the looser bound.

    Raises:
        InputError: for a number out of range.
    """
    if not 0 < sampling_rate <= 1:
        raise InputError(f"sampling_rate is {sampling_rate}; expected above 0 and at most 1")
    check_noise(noise_multiplier)
    if not 0 < delta < 1:
        raise InputError(f"delta is {delta}; expected between 0 and 1")
    if rounds < 0:
        raise InputError(f"rounds is {rounds}; expected 0 or more")
    if conversion not in ("canonne", "mironov"):
        raise InputError(f"conversion is {conversion!r}; expected canonne or mironov")
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
    """Refuse a noise multiplier that is no number from 0.

    Raises:
        InputError: naming it.
    """
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise InputError(f"{name} is {noise_multiplier}; expected 0 or more")


@lru_cache(maxsize=4096)
def renyi_divergences(sampling_rate: float, noise_multiplier: float) -> tuple[float, ...]:
    """Return the Renyi divergence of one round at each of `ORDERS`."""
    if sampling_rate == 1:
        return tuple(order / (2 * noise_multiplier**2) for order in ORDERS)
    return tuple(_log_moment(order, sampling_rate, noise_multiplier) / (order - 1) for order in ORDERS)


def _log_moment(order: float, rate: float, noise: float) -> float:
    """Return log A of the module's docstring."""
    # The integrand peaks near 0 and near `order`, each as wide as the noise.
    count = math.ceil(DENSITY * (order / noise + 2 * REACH))
    x, step = np.linspace(-REACH * noise, order + REACH * noise, count + 1, retstep=True)
    log_density = -0.5 * (x / noise) ** 2 - math.log(noise * math.sqrt(2 * math.pi)) + math.log(step)
    log_power = order * np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * x - 1) / (2 * noise**2))
    top = float((log_density + log_power).max())
    if top < 1:
        # A is near 1: its distance from 1 is summed, which keeps its digits. Where the power is large, 1 is not.
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
    max_epsilon: float,
) -> float:
    """Return the epsilon of a run, or refuse it before it starts.

    Args:
        num_organisations: of which each takes part in a round with probability participants / num_organisations.
        participants: expected number in a round.
        max_epsilon: the most that the user allows.

    Raises:
        InputError: when epsilon would be larger, with the number of organisations, of rounds and the noise that would
            each meet the bound with all else as it is; and for numbers out of range.
    """
    if not 1 <= participants <= num_organisations:
        raise InputError(
            f"{participants} participants a round of {num_organisations} organisations: expected 1 to all of them"
        )
    if not max_epsilon > 0:
        raise InputError(f"max_epsilon is {max_epsilon}; expected a number above 0")

    def epsilon(
        organisations: int = num_organisations, rounds: int = rounds, noise: float = noise_multiplier
    ) -> float:
        return epsilon_of(participants / organisations, noise, rounds, delta)

    found = epsilon()
    if found <= max_epsilon:
        return found
    organisations = _smallest(lambda count: epsilon(organisations=count) <= max_epsilon, num_organisations)
    ways = [
        f"{organisations:,} organisations of which {participants} take part" if organisations else "",
        *_rounds_and_noise(
            lambda rounds, noise: epsilon(rounds=rounds, noise=noise), rounds, noise_multiplier, max_epsilon
        ),
    ]
    raise InputError(
        f"epsilon would be {found:.3g} at delta {delta:g}, above max_epsilon {max_epsilon:g}, for {num_organisations} "
        f"organisations with {participants} a round, {rounds} rounds and noise multiplier {noise_multiplier:g}; "
        + _in_words(ways, "organisations")
    )


def check_row_budget(
    num_rows: Mapping[str, int],
    batch_size: int,
    rounds: int,
    local_steps: int,
    noise_multiplier: float,
    delta: float,
    max_epsilon: float | None = None,
) -> dict[str, float]:
    """Return of each organisation what a run reveals of one of its rows, or refuse the run before it starts.

    All rounds are counted, also where an organisation takes part in some of them only.

    Args:
        num_rows: rows of each organisation, of which each is in a step with probability batch_size / rows,
            independently.
        batch_size: rows that a step expects.
        local_steps: optimizer steps of a round.
        noise_multiplier: standard deviation of the noise on a step's sum, in units of the rows' clipping norm.
        max_epsilon: the most that the user allows; by default anything.

    Raises:
        InputError: naming the organisation of fewest rows, with the number of rows, of rounds and the noise that would
            each meet the bound with all else as it is; for a delta that is not below 1 / rows.
    """

    def epsilon(rows: int, rounds: int = rounds, noise: float = noise_multiplier) -> float:
        return epsilon_of(min(1.0, batch_size / rows), noise, rounds * local_steps, delta)

    if max_epsilon is not None and not max_epsilon > 0:
        raise InputError(f"max_epsilon is {max_epsilon}; expected a number above 0")
    most, fewest = max(num_rows, key=num_rows.__getitem__), min(num_rows, key=num_rows.__getitem__)
    if not delta * num_rows[most] < 1:
        raise InputError(
            f"delta is {delta:g}, and organisation {most!r} has {num_rows[most]:,} rows; expected below 1 / rows: one "
            "row in so many might be told in full"
        )
    found = {name: epsilon(rows) for name, rows in num_rows.items()}
    few, worst = num_rows[fewest], found[fewest]
    if max_epsilon is None or worst <= max_epsilon:
        return found
    rows = _smallest(lambda count: epsilon(count) <= max_epsilon, few)
    ways = [
        f"{rows:,} rows in each organisation" if rows else "",
        *_rounds_and_noise(
            lambda rounds, noise: epsilon(few, rounds, noise), rounds, noise_multiplier, max_epsilon, "a row noise"
        ),
    ]
    raise InputError(
        f"the row-level epsilon of organisation {fewest!r} would be {worst:.3g} at delta {delta:g}, above max_epsilon "
        f"{max_epsilon:g}, for {few:,} rows, batches of {batch_size}, {rounds} rounds of {local_steps} steps and row "
        f"noise multiplier {noise_multiplier:g}; " + _in_words(ways, "rows")
    )


def noise_to_signal(num_values: int, noise_multiplier: float, participants: int) -> float:
    """Return the norm of the noise on the mean change, in units of the largest norm that the mean can have.

    It is z sqrt(d) / n for d values and n participants: above 1, noise is most of what the server adds. An adapter of
    158,080 values with 6 organisations and z = 1 has 66.
    """
    return noise_multiplier * math.sqrt(num_values) / participants


def _rounds_and_noise(
    epsilon: Callable[[int, float], float], rounds: int, noise: float, max_epsilon: float, what: str = "a noise"
) -> list[str]:
    """Return in words the rounds and the noise that would each meet a bound; empty texts where none does."""
    # The most rounds are one less than the fewest that are too many.
    too_many = _smallest(lambda count: epsilon(count, noise) > max_epsilon, 0)
    # Less noise than there is does not meet it; to look at little of it takes long.
    hundredths = _smallest(lambda count: epsilon(rounds, count / 100) <= max_epsilon, max(int(100 * noise), 1))
    return [
        _rounds_in_words(too_many - 1) if too_many is not None and too_many > 1 else "",
        f"{what} multiplier of {hundredths / 100:.2f}" if hundredths else "",
    ]


def _in_words(ways: Sequence[str], what: str) -> str:
    ways = [way for way in ways if way]
    return f"each of these would meet it: {', or '.join(ways)}" if ways else f"no number of {what} or rounds would"


def _rounds_in_words(rounds: int) -> str:
    return "1 round" if rounds == 1 else f"{rounds:,} rounds"


def _smallest(holds: Callable[[int], bool], start: int) -> int | None:
    """Return the smallest number from `start` on at which something holds that holds from there on."""
    low, high = start - 1, max(start, 1)
    while not holds(high):
        low, high = high, high * 2
        if high > MOST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
