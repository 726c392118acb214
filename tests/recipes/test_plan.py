"""recipes/plan.py: what it prints and writes, without torch, and what it refuses."""

import json
import re
import subprocess
import sys
from pathlib import Path

import plan
import pytest
import yaml

from hfllm.errors import InputError
from hfllm.models.presets import preset
from hfllm.scaling.shapes import Shape

ROOT = Path(__file__).parent.parent.parent


def run(tmp_path, *flags):
    return plan.main(*plan.parse(["--output_dir", str(tmp_path), *map(str, flags)]))


def test_the_trillion_without_torch(tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'recipes'); import plan\n"
        f"plan.main(*plan.parse(['--output_dir', {str(tmp_path)!r}]))\n"
        "assert not {'torch', 'transformers', 'trl', 'numpy', 'matplotlib', 'yaml'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Layouts on 1024 h100" in result.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["metrics"]["parameters"] == 1_008_038_758_400
    assert report["artifacts"] == {"accelerate.yaml": "accelerate.yaml", "ds_config.json": "ds_config.json"} | {
        "flags.yaml": "flags.yaml"
    }
    for file in report["artifacts"].values():
        assert (tmp_path / file).is_file()


def test_the_published_run_of_the_trillion(tmp_path):
    """Narayanan et al. 2021, arXiv:2104.04473, section 5.1: 84 days on 3,072 A100; 12%."""
    metrics = run(
        tmp_path,
        *("--preset", "gpt3-1t", "--num_devices", 3072, "--device", "a100-80gb", "--tokens", 450e9),
        *("--tensor_parallel", 8, "--pipeline_parallel", 64, "--recompute", "full", "--attention", "eager"),
        *("--micro_batch_size", 1, "--interleave", 1),
    )
    assert metrics["days"] == pytest.approx(84, rel=0.12)
    assert metrics["bubble"] == pytest.approx(0.123, abs=5e-4)
    assert metrics["memory_gib"] < 80
    values = yaml.safe_load((tmp_path / "accelerate.yaml").read_text())
    assert values["megatron_lm_config"]["megatron_lm_pp_degree"] == 64


def test_metrics(tmp_path):
    metrics = run(tmp_path, "--preset", "llama-2-7b", "--num_devices", 8, "--max_length", 4096, "--mfu", 0.4)
    shape = Shape.from_config(preset("llama-2-7b"))
    assert metrics["kv_gib_per_sequence"] == 2.0
    assert metrics["training_tokens"] == 20 * shape.num_parameters()
    assert metrics["training_flops"] == metrics["flops_per_token"] * metrics["training_tokens"]
    seconds = metrics["training_flops"] / (8 * 989e12 * 0.4)
    assert metrics["days"] == pytest.approx(seconds / 86400)
    assert metrics["tokens_per_second"] == pytest.approx(metrics["training_tokens"] / seconds)
    # Another question may be asked in the same folder.
    again = run(tmp_path, "--preset", "llama-2-7b", "--num_devices", 16, "--max_length", 4096, "--mfu", 0.4)
    assert again["days"] == pytest.approx(metrics["days"] / 2)


def test_a_models_own_config_on_this_machine(make_config, tmp_path):
    config = make_config()
    config.save_pretrained(tmp_path / "model")
    flags = ("--device", "cpu", "--num_devices", 1, "--precision", "fp32", "--global_batch_size", 8)
    chunk = ("--max_length", 64, "--micro_batch_size", 8, "--loss_chunk_size", 16)
    metrics = run(tmp_path / "out", "--config_path", tmp_path / "model", *flags, *chunk)
    assert metrics["parameters"] == config.num_parameters()
    assert (tmp_path / "out" / "report.md").read_text().startswith("# plan")
    whole = run(tmp_path / "out", "--config_path", tmp_path / "model" / "config.json", *flags, *chunk[:-2])
    assert whole["memory_gib"] > metrics["memory_gib"]


def test_another_device(tmp_path):
    flags = ("--preset", "llama-2-7b", "--num_devices", 4, "--zero_stage", 3, "--tensor_parallel", 1)
    usual = run(tmp_path, *flags)
    other = run(tmp_path, *flags, "--device_memory_gb", 40, "--device_peak_tflops", 500, "--devices_per_node", 4)
    assert other["usable_gib"] == 36
    assert other["days"] > usual["days"]
    assert yaml.safe_load((tmp_path / "accelerate.yaml").read_text())["num_machines"] == 1


