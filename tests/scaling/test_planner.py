"""The search over layouts: what fits, in which order, and what is refused."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hfllm.errors import InputError
from hfllm.models.family.presets import preset
from hfllm.scaling.devices import find_device
from hfllm.scaling.layouts import DDP, DEEPSPEED, FSDP2, MEGATRON, SINGLE, TENSOR, Layout
from hfllm.scaling.memory import PRECISIONS, device_memory
from hfllm.scaling.planner import Request, choose, plan, size_text
from hfllm.scaling.shapes import NAMED_SHAPES, Shape

NAN = float("nan")
ROOT = Path(__file__).parent.parent.parent
LLAMA = Shape.from_config(preset("llama-2-7b"))
TRILLION = Shape.from_config(NAMED_SHAPES["gpt3-1t"])


def request(**fields):
    return Request(**{"shape": LLAMA, "device": find_device("a100-80gb"), "max_length": 4096, **fields})


@pytest.mark.parametrize("names", [("hfllm.scaling.planner", "hfllm.stages.plan")])
def test_planning_imports_neither_torch_nor_numpy(names):
    code = (
        f"import sys, {', '.join(names)}; assert not {{'torch', 'transformers', 'numpy', 'yaml'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("fields", [{}, {"shape": TRILLION, "num_devices": 1024, "max_length": 2048}])
def test_what_is_found_fits_and_can_run(fields):
    one = request(**fields)
    plans = plan(one)
    assert plans == sorted(plans, key=lambda each: each.speed.seconds)
    for each in plans:
        each.layout.check(one.shape, one.num_devices, one.global_batch_size)
        passes = one.global_batch_size // (each.layout.data * each.layout.micro_batch)
        assert each.micro_batches == passes
        options = one.dtype(each.layout), one.max_length, passes
        memory = device_memory(one.shape_of(each.layout), each.layout, *options, device=one.device)
        assert memory == each.memory and memory.peak <= one.usable_bytes
    spreads = {
        (p.layout.data, p.layout.tensor, p.layout.pipeline, p.layout.expert, p.layout.zero_stage, p.layout.context)
        for p in plans
    }
    assert len(spreads) == len(plans)


def test_the_best_micro_batch_of_a_spread_is_chosen():
    """No other micro-batch or recomputation of the fastest spread that fits is faster."""
    one = request()
    best = plan(one)[0]
    for recompute in ("none", "full"):
        for size in (1, 2, 4, 8, 16, 32):
            held = replace(one, recompute=recompute, micro_batch_size=size, zero_stage=best.layout.zero_stage)
            degrees = {"tensor_parallel": best.layout.tensor, "pipeline_parallel": best.layout.pipeline}
            try:
                others = plan(replace(held, **degrees))
            except InputError:
                continue
            assert others[0].speed.seconds >= best.speed.seconds * (1 - 1e-9)


@pytest.mark.parametrize(
    "fields",
    [
        {"zero_stage": 3, "tensor_parallel": 1, "global_batch_size": 240},
        {"zero_stage": 2, "tensor_parallel": 1, "global_batch_size": 480, "max_length": 512},
        {"tensor_parallel": 2, "pipeline_parallel": 2, "interleave": 2, "global_batch_size": 96, "num_devices": 16},
        {"shape": Shape(1024, 8, 8, 1000), "global_batch_size": 72, "max_length": 128, "zero_stage": 3},
    ],
)
def test_every_divisor_of_a_replicas_batch_is_a_micro_batch(fields):
    """The search stops where the time falls no more, and finds what trying each finds."""
    one = request(**fields)
    best, tried = plan(one)[0], []
    for size in range(1, one.global_batch_size + 1):
        try:
            tried += plan(replace(one, micro_batch_size=size))[:1]
        except InputError:
            continue
    assert best.speed.seconds == pytest.approx(min(each.speed.seconds for each in tried), rel=1e-8)
    assert any(each.layout.micro_batch not in (1, 2, 4, 8, 16, 32, 64) for each in tried)


def test_a_batch_of_three_rows_is_taken_at_once():
    """3,072 rows on 1,024 devices under ZeRO-3: three passes fetch all weights three times."""
    trillion = {"shape": TRILLION, "device": find_device("h200"), "num_devices": 1024, "max_length": 2048}
    best = choose(plan(request(**trillion, global_batch_size=3072, zero_stage=3, tensor_parallel=1)))
    assert (best.layout.micro_batch, best.micro_batches) == (3, 1)


def test_the_loss_is_that_of_the_recipe():
    """In chunks of 1,024 tokens, but whole under DeepSpeed's ZeRO-3 and where the recipes do not run."""
    one, chunked, whole = (request(shape=replace(LLAMA, loss_chunk_size=size)) for size in (None, 256, 0))
    layouts = {
        Layout(8): 1024,
        Layout(8, zero_stage=2): 1024,
        Layout(8, zero_stage=3): 0,
        Layout(4, 2, zero_stage=3): 0,
        Layout(4, 2, zero_stage=1): 0,
    }
    assert {layout: one.loss_chunk_size(layout) for layout in layouts} == layouts
    assert {whole.loss_chunk_size(layout) for layout in layouts} == {0}
    assert [chunked.loss_chunk_size(layout) for layout in layouts] == [256, 256, 0, 256, 0]
    held = {"zero_stage": 3, "tensor_parallel": 1, "pipeline_parallel": 1, "micro_batch_size": 8}
    sizes = {plan(replace(each, **held))[0].memory.logits for each in (one, chunked, whole)}
    # Logits of 16 bits are 2 bytes more.
    assert sizes == {14 * 32000 * 8 * 4096}
    held["zero_stage"] = 2
    small, large = (plan(replace(each, **held))[0].memory.logits for each in (one, whole))
    assert small < large == 14 * 32000 * 8 * 4096


