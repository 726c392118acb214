"""The estimate of a step's time: its parts by hand, and the first 14 runs; test_published_runs.py has many more."""

from dataclasses import replace

import pytest

from hfllm.errors import InputError
from hfllm.scaling.devices import find_device
from hfllm.scaling.layouts import Layout, stage_layers
from hfllm.scaling.memory import PRECISIONS, layer_activations
from hfllm.scaling.shapes import NAMED_SHAPES, Shape
from hfllm.scaling.speed import (
    COMPILED_TRAVERSALS,
    FAR_LATENCY,
    NEAR_LATENCY,
    TRAVERSALS,
    estimate,
    exchange_seconds,
    flops_per_token,
    gather_seconds,
    palm_flops_per_token,
)

A100, BF16 = find_device("a100-80gb"), PRECISIONS["bf16"]
GPT22B = {**NAMED_SHAPES["megatron-18b"], "num_hidden_layers": 48, "num_attention_heads": 64}
GPT3 = {**NAMED_SHAPES["megatron-145b"], "num_hidden_layers": 96}


@pytest.mark.parametrize(
    ("fields", "pipeline", "interleave", "batch", "micro_batch", "mfu"),
    [
        (GPT22B, 1, 1, 4, 4, 0.415),
        (GPT3, 8, 3, 64, 1, 0.514),
        (NAMED_SHAPES["megatron-530b"], 35, 3, 280, 1, 0.560),
        (NAMED_SHAPES["gpt3-1t"], 64, 1, 512, 1, 0.563),
    ],
)
def test_korthikanti_runs(fields, pipeline, interleave, batch, micro_batch, mfu):
    """Korthikanti et al. 2022, arXiv:2205.05198, tables 3 and 5; 12%."""
    layout = Layout(1, 8, pipeline, recompute="selective", micro_batch=micro_batch, interleave=interleave)
    speed = estimate(Shape.from_config(fields), layout, BF16, A100, 2048, batch, "eager")
    assert speed.mfu == pytest.approx(mfu, rel=0.12)


