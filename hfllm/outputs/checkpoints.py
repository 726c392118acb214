"""Checkpoints of an output folder: the one to resume from, its record of its run, and its checksums."""

import hashlib
import json
import os
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hfllm.durable import sync, sync_folder
from hfllm.outputs.report import write_atomically

# ---- checkpoints ----


STATE_FILE = "trainer_state.json"
# The key of a run's own record in Trainer's state, which is written last.
RECORD = "hfllm"


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """Return the newest complete checkpoint of an output folder, or `None`.

    Trainer writes `trainer_state.json` last: if it is missing or truncated, the run was killed while saving. Weights
    or the optimizer's file may have been truncated too, as by a full disk, or damaged later. Such checkpoints are
    skipped with a warning about the file, and an older one still exists, since it is removed only after the save.
    """
    for path in reversed(checkpoints_in(folder)):
        damage = damage_in(path)
        if damage is None:
            return str(path)
        warnings.warn(f"{path} is not complete ({damage}): trying the checkpoint before it", stacklevel=2)
    return None


def damaged_checkpoint(folder: str | Path) -> str | None:
    """Return the newest checkpoint saved whole and damaged since, with its damage, in words."""
    for path in reversed(checkpoints_in(folder)):
        if (path / CHECKSUMS).exists() and (damage := damage_in(path)):
            return f"{path} is damaged ({damage}), and no other is whole"
    return None


def damage_in(checkpoint: str | Path) -> str | None:
    """Return the missing, truncated or changed file of a checkpoint, in words; `None` if it is whole.

    All of its files are read, to compare their checksums. `is_complete` takes no time, and detects less.
    """
    return _cut_off(Path(checkpoint)) or damage_of(checkpoint)


def checkpoints_in(folder: str | Path) -> list[Path]:
    """Return the checkpoints of an output folder, complete or not, in the order of their steps."""
    numbered = (path for path in Path(folder).glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal())
    return sorted(numbered, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint of an output folder."""
    return int(checkpoint.name.rpartition("-")[2])


def is_complete(checkpoint: Path) -> bool:
    """Return whether a checkpoint was saved to its end, and none of its files is cut off."""
    return _cut_off(checkpoint) is None


def _cut_off(checkpoint: Path) -> str | None:
    """Return the missing or truncated file of a checkpoint, in words."""
    if not (checkpoint / STATE_FILE).is_file():
        return f"{STATE_FILE} is missing"
    for file in sorted(filter(Path.is_file, checkpoint.rglob("*"))):
        try:
            is_whole = _is_whole(file)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
            is_whole = False
        if not is_whole:
            return f"{file.relative_to(checkpoint)} is damaged"
    return None


def state_of(checkpoint: str | Path) -> dict[str, Any]:
    """Return Trainer's state of a checkpoint: its step, the last step, the log history."""
    state = json.loads((Path(checkpoint) / STATE_FILE).read_text(encoding="utf-8"))
    return state if isinstance(state, dict) else {}


def record_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a run of ours in Trainer's state; nothing for another program's state."""
    record = (state.get("stateful_callbacks") or {}).get(RECORD)
    return record if isinstance(record, dict) else {}


def missing_for_resuming(checkpoint: str | Path, engine: str | None = None) -> str | None:
    """Return the missing state for resuming from a checkpoint, such as `optimizer.pt`, or `None`.

    Args:
        engine: `deepspeed`, `fsdp` or an empty string for neither; by default any of their files will do.
    """
    folder = Path(checkpoint)
    # DeepSpeed keeps optimizer and schedule by process in a folder of their own.
    shards = any(folder.glob("global_step*/*_optim_states.pt"))
    if engine == "deepspeed" or (engine is None and shards):
        return None if shards else "global_step*/*_optim_states.pt"
    names = {"": ("optimizer.pt",), "fsdp": ("optimizer.bin", "optimizer_*")}
    accepted = names[engine] if engine is not None else (*names[""], *names["fsdp"])
    if not any(any(folder.glob(name)) for name in accepted):
        return accepted[0]
    return None if (folder / "scheduler.pt").is_file() else "scheduler.pt"


def _is_whole(file: Path) -> bool:
    """Return whether a file ends at the end given by its format; `True` for formats without one."""
    if file.suffix in (".pt", ".pth"):
        return zipfile.is_zipfile(file)
    if file.suffix == ".json":
        return isinstance(json.loads(file.read_text(encoding="utf-8")), dict | list)
    if file.suffix != ".safetensors":
        return True
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > file.stat().st_size:
            return False
        header = json.loads(stream.read(size))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return file.stat().st_size == 8 + size + max(ends, default=0)


# ---- checksums ----
# Checksums of a checkpoint's files, to avoid resuming from a checkpoint damaged later.
#
# They are in a file in the form of `sha256sum`, so `sha256sum --check SHA256SUMS` in the folder compares them too.
# It is written when all others are whole: a checkpoint without it is an older one, another program's, or one whose run
# was killed just then, and is known only by its files' formats.


CHECKSUMS = "SHA256SUMS"
# A card is for readers, who may edit it.
NOT_COMPARED = (CHECKSUMS, "README.md")
BLOCK = 1 << 20


def write_checksums(folder: str | Path) -> None:
    """Write the checksums of all files of a checkpoint, also in its subfolders, once all are on the disk."""
    folder = Path(folder)
    sync(folder)
    sync_folder(folder.parent)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in NOT_COMPARED)
    write_lines(folder / CHECKSUMS, folder, files)


def write_lines(path: Path, folder: Path, files: Sequence[Path], header: str = "") -> None:
    """Write the checksums of files of a folder, after a header of lines beginning with `#`."""
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
    """Return the missing or changed file of a checkpoint, in words; `None` if none, or without checksums."""
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
        result = checksums_of(folder / name for name in expected)
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    for (name, checksum), other in zip(expected.items(), result, strict=True):
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
