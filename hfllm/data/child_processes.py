"""Processes that end with their starting process, however it ends, and work spread over several processes.

Linux kills a process when its parent ends (prctl with PR_SET_PDEATHSIG). Everywhere, and for a parent that had ended
before this request, a thread waits for the end of the parent, or of a pipe that only the parent writes to.
"""

import ctypes
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection, wait
from multiprocessing.process import current_process
from queue import SimpleQueue
from typing import Any

SET_PARENT_DEATH_SIGNAL = 1
# Seconds between two looks at whether a process still runs.
PAUSE = 0.2
# Nobody reads it.
ABANDONED = 1
# In the environment of processes launched by `hfllm`, and of processes launched by torchrun.
LAUNCHER, TORCHRUN = "HFLLM_LAUNCHER", "TORCHELASTIC_RUN_ID"


class WorkerEnded(RuntimeError):
    """A process with work to do has ended without an answer: it was killed, or has ended itself."""


# ---- the end of another process ----


def end_with(process: int) -> None:
    """End this process, at once and in any state, when another one ends; nothing more is written by then.

    If the other one is the parent, on Linux its thread that has started this process must live as long as it does.

    Args:
        process: id of the parent, or of another process of this machine. It may have ended already.
    """
    # Windows keeps the number of an ended parent, and a look at another process would interrupt it.
    if sys.platform == "win32":
        return
    is_child = os.getppid() == process
    if is_child and sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)

    def runs() -> bool:
        return os.getppid() == process if is_child else _exists(process)

    def watch() -> None:
        while runs():
            time.sleep(PAUSE)
        os._exit(ABANDONED)

    if not runs():
        print(f"error: process {process}, with which this one has to end, has ended", file=sys.stderr, flush=True)
        os._exit(ABANDONED)
    threading.Thread(target=watch, name="end_with", daemon=True).start()


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        # It is another user's.
        return True
    return True


def be_launcher() -> None:
    """Let each recipe started from now on, by this process or by its children, end when this one does.

    In a process that has called `end_with_launcher` this is the launcher from now on.
    """
    os.environ[LAUNCHER] = f"{os.getpid()}@{socket.gethostname()}"


def end_with_launcher() -> None:
    """End this process when the one that has called `be_launcher` ends, or a torchrun that has started it."""
    launcher, _, host = os.environ.get(LAUNCHER, "").partition("@")
    # Of several machines one has it.
    is_here = launcher.isdecimal() and host == socket.gethostname()
    # One process may run several recipes.
    if is_here and int(launcher) != os.getpid():
        end_with(int(launcher))
    if TORCHRUN in os.environ and not (is_here and os.getppid() == int(launcher)):
        end_with(os.getppid())


def end_children_with_this_process(package: str = "multiprocessing") -> None:
    """Let each process started by `multiprocessing` from now on, such as a data loader's, end when this one does.

    A spawned process imports the main module again: the modules imported there have to call this too, and the process
    that spawns it has to call `be_launcher`.

    Args:
        package: `multiprocess` for the package of this name, which datasets uses.
    """
    # It runs in forked processes, also by a server of forks, and holds its first argument weakly.
    import_module(f"{package}.util").register_after_fork(_end_with_starter, _watch_starter)
    # A spawned process does not know its parent yet.
    if getattr(current_process(), "_inheriting", False):
        end_with_launcher()


def _watch_starter(_: object) -> None:
    for package in ("multiprocessing", "multiprocess"):
        module = sys.modules.get(f"{package}.process")
        starter = module.parent_process() if module else None
        if starter is not None:
            threading.Thread(target=_end_with_starter, args=(starter,), name="end_with", daemon=True).start()


def _end_with_starter(starter: Any) -> None:
    starter.join()
    os._exit(ABANDONED)


# ---- work in several processes ----


class Workers:
    """Processes that work on items, several at a time; a context manager, which ends them.

    They end with this process, too. Each unpickles its function for each item, so that nothing of the last is left.

    Args:
        number: how many, at least 1; they are started when there is work for them.
        context: `multiprocessing.get_context("spawn")`, or that of `multiprocess`, which pickles more.
        begin: the first call in each process.
    """

    def __init__(self, number: int, context: Any, begin: Callable[[], object] | None = None):
        self.number, self.context, self.begin = number, context, begin
        self._processes: dict[Connection, Any] = {}

    def run(self, work: Callable[[Any], object], items: Sequence[Any]) -> None:
        """Call `work` with each item; they are begun in their order. The first error ends all processes.

        Raises:
            WorkerEnded: when a process was killed, or has ended itself.
            Exception: the exception of `work` or `begin`, with the traceback as a note.
        """
        waiting = iter(items)
        try:
            while len(self._processes) < min(self.number, len(items)):
                self._start()
            busy = [pipe for pipe in self._processes if self._hand_over(pipe, work, waiting)]
            while busy:
                for pipe in wait(busy):
                    self._check_answer(pipe)
                    if not self._hand_over(pipe, work, waiting):
                        busy.remove(pipe)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End all processes, in any state."""
        for pipe, process in self._processes.items():
            process.kill()
            pipe.close()
        while self._processes:
            self._processes.popitem()[1].join()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(self) -> None:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_serve, args=(theirs, os.getpid(), self.begin), daemon=True)
        process.start()
        # From now on the pipe ends when the process does.
        theirs.close()
        self._processes[ours] = process

    def _hand_over(self, pipe: Connection, work: Callable[[Any], object], waiting: Iterator[Any]) -> bool:
        """Hand the next item to a process; return whether there was one."""
        for item in waiting:
            try:
                pipe.send((work, item))
            except ConnectionError:
                raise self._ended(pipe) from None
            return True
        return False

    def _check_answer(self, pipe: Connection) -> None:
        try:
            error, where = pipe.recv()
        except (EOFError, ConnectionError):
            raise self._ended(pipe) from None
        if error is not None:
            error.add_note(where)
            raise error

    def _ended(self, pipe: Connection) -> WorkerEnded:
        process = self._processes[pipe]
        process.join()
        code = process.exitcode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return WorkerEnded(f"process {process.pid} {how}")


def _serve(pipe: Connection, parent: int, begin: Callable[[], object] | None) -> None:
    """Do the work from the pipe, until it or the parent ends."""
    # Ctrl-C reaches all processes of a terminal: the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(parent)
    requests: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, requests), daemon=True).start()
    while True:
        request, answer = requests.get(), (None, "")
        try:
            if begin is not None:
                begin()
                begin = None
            if isinstance(request, Exception):
                raise request
            work, item = request
            work(item)
        except Exception as error:
            answer = _sendable(error), traceback.format_exc()
        # It may hold much.
        request = work = item = None
        pipe.send(answer)


def _receive(pipe: Connection, requests: "SimpleQueue[Any]") -> None:
    """Hand on the work; without a parent nobody waits for the results."""
    while True:
        try:
            request = pipe.recv()
        except (EOFError, ConnectionError):
            os._exit(ABANDONED)
        except Exception as error:
            # It cannot be unpickled here.
            request = error
        requests.put(request)
        request = None


def _sendable(error: Exception) -> Exception:
    """Return the error, or one with its words where its class cannot be read again."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
