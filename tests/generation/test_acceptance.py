"""The acceptance rule leaves the target's distribution unchanged, and the paper's formulas give its table."""

import pytest
import torch

from hfllm.generation.speculative import acceptance
from hfllm.generation.speculative.acceptance import (
    accept_greedy,
    accept_sampled,
    expected_tokens,
    operations,
    optimal_num_draft_tokens,
    residual,
    speedup,
)

DRAWS, VOCABULARY, DRAFTED = 50_000, 8, 3
# Standard deviations that the statistic may lie from its mean: one time in a million by chance alone.
LIMIT = 4.9


def surprise(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """How many standard deviations Pearson's statistic lies above its mean (Wilson and Hilferty 1931)."""
    assert not counts[probs == 0].any()
    counts, probs = counts[probs > 0].double(), probs[probs > 0].double()
    expected = probs * counts.sum()
    freedom = len(probs) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5


@pytest.fixture
def distributions():
    """Random p (G + 1, V) and q (G, V); p leaves a token out that q has, and the other way round."""
    generator = torch.Generator().manual_seed(3)
    p = torch.randn(DRAFTED + 1, VOCABULARY, generator=generator).softmax(-1)
    q = torch.randn(DRAFTED, VOCABULARY, generator=generator).softmax(-1)
    p[:, 0], q[:, 1] = 0.0, 0.0
    return p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)


