"""Processes that are lost, or that the scheduler ends: the run ends too, goes on, and learns the same."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hfllm.outputs.checkpoints import last_complete_checkpoint

ROOT = Path(__file__).parent.parent.parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/ddp.yaml", "--num_processes=2"]
ACCELERATE += ["--main_process_port=0", "--mixed_precision=no", "--dynamo_backend=no", "--rdzv_backend=c10d"]
ACCELERATE += ["--max_restarts=1"]
# Else the processes that are started again may meet at the addresses of those that were lost.
RESTARTABLE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
# 50 steps of 8 rows.
SETTINGS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "vocab_size": 400,
    "num_documents": 300,
    "packing": True,
    "max_length": 64,
    "per_device_train_batch_size": 4,
    "total_tokens": "25600",
    "sample_steps": 0,
    "logging_steps": 10,
    "save_strategy": "steps",
    "save_steps": 10,
    "resume_from_checkpoint": "auto",
    "enable_jit_checkpoint": True,
}


@pytest.mark.slow
@pytest.mark.turn(6)
def test_lost_and_terminated_processes_change_nothing(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(SETTINGS))

    def launch(launcher, fault, step, folder):
        words = ["tests/recipes/fault_run.py", fault, str(step), "pretrain", "--config", str(config)]
        return subprocess.run(
            [sys.executable, *launcher, *words, "--output_dir", str(tmp_path / folder)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            # A run that hangs instead of ending fails here.
            timeout=400,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **RESTARTABLE},
        )

    def last_step():
        return int(last_complete_checkpoint(tmp_path / "cut").rpartition("-")[2])

    whole = launch(TORCHRUN, "kill", -1, "whole")
    assert whole.returncode == 0, whole.stderr[-3000:]

    lost = launch(TORCHRUN, "kill", 25, "cut")
    assert lost.returncode != 0
    cause = lost.stderr.partition("Root Cause (first observed failure):")[2]
    assert "rank      : 1 " in cause and "Signal 9 (SIGKILL) received" in cause
    assert last_step() == 20

    ended = launch(TORCHRUN, "terminate", 33, "cut")
    assert ended.returncode != 0
    assert f"SIGTERM: saved step {last_step()} in" in ended.stderr
    assert 33 < last_step() < 40

    again = launch(ACCELERATE, "kill", 45, "cut")
    assert again.returncode == 0, again.stderr[-3000:]
    assert "exitcode: -9" in again.stderr
    assert again.stdout.count("=== pretrain") == 2
    one, other = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "cut"))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.slow
@pytest.mark.turn(6)
@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGTERM, "SIGTERM: saved step {} in "), (signal.SIGINT, "continues from checkpoint-{} in ")],
    ids=["SIGTERM", "Ctrl-C"],
)
@pytest.mark.usefixtures("ctrl_c_is_heard")
def test_a_process_that_was_launched_says_what_is_saved_before_its_launcher_ends(tmp_path, number, said):
    config, out = tmp_path / "config.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump({**SETTINGS, "total_tokens": "25600000"}))
    code = "import sys; from hfllm.runs.launcher import main; sys.exit(main())"
    words = ["pretrain", "--num_processes", "1", "--config", str(config), "--output_dir", str(out)]
    launcher = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    try:
        while not list(out.glob("checkpoint-*/trainer_state.json")) and launcher.poll() is None:
            time.sleep(0.1)
        # Ctrl-C reaches all processes of a terminal, a scheduler's signal the one that it knows.
        (os.killpg if number == signal.SIGINT else os.kill)(launcher.pid, number)
        heard = launcher.communicate(timeout=200)[1]
        assert launcher.returncode == 128 + number, heard[-3000:]
        assert said.format(Path(last_complete_checkpoint(out)).name.rpartition("-")[2]) in heard
    finally:
        launcher.kill()
        launcher.communicate()
