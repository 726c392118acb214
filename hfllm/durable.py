"""Durable writes of files and folders: a renamed one is on the disk by then with its name, also if the power fails.

A file system may write a new name before the file's contents: after a crash the name exists and the file is empty.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

try:
    import fcntl
except ImportError:  # Windows has no such locks: nothing is known to be left behind.
    fcntl = None

OWNER_FILE = ".hfllm.owner"


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a new name beside `path` for its contents, and rename it over `path` at the end; after an error remove it.

    No other process has that name, since it may write the same file.
    """
    unfinished = path.with_name(f"{path.name}.{uuid4().hex}")
    try:
        yield unfinished
        replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def replace(unfinished: str | Path, path: str | Path) -> None:
    """Rename a file or a folder over `path` once all its contents are on the disk, and wait until the name is, too.

    Args:
        unfinished: on the file system of `path`; for a folder, there is a wait for all files and folders in it.
        path: as `os.replace` takes it.
    """
    sync(unfinished)
    os.replace(unfinished, path)
    sync_folder(Path(path).parent)


def sync(path: str | Path) -> None:
    """Wait until a file is on the disk, or a folder with all its contents; links are skipped."""
    if not Path(path).is_dir():
        _sync(path, os.O_RDONLY)
        return
    for folder, _, names in os.walk(path):
        for name in names:
            file = Path(folder, name)
            if file.is_file() and not file.is_symlink():
                _sync(file, os.O_RDONLY)
        sync_folder(folder)


def sync_folder(folder: str | Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can say so."""
    try:
        _sync(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except OSError:
        # Windows opens no folders, and some file systems of networks do not wait for them.
        return


def _sync(path: str | Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- folders ----
#
# Folders that appear whole or not at all, and temporary ones, removed by the next run if this one is killed. A
# temporary folder belongs to its process by a lock of the system, which ends with the process in any case: a folder
# without a lock was left behind.


@contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield a new folder in `parent`, created as well, and remove it at the end if it still exists.

    Folders of the same prefix left by killed processes are removed before.
    """
    parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(parent, prefix)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    owned = _own(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if owned is not None:
            os.close(owned)


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove the temporary folders of this prefix whose processes have ended."""
    if fcntl is None:
        return
    for file in parent.glob(f"{prefix}*/{OWNER_FILE}"):
        with suppress(OSError):
            owner = os.open(file, os.O_RDWR)
            try:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(file.parent, ignore_errors=True)
            finally:
                os.close(owner)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` at the end, or is removed on an error.

    Args:
        path: new, or a folder with only hidden files, such as a run's lock; they are kept.
    """
    with temporary_folder(path.parent, f".{path.name}.") as temporary:
        yield temporary
        temporary.chmod(0o755)
        (temporary / OWNER_FILE).unlink(missing_ok=True)
        sync(temporary)
        if path.exists():
            # A lock stays valid in the new folder, unless this process opens and closes it.
            for hidden in path.iterdir():
                os.replace(hidden, temporary / hidden.name)
            sync_folder(temporary)
            path.rmdir()
        os.replace(temporary, path)
        sync_folder(path.parent)


def _own(folder: Path) -> int | None:
    """Mark a folder as this process's; return the descriptor of the lock, `None` where there are no locks."""
    if fcntl is None:
        return None
    new = folder / f"{OWNER_FILE}.new"
    owned = os.open(new, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(owned, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # It is never there without its lock.
        os.replace(new, folder / OWNER_FILE)
    except OSError:
        # This file system has no locks: a folder left behind is not recognizable.
        new.unlink(missing_ok=True)
        os.close(owned)
        return None
    return owned
