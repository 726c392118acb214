"""Which checkpoints are whole, as the libraries that read their files see it."""

import subprocess

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hfllm.outputs.checkpoints import (
    CHECKSUMS,
    checkpoints_in,
    damage_of,
    damaged_checkpoint,
    last_complete_checkpoint,
    missing_for_resuming,
    record_of,
    state_of,
    write_checksums,
)


@pytest.fixture
def folder(tmp_path):
    """An output folder with two whole checkpoints."""
    for step in (1, 2):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        save_file({"weight": torch.arange(9.0), "bias": torch.ones(1)}, checkpoint / "model.safetensors")
        torch.save({"step": step}, checkpoint / "optimizer.pt")
        (checkpoint / "trainer_state.json").write_text("{}")
    return tmp_path


WHOLE = {"as it was": lambda written: written}
DAMAGED = {
    "empty": lambda written: b"",
    "within the size of its header": lambda written: written[:5],
    "within its header": lambda written: written[:20],
    "behind its header": lambda written: written[:-20],
    "by a byte": lambda written: written[:-1],
    "too long by a byte": lambda written: written + b"\0",
    "written twice": lambda written: written + written,
    "no header": lambda written: written[:8] + b"\0" * (len(written) - 8),
}


@pytest.mark.parametrize("change", [*WHOLE, *DAMAGED])
def test_weights_are_whole_if_safetensors_reads_them(folder, change):
    file = folder / "checkpoint-2" / "model.safetensors"
    file.write_bytes({**WHOLE, **DAMAGED}[change](file.read_bytes()))
    if change in WHOLE:
        load_file(file)
        assert last_complete_checkpoint(folder) == str(folder / "checkpoint-2")
        return
    with pytest.raises(SafetensorError):
        load_file(file)
    with pytest.warns(UserWarning, match="checkpoint-2 is not complete"):
        assert last_complete_checkpoint(folder) == str(folder / "checkpoint-1")


def test_tensors_and_metadata_that_take_no_room_are_whole(folder):
    file = folder / "checkpoint-2" / "model.safetensors"
    for tensors in ({}, {"none": torch.zeros(0)}):
        save_file(tensors, file, metadata={"format": "pt"})
        assert last_complete_checkpoint(folder) == str(folder / "checkpoint-2")


def test_an_optimizer_file_that_was_cut_off_is_seen(folder):
    file = folder / "checkpoint-2" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(RuntimeError):
        torch.load(file)
    with pytest.warns(UserWarning, match="checkpoint-2 is not complete"):
        assert last_complete_checkpoint(folder) == str(folder / "checkpoint-1")


STATE = {
    "plain": (["optimizer.pt", "scheduler.pt"], ""),
    "FSDP, whole": (["optimizer.bin", "scheduler.pt"], "fsdp"),
    "FSDP, in parts": (["optimizer_0/0.distcp", "scheduler.pt"], "fsdp"),
    "DeepSpeed": (["global_step4/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"], "deepspeed"),
}


@pytest.mark.parametrize("kind", list(STATE))
def test_what_each_engine_needs_to_resume(tmp_path, kind):
    files, engine = STATE[kind]
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    assert missing_for_resuming(tmp_path) is None
    for _, other in STATE.values():
        assert (missing_for_resuming(tmp_path, other) is None) == (other == engine), other
    (tmp_path / files[-1]).unlink()
    for asked in (None, engine):
        assert missing_for_resuming(tmp_path, asked)


def test_checkpoints_are_ordered_by_their_steps(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-100", "checkpoint-best"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]


def test_weights_alone_cannot_be_resumed(folder):
    (folder / "checkpoint-2" / "optimizer.pt").unlink()
    assert missing_for_resuming(folder / "checkpoint-2") == "optimizer.pt"
    assert missing_for_resuming(folder / "checkpoint-1") == "scheduler.pt"
    assert record_of(state_of(folder / "checkpoint-1")) == {}


# ---- checksums ----


def test_checksums_are_those_of_the_usual_tool(folder):
    checkpoint = folder / "checkpoint-2"
    (checkpoint / "global_step2").mkdir()
    torch.save({}, checkpoint / "global_step2" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (checkpoint / "README.md").write_text("# A draft")
    (checkpoint / "éclair.jinja").write_text("{{ messages }}")
    write_checksums(checkpoint)
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict", CHECKSUMS], cwd=checkpoint, capture_output=True, text=True, check=True
    )
    names = {line.partition(":")[0] for line in checked.stdout.splitlines()}
    written = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert names == written - {CHECKSUMS, "README.md"}
    (checkpoint / "README.md").write_text("# Mine")
    (checkpoint / "notes.txt").write_text("mine")
    assert damage_of(checkpoint) is None


CHANGES = {
    "a bit in a part of the optimizer": ("global_step2/states.pt", lambda written: written[:-1] + b"\1"),
    "a bit": ("model.safetensors", lambda written: written[:-1] + b"\1"),
    "a number": ("trainer_state.json", lambda written: b"[]"),
    "no checksum": (CHECKSUMS, lambda written: b""),
    "half a checksum": (CHECKSUMS, lambda written: written[:30]),
    "half of them": (CHECKSUMS, lambda written: written[:100]),
    "another checksum": (CHECKSUMS, lambda written: b"0" * 64 + written[64:]),
    "no text": (CHECKSUMS, lambda written: b"\xff" + written[1:]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_formats_do_not_show_is_seen(folder, change):
    for checkpoint in (folder / "checkpoint-1", folder / "checkpoint-2"):
        (checkpoint / "global_step2").mkdir()
        (checkpoint / "global_step2" / "states.pt").write_bytes((checkpoint / "optimizer.pt").read_bytes())
        write_checksums(checkpoint)
    name, changed = CHANGES[change]
    file = folder / "checkpoint-2" / name
    file.write_bytes(changed(file.read_bytes()))
    with pytest.warns(UserWarning, match=r"checkpoint-2 is not complete \(.*(damaged|cannot be read)"):
        assert last_complete_checkpoint(folder) == str(folder / "checkpoint-1")
    assert str(folder / "checkpoint-2") in damaged_checkpoint(folder)


def test_older_checkpoints_and_those_of_others_have_none(folder):
    assert damage_of(folder / "checkpoint-2") is None and damaged_checkpoint(folder) is None
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-2")


@pytest.mark.parametrize("text", ["", "{", '{"step": ', "3", "\x00"])
def test_settings_that_are_cut_off_are_seen_without_checksums(folder, text):
    (folder / "checkpoint-2" / "config.json").write_text(text)
    with pytest.warns(UserWarning, match=r"checkpoint-2 is not complete \(config.json is damaged\)"):
        assert last_complete_checkpoint(folder) == str(folder / "checkpoint-1")
