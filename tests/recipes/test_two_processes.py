"""The whole chain under two processes: stages wait for each other, one process writes."""

import json

import pytest


@pytest.fixture
def launch(processes):
    def make(recipe, *flags):
        """What a recipe prints under two processes."""
        printed = processes.torchrun(f"recipes/{recipe}.py", *flags)
        assert printed.count(f"=== {recipe}") == 1
        return printed

    return make


@pytest.mark.slow
def test_the_main_job_under_two_processes(launch, tiny, tmp_path):
    output = launch("rlhf", "--config", tiny["rlhf"], "--output_dir", tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    # Four optimizer steps, one per rollout, of 4 episodes on each of two processes.
    state = [line for line in output.splitlines() if line.startswith("step 4/4")]
    assert state
    assert report["metrics"]["kl_to_reference"] is not None
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_student_and_its_int8_form_under_two_processes(launch, tiny, tmp_path):
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
