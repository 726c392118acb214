"""What is renamed to its name is on the disk by then: files first, then the folder that has the name."""

import os
from pathlib import Path

import pytest

from hfllm import durable
from hfllm.durable import whole_folder
from hfllm.federation.updates import replace_tensors
from hfllm.outputs.checkpoints import CHECKSUMS, write_checksums
from hfllm.outputs.report import write_atomically


@pytest.fixture
def done(monkeypatch):
    """What was waited for and renamed, in order; a file of the latter by its new name."""
    steps, replace = [], os.replace

    def renamed(source, target):
        steps.append(("renamed", Path(target).name))
        replace(source, target)

    def synced(descriptor):
        steps.append(("synced", os.readlink(f"/proc/self/fd/{descriptor}")))

    def sync(path, flags):
        descriptor = os.open(path, flags)
        os.fsync(descriptor)
        os.close(descriptor)

    # The tests' own process does not wait for the disk.
    monkeypatch.setattr(durable, "_sync", sync)
    monkeypatch.setattr("os.fsync", synced)
    monkeypatch.setattr("os.replace", renamed)
    return steps


def test_a_file_is_on_the_disk_before_its_name_and_then_the_name_is(tmp_path, done):
    write_atomically(tmp_path / "report.json", "{}")
    (first, file), second, third = done
    assert first == "synced" and Path(file).parent == tmp_path and Path(file).name != "report.json"
    assert [second, third] == [("renamed", "report.json"), ("synced", str(tmp_path))]
    del done[:]
    replace_tensors(tmp_path / "state.safetensors", {})
    unfinished = str(tmp_path / ".state.safetensors.tmp")
    assert done == [("synced", unfinished), ("renamed", "state.safetensors"), ("synced", str(tmp_path))]


def test_a_folder_is_on_the_disk_with_all_that_it_holds(tmp_path, done):
    with whole_folder(tmp_path / "model") as folder:
        (folder / "inner").mkdir()
        for name in ("a", "inner/b"):
            (folder / name).write_text(name)
        (folder / "link").symlink_to("/dev/null")
        expected = {str(path) for path in (folder, folder / "inner", folder / "a", folder / "inner/b")}
    at = done.index(("renamed", "model"))
    assert {path for step, path in done[:at] if step == "synced"} == expected
    assert done[at + 1 :] == [("synced", str(tmp_path))]


def test_checksums_follow_what_they_are_of(tmp_path, done):
    checkpoint = tmp_path / "checkpoint-2"
    (checkpoint / "global_step2").mkdir(parents=True)
    files = [checkpoint / "trainer_state.json", checkpoint / "global_step2" / "optim.pt"]
    for file in files:
        file.write_text("{}")
    write_checksums(checkpoint)
    at = done.index(("renamed", CHECKSUMS))
    waited = {path for step, path in done[:at] if step == "synced"}
    assert {*map(str, files), str(checkpoint), str(checkpoint / "global_step2"), str(tmp_path)} <= waited
    assert done[at + 1 :] == [("synced", str(checkpoint))]


def test_a_folder_that_cannot_be_waited_for_is_no_error_and_a_file_is(tmp_path, monkeypatch):
    def refuse(path, flags):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(durable, "_sync", refuse)
    durable.sync_folder(tmp_path)
    (tmp_path / "a").write_text("a")
    with pytest.raises(OSError, match="Invalid argument"):
        durable.replace(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()
