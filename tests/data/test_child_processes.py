"""What a process has started ends with it, also when it is killed, and a worker that is killed is an error."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from hfllm.data.child_processes import LAUNCHER, WorkerEnded, Workers, be_launcher, end_with_launcher

ROOT = Path(__file__).parent.parent.parent
SPAWN = multiprocessing.get_context("spawn")
# Each prints the ids of the processes that have to end.
MULTIPROCESSING = """
import multiprocessing, os, time
from hfllm.data.child_processes import be_launcher, end_children_with_this_process
end_children_with_this_process()
if __name__ == "__main__":
    be_launcher()
    children = [multiprocessing.get_context(method).Process(target=time.sleep, args=(600,))
                for method in ("fork", "spawn", "forkserver", "fork")]
    for child in children:
        child.start()
    print(*(child.pid for child in children), flush=True)
    time.sleep(600)
"""
POOL = """
import multiprocessing, os, sys, time
from pathlib import Path
from hfllm.data.child_processes import Workers

def sleep(path):
    Path(path).write_text(str(os.getpid()))
    time.sleep(600)

if __name__ == "__main__":
    with Workers(2, multiprocessing.get_context("spawn")) as workers:
        workers.run(sleep, sys.argv[1:])
"""
# The second is a child of the first that does not end with it: a launcher's launcher, such as mpirun.
LAUNCHES = """
import os, subprocess, sys, time
from hfllm.data.child_processes import be_launcher, end_with_launcher
if sys.argv[1] == "launcher":
    be_launcher()
    subprocess.Popen([sys.executable, __file__, "rank"])
    subprocess.Popen(["sh", "-c", '"$0" "$1" rank; true', sys.executable, __file__])
else:
    end_with_launcher()
    print(os.getpid(), flush=True)
time.sleep(600)
"""


class Unreadable(Exception):
    """One that cannot be made again from what it keeps."""

    def __init__(self, one, other):
        super().__init__(f"of {one} and {other}")


def raise_unreadable(item):
    raise Unreadable(item, "more")


@pytest.fixture
def start(tmp_path):
    """Start Python with a script; it is killed at the end."""
    started = []

    def begin(script, *words):
        (tmp_path / "script.py").write_text(script)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(tmp_path / "script.py"), *map(str, words)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, start_new_session=True))
        return started[-1]

    yield begin
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()


def is_running(process):
    """Whether it runs: one that has ended may still have its number."""
    try:
        return subprocess.check_output(["ps", "-o", "stat=", "-p", str(process)], text=True)[0] != "Z"
    except subprocess.CalledProcessError:
        return False


def assert_all_end_with(process, others):
    assert all(map(is_running, others))
    process.kill()
    process.wait()
    give_up = time.monotonic() + 60
    while any(map(is_running, others)):
        assert time.monotonic() < give_up, others
        time.sleep(0.02)


@pytest.mark.slow
def test_the_children_of_a_killed_process_end(start):
    """By whatever way multiprocessing starts them: on Linux those of a data loader are forked, elsewhere spawned."""
    process = start(MULTIPROCESSING)
    assert_all_end_with(process, list(map(int, process.stdout.readline().split())))


@pytest.mark.slow
def test_the_workers_of_a_killed_process_end(start, tmp_path):
    notes = [tmp_path / name for name in "ab"]
    process = start(POOL, *notes)
    while not all(note.is_file() and note.read_text() for note in notes):
        assert process.poll() is None
        time.sleep(0.02)
    assert_all_end_with(process, [int(note.read_text()) for note in notes])


@pytest.mark.slow
def test_what_a_killed_launcher_has_launched_ends(start):
    process = start(LAUNCHES, "launcher")
    ranks = [int(process.stdout.readline()) for _ in range(2)]
    assert_all_end_with(process, ranks)


def test_a_launcher_that_had_ended_before_is_noticed(start):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()

    for host, code in (("elsewhere", None), (socket.gethostname(), 1)):
        os.environ[LAUNCHER] = f"{ended.pid}@{host}"
        try:
            process = start(LAUNCHES, "rank")
        finally:
            del os.environ[LAUNCHER]
        # That of another machine is none of this one.
        assert bool(process.stdout.readline()) == (code is None)
        assert code is None or process.wait() == code


def test_a_launcher_does_not_wait_for_itself(monkeypatch):
    monkeypatch.setenv(LAUNCHER, "")
    be_launcher()
    threads = threading.active_count()
    end_with_launcher()
    assert threading.active_count() == threads


def test_all_items_are_worked_on(tmp_path):
    folders = [tmp_path / str(number) for number in range(5)]
    with Workers(2, SPAWN, begin=partial(Path.mkdir, tmp_path / "begun", exist_ok=True)) as workers:
        workers.run(Path.mkdir, [])
        assert not multiprocessing.active_children()
        workers.run(Path.mkdir, folders)
        assert all(folder.is_dir() for folder in (*folders, tmp_path / "begun"))
        workers.run(Path.rmdir, folders)
        assert not any(folder.is_dir() for folder in folders) and len(multiprocessing.active_children()) == 2
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("work", "item", "said"), [(signal.raise_signal, 9, "signal 9"), (os._exit, 3, "code 3")])
def test_a_worker_that_ends_is_an_error(work, item, said):
    with Workers(1, SPAWN) as workers:
        with pytest.raises(WorkerEnded, match=rf"process \d+ (was killed by|ended with) {said}"):
            workers.run(work, [item])
        assert not multiprocessing.active_children()


@pytest.mark.slow
def test_errors_of_the_work_come_with_their_traceback():
    with Workers(1, SPAWN) as workers:
        with pytest.raises(ValueError, match="invalid literal") as caught:
            workers.run(int, ["1", "x", "2"])
        assert "child_processes.py" in caught.value.__notes__[0]
        # It begins again.
        with pytest.raises(RuntimeError, match="Unreadable: of 1 and more"):
            workers.run(raise_unreadable, [1])
        assert not multiprocessing.active_children()


def test_what_a_worker_cannot_unpickle_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(Path(__file__).parent)])
    with Workers(1, SPAWN) as workers, pytest.raises(ModuleNotFoundError, match="test_child_processes"):
        workers.run(raise_unreadable, [1])
