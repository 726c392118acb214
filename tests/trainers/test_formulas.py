"""PPO's formulas against brute force."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfllm.trainers.ppo import formulas


def random_batch(rows=5, length=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([7, 1, 4, 0, 6])[:rows]
    mask = (torch.arange(length) < lengths.unsqueeze(1)).float()
    rewards, values = (torch.randn(rows, length, generator=generator, dtype=torch.float64) for _ in range(2))
    return rewards * mask, values * mask, mask.double(), lengths


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0), (0.0, 0.5)])
def test_gae_is_the_brute_force_sum(gamma, lam):
    rewards, values, mask, lengths = random_batch()
    advantages, returns = formulas.generalized_advantages(rewards, values, mask, gamma, lam)
    for row, length in enumerate(lengths.tolist()):
        for t in range(length):
            expected = 0.0
            for later in range(t, length):
                next_value = values[row, later + 1] if later + 1 < length else 0.0
                delta = rewards[row, later] + gamma * next_value - values[row, later]
                expected += (gamma * lam) ** (later - t) * delta
            torch.testing.assert_close(advantages[row, t], torch.as_tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(returns, (advantages + values) * mask)
    assert (advantages[mask == 0] == 0).all()


def looped(deltas, discount):
    """The discounted sum of a row's deltas, from the last to the first."""
    total, sums = 0.0, []
    for delta in reversed(deltas):
        total = delta + discount * total
        sums.insert(0, total)
    return sums


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    chosen=st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    gamma=st.sampled_from([1.0, 0.9]),
    lam=st.sampled_from([0.0, 0.8, 1.0, None]),
    alpha=st.sampled_from([0.05, 0.5, 3.0]),
    value_lam=st.sampled_from([None, 0.0, 0.7, 1.0]),
)
def test_lambdas_of_their_own_for_returns_and_lengths(chosen, seed, gamma, lam, alpha, value_lam):
    """Against a loop over the tokens of the policy alone: tools write between them, and padding follows."""
    mask = torch.tensor(chosen, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(mask.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    of_rows = formulas.length_adaptive_lam(mask, alpha) if lam is None else lam
    found = formulas.generalized_advantages(rewards, values, mask, gamma, of_rows, value_lam)
    for row, is_chosen in enumerate(mask > 0):
        reward, value = rewards[row, is_chosen].tolist(), values[row, is_chosen].tolist()
        own = max(0.0, 1 - 1 / (alpha * len(value))) if lam is None and value else lam or 0.0
        deltas = [r + gamma * after - v for r, v, after in zip(reward, value, [*value[1:], 0.0], strict=False)]
        earned = looped(deltas, gamma * (own if value_lam is None else value_lam))
        expected = [looped(deltas, gamma * own), [e + v for e, v in zip(earned, value, strict=True)]]
        for result, right in zip(found, expected, strict=True):
            torch.testing.assert_close(result[row, is_chosen], torch.tensor(right, dtype=torch.float64))
            assert (result[row, ~is_chosen] == 0).all()


def test_at_neutral_settings_the_bits_are_those_of_one_lambda():
    rewards, values, mask, _ = random_batch()
    one = formulas.generalized_advantages(rewards, values, mask, 0.99, 0.95)
    both = formulas.generalized_advantages(rewards, values, mask, 0.99, 0.95, 0.95)
    assert all(torch.equal(each, other) for each, other in zip(one, both, strict=True))
    old, new = values, rewards
    plain = formulas.policy_loss(new, old, values, mask, 0.2, 3.0)
    same = formulas.policy_loss(new, old, values, mask, 0.2, 3.0, 0.2)
    assert all(torch.equal(each, other) for each, other in zip(plain, same, strict=True))


def test_lambda_by_length_looks_over_a_share_of_the_response():
    mask = (torch.arange(500) < torch.tensor([[10], [100], [500]])).double()
    lam = formulas.length_adaptive_lam(mask, 0.05)
    torch.testing.assert_close(lam, torch.tensor([0.0, 0.8, 0.96], dtype=torch.float64))
    # The weights of all later tokens add up to that share: 5 and 25 tokens.
    torch.testing.assert_close(1 / (1 - lam[1:]), torch.tensor([5.0, 25.0], dtype=torch.float64))


def test_by_default_lambda_looks_over_20_tokens_or_all_of_a_longer_response():
    mask = (torch.arange(500) < torch.tensor([[10], [20], [50], [500]])).double()
    expected = torch.tensor([0.95, 0.95, 1 - 1 / 125, 1 - 1 / 12_500], dtype=torch.float64)
    torch.testing.assert_close(formulas.default_lam(mask), expected)
    # Where none is longer, the bits are those of one number for all.
    assert formulas.default_lam(mask[:2]) == 0.95
    # A masked token is none of the response.
    assert formulas.default_lam((torch.arange(40) % 2 == 0).double().unsqueeze(0)) == 0.95


def test_the_upper_clip_lets_good_tokens_rise_further_and_bad_ones_no_less():
    old, mask = torch.zeros(1, 3), torch.ones(1, 3)
    new, advantages = torch.tensor([[1.26, 1.26, 0.5]]).log(), torch.tensor([[1.0, -1.0, 1.0]])
    loss, clipped = formulas.policy_loss(new, old, advantages, mask, 0.2)
    higher, unclipped = formulas.policy_loss(new, old, advantages, mask, 0.2, cliprange_high=0.28)
    assert (loss.item(), clipped.item()) == (pytest.approx(-(1.2 - 1.26 + 0.5)), 1)
    assert (higher.item(), unclipped.item()) == (pytest.approx(-(1.26 - 1.26 + 0.5)), 0)


def test_with_lambda_one_the_advantage_is_return_minus_value():
    rewards, values, mask, _ = random_batch()
    advantages, _ = formulas.generalized_advantages(rewards, values, mask, gamma=1.0, lam=1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(advantages, (to_go - values) * mask)


def test_what_lies_in_the_padding_changes_nothing():
    rewards, values, mask, _ = random_batch()
    noise = torch.randn_like(values) * (1 - mask) * 100
    clean = formulas.generalized_advantages(rewards, values, mask, 0.99, 0.95)
    noisy = formulas.generalized_advantages(rewards + noise, values + noise, mask, 0.99, 0.95)
    torch.testing.assert_close(clean, noisy)
    torch.testing.assert_close(formulas.masked_whiten(values, mask), formulas.masked_whiten(values + noise, mask))
    log_a, log_b = values, rewards
    for loss in (
        lambda shift: formulas.policy_loss(log_a + shift, log_b, values, mask, 0.2),
        lambda shift: formulas.value_loss(log_a + shift, log_b, rewards, mask, 0.2),
    ):
        torch.testing.assert_close(loss(0 * noise), loss(noise))


def test_logits_of_any_size_in_the_padding_change_no_loss_and_no_gradient():
    """exp() of what lies there would be infinite, and infinity times a mask of 0 is not 0."""
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    old, advantages = torch.zeros(1, 3), torch.tensor([[1.0, -1.0, 2.0]])
    logprobs = torch.tensor([[0.1, -0.1, 1e4]], requires_grad=True)
    loss, clipped = formulas.policy_loss(logprobs, old, advantages, mask, cliprange=0.2)
    torch.testing.assert_close(loss.detach(), -(torch.tensor(0.1).exp() - torch.tensor(-0.1).exp()))
    assert clipped == 0
    loss.backward()
    expected = torch.tensor([[-torch.tensor(0.1).exp(), torch.tensor(-0.1).exp(), 0.0]])
    torch.testing.assert_close(logprobs.grad, expected)


def test_the_score_sits_on_the_last_real_token():
    mask = torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    scores = torch.tensor([2.0, 3.0, 5.0, 7.0])
    rewards = formulas.token_rewards(scores, torch.zeros(4, 4), mask, kl_coef=0.1)
    expected = torch.tensor([[0.0, 0, 2, 0], [3, 0, 0, 0], [0, 0, 0, 5], [0, 0, 0, 0]])
    torch.testing.assert_close(rewards, expected)


def test_kl_is_charged_on_every_real_token_and_only_there():
    mask = torch.tensor([[1.0, 1, 0]])
    rewards = formulas.token_rewards(torch.tensor([1.0]), torch.tensor([[0.5, -1.0, 9.0]]), mask, kl_coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 1.1, 0.0]]))


