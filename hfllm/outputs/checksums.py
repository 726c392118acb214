"""Checksums of a checkpoint's files, so that one which was damaged later is not resumed from.

They are in a file as `sha256sum` writes it, so that `sha256sum --check SHA256SUMS` in the folder compares them too. It
is written when all others are whole: a checkpoint without it is an older one, another program's, or one whose run was
killed just then, and is known by its files' formats alone.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hfllm.durable import sync, sync_folder
from hfllm.outputs.report import write_atomically

CHECKSUMS = "SHA256SUMS"
# A card is for readers, who may edit it.
NOT_COMPARED = (CHECKSUMS, "README.md")
BLOCK = 1 << 20


def write_checksums(folder: str | Path) -> None:
    """Write the checksums of all files of a checkpoint, also of those in folders of it, once all are on the disk."""
    folder = Path(folder)
    sync(folder)
    sync_folder(folder.parent)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in NOT_COMPARED)
    write_lines(folder / CHECKSUMS, folder, files)


def write_lines(path: Path, folder: Path, files: Sequence[Path], header: str = "") -> None:
    """Write the checksums of files of a folder, after a header whose lines begin with `#`."""
    names = [file.relative_to(folder).as_posix() for file in files]
    lines = [f"{checksum}  {name}\n" for name, checksum in zip(names, checksums_of(files), strict=True)]
    write_atomically(path, header + "".join(lines))


def read_checksums(path: Path, header: str = "") -> dict[str, str]:
    """Return checksums by the name of the file, as `write_lines` has written them.

    Raises:
        ValueError: when the file is cut off, has another header, or holds something else.
    """
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    if header and lines[:1] != [header]:
        raise ValueError(f"expected the line {header!r} first")
    entries = [line.partition("  ") for line in lines[1 if header else 0 :]]
    if not text.endswith("\n") or not all(len(checksum) == 64 and name for checksum, _, name in entries):
        raise ValueError("expected lines of a checksum and a name")
    return {name: checksum for checksum, _, name in entries}


def damage_of(folder: str | Path) -> str | None:
    """Return which file of a checkpoint is not what was saved, in words; `None` if all are, or nothing tells."""
    folder = Path(folder)
    try:
        expected = read_checksums(folder / CHECKSUMS)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        return f"{CHECKSUMS} cannot be read"
    except ValueError:
        return f"{CHECKSUMS} is damaged"
    for name in expected:
        if not (folder / name).is_file():
            return f"{name} is missing"
    try:
        found = checksums_of(folder / name for name in expected)
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    for (name, checksum), other in zip(expected.items(), found, strict=True):
        if checksum != other:
            return f"{name} is damaged (its checksum is not that of {CHECKSUMS})"
    return None


def checksums_of(files: Iterable[Path]) -> list[str]:
    """Return the checksums of files, several at once: Python hashes without its lock."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(_checksum, files))


def _checksum(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
