"""Rows of a suite's local files, with the columns that they need."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfllm.data.sources import load_source, parse_json
from hfllm.errors import InputError

Rows = list[tuple[str, dict[str, Any]]]


def rows_of(path: str, needed: Sequence[str], flag: str) -> Rows:
    """Return the rows of a local file with where each is, such as `FILE, row 3`.

    Args:
        path: a csv, tsv, json or jsonl file; a JSON object with the list `examples`, as BIG-bench writes it, counts as
            that list.
        needed: columns that each row has.
        flag: that names the file, for errors.

    Raises:
        InputError: when there is no such file, it cannot be read, or a row lacks a column.
    """
    if not Path(path).is_file():
        raise InputError(f"{flag} {path}: no such file")
    examples = _examples(path)
    source = None if examples is not None else load_source(path)
    rows = examples if source is None else list(zip(source.origins, source.rows, strict=True))
    if not rows:
        raise InputError(f"{flag} {path}: it has no rows")
    for origin, row in rows:
        missing = [name for name in needed if row.get(name) is None]
        if missing:
            raise InputError(
                f"{origin}: no column {missing[0]!r}; expected {', '.join(map(repr, needed))}, "
                f"found {', '.join(map(repr, list(row)[:12]))}"
            )
    return rows


def _examples(path: str) -> Rows | None:
    """Return the rows of a JSON object's `examples`; `None` for any other file."""
    if not path.endswith(".json"):
        return None
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        value = parse_json(text) if text.lstrip().startswith("{") else None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if value is None:
        return None
    rows = value.get("examples")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: expected a list of objects, or an object with such a list as 'examples'")
    return [(f"{path}, example {number}", row) for number, row in enumerate(rows, 1)]
