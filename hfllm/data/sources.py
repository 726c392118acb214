"""Resolve a dataset's name: a local file or folder, or a dataset on the Hub.

Rows keep their origin, so an error about a row can name its file and line. The embedded
world (`world`) is not a source of rows: each stage asks it for its own training data. `pydoc` is the
documentation of the running Python.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from hfllm.data.hub_pictures import undecoded
from hfllm.data.pydoc_corpus import pydoc_documents
from hfllm.errors import InputError

WORLD, PYDOC = "world", "pydoc"
# Rows with pictures: the drawn world, and the digits that come with scikit-learn.
PICTURES, DIGITS = "pictures", "digits"
EMBEDDED = (WORLD, PYDOC, PICTURES, DIGITS)
EXTENSIONS = (".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv", ".parquet", ".txt")
LINES = (".jsonl", ".jsonl.gz")


@dataclass
class Source:
    """Rows with their origin.

    Args:
        rows: the rows, dictionaries of columns.
        origins: where each row comes from, such as `pairs.jsonl, line 3`.
    """

    rows: Sequence[dict[str, Any]]
    origins: Sequence[str]

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        return zip(self.origins, self.rows, strict=True)

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class HubPart:
    """Which part of a dataset on the Hub to read, and how.

    Args:
        split: its split, or a slice of one, such as `train[:1%]`.
        config: its configuration, where it has several.
        revision: its branch, tag or commit.
        streaming: read the rows one by one as they arrive, without downloading the whole first.
    """

    split: str = "train"
    config: str | None = None
    revision: str | None = None
    streaming: bool = False


TRAIN = HubPart()


def load_source(name: str, part: HubPart = TRAIN) -> Source:
    """Read the dataset called `name`.

    Args:
        name: a file (jsonl, jsonl.gz, json, csv, tsv, parquet, txt: a document per blank-line-separated paragraph), a
            folder of such files, `pydoc`, or the id of a dataset on the Hub.
        part: which part of a Hub dataset.

    Raises:
        InputError: when nothing is found, or a row cannot be read (file and line are named).
    """
    rows, origins = [], []
    for origin, row in iterate_source(name, part):
        rows.append(row)
        origins.append(origin)
    return Source(rows, origins)


def iterate_source(name: str, part: HubPart = TRAIN) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (origin, row) of the dataset called `name`: see `load_source`."""
    if name == PYDOC:
        yield from ((origin, {"text": text}) for origin, text in pydoc_documents())
        return
    files, is_empty = source_files(name), True
    for file in files or ():
        kind, count = "line" if file.name.endswith(LINES) else "row", 0
        try:
            for number, row in read_rows(file):
                yield f"{file}, {kind} {number}", row
                count, is_empty = count + 1, False
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: not UTF-8 after row {count}: {error.reason}") from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{file}: not gzip, or cut short after row {count}: {error}") from None
        except OSError as error:
            raise InputError(f"{file}: cannot be read after row {count}: {error.strerror or error}") from None
    if files is None:
        for number, row in enumerate(_load_from_hub(name, part), 1):
            yield f"{name}, row {number}", row
    elif is_empty:
        raise InputError(f"dataset {name!r} is empty")


def source_files(name: str) -> list[Path] | None:
    """Return the local files of a dataset; `None` for one on the Hub.

    Raises:
        InputError: when there are none and the name is not a Hub id.
    """
    path = Path(name)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.name.endswith(EXTENSIONS) and not file.is_dir())
        for file in files:
            # A pipe would be waited for.
            if not file.is_file():
                raise InputError(f"{file}: not a file that can be read, such as a link to nowhere or a pipe")
        if not files:
            raise InputError(f"dataset folder {name!r} holds no file that ends in {', '.join(EXTENSIONS)}")
        return files
    if path.is_file():
        return [path]
    if name.endswith(EXTENSIONS) or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f"dataset {name!r} does not exist: no such file or folder (and not a Hub id like user/name)")
    return None


def folder_of(name: str) -> Path | None:
    """Return what paths in a dataset are relative to: its folder, or that of its file; `None` for one on the Hub."""
    path = Path(name)
    return path if path.is_dir() else path.parent if path.is_file() else None


def read_rows(file: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """Return the rows of one file with their numbers, from 1; for jsonl the number is that of the line."""
    if file.name.endswith(LINES):
        return _read_jsonl(file)
    if file.suffix == ".json":
        return enumerate(_read_json(file), 1)
    if file.suffix in (".csv", ".tsv"):
        return enumerate(_read_csv(file), 1)
    if file.suffix == ".parquet":
        return enumerate(_read_parquet(file), 1)
    if file.suffix == ".txt":
        return enumerate(({"text": text} for text in _read_paragraphs(file)), 1)
    raise InputError(f"{file}: cannot read this kind of file; accepted: {', '.join(EXTENSIONS)}")


def _read_jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
        for number, undecoded in enumerate(stream, 1):
            # Line by line, to name a line that is not UTF-8; some editors begin a file with a byte order mark.
            line = undecoded.decode("utf-8-sig")
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{file}, line {number}: not JSON ({error}): {line.strip()[:80]!r}") from None
            if not isinstance(row, dict):
                raise InputError(f"{file}, line {number}: a row must be a JSON object, got {type(row).__name__}")
            yield number, row


def parse_json(text: str) -> Any:
    """Return the JSON value, with "?" for unpaired surrogates, which UTF-8 cannot encode."""
    value = json.loads(text)
    if "\\ud" in text.lower():
        value = json.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
    return value


def _read_csv(file: Path) -> Iterator[dict[str, Any]]:
    # The standard limit of 128 kB is less than a long document.
    csv.field_size_limit(2**31 - 1)
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, delimiter="\t" if file.suffix == ".tsv" else ",")
        for number, row in enumerate(reader, 1):
            if None in row:
                found, expected = len(row) - 1 + len(row[None]), len(reader.fieldnames)
                raise InputError(f"{file}, row {number}: {found} fields, and the header names {expected}")
            yield row


def _read_parquet(file: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(1000):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{file}: not parquet, or damaged: {str(error).splitlines()[0]}") from None


def _read_paragraphs(file: Path) -> Iterator[str]:
    """Yield the paragraphs between lines that are empty or hold only spaces."""
    lines: list[str] = []
    with file.open("rb") as stream:
        for undecoded in chain(stream, [b"\n"]):
            # Line by line, so that paragraphs before a line that is not UTF-8 are counted correctly.
            lines.append(undecoded.decode("utf-8-sig").replace("\r\n", "\n"))
            if not lines[-1].strip():
                text = "".join(lines).strip()
                if text:
                    yield text
                lines = []


def _read_json(file: Path) -> list[dict[str, Any]]:
    try:
        rows = parse_json(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(f"{file}: not JSON ({error}); for one object per line name it .jsonl") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{file}: expected a JSON list of objects")
    return rows


def _load_from_hub(name: str, part: HubPart) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(
            name, part.config, split=part.split, revision=part.revision, streaming=part.streaming or False
        )
        # Where rows are streamed, most errors show with the first.
        rows = iter(undecoded(name, rows))
        first = next(rows, None)
    except Exception as error:
        raise InputError(
            f"dataset {name!r} is neither a local file or folder nor could it be loaded from the Hub: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    if first is None:
        raise InputError(f"dataset {name!r}, split {part.split!r}, is empty")
    yield first
    number = 1
    try:
        for row in rows:
            yield row
            number += 1
    except Exception as error:
        raise InputError(
            f"dataset {name!r}: cannot be read after row {number}: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}"
        ) from error
