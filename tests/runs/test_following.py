"""The command after a stage is one that its recipe would take, with the files that the stage has written."""

import json
import shlex

import pytest

from hfllm.outputs.verdict import IS_BETTER, IS_EQUAL
from hfllm.runs.following import after_chat, next_command
from hfllm.runs.recipes import load_recipe, recipe_names

WORLD = {"dataset_name": "world"}


@pytest.mark.parametrize(
    ("stage", "arguments", "expected"),
    [
        ("pretrain", WORLD, "hfllm sft --model_name_or_path OUT"),
        ("sft", WORLD, "hfllm reward --model_name_or_path OUT"),
        ("sft", {"dataset_name": "mine.csv"}, "hfllm label --model_name_or_path OUT --dataset_name mine.csv"),
        (
            "reward",
            {"dataset_name": "pairs.jsonl", "model_name_or_path": "tuned"},
            "hfllm rlhf --model_name_or_path tuned --reward_model_name_or_path OUT --dataset_name pairs.jsonl",
        ),
        ("reward", WORLD, "hfllm rlhf --model_name_or_path OUT/sft --reward_model_name_or_path OUT"),
        ("rlhf", WORLD, "hfllm push --model_name_or_path OUT --hub_model_id OUT"),
        ("quantize", WORLD, "hfllm chat OUT"),
        (
            "pretrain",
            {**WORLD, "dataset_mixture": ["a:1"]},
            "hfllm sft --model_name_or_path OUT --dataset_name YOUR_ROWS.jsonl",
        ),
        ("pretrain", {**WORLD, "objective": "masked"}, "hfllm classify --model_name_or_path OUT"),
        (
            "sft",
            {"dataset_name": "q.csv", "column_mapping": ["prompt=question", "response=answer"], "max_samples": 9},
            "hfllm label --model_name_or_path OUT --dataset_name q.csv --max_samples 9 "
            "--column_mapping prompt=question",
        ),
        (
            "label",
            {"dataset_name": "q.csv", "model_name_or_path": "m"},
            "hfllm label --model_name_or_path m --dataset_name q.csv --output_dir OUT",
        ),
    ],
)
def test_each_stage_names_the_next(stage, arguments, expected):
    assert next_command(stage, arguments, "OUT", IS_BETTER) == expected


def test_a_model_is_published_by_the_name_of_its_run():
    line = next_command("tools", WORLD, "outputs/tools/rl", IS_BETTER, "outputs/tools")
    assert line == "hfllm push --model_name_or_path outputs/tools/rl --hub_model_id tools"


def test_labels_are_learned_once_there_are_some(tmp_path):
    (tmp_path / "labels.jsonl").write_text("{}\n")
    flags = {"dataset_name": "q.csv", "model_name_or_path": "m"}
    line = next_command("label", flags, str(tmp_path), IS_EQUAL)
    assert line == f"hfllm reward --model_name_or_path m --dataset_name {tmp_path}/labels.jsonl"


def test_what_is_no_better_is_talked_to_first():
    assert next_command("sft", WORLD, "OUT", IS_EQUAL) == "hfllm chat OUT"
    # Nobody talks to a reward model.
    assert next_command("reward", WORLD, "OUT", IS_EQUAL).startswith("hfllm rlhf")


def test_an_adapter_is_merged_before_it_is_pushed(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    merged = next_command("rlhf", WORLD, str(tmp_path), IS_BETTER)
    assert merged == f"hfllm merge --model_name_or_path {tmp_path} --output_dir {tmp_path}-merged"
    assert next_command("rlhf", WORLD, f"{tmp_path}/", IS_BETTER) == merged
    assert next_command("merge", {}, f"{tmp_path}-merged").startswith("hfllm push --model_name_or_path")


def test_a_federated_reward_model_is_not_talked_to():
    flags = {"dataset_name": "pairs.jsonl", "model_name_or_path": "m", "learner": "reward"}
    line = next_command("federated", flags, "OUT", IS_EQUAL)
    assert line == "hfllm rlhf --model_name_or_path m --reward_model_name_or_path OUT --dataset_name pairs.jsonl"


def test_names_with_spaces_are_quoted():
    line = next_command("sft", {"dataset_name": "my rows.csv"}, "an out", IS_BETTER)
    assert shlex.split(line)[-3:] == ["an out", "--dataset_name", "my rows.csv"]


@pytest.mark.parametrize("stage", ["pretrain", "sft", "label", "reward", "rlhf", "merge", "tokenizer", "quantize"])
def test_recipes_take_the_commands(stage):
    words = shlex.split(next_command(stage, {"dataset_name": "a.jsonl", "model_name_or_path": "b"}, "OUT", IS_BETTER))
    assert words[1] in recipe_names()
    parsed = load_recipe(words[1]).parse(words[2:])
    values = {name: value for group in parsed for name, value in vars(group).items()}
    for flag, value in zip(words[2::2], words[3::2], strict=True) if words[2:3] != ["OUT"] else ():
        assert values[flag.removeprefix("--")] in (value, [value])


def test_after_a_conversation_one_goes_on_whatever_the_verdict(tmp_path):
    folder = str(tmp_path)
    assert after_chat(folder) == after_chat("no/such") == ""

    def made_by(stage, **arguments):
        parts = {"metrics": {}, "artifacts": {}, "environment": {}, "parents": [], "warnings": [], "verdict": {}}
        (tmp_path / "report.json").write_text(json.dumps({"stage": stage, "arguments": arguments, **parts}))
        return after_chat(folder)

    assert made_by("sft", dataset_name="q.csv") == f"hfllm label --model_name_or_path {folder} --dataset_name q.csv"
    push = f"hfllm push --model_name_or_path {folder} --hub_model_id {tmp_path.name}"
    assert made_by("rlhf", dataset_name="q.csv") == made_by("quantize") == push
    (tmp_path / "adapter_config.json").write_text("{}")
    assert made_by("rlhf") == f"hfllm merge --model_name_or_path {folder} --output_dir {folder}-merged"
    assert made_by("reward") == ""
