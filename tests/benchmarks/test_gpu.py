"""benchmarks/gpu.py in miniature on the CPU: every section runs; one that fails or is late takes no other along."""

import json
import math
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


@pytest.mark.slow
@pytest.mark.turn(7)
def test_every_section_gives_figures(gpu, tmp_path, capsys):
    from gpu_sections import SECTIONS

    assert gpu.main(["--device", "cpu", "--tiny", "--output_dir", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    found = {section: [row for row in rows if row["section"] == section] for section in SECTIONS}
    assert not [row for row in rows if row["what"] in ("failed", "not run")]
    assert all(len(figures) > 4 for figures in found.values()), found
    numbers = {(row["section"], row["what"]): row["value"] for row in rows if not isinstance(row["value"], str)}
    assert all(map(math.isfinite, numbers.values()))
    assert len((tmp_path / "results.md").read_text().splitlines()) == len(rows) + 2
    # The same device and precision is the same computation, bf16 is another.
    assert numbers["exactness", "fp32 gradient, relative difference"] == 0
    assert numbers["exactness", "fp32 PPO gradient, relative difference"] == 0
    for what in ("logits", "gradient", "PPO gradient"):
        assert 0 < numbers["exactness", f"bf16 {what}, relative difference"] < 0.1
    assert numbers["chain", "PPO: episodes"] == numbers["chain", "PPO with LoRA: episodes"] == 8


def test_a_failing_section_is_reported_and_the_others_go_on(gpu, tmp_path):
    results = gpu.Results(tmp_path)

    def fail():
        results.add("before", 1.0)
        results.add("lost", float("nan"))

    failed, late = gpu.run_sections([("one", fail), ("two", lambda: results.add("right", 2.0, "s"))], results, 1)
    assert (failed, late) == (["one"], [])
    kept = [(row["section"], row["what"]) for row in json.loads((tmp_path / "results.json").read_text())]
    assert kept == [("one", "before"), ("one", "failed"), ("one", "time"), ("two", "right"), ("two", "time")]
    assert "| one | failed | ValueError: lost is nan |  |" in (tmp_path / "results.md").read_text()
    assert gpu.run_sections([("three", fail)], results, 0) == ([], ["three"])


def test_an_unknown_section_is_refused(gpu, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        gpu.main(["--sections", "speed", "--output_dir", str(tmp_path)])
    assert end.value.code == 2 and "'speed' is not one of machine, exactness" in capsys.readouterr().err
