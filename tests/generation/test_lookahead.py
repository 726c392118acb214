"""The lookahead stays within its bounds, follows the acceptance, and refuses nonsense."""

import random

import pytest

from hfllm.errors import InputError
from hfllm.generation.speculative.acceptance import optimal_lookahead
from hfllm.generation.speculative.lookahead import AdaptiveLookahead, FixedLookahead, as_lookahead


def feed(lookahead, alpha, runs, seed=0):
    """Let drafts be accepted with probability alpha; the numbers of steps asked for."""
    generator, steps = random.Random(seed), []
    for _ in range(runs):
        steps.append(lookahead.steps())
        accepted = 0
        while accepted < steps[-1] and generator.random() < alpha:
            accepted += 1
        lookahead.update(accepted, min(accepted + 1, steps[-1]))
    return steps


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize(("minimum", "maximum"), [(0, 0), (0, 6), (2, 6), (5, 5)])
def test_it_stays_within_its_bounds(alpha, minimum, maximum):
    steps = feed(AdaptiveLookahead(0.1, minimum, maximum), alpha, 200)
    assert minimum <= min(steps) <= max(steps) <= maximum


def test_it_settles_near_the_best_number():
    lookahead = AdaptiveLookahead(0.1, maximum=20)
    steps = feed(lookahead, 0.8, 400)[100:]
    best = optimal_lookahead(0.8, 0.1, 20)
    assert abs(sum(steps) / len(steps) - best) < 2
    assert lookahead.alpha == pytest.approx(0.8, abs=0.15)


def test_when_drafting_does_not_pay_it_tries_now_and_then_and_comes_back():
    lookahead = AdaptiveLookahead(0.3, probe_every=10)
    idle = feed(lookahead, 0.0, 200)[100:]
    assert set(idle) == {0, 1}
    assert sum(idle) == 10
    assert feed(lookahead, 1.0, 400)[-1] > 1


def test_what_a_user_may_give():
    assert isinstance(as_lookahead(3, 0.1), FixedLookahead)
    assert as_lookahead(3, 0.1).steps() == 3
    # Nothing is free: verification is counted too, and costs least where arithmetic is idle.
    assert as_lookahead("adaptive", 0.25, "cpu").cost_ratio > as_lookahead("adaptive", 0.25, "cuda").cost_ratio > 0.25
    own = AdaptiveLookahead(0.5)
    assert as_lookahead(own, 0.1) is own


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: as_lookahead(-1, 0.1), "lookahead -1 is below 0"),
        (lambda: as_lookahead("fast", 0.1), "lookahead 'fast'"),
        (lambda: as_lookahead(2.5, 0.1), "lookahead 2.5"),
        (lambda: as_lookahead(True, 0.1), "lookahead True"),
        (lambda: AdaptiveLookahead(0.1, minimum=4, maximum=3), "from 4 to 3"),
        (lambda: AdaptiveLookahead(-0.1), "cost_ratio -0.1"),
    ],
)
def test_nonsense_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
