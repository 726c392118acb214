"""Two processes, under DDP or ZeRO, learn what one process learns from the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pretrain_run import build
from tolerances import assert_same_learning
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

SCRIPT = Path(__file__).parent / "ddp_run.py"
ROOT = Path(__file__).parent.parent.parent


DEEPSPEED = [sys.executable, "-m", "accelerate.commands.launch", "--use_deepspeed", "--num_processes", "2"]
DEEPSPEED += ["--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no"]


def launch(script, *arguments):
    """What a script prints under DeepSpeed's launcher."""
    result = subprocess.run(
        [*DEEPSPEED, str(SCRIPT.parent / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def rewards_in(printed):
    """Reward in evaluation and in the first rollout."""
    line = next(line for line in printed.splitlines() if line.startswith("EVAL"))
    return [float(value) for value in line.split()[1:]]


# Learning rate and optimizer steps of ddp_run.py, pretrain_run.py and distill_run.py.
PPO, PRETRAINING, DISTILLATION = (1e-3, 6), (3e-3, 20), (3e-3, 4)


def same_weights(one, other, learning_rate, steps):
    models = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (other, one)]
    assert_same_learning(*models, learning_rate, steps)


@pytest.fixture(scope="module")
def one(processes, tmp_path_factory):
    """The run of a single process, and the rewards that it printed."""
    folder = tmp_path_factory.mktemp("one")
    return folder, rewards_in(processes.torchrun(SCRIPT, folder, 8, processes=1))


@pytest.mark.slow
def test_two_processes_equal_one_and_save(processes, one, tmp_path):
    folder, rewards = one
    assert rewards_in(processes.torchrun(SCRIPT, tmp_path, 4)) == pytest.approx(rewards, abs=1e-5)
    same_weights(folder, tmp_path, *PPO)
    files = set(os.listdir(tmp_path / "checkpoint-6"))
    assert {"rollout_0.safetensors", "rollout_1.safetensors", "optimizer.pt"} <= files


@pytest.mark.slow
def test_two_processes_equal_one_with_words_of_an_environment(processes, tmp_path):
    rewards = rewards_in(processes.torchrun(SCRIPT, tmp_path / "one", 8, "turns", processes=1))
    printed = processes.torchrun(SCRIPT, tmp_path / "two", 4, "turns")
    assert rewards_in(printed) == pytest.approx(rewards, abs=1e-5)
    same_weights(tmp_path / "one", tmp_path / "two", *PPO)
    processes.torchrun(SCRIPT, tmp_path / "careless", 4, "careless")
    with pytest.raises(AssertionError):
        same_weights(tmp_path / "one", tmp_path / "careless", *PPO)


@pytest.mark.slow
@pytest.mark.turn(6)
def test_two_processes_with_zero_equal_one_with_words_of_an_environment(processes, tmp_path):
    pytest.importorskip("deepspeed")
    rewards = rewards_in(processes.torchrun(SCRIPT, tmp_path / "one", 8, "turns", processes=1))
    printed = launch(SCRIPT.name, tmp_path / "two", 4, "turns", ROOT / "ds_configs" / "zero3.json")
    assert rewards_in(printed) == pytest.approx(rewards, abs=1e-5)
    same_weights(tmp_path / "one", tmp_path / "two", *PPO)


@pytest.fixture(scope="module")
def pretrained(processes, tmp_path_factory):
    """What a single process pretrains."""
    folder = tmp_path_factory.mktemp("pretrained")
    processes.torchrun(SCRIPT.parent / "pretrain_run.py", folder, processes=1)
    return folder


@pytest.mark.slow
def test_two_processes_pretrain_what_one_does(processes, pretrained, tmp_path):
    processes.torchrun(SCRIPT.parent / "pretrain_run.py", tmp_path)
    same_weights(pretrained, tmp_path, *PRETRAINING)


def a_row_lost(batch):
    batch["labels"][0] = -100


def a_row_seen_twice(batch):
    for values in batch.values():
        values[-1] = values[0]


@pytest.mark.slow
@pytest.mark.parametrize("fault", [a_row_lost, a_row_seen_twice])
def test_a_wrong_batch_is_more_than_rounding(tmp_path, monkeypatch, fault):
    whole, faulty = (build(str(tmp_path), save_strategy="no") for _ in range(2))
    whole.train()
    take = type(faulty.plan).__getitem__

    def batch_of_step(plan, step):
        batch = take(plan, step)
        if step == 15:
            fault(batch)
        return batch

    monkeypatch.setattr(type(faulty.plan), "__getitem__", batch_of_step)
    faulty.train()
    assert whole.state.global_step == faulty.state.global_step == PRETRAINING[1]
    with pytest.raises(AssertionError):
        assert_same_learning(faulty.model.state_dict(), whole.model.state_dict(), *PRETRAINING)


@pytest.mark.slow
@pytest.mark.turn(6)
@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_pretrain_with_zero_what_one_does(pretrained, tmp_path, stage):
    pytest.importorskip("deepspeed")
    launch("pretrain_run.py", tmp_path, ROOT / "ds_configs" / f"zero{stage}.json")
    same_weights(pretrained, tmp_path, *PRETRAINING)


@pytest.mark.slow
def test_two_processes_equal_one_with_every_term(processes, one, tmp_path):
    rewards = rewards_in(processes.torchrun(SCRIPT, tmp_path / "one", 8, "terms", processes=1))
    printed = processes.torchrun(SCRIPT, tmp_path / "two", 4, "terms")
    assert rewards_in(printed) == pytest.approx(rewards, abs=1e-5)
    same_weights(tmp_path / "one", tmp_path / "two", *PPO)
    with pytest.raises(AssertionError):
        same_weights(tmp_path / "one", one[0], *PPO)


@pytest.mark.slow
@pytest.mark.turn(6)
@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_with_zero_equal_one(one, tmp_path, stage):
    pytest.importorskip("deepspeed")
    folder, rewards = one
    printed = launch(SCRIPT.name, tmp_path, 4, ROOT / "ds_configs" / f"zero{stage}.json")
    assert rewards_in(printed) == pytest.approx(rewards, abs=1e-5)
    same_weights(folder, tmp_path, *PPO)


@pytest.fixture(scope="module")
def distilled(processes, tmp_path_factory):
    """What a single process distils."""
    folder = tmp_path_factory.mktemp("distilled")
    processes.torchrun(SCRIPT.parent / "distill_run.py", folder, 4, processes=1)
    return folder


@pytest.mark.slow
def test_two_processes_distil_what_one_does(processes, distilled, tmp_path):
    processes.torchrun(SCRIPT.parent / "distill_run.py", tmp_path, 2)
    same_weights(distilled, tmp_path, *DISTILLATION)


@pytest.mark.slow
@pytest.mark.turn(6)
def test_two_processes_distil_with_zero_what_one_does(distilled, tmp_path):
    pytest.importorskip("deepspeed")
    launch("distill_run.py", tmp_path, 2, ROOT / "ds_configs" / "zero2.json")
    same_weights(distilled, tmp_path, *DISTILLATION)


@pytest.mark.slow
def test_two_processes_equal_one_on_pictures(processes, tmp_path):
    """Prompts with no, one and two pictures, so that in some passes one process alone reads a picture."""
    script = SCRIPT.parent / "picture_run.py"
    processes.torchrun(script, tmp_path / "one", 8, processes=1)
    processes.torchrun(script, tmp_path / "two", 4)
    models = [AutoModelForImageTextToText.from_pretrained(tmp_path / name).state_dict() for name in ("two", "one")]
    assert_same_learning(*models, 1e-3, 4)


@pytest.mark.slow
@pytest.mark.turn(6)
def test_two_processes_with_zero_equal_one_on_pictures(processes, tmp_path):
    """The frozen reference is built while ZeRO-3 is on, and its tower with it."""
    pytest.importorskip("deepspeed")
    script = SCRIPT.parent / "picture_run.py"
    processes.torchrun(script, tmp_path / "one", 8, "halves", processes=1)
    launch(script.name, tmp_path / "two", 4, "halves", ROOT / "ds_configs" / "zero3.json")
    models = [AutoModelForImageTextToText.from_pretrained(tmp_path / name).state_dict() for name in ("two", "one")]
    assert_same_learning(*models, 1e-3, 4)
