"""A folder has one run at a time, also when a run has been killed."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from hfllm.durable import whole_folder
from hfllm.errors import InputError
from hfllm.outputs.ownership import refuse_foreign_files
from hfllm.runs.lock import LOCK_FILE, join, lock, owner_of, release, release_all, releases_folders

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


@pytest.fixture
def member(tmp_path):
    """A run's process that has been killed, and one that it had started and that has joined its lock: which one acts.

    A byte sent to it lets it release the folder, a second one ends it.
    """
    asks, answers = os.pipe(), os.pipe()
    run = os.fork()
    if not run:
        lock(tmp_path / "out")
        owner = owner_of(tmp_path / "out")
        if not os.fork():
            os.setsid()
            join(tmp_path / "out", owner)
            os.write(answers[1], f"{os.getpid()}\n{owner}".encode())
            os.read(asks[0], 1)
            release_all()
            os.write(answers[1], b"released")
            os.read(asks[0], 1)
            os._exit(0)
        signal.pause()
    process, _, owner = os.read(answers[0], 400).decode().partition("\n")
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    yield SimpleNamespace(process=int(process), run=run, owner=owner, tell=asks[1], hear=answers[0])
    with suppress(ProcessLookupError):
        os.kill(int(process), signal.SIGKILL)
    for descriptor in (*asks, *answers):
        os.close(descriptor)


def test_the_last_process_of_a_killed_run_keeps_others_out(member, tmp_path, monkeypatch):
    monkeypatch.setattr("hfllm.runs.lock.PATIENCE_WITH_MEMBERS", 0)
    for _ in range(2):
        with pytest.raises(InputError, match=rf"is writing there \(what process {member.run} on \S+ has started\)"):
            lock(tmp_path / "out")
    os.write(member.tell, b"1")
    assert os.read(member.hear, 20) == b"released"
    assert not (tmp_path / "out" / LOCK_FILE).exists()
    lock(tmp_path / "out")


@pytest.mark.slow
def test_a_run_waits_for_the_last_process_of_a_killed_one(member, tmp_path):
    thread = threading.Timer(0.1, os.kill, (member.process, signal.SIGKILL))
    thread.start()
    lock(tmp_path / "out")
    thread.join()
    assert owner_of(tmp_path / "out") != member.owner


def test_a_run_waits_for_another_that_is_ending(holder, tmp_path, monkeypatch):
    monkeypatch.setattr("hfllm.runs.lock.PATIENCE", 60)
    thread = threading.Timer(0.1, holder.kill)
    thread.start()
    lock(tmp_path / "out")
    thread.join()


def in_a_child(function):
    """Call a function in a fork of this process, where it must not fail."""
    child = os.fork()
    if not child:
        try:
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.slow
def test_nobody_joins_a_run_that_has_ended(member, tmp_path):
    os.kill(member.process, signal.SIGKILL)
    lock(tmp_path / "out")
    later = owner_of(tmp_path / "out")
    refused = "the run that this process belongs to has ended"

    def late():
        with pytest.raises(InputError, match=refused):
            join(tmp_path / "out", member.owner)
        # Another machine's file is another one, where the disk is its own.
        join(tmp_path / "out", member.owner.replace(socket.gethostname(), "elsewhere"))
        assert owner_of(tmp_path / "out") is None
        join(tmp_path / "out", None)
        join(tmp_path / "out", later)
        assert owner_of(tmp_path / "out") == later
        with pytest.raises(InputError, match=refused):
            join(tmp_path / "none", later)

    in_a_child(late)
    # That child has not released it.
    release(tmp_path / "out")
    assert not (tmp_path / "out" / LOCK_FILE).exists()


def test_a_run_that_ends_before_what_it_has_started_leaves_the_lock_to_that(tmp_path, monkeypatch):
    monkeypatch.setattr("hfllm.runs.lock.TRIES", 1)
    monkeypatch.setattr("hfllm.runs.lock.PATIENCE_WITH_MEMBERS", 0)
    lock(tmp_path / "out")
    owner = owner_of(tmp_path / "out")
    joined, goes_on = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        join(tmp_path / "out", owner)
        os.write(joined[1], b"1")
        os.read(goes_on[0], 1)
        release_all()
        os._exit(0)
    os.read(joined[0], 1)
    release(tmp_path / "out")
    with pytest.raises(InputError, match="is writing there"):
        lock(tmp_path / "out")
    os.write(goes_on[1], b"1")
    os.waitpid(child, 0)
    assert not (tmp_path / "out" / LOCK_FILE).exists()
    lock(tmp_path / "out")


@pytest.mark.slow
def test_what_the_file_says_is_not_locked(member, tmp_path):
    """Where locks keep readers out, too, as on Windows shares, others have to read who holds it."""

    def other():
        with (tmp_path / "out" / LOCK_FILE).open("r+") as stream:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB, 400, 0)
        # What earlier versions lock, all of it, is locked.
        with (tmp_path / "out" / LOCK_FILE).open("r+") as stream, pytest.raises(OSError):
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)

    in_a_child(other)
    os.kill(member.process, signal.SIGKILL)
    lock(tmp_path / "out")
    in_a_child(other)


def refuse_every_other(folder):
    """Let another process try to lock a folder that this one holds."""

    def other():
        with pytest.raises(InputError, match=f"is writing there \\(process {os.getppid()} on"):
            lock(folder)

    in_a_child(other)


def test_a_lock_whose_file_was_read_is_taken_again(tmp_path, monkeypatch):
    monkeypatch.setattr("hfllm.runs.lock.PATIENCE", 0)
    lock(tmp_path / "out")
    owner = owner_of(tmp_path / "out")
    # It reads the lock's file.
    refuse_foreign_files(tmp_path / "out", "sft", writes_card=True)
    lock(tmp_path / "out")
    assert owner_of(tmp_path / "out") == owner
    refuse_every_other(tmp_path / "out")


@pytest.mark.slow
def test_a_lock_that_another_run_has_had_since_is_a_new_one(tmp_path, monkeypatch):
    monkeypatch.setattr("hfllm.runs.lock.PATIENCE", 0)
    lock(tmp_path / "out")
    owner = owner_of(tmp_path / "out")
    (tmp_path / "out" / LOCK_FILE).read_text()
    in_a_child(lambda: (lock(tmp_path / "out"), release_all()))
    lock(tmp_path / "out")
    assert owner_of(tmp_path / "out") != owner
    refuse_every_other(tmp_path / "out")


def test_a_lock_stays_when_a_whole_folder_takes_the_place_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("hfllm.runs.lock.PATIENCE", 0)
    # As it waits for files outside of tests.
    monkeypatch.setattr("hfllm.durable._sync", lambda path, flags: os.close(os.open(path, flags)))
    lock(tmp_path / "out")
    with whole_folder(tmp_path / "out") as folder:
        (folder / "weights").touch()
    refuse_every_other(tmp_path / "out")


def test_a_file_that_is_removed_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    """The run that held it ends between opening and locking: a lock on a file without a name keeps nobody out."""
    lockf, removed = fcntl.lockf, []

    def slow(descriptor, *how):
        if not removed:
            removed.append((tmp_path / LOCK_FILE).unlink())
        return lockf(descriptor, *how)

    monkeypatch.setattr(fcntl, "lockf", slow)
    lock(tmp_path)
    assert removed and (tmp_path / LOCK_FILE).read_text() == owner_of(tmp_path)
    release(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--output_dir .*file/out: cannot be written to: Not a directory"):
        lock(tmp_path / "file" / "out")
