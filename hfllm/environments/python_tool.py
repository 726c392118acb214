"""A tool that runs Python code in a process of its own, within limits."""

import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from hfllm.environments.side_by_side import cores

CHILD = Path(__file__).with_name("limited_python.py")
# Numerical libraries would start threads, forbidden by the limits.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
# The same order in sets of texts each time, so that a resumed run reads the same.
ENVIRONMENT |= {"PYTHONHASHSEED": "0"}
MOST_READ = 2**20


class CodeError(Exception):
    """An error in the code of a policy.

    Args:
        words: what the policy reads.
        names: of the error's classes, the nearest first, where they are known.
        message: of the error.
    """

    def __init__(self, words: str, names: Sequence[str] = (), message: str = ""):
        super().__init__(words)
        self.names, self.message = list(names), message


def python_within(seconds: float = 5.0, megabytes: int = 512, file_megabytes: int = 1) -> Callable[[str], str]:
    """Return a tool `python(code)`, which runs code in a fresh interpreter and returns its printed output.

    The interpreter starts in an empty temporary folder with an empty environment. docs/reference/tools.md
    lists its abilities and limits.

    Args:
        seconds: of CPU, and of wall-clock time.
        megabytes: of memory.
        file_megabytes: of every written file, and of the printed output.
    """

    def python(code: str) -> str:
        """Run Python code and read what it prints.

        Args:
            code: a program, which prints its results.
        """
        limits = [f"{seconds:g}", str(megabytes), str(file_megabytes)]
        temporary = tempfile.TemporaryFile
        with working_folder() as folder, temporary() as printed, temporary() as errors, temporary() as verdict:
            try:
                done = subprocess.run(
                    command_of(limits, verdict),
                    input=str(code).encode("utf-8", "replace"),
                    stdout=printed,
                    stderr=errors,
                    cwd=folder,
                    env=ENVIRONMENT,
                    timeout=seconds,
                    start_new_session=True,
                    pass_fds=(verdict.fileno(),),
                )
            except subprocess.TimeoutExpired:
                raise CodeError(f"it ran longer than {seconds:g} seconds") from None
            warn_of(verdict)
            if done.returncode:
                raise CodeError(reason_of(done.returncode, read_output(errors), seconds))
            return read_output(printed)

    # More programs at once than cores would reach their limits of time by waiting for each other.
    python.max_threads = cores()
    return python


def command_of(limits: Sequence[str], verdict: IO[bytes], *more: str) -> list[str]:
    """Return the command of a limited interpreter.

    Args:
        limits: as texts, see `limited_python`.
        verdict: the file for what the kernel does not hold.
        more: further arguments.
    """
    # The verdict, the list of limits not held by the kernel, has a file of its own, never open in the code.
    own = [str(verdict.fileno()), str(os.getpid())]
    return [sys.executable, "-P", "-s", "-B", "-X", "utf8", str(CHILD), *limits, *own, *more]


def warn_of(verdict: IO[bytes]) -> None:
    """Warn of limits that the kernel does not hold."""
    if missing := read_output(verdict).partition("\n")[0]:
        words = f"python tool: the kernel does not limit {missing} here (docs/reference/tools.md)"
        warnings.warn(words, stacklevel=3)


@contextmanager
def working_folder() -> Iterator[str]:
    """Make a temporary folder, and remove it with all the code's files in it."""
    folder = new_folder()
    try:
        yield folder
    finally:
        remove_folder(folder)


def new_folder() -> str:
    """Make a temporary folder for code."""
    return tempfile.mkdtemp(prefix="python-tool-")


def remove_folder(folder: str) -> None:
    """Remove a folder with all that code has put there."""
    # Folders may be nested more deeply than a path is long: a folder is moved up before it is emptied.
    waiting = [folder]
    for count, path in enumerate(waiting):
        with suppress(OSError):
            os.chmod(path, 0o700)
            for number, entry in enumerate(list(os.scandir(path))):
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(f"{folder}-{count}-{number}")
                    os.rename(entry.path, waiting[-1])
                else:
                    os.unlink(entry.path)
            os.rmdir(path)


def read_output(file: IO[bytes]) -> str:
    """Return the text of a file that code wrote to."""
    with suppress(ImportError, OSError):
        import fcntl  # not on Windows

        # Its flags are those of the code's own descriptor, which may allow only reading whole pages.
        fcntl.fcntl(file, fcntl.F_SETFL, 0)
    file.seek(0)
    return file.read(MOST_READ).decode("utf-8", "replace")


def reason_of(code: int, errors: str, seconds: float) -> str:
    """Return in a line why the code failed: its error, or the signal that ended it."""
    if code == -signal.SIGXCPU:
        return f"it ran longer than {seconds:g} seconds"
    if code < 0:
        has_name = -code in set(signal.Signals)
        return f"it was ended by {signal.Signals(-code).name if has_name else f'signal {-code}'}"
    lines = errors.strip().splitlines()
    return lines[-1] if lines else f"it exited with {code}"


python = python_within()
