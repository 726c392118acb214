"""hfllm.scaling.studies: Kaplan's law fitted beside Chinchilla's, and the better one believed."""

import numpy
import pytest

from hfllm.scaling.fitting import Runs, bootstrap, fit_law
from hfllm.scaling.laws import EPOCH, KaplanLaw
from hfllm.scaling.studies import Forecast, KaplanObjective, fit_kaplan

TRUTH = KaplanLaw(N_c=8.6e7, D_c=7.3e9, alpha_N=0.18, alpha_D=0.14)


def table(law, noise=1e-3):
    """Twenty runs of five sizes and four lengths that follow a law."""
    sizes, tokens = (
        axis.ravel() for axis in numpy.meshgrid(numpy.geomspace(2e4, 4e5, 5), numpy.geomspace(3e5, 4e6, 4))
    )
    errors = numpy.exp(noise * numpy.random.default_rng(0).standard_normal(len(sizes)))
    return Runs(sizes, tokens, law.loss(sizes, tokens) * errors)


@pytest.mark.slow
def test_the_coefficients_of_a_known_law_come_back():
    fit = fit_kaplan(table(TRUTH), resamples=50)
    assert fit.law.alpha_N == pytest.approx(TRUTH.alpha_N, rel=0.02)
    assert fit.law.alpha_D == pytest.approx(TRUTH.alpha_D, rel=0.02)
    at = (1e6, 1e7)
    assert fit.losses(*at)[0] == pytest.approx(TRUTH.loss(*at), rel=2e-3)
    assert fit.losses(*at)[0] == pytest.approx(fit.law.loss(*at), rel=1e-9)
    low, high = numpy.quantile(fit.losses(*at)[1:], (0.025, 0.975))
    assert low < TRUTH.loss(*at) < high


def test_the_gradient_is_that_of_the_values():
    objective = KaplanObjective(table(TRUTH), delta=0.05)
    point = numpy.array([[1.2, 1.3, 0.25, 0.2]])
    _, gradient = objective(point, numpy.array([0]))
    for column, step in enumerate(1e-6 * numpy.eye(4)):
        up, down = (objective(point + sign * step, numpy.array([0]))[0][0] for sign in (1, -1))
        assert gradient[0, column] == pytest.approx((up - down) / 2e-6, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("law", "form", "other"), [(TRUTH, "kaplan", "chinchilla"), (EPOCH, "chinchilla", "kaplan")])
def test_the_law_that_the_runs_follow_is_believed(law, form, other):
    runs = table(law)
    fit = fit_law(runs)
    forecast = Forecast(fit, bootstrap(fit, 20), fit_kaplan(runs, 20))
    larger = Runs([2e6], [2e7], [law.loss(2e6, 2e7)])
    assert forecast.form == form
    assert abs(forecast.errors(larger)) < 0.01 and abs(forecast.errors(larger)) < abs(forecast.errors(larger, other))
    low, high = forecast.interval(2e6, 2e7)
    assert low <= forecast.loss(2e6, 2e7) <= high
