"""benchmarks/off_policy.py and ppo_agilerl.py: what a copy samples, what is paid, and when a goal is reached."""

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
