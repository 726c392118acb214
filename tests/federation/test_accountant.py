"""The accountant against opacus, a published table and closed forms, and budgets that are refused."""

import math

import numpy as np
import pytest

from hfllm.errors import InputError
from hfllm.federation.privacy import ORDERS, check_budget, epsilon_of, noise_to_signal, renyi_divergences

# opacus 1.6.0, RDPAccountant's analysis with its default orders: (sampling rate, noise, steps, delta): epsilon.
OPACUS = {
    (0.02, 1.0, 30, 1e-5): 1.4915061030195942,
    (1.0, 5.0, 10, 1e-5): 2.8136532471298397,
    (0.1, 0.8, 100, 1e-6): 13.897411368665754,
    (0.004, 1.12, 1000, 1e-5): 0.810978104478185,
    (0.0001, 0.3, 10000, 1e-3): 9.274563824658166,
}
# TensorFlow Privacy, tutorials/README.md, "Select Parameters", and its older text for 1.1: 60,000 rows, batches of
# 256, delta 1e-5: (noise, epochs): epsilon by Mironov's conversion.
PUBLISHED = {(1.12, 60): 2.92, (0.6, 30): 9.74, (1.2, 10): 1.20, (1.1, 60): 3.01}


@pytest.mark.parametrize("run", OPACUS)
def test_epsilon_is_opacus_s(run):
    assert epsilon_of(*run) == pytest.approx(OPACUS[run], rel=1e-8)


def test_epsilon_is_that_of_an_installed_opacus():
    accountants = pytest.importorskip("opacus.accountants", reason="opacus is not installed")
    for rate, noise, steps, delta in ((0.3, 0.7, 7, 1e-4), (0.01, 2.0, 500, 1e-6)):
        accountant = accountants.RDPAccountant()
        accountant.history = [(noise, rate, steps)]
        assert epsilon_of(rate, noise, steps, delta) == pytest.approx(accountant.get_epsilon(delta), rel=1e-6)


@pytest.mark.parametrize("run", PUBLISHED)
def test_epsilon_is_the_published_one_within_a_percent(run):
    noise, epochs = run
    found = epsilon_of(256 / 60_000, noise, epochs * 60_000 // 256, 1e-5, "mironov")
    assert found == pytest.approx(PUBLISHED[run], rel=0.01)
    assert epsilon_of(256 / 60_000, noise, epochs * 60_000 // 256, 1e-5) < found


def test_integer_orders_are_the_binomial_sum():
    """Mironov, Talwar and Zhang 2019, section 3.3."""
    for rate, noise in ((0.2, 1.0), (0.001, 0.8), (0.9, 3.0)):
        found = dict(zip(ORDERS, renyi_divergences(rate, noise), strict=True))
        for order in (2, 5, 32):
            terms = [
                math.lgamma(order + 1) - math.lgamma(k + 1) - math.lgamma(order - k + 1)
                + k * math.log(rate) + (order - k) * math.log1p(-rate) + k * (k - 1) / (2 * noise**2)
                for k in range(order + 1)
            ]  # fmt: skip
            assert found[order] == pytest.approx(np.logaddexp.reduce(terms) / (order - 1), rel=1e-8)


def test_more_noise_and_fewer_rounds_reveal_less():
    assert epsilon_of(1.0, 1.0, 10, 1e-5) > epsilon_of(1.0, 2.0, 10, 1e-5) > epsilon_of(0.1, 2.0, 10, 1e-5) > 0
    assert epsilon_of(0.5, 0.0, 1, 1e-5) == math.inf and epsilon_of(0.5, 1.0, 0, 1e-5) == 0
    assert all(math.isfinite(epsilon_of(0.001, noise, 5, 1e-5)) for noise in (0.05, 0.2, 100.0))


def test_a_budget_that_does_not_hold_is_refused_with_what_would():
    with pytest.raises(InputError) as raised:
        check_budget(6, 6, 20, 1.0, 1e-5, 8.0)
    said = str(raised.value)
    assert "epsilon would be 30.1 at delta 1e-05, above max_epsilon 8" in said
    assert "28 organisations of which 6 take part, or 2 rounds, or a noise multiplier of 2.86" in said
    # Each is what it says, and one less is not.
    assert check_budget(28, 6, 20, 1.0, 1e-5, 8.0) <= 8 < epsilon_of(6 / 27, 1.0, 20, 1e-5)
    assert check_budget(6, 6, 2, 1.0, 1e-5, 8.0) <= 8 < epsilon_of(1.0, 1.0, 3, 1e-5)
    assert check_budget(6, 6, 20, 2.86, 1e-5, 8.0) <= 8 < epsilon_of(1.0, 2.85, 20, 1e-5)


def test_without_noise_no_number_of_organisations_helps():
    with pytest.raises(InputError, match=r"epsilon would be inf .* meet it: a noise multiplier of"):
        check_budget(6, 6, 20, 0.0, 1e-5, 8.0)


def test_six_organisations_and_an_adapter_drown_in_noise():
    assert noise_to_signal(158_080, 1.0, 6) == pytest.approx(66.27, rel=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: epsilon_of(0.0, 1.0, 1, 1e-5), "sampling_rate is 0.0"),
        (lambda: epsilon_of(0.1, -1.0, 1, 1e-5), "noise_multiplier is -1.0"),
        (lambda: epsilon_of(0.1, math.nan, 1, 1e-5), "noise_multiplier is nan"),
        (lambda: epsilon_of(0.1, 1.0, 1, 1.0), "delta is 1.0"),
        (lambda: epsilon_of(0.1, 1.0, -1, 1e-5), "rounds is -1"),
        (lambda: epsilon_of(0.1, 1.0, 1, 1e-5, "x"), "conversion is 'x'"),
        (lambda: check_budget(6, 7, 1, 1.0, 1e-5, 8.0), "7 participants a round of 6"),
        (lambda: check_budget(6, 6, 1, 1.0, 1e-5, 0.0), "max_epsilon is 0.0"),
    ],
)
def test_numbers_out_of_range_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