def test_the_exact_kl_is_that_of_torch_from_the_policy_to_the_reference():
    torch.manual_seed(0)
    policy, reference = (torch.randn(3, 20).log_softmax(-1) for _ in range(2))
    one, other = (torch.distributions.Categorical(logits=each) for each in (policy, reference))
    expected = torch.distributions.kl_divergence(one, other)
    torch.testing.assert_close(formulas.full_kl(policy, reference), expected)
    # It is not symmetric, so that the other direction would be noticed.
    assert (expected - formulas.full_kl(reference, policy)).abs().min() > 0.01


def test_kl_estimators_agree_with_the_exact_kl():
    torch.manual_seed(0)
    policy, reference = (torch.randn(20).log_softmax(0) for _ in range(2))
    exact = (policy.exp() * (policy - reference)).sum()
    tokens = torch.multinomial(policy.exp(), 200_000, replacement=True)
    for estimator in ("k1", "k3"):
        mean = formulas.kl_estimate(policy[tokens], reference[tokens], estimator).mean()
        torch.testing.assert_close(mean, exact, atol=0.02, rtol=0)
    assert (formulas.kl_estimate(policy, reference, "k3") >= 0).all()
    near = policy + 0.01 * torch.randn(20)
    torch.testing.assert_close(
        (policy.exp() * formulas.kl_estimate(policy, near.log_softmax(0), "k2")).sum(),
        (policy.exp() * (policy - near.log_softmax(0))).sum(),
        atol=1e-6,
        rtol=0.05,
    )
    with pytest.raises(ValueError, match="k1, k2, k3"):
        formulas.kl_estimate(policy, reference, "k4")


