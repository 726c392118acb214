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
from hfllm.stages.rlhf.flags import stages_before

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


SHARED = [("pretrain", 2, "half"), ("sft", 2, "half"), ("reward", 3, "a third"), ("rlhf", 1000, "one")]


@pytest.mark.parametrize(("name", "processes", "rows"), SHARED)
def test_processes_share_the_batches_of_the_world(tmp_path, monkeypatch, name, processes, rows):
    def parse(*words):
        return recipe.parse(["--output_dir", str(tmp_path), *words])

    def batch_of(parsed):
        stage = Stage(name, *parsed)
        return stage.training_args.per_device_train_batch_size, stage._about_batch()

    recipe, own = import_module(name), tmp_path / "own.jsonl"
    own.touch()
    # A batch that was named, and one of other data, are each process's.
    others = [parse("--per_device_train_batch_size", "6"), parse("--dataset_name", str(own))]
    if name == "pretrain":
        others.append(parse("--dataset_mixture", f"{own}:1", "pydoc:1"))
    parsed, before = parse(), [batch_of(each) for each in others]
    alone = Stage(name, *parsed)
    (whole, _), identity = batch_of(parsed), alone.identity
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    batch, line = batch_of(parsed)
    assert batch == {"half": whole // 2, "a third": whole // 3, "one": 1}[rows]
    assert line.startswith(f"{batch * processes} rows a step: ")
    assert [batch_of(each) for each in others] == before and {line for _, line in before} == {None}
    # Flags stay, so that a finished run is known.
    several = Stage(name, *parsed)
    assert several.arguments == alone.arguments
    if name != "rlhf" and whole % processes == 0:
        assert difference(identity, several.identity) is None


def test_processes_share_the_batches_of_the_stages_before_too(tmp_path, monkeypatch):
    parsed = rlhf.parse(["--output_dir", str(tmp_path)])
    before = stages_before(*parsed).parsed
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, groups in {**before, "rlhf": parsed}.items():
        stage = Stage(name, *groups)
        whole = next(group for group in groups if hasattr(group, "max_steps")).per_device_train_batch_size
        assert stage.training_args.per_device_train_batch_size == whole // 2 > 0
        assert stage._about_batch().startswith(f"{whole} rows a step: ")
    assert set(before) == {"pretrain", "sft", "reward"}


def test_a_model_of_ones_own_takes_the_library_s_batch_in_each_process(base, tmp_path, monkeypatch):
    parsed = rlhf.parse(["--model_name_or_path", str(base), "--reward_funcs", "gold", "--output_dir", str(tmp_path)])
    stage = Stage("rlhf", *parsed)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert stage.training_args.per_device_train_batch_size == 16 and stage._about_batch() is None


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
