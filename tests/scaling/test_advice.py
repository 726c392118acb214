"""Sentences about a plan, and the cluster that takes a given time."""

from dataclasses import replace

import pytest

from hfllm.models.family.presets import preset
from hfllm.scaling.devices import GIB, find_device
from hfllm.scaling.layouts import MEGATRON, Layout
from hfllm.scaling.planner import Request, choose, duration, larger_cluster, plan, sentences
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


def test_a_plan_without_a_catch_needs_one_sentence_and_one_of_whole_runs():
    line, whole = sentences(*planned(num_devices=8, global_batch_size=1024))
    assert line.startswith("data 8, ZeRO-1: 43 days at an MFU of 67%, ")
    assert whole.endswith("took 1.5 times the planned time: about 65 days, and 43 days to 86 days for four of five.")
    (alone,) = sentences(*planned(num_devices=8, global_batch_size=1024, mfu=0.4))
    assert "at an MFU of 40%" in alone


def test_devices_that_wait_are_named():
    small = Shape.from_config(preset("gpt2"))
    lines = sentences(*planned(shape=small, num_devices=1024, max_length=1024, global_batch_size=4096))
    assert any("of each step wait for other devices: fewer of them" in line for line in lines)


def test_little_memory_is_named():
    chosen, plans, request = planned()
    lines = sentences(replace(chosen, headroom=0.01), plans, request)
    assert "Only 1.0% of the usable memory stay free: measure before you rely on it." in lines


def on_a_cpu(name, memory, **fields):
    """As on machines of two cores and so many GiB."""
    device = replace(find_device("cpu"), memory=memory * GIB, peak_fp32=160e9, peak_16bit=160e9)
    shape = Shape.from_config(preset(name))
    return planned(**{"shape": shape, "device": device, "precision": "fp32", "max_length": 1024, **fields})


@pytest.mark.parametrize(("devices", "rows", "memory"), [(2, 16, 3), (16, 16, 2), (4, 8, 16)])
def test_no_pipeline_is_chosen_on_a_cpu_over_what_the_recipes_run(devices, rows, memory):
    """It was, and the fastest layout that the recipes run was then faster: 138 days against 143."""
    chosen, plans, request = on_a_cpu("gpt2", memory, num_devices=devices, global_batch_size=rows)
    assert chosen.runs_in_recipes and all(one.layout.engine != MEGATRON for one in plans)
    assert not any("does not run it" in line for line in sentences(chosen, plans, request))


def test_small_batches_are_not_rounded_to_no_tokens():
    lines = sentences(*on_a_cpu("gpt2", 16, num_devices=1, global_batch_size=8))
    assert any("with 9 rows per step (9,216 tokens)" in line for line in lines)


def test_a_pipeline_on_a_cpu_needs_gpus():
    chosen, plans, request = on_a_cpu("gpt2", 16, num_devices=2, global_batch_size=8, pipeline_parallel=2)
    assert chosen.layout.engine == MEGATRON
    assert "Megatron-LM, which runs it, needs GPUs." in sentences(chosen, plans, request)
    eager = on_a_cpu("gpt2", 16, num_devices=2, global_batch_size=8, recompute="selective", attention="eager")
    assert eager[0].layout.engine == MEGATRON


def test_little_memory_is_the_reason_against_the_fastest_of_the_recipes():
    chosen, plans, request = planned(num_devices=8)
    tight = [replace(one, headroom=0.012) for one in plans]
    other = replace(chosen, layout=Layout(4, pipeline=2, zero_stage=1), runs_in_recipes=False)
    (line,) = (line for line in sentences(other, tight, request) if "does not run it" in line)
    assert line.endswith(", and leaves only 1.2% of the usable memory free.")
    (line,) = (line for line in sentences(other, plans, request) if "does not run it" in line)
    assert "leaves only" not in line


def test_what_runs_other_layouts_is_named():
    chosen, plans, request = planned(num_devices=8)
    for layout, text in (
        (Layout(2, tensor=4, zero_stage=3), "but a script that loads its model for tensor parallelism; the fastest"),
        (Layout(2, tensor=4, zero_stage=1), "Megatron-LM does; the fastest that it runs, data 8"),
    ):
        other = replace(chosen, layout=layout, runs_in_recipes=False)
        assert any(f"`hfllm pretrain` does not run it, {text}" in line for line in sentences(other, plans, request))


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
