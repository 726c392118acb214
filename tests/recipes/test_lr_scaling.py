"""--lr_scaling_rule reaches the optimizer of every recipe that trains, and the report."""

import json
from importlib import import_module
from pathlib import Path

import pretrain
import pytest
import rlhf
import yaml

from hfllm.errors import InputError
from hfllm.runs.identity import difference
from hfllm.runs.stage import Stage

STAGES = {
    "pretrain": [],
    "sft": [],
    "reward": ["--on_policy_fraction", "0"],
    "rlhf": ["--reward_funcs", "gold"],
    "distill": [],
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", list(STAGES))
def test_a_recipe_with_a_batch_four_times_the_base(tiny, base, tmp_path, stage):
    recipe = import_module(stage)
    # Without the settings of stages before it, which have made their model.
    settings = yaml.safe_load(Path(tiny[stage]).read_text())
    own = {name: value for name, value in settings.items() if not name.endswith("_config")}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**own, "max_steps": 1}))
    words = ["--config", str(config), *STAGES[stage], "--output_dir", str(tmp_path)]
    if stage != "pretrain":
        words += ["--teacher_model_name_or_path" if stage == "distill" else "--model_name_or_path", str(base)]
    words += ["--learning_rate", "0.001", "--warmup_steps", "0", "--logging_steps", "1"]
    words += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    metrics = recipe.main(*recipe.parse([*words, "--lr_scaling_rule", "sqrt", "--lr_scaling_base_batch_size", "2"]))
    assert metrics["learning_rate"] == pytest.approx(0.002) and metrics["global_batch_size"] == 8
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["metrics"]["learning_rate"] == pytest.approx(0.002)
    # PPO's critic has a rate of its own.
    assert ("value_learning_rate" in metrics) == (stage == "rlhf")
    # What was asked for, by which the run is known again.
    assert report["arguments"]["learning_rate"] == 0.001
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["learning_rate"] for entry in history if "loss" in entry] == pytest.approx([0.002])


@pytest.mark.parametrize("name", ["pretrain", "sft", "reward", "rlhf"])
@pytest.mark.parametrize(("processes", "rows"), [(2, "half"), (3, "a third"), (1000, "one")])
def test_processes_share_the_batches_of_the_world(tmp_path, monkeypatch, name, processes, rows):
    def stage(*words):
        return Stage(name, *recipe.parse(["--output_dir", str(tmp_path), *words]))

    recipe = import_module(name)
    alone, named = stage(), stage("--per_device_train_batch_size", "6")
    (tmp_path / "own.jsonl").touch()
    own = stage("--dataset_name", str(tmp_path / "own.jsonl"))
    whole, other = (each.training_args.per_device_train_batch_size for each in (alone, own))
    identity = alone.identity
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    several = Stage(name, *alone.parsed)
    batch = several.training_args.per_device_train_batch_size
    assert batch == {"half": whole // 2, "a third": whole // 3, "one": 1}[rows]
    assert several._about_batch().endswith(f" --per_device_train_batch_size {batch}")
    # A batch that was named, and one of other data, are each process's; flags stay, so that a finished run is known.
    assert named.training_args.per_device_train_batch_size == 6 and named._about_batch() is None
    assert own.training_args.per_device_train_batch_size == other
    assert several.arguments == alone.arguments
    if name != "rlhf" and whole % processes == 0:
        assert difference(identity, several.identity) is None


def test_a_rate_that_is_not_given_cannot_be_scaled(tmp_path):
    words = ["--model_name_or_path", "me/mine", "--dataset_name", "world", "--reward_funcs", "gold"]
    words += ["--lr_scaling_rule", "sqrt", "--lr_scaling_base_batch_size", "2", "--output_dir", str(tmp_path)]
    with pytest.raises(InputError, match="--lr_scaling_rule sqrt needs --learning_rate: the rate that is scaled"):
        rlhf.main(*rlhf.parse(words))


def test_a_batch_that_grows_has_no_one_rate(tmp_path):
    words = ["--output_dir", str(tmp_path), "--packing", "true", "--batch_ramp", "0:128,0.5:256"]
    words += ["--lr_scaling_rule", "sqrt", "--lr_scaling_base_batch_size", "2"]
    with pytest.raises(InputError, match="--lr_scaling_rule cannot be used here: --batch_ramp changes the batch"):
        pretrain.main(*pretrain.parse(words))
