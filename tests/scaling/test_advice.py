"""Sentences about a plan, and the cluster that takes a given time."""

from dataclasses import replace

import pytest

from hfllm.models.presets import preset
from hfllm.scaling.advice import duration, larger_cluster, sentences
from hfllm.scaling.devices import find_device
from hfllm.scaling.planner import Request, choose, plan
from hfllm.scaling.shapes import NAMED_SHAPES, Shape

LLAMA = Shape.from_config(preset("llama-2-7b"))


def planned(**fields):
    request = Request(**{"shape": LLAMA, "device": find_device("a100-80gb"), "max_length": 4096, **fields})
    plans = plan(request)
    return choose(plans), plans, request


def test_durations():
    texts = {
        4482: "4,482 days (12.3 years)",
        90: "90 days",
        1.5: "1.5 days",
        0.5: "12.0 hours",
        1 / 86400: "1 seconds",
    }
    assert {days: duration(days) for days in texts} == texts


def test_a_plan_without_a_catch_needs_one_sentence():
    (line,) = sentences(*planned(num_devices=8, global_batch_size=1024))
    assert line.startswith("data 8, ZeRO-1: 43 days at an MFU of 67%, ")


def test_devices_that_wait_are_named():
    small = Shape.from_config(preset("gpt2"))
    lines = sentences(*planned(shape=small, num_devices=1024, max_length=1024, global_batch_size=4096))
    assert any("of each step wait for other devices: fewer of them" in line for line in lines)


def test_little_memory_is_named():
    chosen, plans, request = planned()
    lines = sentences(replace(chosen, headroom=0.01), plans, request)
    assert "Only 1.0% of the usable memory stay free: measure before you rely on it." in lines


def test_many_shards_are_named():
    fields = {
        "num_devices": 1024,
        "max_length": 2048,
        "global_batch_size": 3072,
        "zero_stage": 3,
        "tensor_parallel": 1,
    }
    lines = sentences(*planned(shape=Shape.from_config(NAMED_SHAPES["gpt3-1t"]), device=find_device("h100"), **fields))
    assert any("Published runs of ZeRO-3 over more than 512 devices took two to three times" in line for line in lines)


@pytest.mark.parametrize("target", [20.0, 5.0])
def test_a_larger_cluster_takes_the_time_that_was_asked(target):
    chosen, _, request = planned()
    larger = larger_cluster(chosen, request, target)
    assert larger.days <= target
    # Nearly in proportion, and planning that cluster gives the same time.
    assert 1 <= larger.layout.devices / (8 * chosen.days / target) <= 1.3
    degrees = {"zero_stage": larger.layout.zero_stage, "tensor_parallel": 1, "pipeline_parallel": 1}
    sizes = {"num_devices": larger.layout.devices, "global_batch_size": larger.global_batch_size}
    again = plan(replace(request, **degrees, **sizes, micro_batch_size=larger.layout.micro_batch))[0]
    assert again.days == pytest.approx(larger.days, rel=1e-3)


def test_no_cluster_is_named_where_none_helps():
    chosen, _, request = planned()
    assert larger_cluster(chosen, request, 1e-9 * chosen.days) is None
