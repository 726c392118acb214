"""Keep two runs out of one output folder.

The lock is a system lock on a file in the folder: the system releases it when the process ends, for any reason. It is
held per process, so processes started by a run, such as a data loader's workers, neither hold nor release it, and by
every process writing to the folder: the locking process has one byte of the file, processes that `join` it share the
next. So no run begins before the last process of a killed one has ended.
"""

import atexit
import errno
import os
import secrets
import socket
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

from hfllm.errors import InputError
from hfllm.outputs.ownership import LOCK_FILE, unclaim_empty

Given, Made = ParamSpec("Given"), TypeVar("Made")

try:
    import fcntl
except ImportError:  # Windows has no such locks.
    fcntl = None

# The error of a file system without locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
# The error of a held lock.
HELD = (errno.EACCES, errno.EAGAIN)
# The bytes of the file, far behind its text: on Windows shares no other process can read locked bytes.
RUN, MEMBERS = 1 << 30, (1 << 30) + 1
# Seconds to wait for a run that may be ending, such as one killed a moment ago, and for the ending processes of an
# ended run; and seconds between two tries.
PATIENCE, PATIENCE_WITH_MEMBERS, PAUSE = 3.0, 30.0, 0.05
# Tries to be the last process to release a folder.
TRIES = 10


class _Lock(NamedTuple):
    """A folder held by this process: the open file, the index of its byte, the thread, the text of the file."""

    descriptor: int
    byte: int
    thread: threading.Thread
    owner: str


_held: dict[str, _Lock] = {}
# The folders among them created for the lock.
_made: set[str] = set()
# A new process holds nothing, and must not remove its parent's locks.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_held.clear)


def lock(folder: str | Path) -> None:
    """Hold an output folder, which is made, until `release` or the end of this process.

    A thread already holding it keeps it: a failed run may be repeated in the same process. If another process holds
    it, that process may be ending: there is a short wait for it.
    """
    path = Path(folder).resolve()
    if file_lock := _held.get(str(path)):
        if file_lock.thread is not threading.current_thread() and file_lock.thread.is_alive():
            raise InputError(_refusal(folder, f"thread {file_lock.thread.name} of this process"))
        if _holds_still(path):
            _held[str(path)] = file_lock._replace(thread=threading.current_thread())
            return
    try:
        if not path.is_dir():
            path.mkdir(parents=True, exist_ok=True)
            _made.add(str(path))
        file_lock = _locked(folder, path / LOCK_FILE)
    except OSError as error:
        raise InputError(f"--output_dir {folder}: cannot be written to: {error.strerror or error}") from None
    if file_lock is not None:
        _held[str(path)] = file_lock


def owner_of(folder: str | Path) -> str | None:
    """Return the identifier of this process's lock on a folder, for `join`; `None` if it holds none."""
    file_lock = _held.get(str(Path(folder).resolve()))
    return file_lock.owner if file_lock else None


def join(folder: str | Path, owner: str | None) -> None:
    """Hold a folder together with its locking process, until `release` or the end of this process.

    Args:
        owner: the result of `owner_of` there; nothing is held if it was `None`.
    """
    path = Path(folder).resolve()
    if owner is None or fcntl is None or _holds_still(path):
        return
    try:
        descriptor = os.open(path / LOCK_FILE, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, MEMBERS)
            # Before it asks for this byte, a later run writes its own name.
            is_same = _is_there(descriptor, path / LOCK_FILE) and _read(descriptor) == owner
        except OSError:
            os.close(descriptor)
            raise
    except OSError as error:
        is_same = error.errno in NO_LOCKS
    else:
        if is_same:
            _held[str(path)] = _Lock(descriptor, MEMBERS, threading.current_thread(), owner)
        else:
            os.close(descriptor)
    # Another machine may have a disk of its own there.
    if not is_same and _host(owner) == socket.gethostname():
        raise InputError(f"--output_dir {folder}: the run that this process belongs to has ended")


