"""The planner against all published runs of benchmarks/published_runs.csv, by kind of device; held-out ones alone."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from hfllm.scaling.devices import GIB

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name):
    """A file of benchmarks/, some of which have the names of recipes, so that the folder cannot be on the path."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


published = load("published_runs")
planned, provenance = load("planner").planned, published.provenance
report, summary = published.report, published.summary
RUNS = published.read_runs()


def group(family, held_out=None):
    return [run for run in RUNS if run.family == family and held_out in (None, run.is_held_out)]


@pytest.mark.parametrize("family", ["a100", "h100"])
@pytest.mark.parametrize("held_out", [None, False, True])
def test_times_of_published_runs(family, held_out):
    """Of all runs, of those to which constants are fitted, and of those that are held out."""
    runs = group(family, held_out)
    one = summary(runs)
    assert len(runs) >= 20
    assert one["median"] == pytest.approx(1, abs=0.05)
    assert one["close"] >= 0.85


def test_a_third_of_the_runs_is_held_out_by_place():
    assert sum(run.is_held_out for run in RUNS) == len(RUNS) // 3
    assert [run.is_held_out for run in RUNS[:6]] == [False, False, True] * 2


@pytest.mark.parametrize("family", ["a100", "h100"])
def test_large_runs_of_many_layouts_are_close(family):
    """Not only the many small ones of one table: those with pipelines, from 13 billion parameters, without experts."""
    large = [run for run in group(family) if run.layout.pipeline > 1 and not run.shape.num_local_experts]
    one = summary(large)
    assert len(large) >= 12
    assert one["median"] == pytest.approx(1, abs=0.06) and one["close"] >= 0.95


def test_a_constant_that_is_a_fifth_off_is_seen(monkeypatch):
    """The test above can fail."""
    from dataclasses import replace

    off = [replace(run, device=replace(run.device, efficiency=0.8 * run.device.efficiency)) for run in group("h100")]
    assert abs(summary(off)["median"] - 1) > 0.05


def test_memory_is_never_below_what_was_published():
    """What is set aside: the planned peak, and the tenth of the device that is left for fragments; BLOOM's 60 GB."""
    known = [run for run in RUNS if run.memory_gib is not None]
    assert len(known) >= 15
    for run in known:
        # Half of the last digit that is printed.
        rounding = 0.5e9 / GIB if "GB" in run.published else 0.05
        assert run.claimed_gib >= run.memory_gib - rounding, (run.source, run.model, run.sequence_length)


def test_memory_is_never_below_what_was_measured_here():
    """The 36 trainings of benchmarks/results/planner.md, on one process and two; at most a tenth more."""
    results = BENCHMARKS / "results" / "planner.md"
    row = re.compile(r"\| (\w+) \| (\d) \| (\d) \| (\S+) \| (yes|no) \| (\d+) \|")
    cases = [row.match(line).groups() for line in results.read_text().splitlines() if row.match(line)]
    assert len(cases) == 36
    for size, processes, zero_stage, chunk, checkpointing, measured in cases:
        case = {"size": size, "processes": int(processes), "zero_stage": int(zero_stage)}
        case |= {"chunk": None if chunk == "-" else int(chunk), "checkpointing": checkpointing == "yes"}
        assert 1 <= planned(case).peak / (int(measured) * 2**20) < 1.1, case


def test_deepseek_v3_takes_its_hours():
    """arXiv:2412.19437, table 1: 2.664 million H800 hours for 14.8 trillion tokens; 15%."""
    (run,) = (run for run in RUNS if run.device.name == "h800")
    hours = 14.8e12 / run.speed.tokens_per_second * run.layout.devices / 3600
    assert hours == pytest.approx(2.664e6, rel=0.15)


def flops_with_recomputation(shape, length):
    """Of a token; equation 3 of Narayanan et al., arXiv:2104.04473."""
    layers, hidden = shape.num_hidden_layers, shape.hidden_size
    return 96 * layers * hidden**2 * (1 + length / (6 * hidden) + shape.vocab_size / (16 * layers * hidden))


def tokens_per_second(run):
    """Of a device, from the published words; `None` where their source does not say how it counts FLOPs."""
    tokens = run.global_batch_size * run.sequence_length / run.layout.devices
    if found := re.match(r"(\d+) tokens/s$", run.published):
        return float(found[1])
    if found := re.match(r"([\d.]+) s a step$", run.published):
        return tokens / float(found[1])
    if found := re.match(r"(\d+) TFLOP/s with recomputation", run.published):
        return float(found[1]) * 1e12 / flops_with_recomputation(run.shape, run.sequence_length)
    if found := re.match(r"(\d+) hours for (\d+) steps", run.published):
        return tokens * int(found[2]) / int(found[1]) / 3600
    if found := re.match(r"([\d.]+)M hours for ([\d.]+)T tokens", run.published):
        return 1e6 * float(found[2]) / float(found[1]) / 3600
    return None


def test_seconds_follow_from_what_was_published():
    """All but Llama 3's three rows and GLM-130B's, whose FLOP/s leave open how attention is counted."""
    unknown = {run.source for run in RUNS if tokens_per_second(run) is None}
    assert unknown == {"Llama 3 2024 (arXiv:2407.21783) table 4", "GLM-130B 2022 (arXiv:2210.02414)"}
    for run in RUNS:
        if run.source not in unknown:
            tokens = run.global_batch_size * run.sequence_length / run.layout.devices
            assert tokens / run.seconds == pytest.approx(tokens_per_second(run), rel=1e-3), (run.source, run.model)


def test_the_page_names_rows_that_were_not_read_in_their_source():
    lines = provenance(RUNS)
    assert {run.checked.split(":")[0] for run in RUNS} == {"source", "quoted"}  # none from memory alone
    assert all(run.is_from_source or run.source in lines[0] for run in RUNS)
    for name in ("docs/planner.md", "benchmarks/results/published_runs.md"):
        page = " ".join((BENCHMARKS.parent / name).read_text().split())
        assert all(line in page for line in lines), name


def test_the_report_has_each_run():
    text = report()
    assert text.count("\n") > len(RUNS) and all(run.source in text for run in RUNS)
    assert all(run.source and run.published for run in RUNS)


def test_the_page_shows_the_report():
    page = (BENCHMARKS.parent / "docs" / "planner.md").read_text()
    lines = report().splitlines()
    for line in lines[2 : lines.index("")]:
        assert line in page, line
