"""Questions about gaps: the passage has the answer once, and the question does not."""

import runpy
from pathlib import Path

BENCHMARK = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "own_grounding.py"))
gap_rows, table = BENCHMARK["gap_rows"], BENCHMARK["table"]
TEXT = (
    "The river Ouse rises near Brackley and flows to the sea. It passes Bedford on its way. In 1799 it froze, "
    "and people walked to Ely. The water is clear today. "
) * 3


def test_gaps_are_names_or_numbers_that_stand_once():
    rows = [row for seed in range(20) for row in gap_rows([TEXT], seed)]
    assert {row["answer"] for row in rows} >= {"Ouse", "Bedford", "1799"} and list(gap_rows([TEXT], 1)) != rows[:3]
    for row in rows:
        left = row["prompt"].partition('"')[2]
        assert row["passage"].count(row["answer"]) == 1 and row["answer"] not in left
        assert left.rstrip('"').replace("___", row["answer"]) in row["passage"]


def test_the_table_has_a_column_for_each_seed():
    shown = table({1: {"grounded_among_cites": 0.5, "grounded_among_cites_n": 40}, 2: {}})
    assert "| among | grounded | 0.5" in shown and shown.splitlines()[0].endswith("| seed 1 | seed 2 |")
