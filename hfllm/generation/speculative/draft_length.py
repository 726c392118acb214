"""Choose how many tokens to draft before the target verifies them."""

from typing import Protocol

from hfllm.errors import InputError
from hfllm.generation.speculative.acceptance import optimal_num_draft_tokens

# Assumed cost to verify one more token, in runs of the target for one, if not measured. The arithmetic units of
# an accelerator are idle with a few tokens, those of a CPU are not; `measure.measure_costs` measures it.
VERIFICATION_GUESS = {"cpu": 0.1}
VERIFICATION_GUESS_ELSEWHERE = 0.02
# The same with packed weights (`hfllm.generation.packed.model`), per row of the batch.
VERIFICATION_GUESS_PACKED = 0.04


class DraftLength(Protocol):
    """Interface that chooses the number of drafted tokens for each run of the target.

    Attributes:
        maximum: the most that `steps` returns.
    """

    maximum: int

    def steps(self) -> int:
        """Return the number of tokens to draft now."""

    def update(self, accepted: int, tested: int) -> None:
        """Record that `accepted` of `tested` drafted tokens were right.

        Tokens after a rejected one were not tested.
        """


class FixedDraftLength:
    """Always the same number of tokens; 0 means plain decoding."""

    def __init__(self, steps: int):
        if steps < 0:
            raise InputError(f"num_draft_tokens {steps} is below 0: give a number of tokens to draft, or 'adaptive'")
        self.maximum = steps

    def steps(self) -> int:
        return self.maximum

    def update(self, accepted: int, tested: int) -> None:
        pass


class AdaptiveDraftLength:
    """The best number by the paper's formula for the recent acceptance rate (arXiv:2211.17192, section 3.5).

    It depends only on accepted tokens, not on measured times, so a seed gives the same samples again. When
    drafting does not pay, plain decoding continues, with one token drafted at intervals to notice when it does.

    Args:
        cost_ratio: time of a draft step plus that of verifying one more token, in runs of the target for one token.
        minimum: the fewest tokens to draft.
        maximum: the most tokens to draft.
        memory: runs of the target after which an observation counts for 1/e of a new one.
        first_guess: initial acceptance rate, with the weight of one run.
        probe_every: runs between the single drafts when drafting does not pay.
    """

    def __init__(
        self,
        cost_ratio: float,
        minimum: int = 0,
        maximum: int = 12,
        memory: float = 16.0,
        first_guess: float = 0.7,
        probe_every: int = 12,
    ):
        if not 0 <= minimum <= maximum:
            raise InputError(
                f"draft tokens from {minimum} to {maximum}: the minimum must lie between 0 and the maximum"
            )
        if cost_ratio < 0:
            raise InputError(f"cost_ratio {cost_ratio} is below 0: it is a ratio of two times")
        self.cost_ratio, self.minimum, self.maximum = cost_ratio, minimum, maximum
        self.decay, self.probe_every = 1 - 1 / memory, probe_every
        self.accepted, self.tested, self.idle = 4 * first_guess, 4.0, 0

    @property
    def alpha(self) -> float:
        """Return the recent acceptance rate."""
        return min(self.accepted / self.tested, 1.0)

    def steps(self) -> int:
        best = max(self.minimum, optimal_num_draft_tokens(self.alpha, self.cost_ratio, self.maximum))
        self.idle = 0 if best else self.idle + 1
        return min(1, self.maximum) if self.idle and self.idle % self.probe_every == 0 else best

    def update(self, accepted: int, tested: int) -> None:
        if tested:
            self.accepted = self.decay * self.accepted + accepted
            self.tested = self.decay * self.tested + tested


def as_draft_length(
    num_draft_tokens: "int | str | DraftLength", draft_cost: float, device: str = "cpu", packed_rows: int | None = None
) -> DraftLength:
    """Convert a number, `"adaptive"` or a `DraftLength` to a `DraftLength`.

    Args:
        draft_cost: time of a draft step in runs of the target; the verification time is estimated.
        device: the target's device type.
        packed_rows: rows of the batch if the target's weights are packed.

    Raises:
        InputError: for anything else.
    """
    if num_draft_tokens == "adaptive":
        verification = VERIFICATION_GUESS.get(device, VERIFICATION_GUESS_ELSEWHERE)
        if packed_rows is not None and device == "cpu":
            verification = VERIFICATION_GUESS_PACKED * packed_rows
        return AdaptiveDraftLength(draft_cost + verification)
    if isinstance(num_draft_tokens, int) and not isinstance(num_draft_tokens, bool):
        return FixedDraftLength(num_draft_tokens)
    if isinstance(num_draft_tokens, str) or not hasattr(num_draft_tokens, "steps"):
        raise InputError(
            f"num_draft_tokens {num_draft_tokens!r}: expected a number of tokens, 'adaptive' or a DraftLength"
        )
    return num_draft_tokens
