"""Durable writes: a renamed file is on the disk by then, and so is its name, also if the power fails.

A file system may write a new name before the file's contents: after a crash the name exists and the file is empty.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


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
