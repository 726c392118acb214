"""Read each kind of file one document at a time, in memory that does not grow with the file.

Every reader yields `(place, text, reason)`: a position in the file such as `line 3`, and either the text or, for what
cannot be a document, the reason. A damaged file also ends with such a reason. A text with a reason is a document, and
the reason a remark on how it was read.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from hfllm.data.curation.inputs import Input, delimiter_of, text_column
from hfllm.data.curation.options import CurationOptions
from hfllm.data.curation.warc import Item, read_warc

CHUNK = 1 << 20


def read_documents(item: Input, options: CurationOptions) -> Iterator[Item]:
    """Yield the documents of one input file."""
    if Path(item.path).stat().st_size == 0:
        yield "file", None, "empty_file"
        return
    try:
        if item.kind == ".parquet":
            yield from _parquet(item, options)
        elif item.kind.startswith(".warc"):
            yield from read_warc(item, options)
        else:
            with gzip.open(item.path) if item.kind.endswith(".gz") else open(item.path, "rb") as stream:
                yield from _read_stream(stream, item.kind, options)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        yield "the rest", None, "damaged_gz"


def _read_stream(stream: IO[bytes], kind: str, options: CurationOptions) -> Iterator[Item]:
    lines = bounded_lines(stream, options.max_document_bytes)
    if kind.startswith(".jsonl"):
        yield from _jsonl(lines, options)
    elif kind.startswith((".csv", ".tsv")):
        yield from _table(lines, kind, options)
    else:
        yield from _text(lines, options)


def bounded_lines(stream: IO[bytes], limit: int) -> Iterator[bytes | None]:
    """Yield lines with their ends; `None` stands for a line over `limit` bytes, which is skipped in small steps."""
    while line := stream.readline(limit + 1):
        if len(line) > limit and not line.endswith(b"\n"):
            while (rest := stream.readline(CHUNK)) and not rest.endswith(b"\n"):
                pass
            yield None
        else:
            yield line


def decoded(place: str, raw: bytes) -> Item:
    """Decode a document from its bytes, which must be UTF-8."""
    try:
        return place, raw.decode("utf-8"), None
    except UnicodeDecodeError:
        return place, None, "invalid_utf8"


def _text(lines: Iterable[bytes | None], options: CurationOptions) -> Iterator[Item]:
    """Yield a .txt file as lines, as passages of whole paragraphs, or as one document."""
    if options.txt_documents == "line":
        for number, line in enumerate(lines, 1):
            if line is None:
                yield f"line {number}", None, "too_long"
            elif line.strip():
                yield decoded(f"line {number}", _trimmed([line]))
        return
    whole = options.txt_documents == "file"
    # A whole file is one passage without a size limit.
    least = options.max_document_bytes if whole else options.passage_bytes
    most = least if whole else 2 * least
    passage, size, first = [], 0, 1
    for number, line in enumerate(lines, 1):
        full = line is None or size + len(line) > most or (size >= least and not line.strip())
        if full and whole:
            yield "file", None, "too_long"
            return
        if full and passage:
            yield decoded(f"line {first}", _trimmed(passage))
            passage, size = [], 0
        if line is None:
            yield f"line {number}", None, "too_long"
        elif line.strip() or passage:
            first = first if passage else number
            passage.append(line)
            size += len(line)
    if passage:
        yield decoded("file" if whole else f"line {first}", _trimmed(passage))


def _trimmed(lines: list[bytes]) -> bytes:
    """Join lines with plain line ends, without a byte order mark and without empty lines around the text."""
    return b"".join(lines).removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").strip(b"\n")


def _jsonl(lines: Iterable[bytes | None], options: CurationOptions) -> Iterator[Item]:
    for number, line in enumerate(lines, 1):
        place = f"line {number}"
        if line is None:
            yield place, None, "too_long"
            continue
        if not line.strip():
            continue
        _, text, reason = decoded(place, line.removeprefix(b"\xef\xbb\xbf"))
        if reason is None:
            try:
                row = json.loads(text)
            except (ValueError, RecursionError):
                yield place, None, "not_json"
                continue
            text, reason = _text_of(row, options) if isinstance(row, dict) else (None, "not_an_object")
        yield place, text, reason


def _text_of(row: dict, options: CurationOptions) -> tuple[str | None, str | None]:
    text = row.get(text_column(row, options.text_column))
    return (text, None) if isinstance(text, str) else (None, "no_text")


def _table(lines: Iterable[bytes | None], kind: str, options: CurationOptions) -> Iterator[Item]:
    too_long = 0

    def decoded_lines() -> Iterator[str]:
        nonlocal too_long
        for number, line in enumerate(lines):
            if line is None:
                too_long += 1
            else:
                # Bytes that are not UTF-8 become surrogates, by which the reader detects them in the cell.
                yield line.decode("utf-8-sig" if number == 0 else "utf-8", errors="surrogateescape")

    csv.field_size_limit(options.max_document_bytes)
    rows, number = csv.DictReader(decoded_lines(), delimiter=delimiter_of(kind)), 0
    while True:
        number += 1
        try:
            row = next(rows)
        except StopIteration:
            break
        except csv.Error:
            yield f"row {number}", None, "too_long"
            continue
        yield f"row {number}", *_text_of(row, options)
    for _ in range(too_long):
        yield "a row", None, "too_long"


def _parquet(item: Input, options: CurationOptions) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(item.path) as file:
            column, number = text_column(file.schema_arrow.names, options.text_column), 0
            for batch in file.iter_batches(batch_size=64, columns=[column]):
                for cell in batch.column(0):
                    number += 1
                    yield f"row {number}", *_cell(cell, options.max_document_bytes)
    except (pyarrow.ArrowException, OSError):
        yield "the rest", None, "damaged_parquet"


def _cell(cell, limit: int) -> tuple[str | None, str | None]:
    try:
        text = cell.as_py()
    except UnicodeDecodeError:
        return None, "invalid_utf8"
    if not isinstance(text, str):
        return None, "no_text"
    return (text, None) if len(text) <= limit else (None, "too_long")
