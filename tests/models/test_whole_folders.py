"""Folders appear whole or not at all, and what a killed process leaves is removed by the next one alone."""

import signal
import subprocess
import sys

import pytest

from hfllm.durable import OWNER_FILE, temporary_folder, whole_folder

HOLDS = """
import sys, time
from pathlib import Path
from hfllm.durable import temporary_folder
with temporary_folder(Path(sys.argv[1]), ".model.") as folder:
    (folder / "weights").write_text("half")
    print("holds", flush=True)
    time.sleep(60)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_it_appears_whole_and_keeps_hidden_files(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / ".hfllm.lock").write_text("held")
    with whole_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("all")
        assert names(tmp_path / "model") == [".hfllm.lock"]
    assert names(tmp_path / "model") == [".hfllm.lock", "weights"] and names(tmp_path) == ["model"]
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_or_not_at_all(error, tmp_path):
    with pytest.raises(type(error)), whole_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("half")
        raise error
    assert not names(tmp_path)


@pytest.mark.slow
def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    mine = tmp_path / ".model.backup"
    mine.mkdir()
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "holds\n"
        # While it lives it stays, and so does one of this process in another thread.
        with temporary_folder(tmp_path, ".model.") as outer, temporary_folder(tmp_path, ".model.") as inner:
            assert outer.is_dir() and inner.is_dir() and len(names(tmp_path)) == 4
        assert len(names(tmp_path)) == 2
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert len(names(tmp_path)) == 2
    # One of another name is not its business.
    with whole_folder(tmp_path / "other"):
        assert len(names(tmp_path)) == 3
    with whole_folder(tmp_path / "model") as folder:
        assert names(tmp_path) == sorted([".model.backup", "other", folder.name])
    assert names(tmp_path) == [".model.backup", "model", "other"]
    assert not (tmp_path / "model" / OWNER_FILE).exists()


def test_one_that_cannot_be_removed_does_no_harm(tmp_path, monkeypatch):
    left = tmp_path / ".model.aaaaaaaa"
    left.mkdir()
    (left / OWNER_FILE).touch()

    def read_only(*args, **kwargs):
        raise OSError("read-only")

    with monkeypatch.context() as patch:
        patch.setattr("os.open", read_only)
        with pytest.raises(OSError, match="read-only"), whole_folder(tmp_path / "model"):
            pass
    assert names(left) == [OWNER_FILE]
