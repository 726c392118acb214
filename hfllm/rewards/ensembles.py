"""An ensemble of several rewards, which is harder to exploit."""

import statistics
from collections.abc import Sequence

from hfllm.errors import InputError
from hfllm.rewards.functions import RewardFunction, checked_rewards, reward_name


class RewardEnsemble:
    """Several rewards combined into one that is harder to exploit (Coste et al. 2023, arXiv:2310.02743, section 3).

    A reward model trained on comparisons is only defined up to a constant: call `calibrate` once, or the worst of
    several is just the one with the lowest constant.

    Args:
        members: reward functions or `RewardModel`s, at least two.
        aggregation: `"mean"`; `"worst"`, the lowest of them (worst-case optimization, equation 2); or `"uncertainty"`,
            the mean minus `coefficient` times their variance (equation 3).
        coefficient: see `aggregation`.

    Raises:
        InputError: for fewer than two members, or an unknown aggregation.
    """

    AGGREGATIONS = ("mean", "worst", "uncertainty")

    def __init__(self, members: Sequence[RewardFunction], aggregation: str = "worst", coefficient: float = 1.0):
        if aggregation not in self.AGGREGATIONS:
            raise InputError(f"aggregation {aggregation!r} is not one of {', '.join(self.AGGREGATIONS)}")
        if len(members) < 2:
            raise InputError(f"an ensemble needs at least 2 rewards, got {len(members)}")
        self.members, self.aggregation, self.coefficient = list(members), aggregation, coefficient
        self.offsets, self.scales = [0.0] * len(members), [1.0] * len(members)
        self.__name__ = f"{aggregation}_of_{len(members)}"

    def calibrate(self, prompts: Sequence, completions: Sequence, **columns: Sequence[object]) -> None:
        """Normalize the members: on these responses each gets mean 0 and their common spread.

        Args:
            prompts, completions, columns: as in a call; responses of the model that training starts from.

        Raises:
            InputError: for a member that gives all responses the same score.
        """
        scores = [self._scores_of(member, prompts, completions, **columns) for member in self.members]
        spreads = [statistics.pstdev(values) for values in scores]
        if 0.0 in spreads:
            member = self.members[spreads.index(0.0)]
            raise InputError(f"{reward_name(member)!r} gives all {len(prompts)} completions the same score")
        self.offsets = [statistics.fmean(values) for values in scores]
        self.scales = [statistics.fmean(spreads) / spread for spread in spreads]

    def __call__(self, prompts: Sequence, completions: Sequence, **columns: Sequence[object]) -> list[float]:
        scores = [
            [(value - offset) * scale for value in self._scores_of(member, prompts, completions, **columns)]
            for member, offset, scale in zip(self.members, self.offsets, self.scales, strict=True)
        ]
        return [self._aggregate(numbers) for numbers in zip(*scores, strict=True)]

    @staticmethod
    def _scores_of(
        member: RewardFunction, prompts: Sequence, completions: Sequence, **columns: Sequence[object]
    ) -> list[float]:
        values = checked_rewards(member, prompts, completions, **columns)
        if isinstance(values[0], list):
            raise InputError(f"an ensemble takes one number per completion; {reward_name(member)!r} gives lists")
        return values

    def _aggregate(self, numbers: Sequence[float]) -> float:
        mean = sum(numbers) / len(numbers)
        if self.aggregation == "worst":
            return min(numbers)
        if self.aggregation == "mean":
            return mean
        return mean - self.coefficient * sum((number - mean) ** 2 for number in numbers) / len(numbers)
