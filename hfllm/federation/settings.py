"""The settings of a federation's rounds: names, ranges, and who is asked, without torch, for lists of flags."""

import math
from dataclasses import dataclass

from hfllm.flags import Range, check_number

MEAN, MEDIAN, TRIMMED_MEAN = AGGREGATIONS = ("mean", "median", "trimmed_mean")
# How many times the typical length an update may have, and the share of values cut off at each end.
MAX_NORM_RATIO, TRIM = 2.0, 0.2
# Default rate of each server optimizer: an average is taken as it is, adaptive steps have the size of the rate.
LEARNING_RATES = {"fedavg": 1.0, "momentum": 1.0, "fedadagrad": 0.01, "fedadam": 0.01, "fedyogi": 0.01}
SERVER_OPTIMIZERS = (*LEARNING_RATES,)
# Of updates on the wire.
COMPRESSIONS = ("none", "int8")

TRIMS = Range("a share of at least 0, below 0.5", lambda value: 0 <= value < 0.5)
NORM_RATIOS = Range("a number of at least 1, or 0 for no bound", lambda value: value == 0 or value >= 1)
PARTICIPATIONS = Range("a share above 0, at most 1", lambda value: 0 < value <= 1)


@dataclass(frozen=True)
class RoundSettings:
    """How many rounds there are, and who takes part.

    Args:
        num_rounds: rounds in all.
        participation: share of the organisations asked in a round, drawn by `seed` and the round's number.
        min_organisations: fewest updates of a valid round.
        seed: of the draws.
        is_private: every organisation takes part by chance of its own, unknown to all, as the accountant assumes.
            A round without asked organisations is taken, a round with failures of all asked ones is not; a
            repeated round is another one. Records then say nothing of who took part.
    """

    num_rounds: int
    participation: float = 1.0
    min_organisations: int = 1
    seed: int = 0
    is_private: bool = False


@dataclass(frozen=True)
class Averaging:
    """How the server makes one change of the updates of a round.

    Args:
        aggregation: mean (by tokens), or by coordinate, organizations counting alike, median or trimmed_mean.
        trim: share of the updates left out of the trimmed mean at each end.
        max_norm_ratio: longest update, in units of the median length of its round; 0 bounds nothing.
        clip_norm: longest update of all; by default none. Organizations then count alike, without the bound above.
        noise_multiplier: noise on the mean of clipped updates, in units of `clip_norm`.
    """

    aggregation: str = MEAN
    trim: float = TRIM
    max_norm_ratio: float = MAX_NORM_RATIO
    clip_norm: float | None = None
    noise_multiplier: float = 0.0


def expected_participants(num_organisations: int, participation: float) -> int:
    """Return the number of organisations asked in a round, with privacy the average number."""
    return min(max(math.ceil(participation * num_organisations), 1), num_organisations)


def num_asked(num_organisations: int, settings: RoundSettings) -> int:
    """Return how many organisations a round asks by its settings: with privacy on average."""
    count = expected_participants(num_organisations, settings.participation)
    return count if settings.is_private else max(settings.min_organisations, count)


def check_settings(settings: RoundSettings, num_organisations: int) -> None:
    """Refuse settings impossible for a federation of this size."""
    check_number("participation", settings.participation, PARTICIPATIONS)
    words = f"1 to {num_organisations}, of which there are organisations"
    check_number("min_organisations", settings.min_organisations, Range(words, lambda v: 1 <= v <= num_organisations))
