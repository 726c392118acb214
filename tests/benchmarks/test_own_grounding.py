"""Questions about how sentences go on: the passage has the answer once, and the question does not."""

import runpy
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TEXT = (
    "The river Ouse rises near the town of Brackley and flows to the sea. On its way it passes Bedford twice. "
    "It froze in the winter of 1799, and people walked from Earith to Ely. "
) * 3


@pytest.fixture
def benchmark(monkeypatch):
    """The script's names; its folder is on the path as where it runs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return runpy.run_path(str(BENCHMARKS / "own_grounding.py"))


def test_the_name_or_number_that_comes_next_stands_once(benchmark):
    next_rows = benchmark["next_rows"]
    rows = [row for seed in range(20) for row in next_rows([TEXT], seed)]
    assert {row["answer"] for row in rows} >= {"Brackley", "1799", "Ely"} and list(next_rows([TEXT], 1)) != rows[:3]
    for row in rows:
        beginning = row["prompt"].partition('"')[2].removesuffix(' ..."?')
        assert row["passage"].count(row["answer"]) == row["passage"].count(beginning) == 1
        assert f"{beginning} {row['answer']}" in row["passage"]


def test_the_table_has_a_column_for_each_seed(benchmark):
    metrics = {1: {"grounded_among_cites": 0.5, "grounded_among_cites_n": 40}, 2: {}}
    shown = benchmark["table_of"](["asked with", "figure", "model"], benchmark["lines"](), metrics)
    assert "| among | cites | grounded | 0.5" in shown and shown.splitlines()[0].endswith("| seed 1 | seed 2 |")
