"""The whole chain under two processes: stages wait for each other, one process writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def launch(recipe, *flags):
    """What a recipe prints under two processes."""
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *(f"recipes/{recipe}.py", *map(str, flags)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count(f"=== {recipe}") == 1
    return result.stdout


def test_the_main_job_under_two_processes(tiny, tmp_path):
    output = launch("rlhf", "--config", tiny["rlhf"], "--output_dir", tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    # Four optimizer steps, one per rollout, of 4 episodes on each of two processes.
    state = [line for line in output.splitlines() if line.startswith("step 4/4")]
    assert state
    assert report["metrics"]["kl_to_reference"] is not None
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_student_and_its_int8_form_under_two_processes(tiny, tmp_path):
    pytest.importorskip("bitsandbytes")
    launch("distill", "--config", tiny["distill"], "--output_dir", tmp_path / "student")
    report = json.loads((tmp_path / "student" / "report.json").read_text())
    assert report["metrics"]["steps"] == 4
    assert report["metrics"]["gold_reward_student"] is not None
    quick = ["--schemes", "int8", "--num_eval_texts", 8, "--num_eval_prompts", 12, "--response_length", 4]
    quick += ["--sensitivity", "none", "--rounds", 0]
    launch("quantize", "--model_name_or_path", tmp_path / "student", *quick, "--output_dir", tmp_path / "int8")
    report = json.loads((tmp_path / "int8" / "report.json").read_text())
    assert report["metrics"]["reload_difference"] == 0
    assert (tmp_path / "int8" / "model.safetensors").is_file()
