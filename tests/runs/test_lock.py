"""A folder has one run at a time, also when a run has been killed."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hfllm.errors import InputError
from hfllm.runs.lock import LOCK_FILE, lock, release, release_all, releases_folders

ROOT = Path(__file__).parent.parent.parent
HOLD = """
import os, sys
from hfllm.runs.lock import lock
lock(sys.argv[1])
child = os.fork()
if child == 0:
    os.read(0, 1)
    os._exit(0)
print("held", flush=True)
os.read(0, 1)
"""


@pytest.fixture(autouse=True)
def nothing_held():
    yield
    release_all()


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder `out`, and has a child."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def test_another_process_is_named_and_kept_out_until_it_is_killed(holder, tmp_path):
    out = tmp_path / "out"
    for _ in range(2):
        with pytest.raises(InputError, match=rf"another run is writing there \(process {holder.pid} on \S+\)"):
            lock(out)
    lock(tmp_path)
    lock(out / "sft")
    holder.kill()
    holder.wait()
    # Its child has not ended, and its file is still there.
    assert (out / LOCK_FILE).exists()
    lock(out)
    assert f"process {os.getpid()} on" in (out / LOCK_FILE).read_text()


def test_a_run_may_be_repeated_in_its_process_and_another_thread_may_not_write(tmp_path):
    lock(tmp_path / "out")
    lock(tmp_path / "out" / ".." / "out")
    refused = []

    def second():
        try:
            lock(tmp_path / "out")
        except InputError as error:
            refused.append(str(error))

    thread = threading.Thread(target=second)
    thread.start()
    thread.join()
    assert len(refused) == 1 and "of this process" in refused[0]
    release(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    thread = threading.Thread(target=second)
    thread.start()
    thread.join()
    assert len(refused) == 1
    # That thread has ended without releasing it.
    lock(tmp_path / "out")


def test_what_is_released_leaves_nothing_but_what_was_written(tmp_path):
    lock(tmp_path / "out")
    (tmp_path / "out" / "file").touch()
    (tmp_path / "mine").mkdir()
    lock(tmp_path / "mine")
    release_all()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["mine", "out", "out/file"]
    release(tmp_path / "out")


def test_a_recipe_that_fails_releases_what_it_holds(tmp_path):
    @releases_folders
    def main(fails):
        """A recipe."""
        lock(tmp_path / "in")
        if fails:
            raise KeyboardInterrupt
        return fails

    assert main.__doc__ == "A recipe."
    lock(tmp_path / "outside")
    with pytest.raises(KeyboardInterrupt):
        main(True)
    assert main(False) is False
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]
    assert (tmp_path / "outside" / LOCK_FILE).exists()


def test_a_child_neither_holds_nor_releases(tmp_path):
    lock(tmp_path / "out")
    child = os.fork()
    if child == 0:
        try:
            release_all()
            lock(tmp_path / "out")
        except InputError:
            os._exit(7)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert (tmp_path / "out" / LOCK_FILE).exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--output_dir .*file/out: cannot be written to: Not a directory"):
        lock(tmp_path / "file" / "out")
