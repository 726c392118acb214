"""Runs that are far from the law of the others: found, named, and no others; what they do to a fit."""

import numpy
import pytest

from hfllm.scaling.fitting import Runs, find_outliers, read_runs
from hfllm.scaling.laws import EPOCH


def made(count=60, noise=4e-3, seed=0):
    rng = numpy.random.default_rng(seed)
    sizes, tokens = (numpy.exp(rng.uniform(*numpy.log(ends), count)) for ends in ((3e7, 1e10), (3e8, 5e11)))
    return sizes, tokens, EPOCH.loss(sizes, tokens) * numpy.exp(noise * rng.standard_normal(count))


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.9, 1.2])
def test_exactly_the_planted_rows_are_found(factor):
    """The five with the least compute, which pull the fit most, as in the 245 runs of Besiroglu et al. 2024."""
    sizes, tokens, losses = made()
    planted = numpy.sort(numpy.argsort(sizes * tokens)[:5])
    losses[planted] *= factor
    found = find_outliers(Runs(sizes, tokens, losses))
    assert found.indices.tolist() == planted.tolist()
    assert found.errors == pytest.approx(1 / factor - 1, abs=0.03)
    assert 2e-3 < found.scale < 6e-3
    # Leaving them out brings the coefficients back to the truth.
    before, after = (abs(numpy.log(fit.law.B / EPOCH.B)) for fit in (found.with_them, found.without))
    assert len(found.inliers) == 55 and after <= before + 0.1


@pytest.mark.slow
def test_noise_alone_has_no_outliers():
    assert len(find_outliers(Runs(*made(seed=1)))) == 0


@pytest.mark.slow
def test_names_are_lines_of_the_file(tmp_path):
    sizes, tokens, losses = made(count=30, noise=1e-3)
    losses[3] *= 1.5
    lines = [f"{n},{d},{loss}" for n, d, loss in zip(sizes, tokens, losses, strict=True)]
    (tmp_path / "runs.csv").write_text("\n".join(["N,D,loss", *lines]) + "\n")
    found = find_outliers(read_runs(tmp_path / "runs.csv"))
    assert [row["line"] for row in found.rows()] == ["5"]
    assert "1 of 30 runs (line 5) are more than 6 robust" in found.warning("runs.csv", dropped=False)
