"""Find the checkpoint of an output folder to resume from."""

import json
import warnings
import zipfile
from pathlib import Path


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """Return the newest complete checkpoint of an output folder, or `None`.

    Trainer writes `trainer_state.json` last: if it is missing or truncated, the run was killed while saving. Weights
    or the optimizer's file may have been truncated too, as by a full disk. Such checkpoints are skipped with a
    warning, and an older one still exists, since it is removed only after the save.
    """
    numbered = sorted(
        (path for path in Path(folder).glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()),
        key=lambda path: int(path.name.rpartition("-")[2]),
    )
    for path in reversed(numbered):
        try:
            json.loads((path / "trainer_state.json").read_text())
            is_whole = all(map(_is_whole, filter(Path.is_file, path.rglob("*"))))
        except (OSError, ValueError):
            is_whole = False
        if not is_whole:
            warnings.warn(f"{path} is not complete: trying the checkpoint before it", stacklevel=2)
            continue
        return str(path)
    return None


def _is_whole(file: Path) -> bool:
    """Return whether a file ends where its format says; `True` for formats that do not say."""
    if file.suffix in (".pt", ".pth"):
        return zipfile.is_zipfile(file)
    if file.suffix != ".safetensors":
        return True
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > file.stat().st_size:
            return False
        header = json.loads(stream.read(size))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return file.stat().st_size == 8 + size + max(ends, default=0)