def release(folder: str | Path) -> None:
    """Stop holding a folder, if this process does; a folder created for the lock and still empty is removed."""
    path = Path(folder).resolve()
    file_lock = _held.pop(str(path), None)
    if file_lock is None:
        return
    # Joined processes release it in the same moment.
    for _ in range(TRIES if file_lock.byte == RUN else 1):
        with suppress(OSError):
            # The last process of the run removes the file, before unlocking it: any later process creates a new one.
            fcntl.lockf(file_lock.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 2, RUN)
            (path / LOCK_FILE).unlink()
            break
        time.sleep(PAUSE)
    os.close(file_lock.descriptor)
    with suppress(OSError):
        unclaim_empty(path)
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
    """Return a recipe's `main` with release of its held folders, however it ends."""

    @wraps(main)
    def released(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        before = set(_held)
        try:
            return main(*args, **kwargs)
        finally:
            for folder in _held.keys() - before:
                if _held[folder].thread is threading.current_thread():
                    release(folder)

    return released


def _holds_still(path: Path) -> bool:
    """Return whether this process still holds a folder, with no other holder since; if not, it is forgotten.

    The system ends a process's locks on a file when the process closes the file, also after only reading it: the lock
    is taken again.
    """
    file_lock = _held.get(str(path))
    if file_lock is None:
        return False
    with suppress(OSError):
        kind = fcntl.LOCK_EX if file_lock.byte == RUN else fcntl.LOCK_SH
        fcntl.lockf(file_lock.descriptor, kind | fcntl.LOCK_NB, 1, file_lock.byte)
        if _is_there(file_lock.descriptor, path / LOCK_FILE) and _read(file_lock.descriptor) == file_lock.owner:
            return True
    os.close(file_lock.descriptor)
    del _held[str(path)]
    return False


def _locked(folder: str | Path, file: Path) -> _Lock | None:
    """Return the lock on the file, `None` where there are no locks."""
    if fcntl is None:
        return None
    until = time.monotonic() + PATIENCE
    while True:
        # A link would lead to the user's own file and overwrite it.
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, RUN)
            # The run holding it may have removed it in the meantime.
            if _is_there(descriptor, file):
                owner = _alone(folder, descriptor)
                return _Lock(descriptor, RUN, threading.current_thread(), owner)
            os.close(descriptor)
        except OSError as error:
            holder = _read(descriptor).partition("\n")[0]
            os.close(descriptor)
            if error.errno in NO_LOCKS:
                warnings.warn(f"{folder}: no locks here: nothing keeps a second run out of it", stacklevel=3)
                return None
            if error.errno not in HELD:
                raise
            if time.monotonic() > until:
                raise InputError(_refusal(folder, holder or "another process")) from None
            time.sleep(PAUSE)
        except BaseException:
            os.close(descriptor)
            raise


def _alone(folder: str | Path, descriptor: int) -> str:
    """Write this process's name into the file and wait for the last process of an earlier run; return the name."""
    before = _read(descriptor)
    owner = f"process {os.getpid()} on {socket.gethostname()}\n{secrets.token_hex(8)}\n"
    _write(descriptor, owner)
    until = time.monotonic() + PATIENCE_WITH_MEMBERS
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, MEMBERS)
        except OSError as error:
            if error.errno not in HELD:
                raise
        else:
            fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, MEMBERS)
            return owner
        if time.monotonic() > until:
            _write(descriptor, before)
            raise InputError(_refusal(folder, f"what {before.partition(chr(10))[0] or 'another process'} has started"))
        time.sleep(PAUSE)


def _is_there(descriptor: int, file: Path) -> bool:
    """Return whether an open file is still the file of its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


def _read(descriptor: int) -> str:
    return os.pread(descriptor, 400, 0).decode(errors="replace")


def _write(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)


def _host(owner: str) -> str:
    return owner.partition("\n")[0].partition(" on ")[2]


def _refusal(folder: str | Path, holder: str) -> str:
    return f"--output_dir {folder}: another run is writing there ({holder}): wait for its end or choose another folder"
