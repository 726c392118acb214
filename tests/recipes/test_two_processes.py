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
@pytest.mark.turn(7)
def test_the_main_job_under_two_processes(launch, tiny, tmp_path):
    output = launch("rlhf", "--config", tiny["rlhf"], "--output_dir", tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    # Four optimizer steps, one per rollout, of 4 episodes on each of two processes.
    state = [line for line in output.splitlines() if line.startswith("step 4/4")]
    assert state
    assert report["metrics"]["kl_to_reference"] is not None
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.turn(7)
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


@pytest.mark.slow
@pytest.mark.turn(7)
def test_pictures_and_ppo_on_them_under_two_processes(launch, tmp_path):
    """An optimizer step of PPO has as many answers as with one process."""
    small = ["--hidden_size", 16, "--num_attention_heads", 2, "--num_hidden_layers", 1, "--num_vision_layers", 1]
    few = ["--num_patch_pictures", 8, "--num_captions", 8, "--num_examples", 56, "--num_eval_examples", 12]
    few += ["--max_new_tokens", 4]
    rates = ["--per_device_train_batch_size", 4, "--logging_steps", 1, "--num_rl_prompts", 1024]
    output = launch("vision", *small, *few, *rates, "--output_dir", tmp_path)
    # 72 rows, 4 on each of two processes; then 1,024 prompts, 64 to a step.
    assert "step 9/9 " in output and "step 16/16 " in output
    report = json.loads((tmp_path / "report.json").read_text())
    assert {"sampled_gold_change", "rl_seen_right"} <= report["metrics"].keys()
    assert (tmp_path / "rl" / "model.safetensors").is_file()
