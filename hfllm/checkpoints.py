"""Which checkpoint of an output folder to go on from."""

import json
import warnings
from pathlib import Path


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint of an output folder that was written to its end, or `None`.

    Trainer writes `trainer_state.json` last: where it is missing or cut off, the run was killed while saving. Such
    checkpoints are skipped with a warning, and an older one is still there, since it is removed only afterwards.
    """
    numbered = sorted(
        (path for path in Path(folder).glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()),
        key=lambda path: int(path.name.rpartition("-")[2]),
    )
    for path in reversed(numbered):
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError):
            warnings.warn(f"{path} was not written to its end: trying the checkpoint before it", stacklevel=2)
            continue
        return str(path)
    return None
