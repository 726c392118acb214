"""Pretrain, sft, reward and rlhf on two processes of every engine that runs on a CPU: what one process learns.

Losses and weights to 1e-5 on the same global batch in more passes; checkpoints that go on; models saved whole.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from tolerances import assert_same_learning
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

ROOT = Path(__file__).parent.parent.parent
RECIPES = ["pretrain", "continue", "sft", "reward", "rlhf"]
# accelerate's files, and what goes on from a checkpoint: of the same engine, or of a single process.
ENGINES = {
    "ddp": {"pretrain": "one", "sft": "one", "reward": "one", "rlhf": "own"},
    "zero1": {"sft": "own"},
    "zero2": {"pretrain": "own", "reward": "own"},
    "zero3": {"sft": "own", "rlhf": "own"},
    # A minute of compilation on a machine that has not run it.
    "zero3_offload_cpu": {"continue": "own"},
}
# ZeRO-3 draws the weights of a new model in another order; of the others, one is enough that has pretrained twice.
LEFT_OUT = {"zero3": "pretrain", "zero3_offload_cpu": "pretrain", "zero1": "continue", "zero2": "continue"}


def launch(launcher, *arguments):
    result = subprocess.run(
        [sys.executable, *launcher, "tests/recipes/engines_run.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The models of a single process."""
    folder = tmp_path_factory.mktemp("one")
    launch([], folder, folder, *RECIPES)
    return folder


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def weights(folder):
    """What is loaded of a saved model, every weight of which has to be there."""
    is_scorer = json.loads((folder / "config.json").read_text())["architectures"][0].endswith("Classification")
    kind = AutoModelForSequenceClassification if is_scorer else AutoModelForCausalLM
    model, found = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    head = folder / "value_head.safetensors"
    return {**model.state_dict(), **(load_file(head) if head.exists() else {})}


def assert_same(expected, actual):
    assert len(losses(actual)) == 4
    assert losses(actual) == pytest.approx(losses(expected), abs=1e-5)
    assert_same_learning(weights(actual), weights(expected), learning_rate=1e-3, steps=4)


@pytest.mark.slow
@pytest.mark.turn(3)
@pytest.mark.parametrize("engine", list(ENGINES))
def test_two_processes_learn_what_one_does(one, tmp_path, engine):
    values = yaml.safe_load((ROOT / "accelerate_configs" / f"{engine}.yaml").read_text())
    if values["distributed_type"] == "DEEPSPEED":
        pytest.importorskip("deepspeed")
    folders = {"one": one, "own": tmp_path}
    resumed = [f"{recipe}:{folders[whose] / recipe}" for recipe, whose in ENGINES[engine].items()]
    launcher = ["-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{engine}.yaml"]
    launcher += ["--num_processes=2", "--main_process_port=0", "--mixed_precision=no", "--dynamo_backend=no"]
    recipes = [recipe for recipe in RECIPES if recipe != LEFT_OUT.get(engine)]
    launch(launcher, tmp_path, one, *recipes, *resumed)
    for recipe in recipes:
        assert_same(one / recipe, tmp_path / recipe)
    for recipe in ENGINES[engine]:
        assert_same(one / recipe, tmp_path / f"{recipe}-resumed")
