"""Recipes that SIGTERM ends save first, and go on to the weights of a run that was not interrupted."""

import os
import signal
from functools import cache
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

from hfllm.errors import InputError
from hfllm.outputs.checkpoints import last_complete_checkpoint
from hfllm.trainers.mixins import TERMINATED, check_shards

FLAGS = {
    "pretrain": [],
    "packed": ["--packing", "true", "--max_length", "64", "--max_steps", "-1", "--total_tokens", "3200"],
    "sft": ["--gradient_accumulation_steps", "2"],
    "reward": ["--on_policy_fraction", "0", "--save_steps", "3"],
    "rlhf": ["--reward_funcs", "gold", "--num_mini_batches", "2", "--num_ppo_epochs", "1", "--max_steps", "5"],
}


class Terminate(TrainerCallback):
    """A scheduler that gives notice while a step is under way."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def run_in(tiny, base):
    def make(stage, folder, *flags):
        recipe = import_module(stage.replace("packed", "pretrain"))
        words = ["--config", tiny[recipe.__name__], *FLAGS[stage], "--output_dir", str(folder), *flags]
        if recipe.__name__ != "pretrain":
            words += ["--model_name_or_path", str(base)]
        recipe.main(*recipe.parse(words))

    return make


@pytest.fixture(scope="module")
def whole(run_in, tmp_path_factory):
    """The folder of a run of a stage that nothing interrupted, made once."""

    @cache
    def make(stage):
        folder = tmp_path_factory.mktemp(stage)
        run_in(stage, folder)
        return folder

    return make


@pytest.fixture
def run(run_in, tmp_path):
    return lambda stage, folder, *flags: run_in(stage, tmp_path / folder, *flags)


def terminated(run, monkeypatch, step, *arguments):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr("transformers.trainer.DEFAULT_CALLBACKS", [*DEFAULT_CALLBACKS, Terminate(step)])
        run(*arguments, "--enable_jit_checkpoint", "true")
    assert ended.value.code == TERMINATED == 143


def assert_same_weights(one, other):
    files = sorted(path.name for path in one.glob("*.safetensors"))
    assert files and files == sorted(path.name for path in other.glob("*.safetensors"))
    for file in files:
        expected, actual = load_file(one / file), load_file(other / file)
        assert expected.keys() == actual.keys()
        for name, value in expected.items():
            assert torch.equal(value, actual[name]), f"{file}: {name}"


# Stock training, as that of reward models.
SLOW = {"pretrain": pytest.mark.slow, "sft": pytest.mark.slow}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [pytest.param(stage, marks=SLOW.get(stage, ())) for stage in FLAGS])
def test_sigterm_saves_and_the_next_run_goes_on_to_the_same_weights(run, whole, tmp_path, monkeypatch, capfd, stage):
    handler = signal.getsignal(signal.SIGTERM)
    terminated(run, monkeypatch, 2, stage, "cut")
    assert "SIGTERM: saved step 3 in" in capfd.readouterr().err
    assert last_complete_checkpoint(tmp_path / "cut") == str(tmp_path / "cut" / "checkpoint-3")
    # It is not taken for a run that has finished.
    assert not (tmp_path / "cut" / "report.json").exists()
    assert signal.getsignal(signal.SIGTERM) is handler
    run(stage, "cut", "--resume_from_checkpoint", "auto")
    assert_same_weights(whole(stage), tmp_path / "cut")


@pytest.mark.slow
def test_auto_begins_anew_where_there_is_nothing_to_go_on_from(run, whole, tmp_path):
    (tmp_path / "auto" / "checkpoint-4").mkdir(parents=True)
    with pytest.warns(UserWarning, match="checkpoint-4 is not complete"):
        run("sft", "auto", "--resume_from_checkpoint", "auto")
    assert_same_weights(whole("sft"), tmp_path / "auto")


@pytest.mark.slow
def test_what_is_terminated_in_its_last_step_is_not_trained_further(run, whole, tmp_path, monkeypatch):
    terminated(run, monkeypatch, 3, "sft", "cut")
    assert last_complete_checkpoint(tmp_path / "cut") == str(tmp_path / "cut" / "checkpoint-4")
    run("sft", "cut", "--resume_from_checkpoint", "auto")
    assert (tmp_path / "cut" / "report.json").is_file()
    assert_same_weights(whole("sft"), tmp_path / "cut")


def test_a_checkpoint_of_weights_alone_is_refused(run):
    with pytest.raises(InputError, match="enable_jit_checkpoint with save_only_model"):
        run("sft", "out", "--enable_jit_checkpoint", "true", "--save_only_model", "true")


def test_deepspeed_goes_on_with_as_many_processes(tmp_path):
    shards = tmp_path / "global_step4"
    shards.mkdir()
    for rank in range(2):
        (shards / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    plugin = SimpleNamespace(deepspeed_config={})
    check_shards(str(tmp_path), SimpleNamespace(deepspeed_plugin=plugin, world_size=2))
    with pytest.raises(InputError, match=r"was saved by 2 processes of DeepSpeed .* this run has 4"):
        check_shards(str(tmp_path), SimpleNamespace(deepspeed_plugin=plugin, world_size=4))
    with pytest.raises(InputError, match="was saved by 0 processes"):
        check_shards(str(shards), SimpleNamespace(deepspeed_plugin=plugin, world_size=1))
    plugin.deepspeed_config["checkpoint"] = {"load_universal": True}
    check_shards(str(tmp_path), SimpleNamespace(deepspeed_plugin=plugin, world_size=4))
