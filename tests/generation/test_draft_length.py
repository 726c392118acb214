"""The draft length stays within its bounds, follows the acceptance, and refuses nonsense."""

import random

import pytest

from hfllm.errors import InputError
from hfllm.generation.speculative.acceptance import optimal_num_draft_tokens
from hfllm.generation.speculative.drafts import AdaptiveDraftLength, FixedDraftLength, as_draft_length


def feed(draft_length, alpha, runs, seed=0):
    """Let drafts be accepted with probability alpha; the numbers of steps asked for."""
    generator, steps = random.Random(seed), []
    for _ in range(runs):
        steps.append(draft_length.steps())
        accepted = 0
        while accepted < steps[-1] and generator.random() < alpha:
            accepted += 1
        draft_length.update(accepted, min(accepted + 1, steps[-1]))
    return steps


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize(("minimum", "maximum"), [(0, 0), (0, 6), (2, 6), (5, 5)])
def test_it_stays_within_its_bounds(alpha, minimum, maximum):
    steps = feed(AdaptiveDraftLength(0.1, minimum, maximum), alpha, 200)
    assert minimum <= min(steps) <= max(steps) <= maximum


def test_it_settles_near_the_best_number():
    draft_length = AdaptiveDraftLength(0.1, maximum=20)
    steps = feed(draft_length, 0.8, 400)[100:]
    best = optimal_num_draft_tokens(0.8, 0.1, 20)
    assert abs(sum(steps) / len(steps) - best) < 2
    assert draft_length.alpha == pytest.approx(0.8, abs=0.15)


def test_when_drafting_does_not_pay_it_tries_now_and_then_and_comes_back():
    draft_length = AdaptiveDraftLength(0.3, probe_every=10)
    idle = feed(draft_length, 0.0, 200)[100:]
    assert set(idle) == {0, 1}
    assert sum(idle) == 10
    assert feed(draft_length, 1.0, 400)[-1] > 1


def test_what_a_user_may_give():
    assert isinstance(as_draft_length(3, 0.1), FixedDraftLength)
    assert as_draft_length(3, 0.1).steps() == 3
    # Nothing is free: verification is counted too, and costs least where arithmetic is idle.
    assert (
        as_draft_length("adaptive", 0.25, "cpu").cost_ratio
        > as_draft_length("adaptive", 0.25, "cuda").cost_ratio
        > 0.25
    )
    own = AdaptiveDraftLength(0.5)
    assert as_draft_length(own, 0.1) is own


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: as_draft_length(-1, 0.1), "num_draft_tokens -1 is below 0"),
        (lambda: as_draft_length("fast", 0.1), "num_draft_tokens 'fast'"),
        (lambda: as_draft_length(2.5, 0.1), "num_draft_tokens 2.5"),
        (lambda: as_draft_length(True, 0.1), "num_draft_tokens True"),
        (lambda: AdaptiveDraftLength(0.1, minimum=4, maximum=3), "from 4 to 3"),
        (lambda: AdaptiveDraftLength(-0.1), "cost_ratio -0.1"),
    ],
)
def test_nonsense_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