@pytest.mark.parametrize(
    ("name", "tensor", "pipeline", "devices", "batch", "micro_batch", "teraflops"),
    [
        ("megatron-1.7b", 1, 1, 32, 512, 16, 137),
        ("megatron-3.6b", 2, 1, 64, 512, 16, 138),
        ("megatron-7.5b", 4, 1, 128, 512, 16, 142),
        ("megatron-18b", 8, 1, 256, 1024, 4, 135),
        ("megatron-39b", 8, 2, 512, 1536, 4, 138),
        ("megatron-76b", 8, 4, 1024, 1792, 2, 140),
        ("megatron-145b", 8, 8, 1536, 2304, 2, 148),
        ("megatron-310b", 8, 16, 1920, 2160, 1, 155),
        ("megatron-530b", 8, 35, 2520, 2520, 1, 163),
        ("gpt3-1t", 8, 64, 3072, 3072, 1, 163),
    ],
)
def test_narayanan_runs(name, tensor, pipeline, devices, batch, micro_batch, teraflops):
    """Narayanan et al. 2021, arXiv:2104.04473, table 1, recomputation counted; 12%.

    The table has no micro-batches: these are assumed, smaller for larger models.
    """
    layout = Layout(devices // (tensor * pipeline), tensor, pipeline, recompute="full", micro_batch=micro_batch)
    speed = estimate(Shape.from_config(NAMED_SHAPES[name]), layout, BF16, A100, 2048, batch, "eager")
    assert speed.hfu * 312 == pytest.approx(teraflops, rel=0.12)


def test_flops_are_palms():
    """Six for each multiplied parameter, and 12 L H Q T; recomputation adds one of three passes."""
    shape = Shape.from_config(NAMED_SHAPES["gpt3-1t"])
    parts = flops_per_token(shape, 2048, "full")
    model = parts["layers"] + parts["attention"] + parts["head"]
    assert model == palm_flops_per_token(shape.multiplied_parameters(), 128, 160, 160, 2048)
    assert parts["again"] == pytest.approx((model - parts["head"]) / 3)
    assert flops_per_token(shape, 2048, "selective")["again"] == parts["attention"] / 3
    assert flops_per_token(shape, 2048)["again"] == 0


def test_compiled_layers_move_half_the_bytes():
    """And nothing else changes: a device with endless bandwidth is as fast either way."""
    shape, layout = Shape.from_config(NAMED_SHAPES["megatron-18b"]), Layout(8, zero_stage=1)
    seconds = {}
    for bandwidth in (A100.bandwidth, 1e30):
        device = replace(A100, bandwidth=bandwidth)
        for compiled in (False, True):
            seconds[bandwidth, compiled] = estimate(shape, layout, BF16, device, 2048, 8, compiled=compiled).compute
    assert seconds[1e30, True] == seconds[1e30, False]
    moved = seconds[A100.bandwidth, False] - seconds[A100.bandwidth, True]
    kept = 2048 * shape.num_hidden_layers * layer_activations(shape, layout, BF16, 2048)
    assert moved == pytest.approx((TRAVERSALS - COMPILED_TRAVERSALS) * kept / A100.bandwidth)


def test_only_active_experts_compute():
    dense = Shape(512, 4, 8, 1000, intermediate_size=2 * 1024)
    sparse = Shape(512, 4, 8, 1000, intermediate_size=1024, num_local_experts=8, num_experts_per_tok=2)
    router = 6 * 4 * 8 * 512
    assert flops_per_token(sparse, 128)["layers"] == flops_per_token(dense, 128)["layers"] + router


SMALL = Shape(1024, 8, 16, 32000)


def step(layout, batch=64, device=A100):
    return estimate(SMALL, layout, BF16, device, 1024, batch)


def test_parts_add_up():
    speed = step(Layout(2, 2, 4, zero_stage=1, micro_batch=2))
    assert speed.seconds == pytest.approx(speed.compute + speed.bubble + speed.communication)
    # The first three stages wait less than the last one works, which also has the head.
    assert speed.bubble < speed.compute * 3 / 16
    equal = estimate(Shape(1024, 8, 16, 100), Layout(2, 2, 4, micro_batch=2), BF16, A100, 1024, 64)
    assert equal.bubble == pytest.approx(equal.compute * 3 / 16, rel=0.02)
    assert speed.tokens_per_second == pytest.approx(64 * 1024 / speed.seconds)


def test_more_replicas_take_less_time_and_more_communication_waits():
    alone, four = step(Layout()), step(Layout(4))
    # All but the optimizer's step, which each replica makes for itself.
    assert four.compute == pytest.approx(alone.compute / 4, rel=0.03)
    assert alone.communication == 0
    far = step(Layout(64))
    assert far.communication > four.communication


def test_gathering_weights_for_each_micro_batch_costs_most():
    """Over a slow network: ZeRO-3 fetches weights twice per pass, ZeRO-2 reduces once, ZeRO-1 once per step."""
    desktop = find_device("rtx4090")
    waits = [step(Layout(16, zero_stage=stage), device=desktop).communication for stage in (1, 2, 3)]
    assert waits == sorted(waits) and waits[0] < waits[1] < waits[2]


def test_recomputation_costs_a_third():
    plain, full = step(Layout()), step(Layout(recompute="full"))
    assert full.hfu / full.mfu == pytest.approx(
        1 + flops_per_token(SMALL, 1024, "full")["again"] / sum(flops_per_token(SMALL, 1024).values())
    )
    assert 1.2 < full.seconds / plain.seconds < 1.4


def test_a_node_receives_gathered_weights_once():
    """Over the links of its eight devices together; with a stride of eight, each link carries all of its part."""
    size = 1e9
    ring = (64 - 8) * NEAR_LATENCY + 7 * FAR_LATENCY
    assert gather_seconds(A100, size, 64) - ring == pytest.approx(size * 7 / 8 / (8 * A100.far))
    alone = gather_seconds(A100, size, 8, stride=8)
    assert alone == pytest.approx(size * 7 / 8 / A100.far + 7 * FAR_LATENCY)
    near = gather_seconds(A100, size, 8)
    assert near == pytest.approx(size * 7 / 8 / A100.near + 7 * NEAR_LATENCY)
    assert gather_seconds(A100, size, 1) == 0


def test_an_exchange_with_experts_reaches_each_node_once():
    mixture = Shape(1024, 4, 8, 1000, num_local_experts=64, num_experts_per_tok=8)
    spread = Layout(64, expert=64)
    nodes = 8 * (1 - (7 / 8) ** 8)
    assert exchange_seconds(mixture, spread, A100, 1e9) == pytest.approx(1e9 * nodes * 7 / 8 / A100.far)
    limited = replace(mixture, n_group=4, topk_group=2)
    assert exchange_seconds(limited, spread, A100, 1e9) == pytest.approx(1e9 * 2 * 7 / 8 / A100.far)
    in_a_node = exchange_seconds(mixture, Layout(8, expert=8), A100, 1e9)
    assert in_a_node == pytest.approx(1e9 * 8 * 7 / 8 / A100.near)
    waits = [
        estimate(mixture, spread, BF16, A100, 1024, 64, overlap_experts=way).communication for way in (False, True)
    ]
    assert waits[1] < waits[0]


def test_the_slowest_stage_sets_the_pace():
    """BLOOM's 70 layers on 12 stages: six on most, five and a table on the ends."""
    assert stage_layers(70, 12) == (5, *[6] * 10, 5)
    assert stage_layers(126, 16) == (7, *[8] * 14, 7)
    assert stage_layers(24, 4) == (6, 6, 6, 6)
    for layers, pipeline, interleave in ((61, 16, 1), (61, 8, 4), (94, 8, 4), (7, 5, 1), (128, 64, 2)):
        held = stage_layers(layers, pipeline, interleave)
        assert sum(held) == layers and max(held) - min(held) <= 2
    deep = Shape(1024, 70, 16, 100)
    uneven, even = (estimate(deep, Layout(pipeline=p), BF16, A100, 1024, 1024) for p in (12, 14))
    # Six layers instead of five.
    assert uneven.compute / even.compute == pytest.approx(6 / 5, rel=0.02)


def test_context_parallelism_splits_rows_and_sends_keys():
    rows = {"sequence_length": 65536, "global_batch_size": 8}
    whole, split = (estimate(SMALL, Layout(8 // c, context=c), BF16, A100, **rows) for c in (1, 8))
    # The same work for each device.
    assert split.compute == pytest.approx(whole.compute, rel=0.05)
    assert split.communication > whole.communication


def test_fp8_is_for_the_layers_of_devices_that_have_it():
    h100 = find_device("h100")
    wide = Shape(8192, 8, 64, 1000)
    plain, half = (estimate(wide, Layout(), PRECISIONS[name], h100, 2048, 8) for name in ("bf16", "fp8"))
    assert 1.3 < half.tokens_per_second / plain.tokens_per_second < 2
    with pytest.raises(InputError, match="--precision fp8: a100-80gb has no fp8, use bf16"):
        step(Layout(), device=A100) and estimate(SMALL, Layout(), PRECISIONS["fp8"], A100, 1024, 8)


def test_v100_has_no_bf16():
    with pytest.raises(InputError, match="v100 has no bf16, use fp16 or fp32"):
        step(Layout(), device=find_device("v100"))
    assert estimate(SMALL, Layout(), PRECISIONS["fp16"], find_device("v100"), 1024, 8).mfu > 0
