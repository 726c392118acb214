"""Values that PPO adapts from rollout to rollout: the weight of the KL penalty and the scale of the rewards."""

import math
from dataclasses import dataclass


@dataclass
class KLController:
    """Weight of the KL penalty: fixed, or steered towards a KL (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).

    Args:
        coefficient: the current weight.
        target: target KL in nats per response; `None` keeps the weight.
        horizon: episodes over which the weight may change by a fifth.
    """

    coefficient: float
    target: float | None = None
    horizon: int = 10_000

    def update(self, kl: float, episodes: int) -> None:
        """Update the weight by the mean KL of a rollout of `episodes` episodes."""
        if self.target is None:
            return
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        # A rollout with more episodes than the horizon counts as one of the horizon's length.
        self.coefficient *= 1 + error * min(episodes / self.horizon, 1.0)


@dataclass
class RunningMoments:
    """Mean and variance of all numbers seen, merged batch by batch (Chan et al. 1979, equations 2.1)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def std(self) -> float:
        """Return the standard deviation, or 1 while the variance is 0."""
        variance = self.squares / self.count if self.count else 0.0
        return math.sqrt(variance) if variance > 0 else 1.0

    def update(self, count: float, total: float, total_of_squares: float) -> None:
        """Add numbers, given their count, sum and sum of squares."""
        if count == 0:
            return
        mean = total / count
        squares = max(total_of_squares - count * mean * mean, 0.0)
        everything, gap = self.count + count, mean - self.mean
        self.squares += squares + gap * gap * self.count * count / everything
        self.mean += gap * count / everything
        self.count = everything
