"""benchmarks/grounding.py in miniature: both sides do the same, questions find what they are made of, large texts."""

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("bm25s")
FILE = Path(__file__).parents[2] / "benchmarks" / "grounding.py"
BODIES = ("owl eats mice", "fox lives in holes", "toad sings at night", "bear likes honey")


@pytest.fixture
def benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location("grounding_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    documents = [
        (
            f"animals.{body.split()[0].title()}Facts",
            f"This text is about {body}, as all know. " + f"The {body} daily. " * 7,
        )
        for body in BODIES
    ]
    monkeypatch.setattr("hfllm.data.sources.pydoc_documents", lambda: iter([*documents, ("topics.X", "x")]))
    return module


def test_questions_find_the_text_that_they_are_made_of(benchmark):
    bodies, gold, asked = benchmark.questions_of()
    assert len(bodies) == 4 and sorted(gold) == [0, 1, 2, 3]
    assert asked["first sentence"][0] == f"This text is about {BODIES[gold[0]]}, as all know."
    assert asked["words of the name"][0] == f"animals {BODIES[gold[0]].split()[0].title()} Facts"
    # Each word of a body is in one of them alone.
    assert not any(word in bodies[1] for word in BODIES[0].split())
    lines = benchmark.recall_table(None, None)
    assert [line.split(" | ")[2:4] for line in lines[2:4]] == [["1.000", "1.000"]] * 2


@pytest.mark.slow
def test_both_sides_run_and_large_texts_are_indexed(benchmark, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "TOP_K", 2)
    monkeypatch.setattr(benchmark, "ROUNDS", 1)
    monkeypatch.setattr(benchmark, "QUERIES", 3)
    lines = benchmark.speed_table()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| index", "| queries"]
    monkeypatch.setattr(benchmark, "TYPES", 500)
    benchmark.write_texts(tmp_path / "texts.jsonl", 0.2)
    assert (tmp_path / "texts.jsonl").stat().st_size > 200_000
    for side in ("hfllm", "bm25s"):
        benchmark.large(side, tmp_path / "texts.jsonl")
        found = json.loads(capsys.readouterr().out)
        assert found["passages"] > 200 and {"cut", "index", "peak", "before"} <= found.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


def test_the_cost_of_samples_is_that_of_their_tokens(benchmark, saved):
    lines = benchmark.cost_table(str(saved), prompts=2, samples=3, max_new_tokens=4)
    given, sampled, times = map(float, lines[2].split("|")[1:4])
    assert 1 <= given <= 4 and 3 <= sampled <= 12
    assert times == pytest.approx((given + sampled) / given, abs=0.06)
    assert "2 prompts, 3 samples each of at most 4 tokens" in lines[-1]
