"""Launch files, shipped or written by the planner, as the installed libraries read them; misspelled ones are seen."""

import json
import os
from pathlib import Path

import pytest
import yaml
from launch_checks import check_accelerate, check_deepspeed, check_plugins

from hfllm.models.family.presets import preset
from hfllm.scaling.devices import find_device
from hfllm.scaling.planner import Request, plan
from hfllm.scaling.shapes import NAMED_SHAPES, Shape
from hfllm.stages.plan import ACCELERATE_FILE, DEEPSPEED_FILE, FLAGS_FILE, deepspeed_config, launch_files

ROOT = Path(__file__).parent.parent.parent
ACCELERATE = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
DEEPSPEED = sorted((ROOT / "ds_configs").glob("*.json"))


@pytest.fixture(autouse=True)
def leave_the_environment_alone(monkeypatch):
    """Launching sets variables, and DeepSpeed's configuration is noted for all models made later."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    before = dict(os.environ)
    monkeypatch.chdir(ROOT)
    yield
    unset_hf_deepspeed_config()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_files(path):
    values = yaml.safe_load(path.read_text())
    environment = check_accelerate(path)
    sizes = check_plugins(environment)
    if sizes is not None:
        assert sizes.total_size == values["num_processes"]
    if values["distributed_type"] == "DEEPSPEED":
        file = values["deepspeed_config"]["deepspeed_config_file"]
        assert environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] == file
        stage = json.loads((ROOT / file).read_text())["zero_optimization"]["stage"]
        assert environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == str(stage == 3).lower()


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_deepspeed_files(path):
    check_deepspeed(path)


def test_each_kind_is_there():
    names = {path.stem for path in ACCELERATE}
    zero = {"zero1", "zero2", "zero3", "zero3_offload_cpu", "zero3_offload_nvme"}
    assert names == zero | {"cpu", "single_gpu", "ddp", "fsdp2", "fsdp2_tensor", "multi_node_zero3"}
    assert {path.stem for path in DEEPSPEED} == zero
    for name, options in {"zero1": (1,), "zero3_offload_cpu": (3, "cpu"), "zero3_offload_nvme": (3, "nvme")}.items():
        assert json.loads((ROOT / "ds_configs" / f"{name}.json").read_text()) == deepspeed_config(*options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_proceses": 2}, "unknown keys"),
        (
            {"fsdp_config": {"fsdp_version": 2, "fsdp_reshard_after_foward": True}},
            "would ignore fsdp_reshard_after_fow",
        ),
        ({"fsdp_config": {"fsdp_version": 2, "fsdp_use_orig_params": True}}, "obsolete in FSDP2"),
        ({"fsdp_config": {"fsdp_version": 2, "fsdp_sharding_strategy": "FULL_SHARD"}}, "obsolete in FSDP2"),
        ({"parallelism_config": {"parallelism_config_tensor_size": 2}}, "would ignore parallelism_config_tensor_size"),
        ({"deepspeed_config": {"zero3_int_flag": True}}, "would ignore zero3_int_flag"),
        ({"megatron_lm_config": {"megatron_lm_tp_size": 2}}, "would ignore megatron_lm_tp_size"),
    ],
)
def test_a_wrong_accelerate_key_is_noticed(change, message, tmp_path):
    values = yaml.safe_load((ROOT / "accelerate_configs" / "fsdp2.yaml").read_text())
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(values | change))
    with pytest.raises(ValueError, match=message):
        check_accelerate(path)


def test_a_field_that_deepspeeds_file_decides_is_noticed(tmp_path):
    values = yaml.safe_load((ROOT / "accelerate_configs" / "zero3.yaml").read_text())
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(values | {"mixed_precision": "bf16"}))
    with pytest.raises(ValueError, match="will be ignored"):
        check_plugins(check_accelerate(path))


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        (None, {"gradient_cliping": 1.0}, "never looks up gradient_cliping"),
        ("zero_optimization", {"overlap_com": True}, "overlap_com"),
        ("zero_optimization", {"cpu_offload": True}, "cpu_offload is deprecated"),
        ("zero_optimization", {"stage3_gather_fp16_weights_on_model_save": True}, "is deprecated"),
        ("zero_optimization", {"reduce_scatter": "auto"}, "nobody fills in auto"),
        ("bf16", {"enable": True}, "enable"),
        ("aio", {"thread_count": 1}, "never looks up aio.thread_count"),
    ],
)
def test_a_wrong_deepspeed_key_is_noticed(section, change, message, tmp_path):
    config = deepspeed_config(3, "nvme")
    if section == "zero_optimization" and "deprecated" in message:
        # Beside its successor it would be refused for another reason.
        config = deepspeed_config(2)
    (config if section is None else config[section]).update(change)
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        check_deepspeed(path)


LLAMA = Shape.from_config(preset("llama-2-7b"))
TRILLION = Shape.from_config(NAMED_SHAPES["gpt3-1t"])
SMALL = Shape(512, 4, 8, 1000)
CASES = {
    "single": (SMALL, {"num_devices": 1, "device": "cpu", "precision": "fp32"}),
    "ddp": (SMALL, {"num_devices": 8, "zero_stage": 0, "tensor_parallel": 1, "pipeline_parallel": 1}),
    "zero2": (LLAMA, {"num_devices": 16, "zero_stage": 2, "precision": "fp16"}),
    "zero3": (TRILLION, {"num_devices": 3072, "global_batch_size": 3072, "zero_stage": 3, "tensor_parallel": 1}),
    "tensor": (LLAMA, {"num_devices": 8, "tensor_parallel": 8}),
    "fsdp2": (LLAMA, {"num_devices": 8, "tensor_parallel": 2, "zero_stage": 3}),
    "megatron": (TRILLION, {"num_devices": 3072, "global_batch_size": 3072, "pipeline_parallel": 16, "interleave": 4}),
}


@pytest.mark.parametrize("name", CASES)
def test_planned_files(name, tmp_path):
    shape, options = CASES[name]
    options = {"device": "h100", **options}
    device = find_device(options.pop("device"))
    request = Request(shape, device, **options)
    best = plan(request)[0]
    files = launch_files(best, request, str(tmp_path))
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    values = yaml.safe_load(files[ACCELERATE_FILE])
    assert values["num_processes"] == request.num_devices
    assert values["num_machines"] == -(-request.num_devices // device.per_node)
    sizes = check_plugins(check_accelerate(tmp_path / ACCELERATE_FILE))
    if best.layout.engine == "fsdp2":
        assert (sizes.tp_size, sizes.dp_shard_size) == (best.layout.tensor, best.layout.data)
    assert (DEEPSPEED_FILE in files) == name.startswith("zero")
    if name.startswith("zero"):
        check_deepspeed(tmp_path / DEEPSPEED_FILE)
        assert json.loads(files[DEEPSPEED_FILE])["zero_optimization"]["stage"] == int(name[-1])


def test_flags_are_those_of_pretrain_and_make_the_global_batch(tmp_path):
    import pretrain

    request = Request(SMALL, find_device("cpu"), num_devices=4, max_length=64, global_batch_size=64, precision="fp32")
    best = plan(request)[0]
    path = tmp_path / FLAGS_FILE
    path.write_text(launch_files(best, request)[FLAGS_FILE])
    script_args, training_args, _ = pretrain.parse(["--config", str(path), "--output_dir", str(tmp_path)])
    sequences = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    assert sequences * best.layout.data == 64
    assert script_args.max_length == 64
    assert int(script_args.total_tokens) == int(request.tokens)