def test_whitening_over_two_processes_is_whitening_over_their_batch():
    torch.manual_seed(0)
    values, mask = torch.randn(8, 5), (torch.rand(8, 5) > 0.3).float()
    whole = formulas.masked_whiten(values, mask)
    real = whole[mask > 0]
    torch.testing.assert_close(real.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(real.std(), torch.tensor(1.0), atol=1e-4, rtol=0)
    halves = [(values[:4], mask[:4]), (values[4:], mask[4:])]
    sums = []

    def statistics(of_values, of_mask, known):
        calls = iter(known)

        def reduce(local):
            sums.append(local)
            return next(calls, local)

        return formulas.masked_whiten(of_values, of_mask, reduce=reduce)

    # Each round of communication, played by hand: first the counts and totals, then the squared deviations.
    for half in halves:
        statistics(*half, known=[])
    totals = sums[0] + sums[2]
    sums.clear()
    for half in halves:
        statistics(*half, known=[totals])
    squares = sums[1] + sums[3]
    parts = [statistics(*half, known=[totals, squares]) for half in halves]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_policy_loss_is_the_clipped_surrogate():
    old, mask = torch.zeros(1, 4), torch.ones(1, 4)
    ratio = torch.tensor([[1.5, 0.5, 1.5, 0.5]])
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    loss, clipped = formulas.policy_loss(ratio.log(), old, advantages, mask, cliprange=0.2)
    torch.testing.assert_close(loss, -torch.tensor(1.2 + 0.5 - 1.5 - 0.8))
    assert clipped == 2


def test_value_loss_takes_the_worse_of_clipped_and_unclipped():
    mask = torch.ones(1, 2)
    values, old, returns = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, -1.0]])
    loss, clipped = formulas.value_loss(values, old, returns, mask, cliprange_value=0.2)
    torch.testing.assert_close(loss, torch.tensor(0.5 * (0.8**2 + 2.0**2)))
    assert clipped == 1


def test_without_clipping_the_value_loss_is_half_the_squared_error():
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    values, old, returns = torch.tensor([[1.0, 3.0, 9.0]]), torch.zeros(1, 3), torch.tensor([[2.0, 0.0, -9.0]])
    loss, clipped = formulas.value_loss(values, old, returns, mask, cliprange_value=None)
    expected = torch.nn.functional.mse_loss(values[:, :2], returns[:, :2], reduction="sum") / 2
    torch.testing.assert_close(loss, expected)
    assert clipped == 0
    # A range that nothing leaves gives the same.
    torch.testing.assert_close(loss, formulas.value_loss(values, old, returns, mask, cliprange_value=100.0)[0])


def test_explained_variance():
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, 99.0]]), torch.tensor([[1.0, 1, 1, 0]])
    assert formulas.explained_variance(returns, returns, mask) == 1
    torch.testing.assert_close(formulas.explained_variance(0 * returns, returns, mask), torch.tensor(0.0))
    assert formulas.explained_variance(returns, returns, 0 * mask) == 0


# ---- several answers to a prompt ----


def test_an_answer_is_compared_with_the_others_to_its_prompt():
    means = formulas.means_of_others(torch.tensor([1.0, 0.0, 0.5, 3.0, 3.0, 9.0]), size=3)
    torch.testing.assert_close(means, torch.tensor([0.25, 0.75, 0.5, 6.0, 6.0, 3.0]))


def test_the_first_chosen_token_may_stand_behind_others():
    values, mask = torch.tensor([[1.0, 2.0, 3.0]] * 3), torch.tensor([[1.0, 0, 1], [0, 1, 1], [0, 0, 0]])
    assert formulas.first_chosen(values, mask).tolist() == [1.0, 2.0, 1.0]


# ---- what another engine has sampled ----


@pytest.mark.parametrize("level", ["token", "sequence"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    chosen=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=3),
    seed=st.integers(0, 99),
    cap=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_importance_weights_are_capped_ratios(level, chosen, seed, cap):
    mask = torch.tensor(chosen, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    own, sampled = (torch.randn(mask.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    weights, capped = formulas.importance_weights(own, sampled, mask, cap, level)
    for row, is_chosen in enumerate(chosen):
        whole = math.prod(math.exp(own[row, at] - sampled[row, at]) for at in range(5) if is_chosen[at])
        for at in range(5):
            ratio = math.exp(own[row, at] - sampled[row, at]) if level == "token" else whole
            expected = (min(ratio, cap), float(ratio > cap)) if is_chosen[at] else (0.0, 0.0)
            assert (weights[row, at].item(), capped[row, at].item()) == pytest.approx(expected)


def test_where_both_engines_agree_nothing_is_weighed():
    mask, logprobs = (torch.arange(6) < 4).float().expand(2, 6), -torch.rand(2, 6)
    for level in ("token", "sequence"):
        weights, capped = formulas.importance_weights(logprobs, logprobs, mask, 2.0, level)
        assert torch.equal(weights, mask) and not capped.any()
