"""A Python whose names last from call to call, in a process of its own within the limits of `python_tool`."""

import os
import select
import signal
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import NamedTuple

from hfllm.environments.limited_python import ASKS, FAILED, MOST_SAID, OK, frame
from hfllm.environments.python_tool import (
    ENVIRONMENT,
    CodeError,
    command_of,
    new_folder,
    read_output,
    reason_of,
    remove_folder,
    warn_of,
)
from hfllm.environments.side_by_side import cores
from hfllm.errors import one_line

# Seconds for an interpreter to begin, on a busy machine.
START_SECONDS = 60.0
# Seconds of CPU in all calls of a session together; each call is limited in wall-clock time.
MOST_SECONDS = 86400


class Said(NamedTuple):
    """What code came to.

    Args:
        printed: its output.
        value: of its last line, if this is an expression, as an interactive Python shows it; else an empty text.
    """

    printed: str
    value: str


class LimitedSession:
    """A limited Python whose names last from one run of code to the next.

    It begins with the first code. Code that exceeds a limit, or exits, ends it, and the next code begins another one.
    Between runs its process stands still.

    Args:
        seconds: of each run, in wall-clock time.
        megabytes: of memory.
        file_megabytes: of every written file, and of the printed output of a run.
        answer: answers what the code asks by `__ask__(text)`; by default it has nobody to ask.
    """

    def __init__(
        self,
        seconds: float = 5.0,
        megabytes: int = 512,
        file_megabytes: int = 1,
        answer: Callable[[str], str] | None = None,
    ):
        self.seconds, self._sizes, self._answer = seconds, (megabytes, file_megabytes), answer
        self._child: _Child | None = None

    def run(self, code: str, seconds: float | None = None) -> Said:
        """Run code in the session.

        Args:
            seconds: for this run, other than those of the session.

        Raises:
            CodeError: where the code fails.
            SessionEnded: where the session ends.
            NotBegunError: where the system has no room for its process.
        """
        if self._child is None:
            self._child = _Child.begin(*self._sizes)
        try:
            return self._child.run(code, self.seconds if seconds is None else seconds, self._answer)
        except _Ended as error:
            self.close()
            raise SessionEnded(f"{error}; what it knew is lost") from None
        except CodeError:
            raise
        # At Ctrl-C the code still runs, and its reply would be taken for that of the next run.
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the session, if one has begun."""
        child, self._child = self._child, None
        if child is not None:
            child.close()

    def __del__(self):
        # Python may be at its end, with half of its modules gone.
        with suppress(Exception):
            self.close()


class PythonSession:
    """An `environment_factory` whose tool `python` has a `LimitedSession` of its own in each episode.

    Args:
        seconds, megabytes, file_megabytes: see `LimitedSession`.
    """

    def __init__(self, seconds: float = 5.0, megabytes: int = 512, file_megabytes: int = 1):
        self._session = LimitedSession(seconds, megabytes, file_megabytes)

    def reset(self, **columns: object) -> None:
        """Begin an episode, without the names of the last one."""
        self._session.close()

    def python(self, code: str) -> str:
        """Run Python code and read what it prints, and what its last line is. Names last for the next call.

        Args:
            code: lines of Python.
        """
        return "".join(self._session.run(str(code)))

    # More of them at once would reach their limits of time by waiting for each other.
    python.max_threads = cores()


class NotBegunError(Exception):
    """The system has no room for a process, which is no fault of the code."""


class SessionEnded(CodeError):
    """A session has ended, with all that it knew."""


class _Ended(Exception):
    """A session's process has ended, or must be."""


def _error_of(said: str) -> CodeError:
    """Return the error that a session said, see `limited_python`."""
    names, _, message = said.partition("\n")
    words = one_line(": ".join(part for part in (names.partition(" ")[0], message) if part))
    return CodeError(words, names.split(), message)


# By process: its thread is not forked.
_starters: dict[int, ThreadPoolExecutor] = {}
_starting = threading.Lock()


def _starter() -> ThreadPoolExecutor:
    """Return the thread of this process that begins others."""
    with _starting:
        if os.getpid() not in _starters:
            _starters[os.getpid()] = ThreadPoolExecutor(1, thread_name_prefix="python-sessions")
        return _starters[os.getpid()]


