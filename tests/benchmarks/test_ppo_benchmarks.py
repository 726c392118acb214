"""The benchmarks of PPO: what a copy samples, what is paid, when a goal is reached, and which flags an arm has."""

import argparse
import importlib
from pathlib import Path

import pytest
import torch


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module


def test_a_rounded_matrix_has_as_many_values_as_its_bits_and_is_near(load):
    off_policy = load("off_policy")
    weight = torch.randn(8, 500, generator=torch.Generator().manual_seed(0))
    for bits in (4, 8):
        found = off_policy.rounded(weight, bits)
        step = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        assert ((found - weight).abs() <= step / 2 + 1e-6).all()
        assert all(len(row.unique()) <= 2**bits - 1 for row in found)


@pytest.mark.parametrize(("precision", "least", "most"), [("float32", 0.0, 1e-4), ("int4", 1e-2, 1.0)])
def test_what_is_sampled_carries_the_chances_of_the_copy(load, precision, least, most):
    off_policy = load("off_policy")
    found = off_policy.run(precision, 2.0, 1, argparse.Namespace(rollouts=2, learning_rate=1e-4))
    assert least <= found["importance_sampling/gap"] <= most and len(found["curve"]) == 2


def test_a_goal_is_reached_at_the_first_of_three_rollouts_in_a_row(load):
    against = load("ppo_agilerl")
    run = {"rewards": [0.6, 0.1, 0.5, 0.7, 0.6, 0.9], "seconds": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}
    assert against.seconds_to(0.5, run) == 3.0 and against.seconds_to(0.6, run) == 4.0
    assert against.seconds_to(0.65, run) is None


def test_the_words_that_are_paid_are_a_quarter_of_those_of_the_prompts(load, tmp_path):
    against = load("ppo_agilerl")
    prompts = against.save_model(str(tmp_path), 1)
    shares = [against.share_of_targets(prompt) * against.RESPONSE / against.PROMPT for prompt in prompts]
    assert 0.2 < sum(shares) / len(shares) < 0.3
    assert prompts != against.save_model(str(tmp_path), 2)


def test_an_arm_is_compared_at_the_end_of_as_much_time_as_vanilla_took(load):
    ablation = load("ppo_ablation")

    def curve(seconds, rewards):
        return [{"cpu": seconds * number, "reward": reward} for number, reward in enumerate(rewards, 1)]

    curves = {
        ("dial", "run-1", "vanilla"): curve(1.0, [0.1, 0.1, 0.2, 0.3, 0.3, 0.3, 0.3, 0.3]),
        ("dial", "run-1", "steps"): curve(2.0, [0.1, 0.4, 0.4, 0.5, 0.6, 0.7, 0.9, 0.9]),
    }
    rows = [line.strip("| ").split(" | ") for line in ablation.table_of(curves).splitlines()[2:]]
    assert rows[0] == ["dial", "vanilla", "0.300", "0.300", "0.300", "1.00"]
    # Of its eight logs four are within vanilla's eight seconds; its mean of three is .3 at the third, after six.
    assert rows[1] == ["dial", "steps", "0.900", "0.900", "0.500", "1.00"]


def test_a_further_arm_adds_its_flags_to_the_run(load, tmp_path):
    ablation, file = load("ppo_ablation"), tmp_path / "arms.yaml"
    file.write_text("steps: {reward_model_name_or_path: outputs/steps, lam: 1.0}\n")
    more = ablation.arms_of(file)
    given = {"lam": 0.95, "seed": 1}
    assert ablation.flags_of_arm(given, "steps", more) == {**given, **more["steps"]}
    assert ablation.flags_of_arm(given, "vanilla", more) == given
    file.write_text("all: {lam: 1.0}\n")
    with pytest.raises(SystemExit, match="all: taken"):
        ablation.arms_of(file)
    file.write_text("steps\n")
    with pytest.raises(SystemExit, match="expected the names of arms"):
        ablation.arms_of(file)