def test_sizes_are_readable():
    assert [size_text(size) for size in (0, 512, 3 * 2**20, 1883 * 2**30, 5000 * 2**40)] == [
        *("0 bytes", "512 bytes", "3.0 MiB", "1.8 TiB", "5,000 TiB")
    ]


def test_held_degrees_are_kept():
    held = {"tensor_parallel": 2, "pipeline_parallel": 4, "micro_batch_size": 1, "interleave": 2, "recompute": "full"}
    plans = plan(request(num_devices=16, zero_stage=1, **held))
    assert [each.layout for each in plans] == [Layout(2, 2, 4, 1, 1, "full", 1, 2)]


def test_seven_billion_do_not_fit_without_sharding():
    """16 bytes per parameter are 108 GB."""
    stages = {each.layout.zero_stage for each in plan(request(tensor_parallel=1, pipeline_parallel=1))}
    assert stages == {1, 2, 3}


def test_the_chosen_layout_is_simple_unless_another_is_much_faster():
    """Within a tenth of the fastest the recipes' is chosen; the trillion's ZeRO-3 takes a quarter more."""
    small = plan(request(num_devices=64, global_batch_size=512))
    assert choose(small).runs_in_recipes and choose(small).days <= 1.1 * small[0].days
    large = plan(request(shape=TRILLION, num_devices=1024, max_length=2048, global_batch_size=3072))
    assert choose(large).layout.engine == MEGATRON and not choose(large).runs_in_recipes
    recipes = [one for one in large if one.runs_in_recipes]
    assert recipes and recipes[0].days > 1.1 * choose(large).days
    only = plan(request(num_devices=16, pipeline_parallel=4))
    assert choose(only).days <= 1.1 * only[0].days


def test_a_layout_that_just_fits_is_planned_where_no_other_is():
    """MosaicML's largest micro-batch of 1 billion parameters on A100 of 40 GB, which ran; one row more is too many."""
    mpt = Shape.from_config(
        {"model_type": "gpt2", "n_embd": 2048, "n_layer": 24, "n_head": 16, "n_positions": 2048, "vocab_size": 50368}
    )
    fields = {"shape": mpt, "device": find_device("a100-40gb"), "num_devices": 32, "max_length": 2048}
    fields |= {
        "tensor_parallel": 1,
        "pipeline_parallel": 1,
        "zero_stage": 3,
        "recompute": "none",
        "attention": "flash1",
    }
    fields |= {"fsdp": True, "fused_loss": True, "usable": 1.0}
    (full,) = plan(request(**fields, micro_batch_size=10, global_batch_size=320))
    assert full.headroom == pytest.approx(0, abs=1e-9) and full.layout.engine == "fsdp2"
    assert not full.runs_in_recipes
    with pytest.raises(InputError, match="fits nowhere"):
        plan(request(**fields, micro_batch_size=11, global_batch_size=352))
    free = plan(request(**fields, global_batch_size=320))
    assert all(one.headroom > 0 for one in free)