def outcomes(p, q, counts=None, seed=0):
    """Draft by q and judge by p: accepted counts (draws,), and the tokens that come out, (draws, G + 1)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.stack([torch.multinomial(row, DRAWS, True, generator=generator) for row in q], dim=1)
    probs = q.expand(DRAWS, -1, -1)
    accepted, following = accept_sampled(tokens, probs, p.expand(DRAWS, -1, -1), counts, generator)
    tokens = torch.nn.functional.pad(tokens, (0, 1))
    return accepted, tokens.scatter(1, accepted.unsqueeze(1), following.unsqueeze(1))


def worst_surprise(p, q, counts=None):
    """Over the positions; each is drawn from p by whoever gets there, which here depends on nothing before."""
    accepted, tokens = outcomes(p, q, counts)
    return max(
        surprise(torch.bincount(tokens[accepted >= at, at], minlength=VOCABULARY), p[at])
        for at in range(DRAFTED + 1)
        if (accepted >= at).sum() > 500
    )


def test_samples_follow_the_target(distributions):
    assert worst_surprise(*distributions) < LIMIT


def test_rows_with_fewer_drafts_follow_the_target_too(distributions):
    counts = torch.arange(DRAWS) % (DRAFTED + 1)
    assert worst_surprise(*distributions, counts) < LIMIT
    accepted, _ = outcomes(*distributions, counts)
    assert (accepted <= counts).all()
    assert (accepted == counts).any()


def test_acceptance_is_as_likely_as_the_paper_says(distributions):
    """Equation 2 with theorem 3.5: the overlap of the two distributions, at the first position."""
    p, q = distributions
    accepted, _ = outcomes(p, q)
    alpha = float(torch.minimum(p[0], q[0]).sum())
    deviation = (alpha * (1 - alpha) / DRAWS) ** 0.5
    assert float((accepted > 0).double().mean()) == pytest.approx(alpha, abs=LIMIT * deviation)


def test_the_test_notices_a_replacement_from_the_target_itself(distributions, monkeypatch):
    """The common mistake: after a rejection, to draw from p instead of the residual."""
    monkeypatch.setattr(acceptance, "residual", lambda p, q: p)
    assert worst_surprise(*distributions) > 3 * LIMIT


def test_the_test_notices_a_rule_that_accepts_too_much(distributions, monkeypatch):
    rule = acceptance.acceptance_probability
    monkeypatch.setattr(acceptance, "acceptance_probability", lambda p, q: rule(p, q).sqrt())
    assert worst_surprise(*distributions) > 3 * LIMIT


def test_certain_drafts_follow_the_target(distributions):
    """Without distributions q is 1 at the drafted token: n-grams of the prompt."""
    p = distributions[0].expand(DRAWS, -1, -1)
    tokens = torch.full((DRAWS, DRAFTED), 2)
    generator = torch.Generator().manual_seed(1)
    accepted, following = accept_sampled(tokens, None, p, generator=generator)
    emitted = torch.nn.functional.pad(tokens, (0, 1)).scatter(1, accepted.unsqueeze(1), following.unsqueeze(1))
    for at in range(DRAFTED + 1):
        there = emitted[accepted >= at, at]
        assert surprise(torch.bincount(there, minlength=VOCABULARY), p[0, at]) < LIMIT
    one_hot = torch.nn.functional.one_hot(tokens, VOCABULARY).to(p.dtype)
    again = accept_sampled(tokens, one_hot, p, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again[0], accepted)
    assert torch.equal(again[1], following)


def test_without_drafts_the_target_is_sampled(distributions):
    p = distributions[0][:1].expand(DRAWS, -1, -1)
    none = torch.empty(DRAWS, 0, dtype=torch.long)
    accepted, following = accept_sampled(none, None, p, generator=torch.Generator().manual_seed(0))
    assert not accepted.any()
    assert surprise(torch.bincount(following, minlength=VOCABULARY), p[0, 0]) < LIMIT


def test_equal_distributions_reject_nothing(distributions):
    p, _ = distributions
    accepted, _ = outcomes(p, p[:DRAFTED])
    assert (accepted == DRAFTED).all()


def test_the_residual_is_a_distribution(distributions):
    p, q = distributions
    rest = residual(p[:DRAFTED], q)
    assert rest.sum(-1) == pytest.approx(torch.ones(DRAFTED))
    assert not rest[p[:DRAFTED] <= q].any()
    assert torch.equal(residual(q, q), q)


def test_greedy_takes_the_common_beginning():
    target = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8]])
    draft = torch.tensor([[5, 6, 7], [5, 0, 7], [0, 6, 7], [5, 6, 7]])
    accepted, following = accept_greedy(draft, target, torch.tensor([3, 3, 3, 1]))
    assert accepted.tolist() == [3, 1, 0, 1]
    assert following.tolist() == [8, 6, 5, 6]


@pytest.mark.parametrize(
    ("alpha", "gamma", "factor", "speed"),
    [
        *[(0.6, 2, 1.53, 1.96), (0.7, 3, 1.58, 2.53), (0.8, 2, 1.23, 2.44)],
        *[(0.8, 5, 1.63, 3.69), (0.9, 2, 1.11, 2.71), (0.9, 10, 1.60, 6.86)],
    ],
)
def test_table_1_of_the_paper(alpha, gamma, factor, speed):
    """Table 1 of arXiv:2211.17192, where c and c_hat are 0."""
    assert operations(alpha, gamma, 0.0) == pytest.approx(factor, abs=0.005)
    assert speedup(alpha, gamma, 0.0) == pytest.approx(speed, abs=0.005)


def test_the_formulas_agree_with_a_simulation():
    alpha, gamma = 0.7, 4
    hits = torch.rand(200_000, gamma, generator=torch.Generator().manual_seed(0)) < alpha
    gained = hits.long().cumprod(1).sum(1) + 1
    assert expected_tokens(alpha, gamma) == pytest.approx(float(gained.double().mean()), rel=0.01)
    assert expected_tokens(1.0, gamma) == gamma + 1
    assert expected_tokens(0.0, gamma) == 1.0
    assert speedup(alpha, 0, 0.3) == 1.0


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("c", [0.0, 0.05, 0.2, 0.5, 0.9])
def test_the_optimal_draft_length_is_the_best_and_pays_only_above_c(alpha, c):
    best = optimal_num_draft_tokens(alpha, c, maximum=20)
    assert all(speedup(alpha, best, c) >= speedup(alpha, gamma, c) for gamma in range(21))
    assert (best > 0) == (alpha > c)
