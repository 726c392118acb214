"""`hfllm reward --task process` in miniature: to its report and a reward for PPO, and what it refuses."""

import json

import pytest
import reward
import rlhf
import torch

from hfllm.errors import InputError
from hfllm.models.loading.adapters import load_scorer, scorer_class

TINY = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--logging_steps", "1"]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def solutions(count):
    return [
        {"prompt": f"Say {number}.", "completions": ["One.", f"So {number}."], "labels": [True, number % 2 == 0]}
        for number in range(count)
    ]


def run(saved, out, *flags):
    words = ["--task", "process", "--model_name_or_path", str(saved), *TINY, "--output_dir", str(out), *flags]
    return reward.main(*reward.parse(words))


@pytest.mark.slow
def test_from_rows_to_a_reward_of_ppo(saved, tmp_path, capsys):
    rows = write(tmp_path / "steps.jsonl", solutions(60))
    metrics = run(saved, tmp_path / "out", "--dataset_name", rows)
    assert metrics["train_solutions"] + metrics["eval_solutions"] == 60
    assert metrics["step_accuracy_n"] == 2 * metrics["eval_solutions"]
    assert 0 <= metrics["first_error_found"] <= 1
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "held-out steps judged right" in report["summary"]
    model = load_scorer(str(tmp_path / "out"), scorer_class(str(tmp_path / "out")))
    assert model.config.step_end == "line" and not model.has_new_head
    # The same command again reuses what has finished.
    capsys.readouterr()
    assert run(saved, tmp_path / "out", "--dataset_name", rows) == metrics
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"Say {number}."} for number in range(20)])
    flags = ["--model_name_or_path", str(saved), "--dataset_name", prompts, "--reward_model_name_or_path"]
    flags += [str(tmp_path / "out"), "--total_episodes", "8", "--per_device_train_batch_size", "2"]
    flags += ["--num_mini_batches", "2", "--response_length", "8", "--output_dir", str(tmp_path / "ppo")]
    aligned = rlhf.main(*rlhf.parse(flags))
    # A right step costs nothing.
    assert aligned["proxy_reward_before"] <= 0


@pytest.mark.slow
def test_on_the_world_steps_of_held_out_problems_are_judged(base, tmp_path):
    metrics = run(base, tmp_path / "out", "--dataset_name", "world", "--num_pairs", "40", "--num_eval_prompts", "20")
    assert metrics["train_solutions"] == 40 and metrics["eval_solutions"] == 20
    assert 0.6 < metrics["majority_step_accuracy"] < 0.95


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--num_samples", "2"], "--task process compares no answers"),
        (["--augment", "0.1"], "--task process compares no answers"),
        (["--center_rewards_coefficient", "0.1"], "--task process compares no answers"),
        (["--eos_token", "<pad>"], "tokenized and padded here, by the model's own tokenizer as it is"),
        (["--pad_token", "<pad>"], "tokenized and padded here, by the model's own tokenizer as it is"),
        (["--dataset_num_proc", "2"], "tokenized and padded here, by the model's own tokenizer as it is"),
        (["--train_sampling_strategy", "sequential"], "solutions come in random order"),
        (["--activation_offloading", "true"], "transformers' Trainer, which has none"),
        (["--max_pixels", "100"], "no row has a picture"),
        (["--use_peft"], "PEFT keeps no config, which says where steps end"),
    ],
)
def test_flags_of_comparisons_are_refused(saved, tmp_path, flags, complaint):
    with pytest.raises((InputError, SystemExit, ValueError), match=complaint):
        run(saved, tmp_path / "out", "--dataset_name", "world", *flags)


def test_the_worlds_steps_have_settings_of_their_own():
    script_args, training_args, _ = reward.parse(["--task", "process"])
    assert (script_args.label_noise, training_args.num_train_epochs, script_args.use_muon) == (0.0, 2, True)
    script_args, _, _ = reward.parse(["--task", "process", "--optim", "adamw_torch"])
    assert not script_args.use_muon
    script_args, _, _ = reward.parse([])
    assert script_args.label_noise == 0.1


@pytest.mark.parametrize(("flags", "rate"), [([], 0.0), (["--disable_dropout", "false"], 0.5)])
def test_dropout_is_off_unless_asked_for(saved, tmp_path, monkeypatch, flags, rate):
    rates = []

    def keep(trainer, *rest, **options):
        rates.extend(each.p for each in trainer.model.modules() if isinstance(each, torch.nn.Dropout))
        raise InputError("far enough")

    monkeypatch.setattr("hfllm.trainers.mixins.train", keep)
    config = json.loads((saved / "config.json").read_text())
    write(saved / "config.json", [config | {"classifier_dropout": 0.5}])
    rows = write(tmp_path / "steps.jsonl", solutions(60))
    with pytest.raises(InputError, match="far enough"):
        run(saved, tmp_path / "out", "--dataset_name", rows, *flags)
    assert max(rates) == rate