def test_a_layout_without_memory_to_spare_is_not_chosen():
    plans = plan(request())
    full = [replace(one, headroom=0.0) for one in plans]
    assert choose(full) == replace(choose(plans), headroom=0.0)
    assert choose([*full, replace(plans[-1], headroom=0.5)]).headroom == 0.5


def test_days():
    """At a given MFU, days are 6ND and the attention's FLOPs over the devices' peak; 20 tokens per parameter."""
    one = request(mfu=0.4)
    best = plan(one)[0]
    n = LLAMA.num_parameters()
    assert one.tokens == 20 * n
    per_token = 6 * LLAMA.multiplied_parameters() + 12 * 32 * 4096 * 4096
    assert best.days == pytest.approx(20 * n * per_token / (8 * 312e12 * 0.4) / 86400)
    estimated = plan(request())[0]
    assert estimated.days == pytest.approx(best.days * 0.4 / estimated.mfu)


@pytest.mark.parametrize(
    ("layout", "engine"),
    [
        (Layout(), SINGLE),
        (Layout(4), DDP),
        (Layout(4, zero_stage=2), DEEPSPEED),
        (Layout(4, 2, zero_stage=3), FSDP2),
        (Layout(1, 2), TENSOR),
        (Layout(4, 2, zero_stage=1), MEGATRON),
        (Layout(4, 1, 2), MEGATRON),
        (Layout(4, expert=2), MEGATRON),
        (Layout(4, recompute="selective"), MEGATRON),
    ],
)
def test_who_runs_it(layout, engine):
    assert layout.engine == engine


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"num_devices": 7},
            r"--global_batch_size 256 is no multiple of --micro_batch_size 1 times 7 replicas \(--num_devices 7, "
            r"--tensor_parallel 1 and --pipeline_parallel 1\)",
        ),
        ({"tensor_parallel": 3, "num_devices": 9}, "--tensor_parallel 3 does not divide num_attention_heads=32"),
        (
            {"tensor_parallel": 16},
            "--tensor_parallel 16 and --pipeline_parallel 1 need a multiple of 16 devices, --num_devices is 8",
        ),
        (
            {"pipeline_parallel": 33, "num_devices": 66, "global_batch_size": 66},
            "--pipeline_parallel 33 is more than num_hidden_layers=32",
        ),
        (
            {"pipeline_parallel": 8, "interleave": 8},
            "--pipeline_parallel 8 times --interleave 8 is more than num_hidden_layers=32 and the two tables",
        ),
        ({"expert_parallel": 2}, "--expert_parallel 2: the model has no experts"),
        (
            {"pipeline_parallel": 2, "zero_stage": 3},
            "--zero_stage 3 cannot be combined with --tensor_parallel 1 and --pipeline_parallel 2",
        ),
        ({"num_devices": 1, "zero_stage": 2}, "--zero_stage 2 has nothing to shard over: there is one replica"),
        ({"interleave": 2, "pipeline_parallel": 1}, "--interleave 2 needs a pipeline"),
        (
            {"micro_batch_size": 64, "tensor_parallel": 1, "pipeline_parallel": 1},
            "--global_batch_size 256 is no multiple of --micro_batch_size 64 times 8 replicas",
        ),
        ({"recompute": "selective"}, "--recompute selective drops scores, which --attention flash never keeps"),
        ({"recompute": "half"}, "--recompute half is not one of none, selective, full"),
        ({"precision": "fp8"}, "--precision fp8: a100-80gb has no fp8, use bf16"),
        ({"precision": "int8"}, "--precision int8 is not one of bf16, fp16, fp8, fp32"),
        ({"context_parallel": 3, "num_devices": 8}, "--context_parallel 3 need a multiple of 3 devices"),
        ({"zero_stage": 4}, "--zero_stage 4 is not one of 0, 1, 2, 3"),
        ({"num_devices": 0}, "--num_devices 0 must be at least 1"),
        ({"max_length": 10**400}, "--max_length 10+ must be at least 1, and at most 1,000,000,000"),
        ({"mfu": 1.5}, "--mfu 1.5 must lie between 1e-06 and 1"),
        ({"mfu": NAN}, "--mfu nan must lie"),
        ({"efficiency": NAN}, "--efficiency nan must lie"),
        ({"usable": NAN}, "--usable_memory nan must lie"),
        ({"tokens": 0}, "--tokens 0 must be at least 1"),
        ({"tokens": NAN}, "--tokens nan must be at least 1, and at most"),
        ({"tokens": float("inf")}, "--tokens inf must be at least 1, and at most"),
        ({"shape": TRILLION}, "--max_length 4096 is more than the 2048 learned positions"),
        (
            {"shape": TRILLION, "max_length": 2048},
            r"fits nowhere: of 77.6 GiB usable on each of 8 a100-80gb, the smallest layout \(data 8, ZeRO-3, "
            r"recompute full, micro-batch 1\) needs 1.9 TiB: use more",
        ),
    ],
)
def test_refused(fields, message):
    with pytest.raises(InputError, match=message):
        plan(request(**fields))


