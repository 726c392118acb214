"""The files of pictures that a dataset's rows name by path: which they are, and whether one was replaced since."""

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from hfllm.data.formats import renamed
from hfllm.data.image_files import path_of
from hfllm.data.images import take_images
from hfllm.data.row_limits import MAX_ROW_BYTES
from hfllm.data.sources import EMBEDDED, HubPart, folder_of, iterate_source, source_files
from hfllm.errors import InputError

# Bytes that are read at each end of a file that is not read whole.
END = 1 << 16


def named_pictures(
    name: str | None,
    column_mapping: Sequence[str] | None = None,
    most: int | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
) -> dict[str, Path]:
    """Return the files that the rows of a local dataset name by path, by what the rows call them; they need not exist.

    Rows that cannot be read are passed over: who learns from them says what is wrong. No picture is read.

    Args:
        name: of the dataset; one on the Hub has no files of its own here, and neither have the embedded ones.
        column_mapping: see `loading.renaming_of`.
        most: rows that are looked at, from the first.
        max_row_bytes: see `HubPart`; as in the run, or what follows a longer row would not be found.
    """
    found: dict[str, Path] = {}
    try:
        if not name or name in EMBEDDED or source_files(name) is None:
            return found
        renaming = {ours: theirs for ours, _, theirs in (entry.partition("=") for entry in column_mapping or ())}
        for origin, row in islice(iterate_source(name, HubPart(max_row_bytes=max_row_bytes)), most):
            for value in _pictures(origin, row, renaming):
                if (path := path_of(value)) is not None and path not in found:
                    found[path] = Path(folder_of(name) or "", path)
    except InputError:
        pass
    return found


def _pictures(origin: str, row: dict[str, Any], renaming: dict[str, str]) -> Iterator[Any]:
    try:
        yield from take_images(origin, renamed(origin, row, renaming))[1]
    except InputError:
        return


def existing(files: dict[str, Path]) -> dict[str, Path]:
    """Return those of the names that are of files, not of folders, pipes or nothing."""
    return {name: path for name, path in files.items() if (found := _stat(path)) and stat.S_ISREG(found.st_mode)}


def contents_of(files: dict[str, Path]) -> str:
    """Return a hash of files' names and contents; of a file above 128 KiB of its size, its time and both its ends.

    All bytes of all pictures of a large dataset would be read for hours, in every process. Of what cannot be read only
    the name counts.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, path in sorted(files.items()):
        digest.update(f"{name}\0".encode(errors="surrogatepass"))
        with suppress(OSError), path.open("rb") as stream:
            found = os.fstat(stream.fileno())
            if found.st_size <= 2 * END:
                content = stream.read(2 * END)
            else:
                beginning = stream.read(END)
                stream.seek(-END, os.SEEK_END)
                content = f"{found.st_mtime_ns}\0".encode() + beginning + stream.read(END)
            digest.update(f"{found.st_size}\0".encode() + content)
    return digest.hexdigest()


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (OSError, ValueError):
        # Not there, or no name that the system looks for.
        return None


def written_when(files: dict[str, Path]) -> str:
    """Return how many files there are, with a hash of their names, sizes and times; none is read."""
    digest = hashlib.blake2b(digest_size=8)
    for name, path in sorted(files.items()):
        found = _stat(path)
        told = "missing" if found is None else f"{found.st_size} {found.st_mtime_ns}"
        digest.update(f"{name}\0{told}\0".encode(errors="replace"))
    return f"{len(files)} files, {digest.hexdigest()}"
