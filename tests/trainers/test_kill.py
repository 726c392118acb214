"""A run that is killed at random moments, also while it saves, ends with the bits of one that is not."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hfllm.outputs.checkpoints import last_complete_checkpoint

SCRIPT = Path(__file__).parent / "kill_run.py"


FILES = {"ppo": ["model.safetensors", "value_head.safetensors"], "pretrain": ["model.safetensors"]}
FILES["pictures"] = FILES["ppo"]


@pytest.mark.slow
@pytest.mark.turn(6)
@pytest.mark.parametrize("kind", ["ppo", "pretrain", "pictures"])
def test_kills_change_nothing(processes, tmp_path, kind):
    kills = 10
    printed = processes.run(SCRIPT, kind, tmp_path, 1, kills)
    seen = json.loads(next(line for line in printed.splitlines() if line.startswith("RESULT"))[7:])
    assert seen["kills"] == kills
    assert seen["while_saving"] >= 1
    assert seen["files"] == FILES[kind]
    assert seen["different"] == 0


@pytest.mark.parametrize("damage", ["missing", "cut off", "critic cut off"])
def test_a_checkpoint_that_was_not_finished_is_skipped_with_a_warning(tmp_path, damage):
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-notes").mkdir()
    state = tmp_path / "checkpoint-100" / "trainer_state.json"
    if damage == "critic cut off":
        critic = tmp_path / "checkpoint-100" / "value_model" / "model.safetensors"
        critic.parent.mkdir()
        save_file({"weight": torch.zeros(9)}, critic)
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")
        os.truncate(critic, critic.stat().st_size - 4)
    else:
        state.unlink() if damage == "missing" else state.write_text('{"epoch": 0.')
    with pytest.warns(UserWarning, match="checkpoint-100 is not complete"):
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert last_complete_checkpoint(tmp_path / "nothing") is None
