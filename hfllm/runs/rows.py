"""Rows that a recipe makes for the runs of others: written once, by one process, and only where they have changed.

A file's time is part of what describes a run of another recipe, so that one written again would be another run's.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from hfllm.errors import InputError
from hfllm.outputs.report import write_atomically
from hfllm.runs.command_line import main_process, say

Made = TypeVar("Made")
# What the other processes wait for the main one, which makes the rows alone.
LONGEST_WAIT = timedelta(days=30)


def write_rows(stage: str, path: Path, make: Callable[[], Iterable[Mapping[str, Any]]]) -> None:
    """Write the rows of a run, in one process, where the file does not hold them already; the others wait."""
    by_main_process(lambda: _write_rows(stage, path, make()))


def _write_rows(stage: str, path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # Whatever was made of it: an edited file need not be text.
    before = path.read_bytes() if path.is_file() else None
    if before != text.encode():
        if before is not None:
            say(f"{stage}: {path} does not hold the rows of this run: it is written again")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)


def by_main_process(make: Callable[[], Made]) -> Made | None:
    """Return what the main process makes, and `None` in the others, which wait for it however long it takes.

    Raises:
        InputError: in all processes, when the main process refuses.
    """
    made, refusal = None, None
    if main_process():
        try:
            made = make()
        except InputError as error:
            refusal = str(error)
    if (refusal := _of_main_process(refusal)) is not None:
        raise InputError(refusal)
    return made


def _of_main_process(value: str | None) -> str | None:
    from accelerate import PartialState
    from torch import distributed

    if PartialState().num_processes == 1:
        return value
    # The usual groups give up on a process that is silent for 10 or 30 minutes, as one is that revises.
    group = distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
    values = [value]
    distributed.broadcast_object_list(values, src=0, group=group)
    distributed.destroy_process_group(group)
    return values[0]
