"""Two processes, under DDP or ZeRO, learn what one process learns from the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

SCRIPT = Path(__file__).parent / "ddp_run.py"
ROOT = Path(__file__).parent.parent.parent


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
DEEPSPEED = [sys.executable, "-m", "accelerate.commands.launch", "--use_deepspeed", "--num_processes", "2"]
DEEPSPEED += ["--num_machines", "1", "--mixed_precision", "no"]


def launch(launcher, *arguments):
    """Reward in evaluation and in the first rollout that the run prints."""
    result = subprocess.run(
        [*launcher, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    line = next(line for line in result.stdout.splitlines() if line.startswith("EVAL"))
    return [float(value) for value in line.split()[1:]]


def same_weights(one, other):
    expected = AutoModelForCausalLM.from_pretrained(one).state_dict()
    actual = AutoModelForCausalLM.from_pretrained(other).state_dict()
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, atol=1e-5, rtol=0, msg=name)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run of a single process, and the rewards that it printed."""
    folder = tmp_path_factory.mktemp("one")
    return folder, launch([*TORCHRUN, "--nproc_per_node=1"], folder, 8)


def test_two_processes_equal_one_and_save(one, tmp_path):
    folder, rewards = one
    assert launch([*TORCHRUN, "--nproc_per_node=2"], tmp_path, 4) == pytest.approx(rewards, abs=1e-5)
    same_weights(folder, tmp_path)
    files = set(os.listdir(tmp_path / "checkpoint-6"))
    assert {"rollout_0.safetensors", "rollout_1.safetensors", "optimizer.pt"} <= files


def pretrain(launcher, folder, *arguments, script="pretrain_run.py"):
    result = subprocess.run(
        [*launcher, str(SCRIPT.parent / script), str(folder), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """What a single process pretrains."""
    folder = tmp_path_factory.mktemp("pretrained")
    pretrain([*TORCHRUN, "--nproc_per_node=1"], folder)
    return folder


def test_two_processes_pretrain_what_one_does(pretrained, tmp_path):
    pretrain([*TORCHRUN, "--nproc_per_node=2"], tmp_path)
    same_weights(pretrained, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_pretrain_with_zero_what_one_does(pretrained, tmp_path, stage):
    pytest.importorskip("deepspeed")
    pretrain(DEEPSPEED, tmp_path, ROOT / "ds_configs" / f"zero{stage}.json")
    same_weights(pretrained, tmp_path)


@pytest.mark.slow
def test_two_processes_equal_one_with_every_term(one, tmp_path):
    rewards = launch([*TORCHRUN, "--nproc_per_node=1"], tmp_path / "one", 8, "terms")
    assert launch([*TORCHRUN, "--nproc_per_node=2"], tmp_path / "two", 4, "terms") == pytest.approx(rewards, abs=1e-5)
    same_weights(tmp_path / "one", tmp_path / "two")
    with pytest.raises(AssertionError):
        same_weights(tmp_path / "one", one[0])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_with_zero_equal_one(one, tmp_path, stage):
    pytest.importorskip("deepspeed")
    folder, rewards = one
    assert launch(DEEPSPEED, tmp_path, 4, ROOT / "ds_configs" / f"zero{stage}.json") == pytest.approx(
        rewards, abs=1e-5
    )
    same_weights(folder, tmp_path)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """What a single process distils."""
    folder = tmp_path_factory.mktemp("distilled")
    pretrain([*TORCHRUN, "--nproc_per_node=1"], folder, 4, script="distill_run.py")
    return folder


def test_two_processes_distil_what_one_does(distilled, tmp_path):
    pretrain([*TORCHRUN, "--nproc_per_node=2"], tmp_path, 2, script="distill_run.py")
    same_weights(distilled, tmp_path)


@pytest.mark.slow
def test_two_processes_distil_with_zero_what_one_does(distilled, tmp_path):
    pytest.importorskip("deepspeed")
    pretrain(DEEPSPEED, tmp_path, 2, ROOT / "ds_configs" / "zero2.json", script="distill_run.py")
    same_weights(distilled, tmp_path)
