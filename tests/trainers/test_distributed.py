"""Two processes under DDP learn what one process learns from the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

SCRIPT = Path(__file__).parent / "ddp_run.py"


def launch(output_dir, episodes, processes):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    result = subprocess.run(
        [*command, str(SCRIPT), str(output_dir), str(episodes)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return next(line for line in result.stdout.splitlines() if line.startswith("EVAL")).split()[1:]


def test_two_processes_equal_one_and_save(tmp_path):
    one = launch(tmp_path / "one", episodes=8, processes=1)
    two = launch(tmp_path / "two", episodes=4, processes=2)
    assert [float(value) for value in one] == pytest.approx([float(value) for value in two], abs=1e-5)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    actual = AutoModelForCausalLM.from_pretrained(tmp_path / "two").state_dict()
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, atol=1e-5, rtol=0, msg=name)
    checkpoint = tmp_path / "two" / "checkpoint-6"
    assert {"rollout_0.safetensors", "rollout_1.safetensors", "optimizer.pt"} <= set(os.listdir(checkpoint))