def test_experts_must_divide():
    mixture = Shape.from_config(preset("mixtral-8x7b"))
    with pytest.raises(InputError, match="--expert_parallel 3 does not divide num_local_experts=8"):
        plan(request(shape=mixture, num_devices=64, expert_parallel=3))
    spread = plan(request(shape=mixture, num_devices=64, expert_parallel=8))
    assert all(each.layout.expert == 8 for each in spread)


def test_accelerate_casts_and_deepspeed_copies():
    one = request()
    assert one.dtype(Layout(8)) is PRECISIONS["bf16_autocast"]
    assert one.dtype(Layout(8, zero_stage=1)) is PRECISIONS["bf16"]
    assert request(precision="fp16").dtype(Layout()) is PRECISIONS["fp16_autocast"]
    assert request(precision="fp32").dtype(Layout()) is PRECISIONS["fp32"]
    assert one.dtype(Layout(4, 2, zero_stage=1)) is PRECISIONS["bf16_megatron"]
    # 16 bytes per parameter, but Megatron-LM's README has 18 and 20 with its fp32 gradients and copies.
    sums = {name: each.weights + each.gradients + each.optimizer for name, each in PRECISIONS.items()}
    more = {"bf16_megatron": 18, "fp8_megatron": 18, "fp16_megatron": 20, "bf16_megatron_deepspeed": 20}
    assert sums == dict.fromkeys(PRECISIONS, 16) | more


def test_devices():
    cpu = find_device("cpu")
    assert cpu.memory > 2**30 and cpu.peak("fp32") > 0
    half = find_device("cpu", processes=2)
    assert (2 * half.memory, 2 * half.peak("fp32"), 2 * half.bandwidth) == (
        cpu.memory,
        cpu.peak("fp32"),
        cpu.bandwidth,
    )
    assert half.per_node == 2
    # Other programs use a CPU's memory; of a GPU's, the driver keeps a little.
    assert [request(device=one, precision="fp32").usable_bytes / one.memory for one in (cpu, find_device("h100"))] == [
        *(pytest.approx(0.9), pytest.approx(0.97))
    ]
    assert request(usable=0.5).usable_bytes == 40 * 2**30
    with pytest.raises(InputError, match="'tpu' is not one of h100, h100-500w, h200, gh200, b200, mi300x, h800, a100"):
        find_device("tpu")
    assert find_device("h100").peak("fp32") < find_device("h100").peak("bf16")


def test_newer_devices_have_their_datasheets_numbers():
    """Of eight in a machine, as vendors publish them: memory in TB, and PFLOP/s in bf16 with sparsity."""
    for name, per_node, terabytes, petaflops, bandwidth in (
        ("b200", 8, 1.44, 36, 64e12),
        ("mi300x", 8, 1.649, 20.9, 42.4e12),
        ("gh200", 4, 0.412, 7.916, 16e12),
    ):
        device = find_device(name)
        assert device.per_node == per_node
        assert device.memory * per_node / 1e12 == pytest.approx(terabytes, rel=0.01)
        assert 2 * device.peak("bf16") * per_node / 1e15 == pytest.approx(petaflops, rel=0.01)
        assert device.bandwidth * per_node == pytest.approx(bandwidth)
        assert device.peak("fp8") == pytest.approx(2 * device.peak("bf16"), rel=0.001)
        assert device.far < device.near < device.bandwidth


def test_precision_decides_the_fit():
    """In fp32 the states are as large, and the activations twice."""
    wide, narrow = (
        plan(request(precision=name, zero_stage=3, recompute="none", tensor_parallel=1, micro_batch_size=1))
        for name in ("fp32", "bf16")
    )
    assert wide[0].memory.activations > 1.6 * narrow[0].memory.activations
