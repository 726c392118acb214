"""The whole chain under two processes: stages wait for each other, one process writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_the_main_job_under_two_processes(tiny, tmp_path):
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *("recipes/rlhf.py", "--config", tiny["rlhf"], "--output_dir", str(tmp_path)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("=== rlhf") == 1
    report = json.loads((tmp_path / "report.json").read_text())
    # Four optimiser steps, one a rollout, of 4 episodes on each of two processes.
    state = [line for line in result.stdout.splitlines() if line.startswith("step 4/4")]
    assert state
    assert report["metrics"]["kl_to_reference"] is not None
    assert (tmp_path / "model.safetensors").is_file()
