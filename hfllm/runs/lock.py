"""Keep two runs out of one output folder.

The lock is one of the system on a file in the folder: the system releases it when the process ends, however that ends.
It is held per process, so that processes which a run starts neither hold it nor release it.
"""

import atexit
import errno
import os
import socket
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from hfllm.errors import InputError

Given, Made = ParamSpec("Given"), TypeVar("Made")

try:
    import fcntl
except ImportError:  # Windows has no such locks.
    fcntl = None

LOCK_FILE = ".hfllm.lock"
# What a file system answers that has no locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

# The folders that this process holds: the open lock file of each, and the thread whose run it is.
_held: dict[str, tuple[int, threading.Thread]] = {}
# Those of them that were made for the lock.
_made: set[str] = set()
# A new process holds nothing, and must not remove what its parent holds.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_held.clear)


def lock(folder: str | Path) -> None:
    """Hold an output folder, which is made, until `release` or the end of this process.

    A thread that holds it already keeps it: a run that has failed may be repeated in the same process.

    Raises:
        InputError: when another run holds it, naming its process, or the folder cannot be written to.
    """
    path = Path(folder).resolve()
    if str(path) in _held:
        descriptor, owner = _held[str(path)]
        if owner is not threading.current_thread() and owner.is_alive():
            raise InputError(_refusal(folder, f"thread {owner.name} of this process"))
        _held[str(path)] = descriptor, threading.current_thread()
        return
    try:
        if not path.is_dir():
            path.mkdir(parents=True, exist_ok=True)
            _made.add(str(path))
        descriptor = _locked(folder, path / LOCK_FILE)
    except OSError as error:
        raise InputError(f"--output_dir {folder}: cannot be written to: {error.strerror or error}") from None
    if descriptor is not None:
        _held[str(path)] = descriptor, threading.current_thread()


def release(folder: str | Path) -> None:
    """Stop holding a folder, if this process does; one that was made for that and is still empty is removed."""
    path = Path(folder).resolve()
    descriptor, _ = _held.pop(str(path), (None, None))
    if descriptor is None:
        return
    with suppress(OSError):
        # Before it is unlocked: whoever opens it from now on makes a new one.
        (path / LOCK_FILE).unlink()
    os.close(descriptor)
    if str(path) in _made:
        _made.discard(str(path))
        with suppress(OSError):
            path.rmdir()


@atexit.register
def release_all() -> None:
    """Stop holding any folder."""
    for folder in list(_held):
        release(folder)


def releases_folders(main: Callable[Given, Made]) -> Callable[Given, Made]:
    """Return a recipe's `main` that releases the folders which it holds, however it ends."""

    @wraps(main)
    def released(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        before = set(_held)
        try:
            return main(*args, **kwargs)
        finally:
            for folder in _held.keys() - before:
                if _held[folder][1] is threading.current_thread():
                    release(folder)

    return released


def _locked(folder: str | Path, file: Path) -> int | None:
    """Return the descriptor of the locked file, `None` where there are no locks."""
    if fcntl is None:
        return None
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise InputError(_refusal(folder, holder or "another process")) from None
            if error.errno in NO_LOCKS:
                warnings.warn(f"{folder}: no locks here: nothing keeps a second run out of it", stacklevel=3)
                return None
            raise
        # The run that held it may have removed it in the meantime.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                return descriptor
        os.close(descriptor)


def _refusal(folder: str | Path, holder: str) -> str:
    return f"--output_dir {folder}: another run is writing there ({holder}): wait for its end or choose another folder"