def test_the_chosen_layout_is_listed_and_its_memory_drawn(tmp_path, capsys):
    run(tmp_path, "--top", 1, "--plot")
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| * ")]
    assert len(rows) == 1 and "DeepSpeed" in rows[0]
    assert "recipes/pretrain.py --config" in printed
    assert (tmp_path / "memory.png").stat().st_size > 1000


def test_yaml_flags(tmp_path):
    (tmp_path / "plan.yaml").write_text("preset: gpt2-xl\nnum_devices: 1\nplot: false\ntokens: 1e9\n")
    arguments, *_ = plan.parse(["--config", str(tmp_path / "plan.yaml"), "--num_devices", "2"])
    assert (arguments.preset, arguments.num_devices, arguments.plot, arguments.tokens) == ("gpt2-xl", 2, False, 1e9)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_device", "8"], "unknown flag 'num_device'; did you mean 'num_devices'?"),
        (["--num_devices", "many"], "argument --num_devices: invalid int value: 'many'"),
        (["--plot", "maybe"], "argument --plot: expected true or false, got 'maybe'"),
        (["8"], "unexpected argument '8'"),
        (["--preset", "gpt3-1"], "unknown preset 'gpt3-1'"),
        (["--preset", "gpt2", "--config_path", "x"], "--preset gpt2 and --config_path x: give one of them"),
        (["--config_path", "missing"], "--config_path missing: no such file"),
        (["--device", "tpu"], "--device 'tpu' is not one of h100"),
        (["--device_memory_gb", "0"], "--device_memory_gb 0.0 must be above 0"),
        (["--preset", "gpt2", "--max_length", "2048"], "max_length=2048 is more than the 1024 learned positions"),
        (["--top", "0"], "--top 0 must be at least 1"),
        (["--num_devices", "8"], "the model fits nowhere: of 72 GiB usable on each of 8 h100"),
        (["--tensor_parallel", "3", "--num_devices", "768"], "tensor 3 does not divide num_attention_heads=160"),
        (["--pipeline_parallel", "5", "--num_devices", "640"], "pipeline 5 does not divide num_hidden_layers=128"),
        (["--device", "v100"], "--precision bf16: v100 has no bf16"),
    ],
)
def test_bad_input(flags, message, tmp_path):
    with pytest.raises(InputError) as caught:
        run(tmp_path, *flags)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "expected an object, got list"),
        ("{", "not JSON"),
        ('{"model_type": "rwkv"}', "model_type 'rwkv' is not one of"),
        ('{"model_type": "llama", "hidden_size": 64}', "num_hidden_layers is missing"),
    ],
)
def test_bad_config_json(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        run(tmp_path / "out", "--config_path", tmp_path)


def test_a_misspelt_yaml_key(tmp_path):
    (tmp_path / "plan.yaml").write_text("num_devises: 4\n")
    with pytest.raises(InputError, match="num_devises'; did you mean 'num_devices'"):
        plan.parse(["--config", str(tmp_path / "plan.yaml")])


def test_from_the_command_line():
    command = [sys.executable, "recipes/plan.py", "--tensor_parallel", "7"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    help_text = subprocess.run([*command[:2], "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "--global_batch_size" in help_text and "(default: 3072)" in help_text


def test_the_page_names_every_metric_and_its_commands_parse(tmp_path):
    page = (ROOT / "docs" / "planner.md").read_text()
    for name in run(tmp_path, "--preset", "gpt2", "--num_devices", 1):
        assert f"`{name}`" in page, name
    commands = [
        line.partition("recipes/plan.py")[2] for line in page.splitlines() if line.startswith("python recipes/")
    ]
    assert len(commands) == 4
    for command in commands:
        plan.parse(command.partition("#")[0].split())
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, {})


def test_the_page_shows_what_is_printed(tmp_path, capsys):
    page = (ROOT / "docs" / "planner.md").read_text()
    run(tmp_path, "--num_devices", 3072, "--device", "a100-80gb", "--tokens", 450e9, "--top", 20)
    printed = {tuple(cell.strip() for cell in line.split("|")) for line in capsys.readouterr().out.splitlines()}
    rows = [line for line in page.splitlines() if re.match(r"\| (\* )?\| data \d", line)]
    assert len(rows) == 4
    for row in rows:
        assert tuple(cell.strip() for cell in row.split("|")) in printed, row
