"""The planner on held-out sources: what the page says of it, and what `hfllm plan` says of whole runs."""

import csv
import importlib
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hfllm.scaling import planner as planner_module
from hfllm.scaling.devices import find_device
from hfllm.scaling.planner import Request, choose, plan
from hfllm.scaling.shapes import NAMED_SHAPES, Shape

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "held_out_sources.md"


@pytest.fixture(scope="module")
def sources():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("held_out_sources")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def whole(sources):
    return sources.whole_runs()


@pytest.mark.slow
def test_runs_that_ran_are_planned_to_fit(sources):
    """Nine of ten, and all of MosaicML's, of whose micro-batches the next larger ones would not."""
    runs = sources.read_runs()
    assert sources.over_the_card(runs) <= 0.1 * len(runs)
    largest = [run for run in runs if "MosaicML" in run.source]
    assert len(largest) > 150 and not sources.over_the_card(largest)
    twice = [replace(run, layout=replace(run.layout, micro_batch=2 * run.layout.micro_batch)) for run in largest]
    assert sources.over_the_card(twice) > 0.4 * len(twice)
    text = RESULTS.read_text()
    assert all(line in text for line in sources.memory_lines(runs))


@pytest.mark.slow
def test_free_blocks_that_are_kept_are_the_most_that_the_fitted_runs_allow(sources):
    """A percent more, and some run of the largest micro-batches would be planned not to fit."""
    runs = [run for run in sources.read_runs() if "MosaicML" in run.source]
    share = find_device("h100").least_fragments
    more = [replace(run, device=replace(run.device, least_fragments=share + 0.01)) for run in runs]
    assert not sources.over_the_card(runs) and sources.over_the_card(more)


@pytest.mark.slow
def test_whole_runs_take_longer_by_what_the_planner_says(sources, whole):
    assert sources.factor(whole) == pytest.approx(planner_module.WHOLE_RUN, rel=0.03)
    low, high = planner_module.WHOLE_RUN_RANGE
    assert sum(low <= 1 / run.ratio <= high for run in whole) >= 0.75 * len(whole)
    a100 = [number for number, run in enumerate(whole) if run.family == "a100"]
    plain, corrected = (
        [ratios[number] for number in a100]
        for ratios in ([run.ratio for run in whole], sources.held_out_whole_runs(whole))
    )
    close = [sum(abs(each - 1) <= 0.25 for each in ratios) / len(ratios) for ratios in (plain, corrected)]
    assert close[0] < 0.3 and close[1] >= 0.65
    text = RESULTS.read_text()
    assert all(line in text for line in sources.whole_lines(whole))


@pytest.mark.slow
def test_a_source_has_no_part_in_its_own_factor(sources, whole):
    first = whole[0].source
    other = [replace(run, ratio=5 * run.ratio) if run.source == first else run for run in whole]
    before, after = (sources.held_out_whole_runs(runs) for runs in (whole, other))
    for run, one, two in zip(whole, before, after, strict=True):
        assert two == pytest.approx(5 * one) if run.source == first else two != 0


def test_published_hours_are_those_of_their_days():
    """Hours that are devices times days, or that a paper gives in another way too."""
    with (ROOT / "benchmarks" / "whole_runs.csv").open(newline="") as stream:
        hours = {row["model"]: (float(row["device_hours"]), int(row["devices"])) for row in csv.DictReader(stream)}
    # 380 tokens per second on each device (arXiv:2302.13971), and days.
    assert hours["llama-65b"][0] == pytest.approx(1.4e12 / 380 / 3600, rel=0.01)
    for model, days in (("bloom-176b", 118.2), ("mpt-7b", 9.5), ("smollm3-3b", 24), ("bloomberggpt-50b", 53)):
        assert hours[model][0] == pytest.approx(hours[model][1] * 24 * days, rel=0.01), model


@pytest.mark.slow
def test_the_fit_finds_the_constants_that_made_the_times(sources):
    """Times that other constants give are told from the first ones, up to the pull to where the fit begins."""
    runs = [run for run in sources.read_runs() if run.source.startswith(("Narayanan 2021 table 1", "Korthikanti"))]
    truth = {**sources.START, "a100 efficiency": 0.5}
    made = [replace(run, seconds=run.seconds * sources.ratio(run, truth)) for run in runs]
    found = sources.fit(made)
    assert found["a100 efficiency"] == pytest.approx(0.5, rel=0.1)
    assert abs(math.log(sources.ratio(made[0], found))) < 0.05


@pytest.mark.parametrize(
    ("given", "says"), [({}, True), ({"mfu": 0.4}, False), ({"device": find_device("cpu")}, False)]
)
def test_what_the_factor_is_for(given, says):
    shape = Shape.from_config(NAMED_SHAPES["megatron-1.7b"])
    request = Request(**{"shape": shape, "device": find_device("h100"), **given})
    assert planner_module.whole_run_factor(request) == (planner_module.WHOLE_RUN if says else 1)
    plans = [choose(plan(request))]
    lines = [line for line in planner_module.sentences(plans[0], plans, request) if "whole runs" in line]
    assert len(lines) == says
    if says:
        assert f"about {planner_module.duration(1.5 * plans[0].days)}" in lines[0]


@pytest.mark.slow
@pytest.mark.turn(6)
def test_the_results_are_those_of_today(sources):
    assert RESULTS.read_text().endswith(sources.report() + "\n")
