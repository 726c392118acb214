"""Scaling laws against the numbers that their papers print."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hfllm.errors import InputError
from hfllm.scaling import laws

CHINCHILLA_BUDGET = 5.76e23  # Gopher's and Chinchilla's, Hoffmann et al. 2022


def test_the_rule_of_thumb_meets_chinchillas_table_3():
    spent = laws.optimal_by_ratio(1.92e19)
    assert (spent.parameters, spent.tokens) == (pytest.approx(400e6, rel=1e-12), pytest.approx(8.0e9, rel=1e-12))
    assert laws.optimal_by_ratio(CHINCHILLA_BUDGET).parameters == pytest.approx(67e9, rel=0.05)
    for compute in (1e15, 3e20, 1e27):
        spent = laws.optimal_by_ratio(compute)
        assert spent.parameters == pytest.approx(math.sqrt(compute / 120), rel=1e-12)
        assert spent.compute == pytest.approx(compute, rel=1e-12) and spent.tokens_per_parameter == pytest.approx(20)


def test_forgetting_the_ratio_makes_a_model_4_47_times_too_large():
    naive = math.sqrt(CHINCHILLA_BUDGET / 6)
    assert naive / laws.optimal_by_ratio(CHINCHILLA_BUDGET).parameters == pytest.approx(4.47, abs=0.005)


def test_rounded_coefficients_of_approach_3_give_93_tokens_a_parameter_and_epochs_refit_18():
    assert round(laws.CHINCHILLA.optimal(CHINCHILLA_BUDGET).tokens_per_parameter) == 93
    assert round(laws.EPOCH.optimal(CHINCHILLA_BUDGET).tokens_per_parameter) == 18
    # Table 2 of Hoffmann et al. and section 4 of Besiroglu et al. 2024: a = 0.46 (0.454 before rounding), 0.513.
    assert laws.CHINCHILLA.exponents[0] == pytest.approx(0.454, abs=0.003)
    assert laws.EPOCH.exponents[0] == pytest.approx(0.513, abs=0.001)


@pytest.mark.parametrize("approach", [1, 2, 3])
def test_the_approaches_lines_go_through_their_tables(approach):
    line = laws.chinchilla_projection(approach)
    exponent, low, high = laws.CHINCHILLA_EXPONENTS[approach]
    assert round(line.exponent, 2) == exponent and low - 0.005 <= line.exponent <= high + 0.005
    for parameters, compute in laws.CHINCHILLA_TABLES[approach]:
        # Both columns are printed to two or three digits.
        assert line.optimal(compute).parameters == pytest.approx(parameters, rel=0.04)


def test_approaches_1_and_2_are_where_twenty_to_one_comes_from():
    for approach, expected in ((1, 21), (2, 24), (3, 54)):
        ratio = laws.chinchilla_projection(approach).optimal(CHINCHILLA_BUDGET).tokens_per_parameter
        assert round(ratio) == expected


def test_an_optimum_is_the_least_loss_of_its_budget():
    for law in (laws.CHINCHILLA, laws.EPOCH, laws.C4):
        best = law.optimal(1e21)
        assert best.compute == pytest.approx(1e21, rel=1e-9)
        for factor in (0.99, 1.01):
            size = best.parameters * factor
            assert law.loss(size, 1e21 / 6 / size) > law.loss(best.parameters, best.tokens)
        assert law.optimal_parameters(best.tokens) == pytest.approx(best.parameters, rel=1e-9)


def test_kaplans_optimum_and_its_limits():
    # Table 6 of Kaplan et al. 2020: 1.3e9 (C / PF-day)^0.73 parameters.
    assert laws.KAPLAN.optimal(8.64e19).parameters == pytest.approx(1.3e9)
    ratio = laws.KAPLAN.optimal(8.64e20).parameters / laws.KAPLAN.optimal(8.64e19).parameters
    assert math.log10(ratio) == pytest.approx(0.73)
    # With endless data L(N, D) is (N_c / N)^0.076, with an endless model (D_c / D)^0.103 (section 1.2).
    assert laws.KAPLAN.loss(1e9, 1e30) == pytest.approx((6.4e13 / 1e9) ** 0.076, rel=1e-3)
    assert laws.KAPLAN.loss(1e30, 1e9) == pytest.approx((1.8e13 / 1e9) ** 0.103, rel=1e-3)


def test_the_data_constrained_law_is_muennighoffs_equation_17():
    law = laws.MUENNIGHOFF
    assert [round(law.law.A), round(law.law.B), round(law.law.E, 2)] == [521, 1488, 1.87]
    assert law.law.optimal_parameters(1e9) / 1e9 == pytest.approx(0.051, abs=0.0005)
    tokens, unique, size = 1e11, 25e9, 8.67e9
    enough = 0.051 * unique
    effective = enough + 5.3 * enough * (1 - math.exp(-(size / enough - 1) / 5.3))
    seen = unique + 15.4 * unique * (1 - math.exp(-(tokens / unique - 1) / 15.4))
    expected = 521 / effective**0.353 + 1488 / seen**0.353 + 1.87
    assert law.loss(size, tokens, unique) == pytest.approx(expected, abs=0.005)
    assert law.effective_tokens(1e30, 1.0) == pytest.approx(16.39, abs=0.005)


def test_repeating_up_to_four_times_costs_next_to_nothing_and_then_models_should_be_smaller():
    law, unique = laws.MUENNIGHOFF, 25e9
    # Figure 1: four epochs are nearly as good as new data; section 5: 6.34B with 242B tokens beats 8.67B with 178B.
    assert law.effective_tokens(4 * unique, unique) / (4 * unique) == pytest.approx(0.931, abs=0.001)
    assert law.loss(6.34e9, 242e9, unique) < law.loss(8.67e9, 178e9, unique)
    assert law.law.optimal(9.3e21).parameters == pytest.approx(8.67e9, rel=0.05)
    best = law.optimal(9.3e21, unique)
    assert best.compute == pytest.approx(9.3e21) and 6e9 < best.parameters < 7e9
    for factor in (0.98, 1.02):
        size = best.parameters * factor
        assert law.loss(size, 9.3e21 / 6 / size, unique) > law.loss(best.parameters, best.tokens, unique)
    plenty = law.optimal(9.3e21, 1e13)
    assert plenty.parameters == pytest.approx(law.law.optimal(9.3e21).parameters, rel=1e-3)


def test_best_of_n():
    assert laws.best_of_n_kl(16) == pytest.approx(1.835, abs=0.0005)
    assert laws.best_of_n_kl(1) == 0
    # The best of n has density n F^(n-1): its KL by summation over equally likely, ordered answers.
    answers, n = 20000, 16
    shares = [((i + 1) / answers) ** n - (i / answers) ** n for i in range(answers)]
    kl = sum(share * math.log(share * answers) for share in shares if share > 0)
    assert laws.best_of_n_kl(n) == pytest.approx(kl, rel=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: laws.optimal_by_ratio(-1), "compute=-1: expected a finite number above 0"),
        (lambda: laws.optimal_by_ratio(1e20, 0), "tokens_per_parameter=0"),
        (lambda: laws.EPOCH.optimal(math.nan), "compute=nan"),
        (lambda: laws.ParametricLaw(1, 1, 1, -0.1, 1), "alpha=-0.1"),
        (lambda: laws.chinchilla_projection(4), "approach 4 is not one of 1, 2, 3"),
        (lambda: laws.MUENNIGHOFF.loss(1e9, 1e9, 0), "tokens=0"),
        (lambda: laws.PowerLaw.through([1e9, 1e9], [1, 2]), "at least 2 different compute budgets, got 1"),
        (lambda: laws.best_of_n_kl(0), "n=0: the best of n"),
    ],
)
def test_numbers_without_meaning_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_scaling_needs_neither_torch_nor_transformers():
    modules = [path.stem for path in (Path(laws.__file__).parent).glob("*.py") if path.stem != "__init__"]
    code = "import sys\n" + "".join(f"import hfllm.scaling.{name}\n" for name in modules)
    code += "assert not {'torch', 'transformers', 'scipy', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_the_documentation_says_is_so():
    docs = Path(__file__).parent.parent.parent / "docs"
    text = "\n".join((docs / folder / "scaling_laws.md").read_text() for folder in ("guides", "reference"))
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(code, names)
    assert names["laws"] is laws
    expected = [laws.chinchilla_projection(approach).optimal(CHINCHILLA_BUDGET) for approach in (1, 2, 3)]
    expected += [law.optimal(CHINCHILLA_BUDGET) for law in (laws.CHINCHILLA, laws.EPOCH, laws.KAPLAN)]
    rows = text.split("| from | tokens per parameter |")[1].split("\n\n")[0].splitlines()[2:]
    for row, spent in zip(rows, expected, strict=True):
        shown = row.split("|")[2].strip()
        assert f"{spent.tokens_per_parameter:.{len(shown.partition('.')[2])}f}" == shown