class _Child:
    """The process of a session."""

    @classmethod
    def begin(cls, megabytes: int, file_megabytes: int) -> "_Child":
        """Return a new one, begun by a thread that lasts: the kernel ends a process with the thread that began it."""
        try:
            return _starter().submit(cls, megabytes, file_megabytes).result(START_SECONDS)
        except (OSError, RuntimeError, TimeoutError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise NotBegunError(f"no Python could be started: {reason}") from None

    def __init__(self, megabytes: int, file_megabytes: int):
        self._owner, temporary = os.getpid(), tempfile.TemporaryFile
        with ExitStack() as files:
            folder = new_folder()
            # Not a context manager, which a forked process would end where it lets go of it.
            files.callback(remove_folder, folder)
            self._printed, self._errors, self._verdict = (files.enter_context(temporary()) for _ in range(3))
            self._replies, its_replies = os.pipe()
            files.callback(os.close, self._replies)
            limits = (str(MOST_SECONDS), str(megabytes), str(file_megabytes))
            try:
                self._process = subprocess.Popen(
                    command_of(limits, self._verdict, str(its_replies)),
                    stdin=subprocess.PIPE,
                    stdout=self._printed,
                    stderr=self._errors,
                    cwd=folder,
                    env=ENVIRONMENT,
                    start_new_session=True,
                    pass_fds=(self._verdict.fileno(), its_replies),
                )
            finally:
                os.close(its_replies)
            os.set_blocking(self._process.stdin.fileno(), False)
            self._files, self._is_new = files.pop_all(), True

    def run(self, code: str, seconds: float, answer: Callable[[str], str] | None) -> Said:
        """Run code; see `LimitedSession.run`."""
        for file in (self._printed, self._errors):
            os.ftruncate(file.fileno(), 0)
            os.lseek(file.fileno(), 0, os.SEEK_SET)
        self._process.send_signal(signal.SIGCONT)
        if self._is_new:
            # Its start is no time of the code.
            self._ask("", time.monotonic() + START_SECONDS, START_SECONDS)
            self._is_new = False
            warn_of(self._verdict)
        end = time.monotonic() + seconds
        letter, value = self._ask(code, end, seconds)
        while letter == ASKS and answer is not None:
            letter, value = self._ask(answer(value), end, seconds)
        if letter not in (OK, FAILED):
            raise _Ended("it wrote to the pipe of the tool")
        self._process.send_signal(signal.SIGSTOP)
        if letter == FAILED:
            raise _error_of(value)
        return Said(read_output(self._printed), value)

    def _ask(self, text: str, end: float, seconds: float) -> tuple[int, str]:
        """Send a text, and return the letter and the text of the reply."""
        self._write(frame(text), end, seconds)
        head = self._read(9, end, seconds)
        length = struct.unpack("<Q", head[1:])[0]
        if length > 4 * MOST_SAID:
            raise _Ended("it wrote to the pipe of the tool")
        return head[0], self._read(length, end, seconds).decode("utf-8", "replace")

    def _write(self, data: bytes, end: float, seconds: float) -> None:
        pipe = self._process.stdin.fileno()
        try:
            while data:
                self._wait(pipe, select.POLLOUT, end, seconds)
                data = data[os.write(pipe, data) :]
        except BrokenPipeError:
            raise _Ended(self._last_words(seconds)) from None

    def _read(self, length: int, end: float, seconds: float) -> bytes:
        data = b""
        while len(data) < length:
            self._wait(self._replies, select.POLLIN, end, seconds)
            part = os.read(self._replies, length - len(data))
            if not part:
                raise _Ended(self._last_words(seconds))
            data += part
        return data

    @staticmethod
    def _wait(file: int, event: int, end: float, seconds: float) -> None:
        # Unlike `select`, for files of any number.
        waiting = select.poll()
        waiting.register(file, event)
        if not waiting.poll(1000 * max(0.0, end - time.monotonic())):
            raise _Ended(f"it ran longer than {seconds:g} seconds")

    def _last_words(self, seconds: float) -> str:
        with suppress(subprocess.TimeoutExpired):
            code = self._process.wait(1)
            return reason_of(code, read_output(self._errors), seconds) if code else "it exited"
        return "it closed the pipe of the tool"

    def close(self) -> None:
        """End the process, and remove its folder; a forked process has no part in it."""
        if self._owner != os.getpid():
            return
        self._process.kill()
        with suppress(OSError):
            self._process.stdin.close()
        self._process.wait()
        self._files.close()
