"""Resolve a dataset's name: a local file or folder, a dataset on the Hub, or Python's own documentation.

Rows keep their origin, so an error about a row can name its file and line. The embedded
world (`world`) is not a source of rows: each stage asks it for its own training data. `pydoc` is the
documentation of the running Python.
"""

import ast
import csv
import gzip
import json
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from hfllm.data.row_limits import MAX_ROW_BYTES, Expansion, OverLimit, parquet_rows, too_long
from hfllm.errors import InputError, refuse_if

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


# ---- files and the Hub ----


WORLD, PYDOC = "world", "pydoc"
# Rows with images: the drawn world, and scikit-learn's digits.
PICTURES, DIGITS = "pictures", "digits"
EMBEDDED = (WORLD, PYDOC, PICTURES, DIGITS)
# Files of one document each, beside those of rows.
DOCUMENTS = (".md", ".markdown", ".html", ".htm")
ROWS = (".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv", ".parquet")
EXTENSIONS = (*ROWS, ".txt", *DOCUMENTS)
LINES = (".jsonl", ".jsonl.gz")
IMAGES = frozenset((".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff"))
# Lists and objects in one another; a conversation with tools and their schemas has some ten.
MOST_NESTED = 100
# Lines that a quoted field of a table may run over, although each could be a row.
MOST_LINES = 10


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
    """Which part of a dataset on the Hub to read, and how; the last holds for local files too.

    Args:
        split: its split, or a slice of one, such as `train[:1%]`.
        config: its configuration, where it has several.
        revision: its branch, tag or commit.
        streaming: read the rows one by one as they arrive, without downloading the whole first.
        max_row_bytes: of a row at most, in its form in a file, or of its texts and bytes; 0 is no limit.
    """

    split: str = "train"
    config: str | None = None
    revision: str | None = None
    streaming: bool = False
    max_row_bytes: int = MAX_ROW_BYTES


TRAIN = HubPart()


def load_source(name: str, part: HubPart = TRAIN) -> Source:
    """Read the dataset called `name`.

    Args:
        name: a file (jsonl, jsonl.gz, json, csv, tsv, parquet, txt: a document per blank-line-separated paragraph, md
            and html: a document), a folder of such files, `pydoc`, or the id of a dataset on the Hub.
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
    try:
        yield from _rows_of(name, part)
    except OverLimit as error:
        # A caller that names no part has no flag to lift the limit with.
        raise InputError(str(error) if part is TRAIN else f"{error}; {error.advice}") from None


def _rows_of(name: str, part: HubPart) -> Iterator[tuple[str, dict[str, Any]]]:
    if name == PYDOC:
        yield from ((origin, {"text": text}) for origin, text in pydoc_documents())
        return
    files, is_empty = source_files(name), True
    for file in files or ():
        kind, count = "line" if file.name.endswith(LINES) else "row", 0
        try:
            for number, row in read_rows(file, part.max_row_bytes):
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
            if part.max_row_bytes and num_bytes(row) > part.max_row_bytes:
                raise too_long(f"{name}, row {number}", part.max_row_bytes)
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
        files = _readable(path)
        for file in files:
            # A pipe would be waited for.
            refuse_if(not file.is_file(), f"{file}: not a file that can be read, such as a link to nowhere or a pipe")
        refuse_if(not files, f"dataset folder {name!r} holds no file that ends in {', '.join(EXTENSIONS)}")
        return files
    if path.is_file():
        return [path]
    if name.endswith(EXTENSIONS) or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f"dataset {name!r} does not exist: no such file or folder (and not a Hub id like user/name)")
    return None


def _readable(folder: Path) -> list[Path]:
    """Return the files of a folder that hold rows or texts.

    Beside files of rows, Markdown and HTML are about the dataset, such as its card, and not read.
    """
    files = sorted(file for file in folder.rglob("*") if file.name.endswith(EXTENSIONS) and not file.is_dir())
    has_rows = any(file.name.endswith(ROWS) for file in files)
    return [file for file in files if not (has_rows and file.name.endswith(DOCUMENTS))]


def skipped_files(name: str) -> dict[Path, str]:
    """Return the files of a local folder that are not read, and why.

    Images are left to the rows that name them, and hidden files to their programs.
    """
    folder = Path(name)
    if not folder.is_dir():
        return {}
    read, skipped = {*_readable(folder)}, {}
    for file in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.is_dir() or is_hidden or file in read or file.suffix.lower() in IMAGES:
            continue
        is_beside = file.name.endswith(DOCUMENTS)
        skipped[file] = "a document beside files of rows" if is_beside else f"{file.suffix or 'no'} ending"
    return skipped


def folder_of(name: str) -> Path | None:
    """Return the base of relative paths in a dataset: its folder, or that of its file; `None` for one on the Hub."""
    path = Path(name)
    return path if path.is_dir() else path.parent if path.is_file() else None


def read_rows(file: Path, max_row_bytes: int = MAX_ROW_BYTES) -> Iterable[tuple[int, dict[str, Any]]]:
    """Return the rows of one file with their numbers, from 1; for jsonl the number is the line's.

    Args:
        max_row_bytes: of a row at most, checked while it is read; 0 is no limit.
    """
    if file.name.endswith(LINES):
        return _read_jsonl(file, max_row_bytes)
    if file.suffix == ".json":
        return enumerate(_read_json(file, max_row_bytes), 1)
    if file.suffix in (".csv", ".tsv"):
        return enumerate(_read_csv(file, max_row_bytes), 1)
    if file.suffix == ".parquet":
        return enumerate(parquet_rows(file, max_row_bytes), 1)
    if file.suffix in DOCUMENTS:
        return enumerate(_read_document(file, max_row_bytes), 1)
    if file.suffix == ".txt":
        return enumerate(({"text": text} for text in _read_paragraphs(file, max_row_bytes)), 1)
    raise InputError(f"{file}: cannot read this kind of file; accepted: {', '.join(EXTENSIONS)}")


def renamed(origin: str, row: Mapping[str, Any], renaming: Mapping[str, str]) -> dict[str, Any]:
    """Return a row with its columns under our names.

    Raises:
        InputError: when it lacks one.
    """
    for ours, theirs in renaming.items():
        if theirs not in row:
            there = ", ".join(row)
            raise InputError(f"{origin}: --column_mapping {ours}={theirs}: no column {theirs!r}; there are: {there}")
    others = {name: value for name, value in row.items() if name not in renaming.values()}
    return others | {ours: row[theirs] for ours, theirs in renaming.items()}


def num_bytes(value: Any) -> int:
    """Return about how many bytes the texts, bytes and numbers of a row have, at any depth."""
    total, left = 0, [value]
    while left:
        each = left.pop()
        if isinstance(each, Mapping):
            left += each.values()
        elif isinstance(each, list | tuple):
            left += each
        total += len(each) if isinstance(each, str | bytes) else 8
    return total


def _limited_lines(file: Path, stream: IO[bytes], limit: int) -> Iterator[bytes]:
    """Yield the lines of a stream; one over the limit is refused before it is in memory."""
    expansion = Expansion(file, limit)
    for number in count(1):
        line = stream.readline(limit + 1 if limit else -1)
        if not line:
            return
        if limit and len(line) > limit:
            raise too_long(f"{file}, line {number}", limit)
        expansion.add(len(line))
        yield line


def _read_jsonl(file: Path, limit: int) -> Iterator[tuple[int, dict[str, Any]]]:
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
        for number, raw in enumerate(_limited_lines(file, stream, limit), 1):
            # Line by line, to name a line with invalid UTF-8; some editors begin a file with a byte order mark.
            line = raw.decode("utf-8-sig")
            if not line.strip():
                continue
            try:
                row = checked_depth(parse_json(line), line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{file}, line {number}: not JSON ({error}): {line.strip()[:80]!r}") from None
            if not isinstance(row, dict):
                raise InputError(f"{file}, line {number}: a row must be a JSON object, got {type(row).__name__}")
            yield number, row


def parse_json(text: str) -> Any:
    """Return the JSON value, with "?" for unpaired surrogates, which UTF-8 cannot encode.

    Raises:
        ValueError: when the text is no JSON, or a key occurs twice in an object, of which one value would be lost.
    """
    return _without_surrogates(json.loads(text, object_pairs_hook=_object_of), text)


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs) and (lost := [name for name, value in pairs if made[name] != value]):
        twice = lost[0]
        raise ValueError(f"the key {twice!r} occurs twice in an object")
    return made


def _without_surrogates(value: Any, text: str) -> Any:
    if "\\ud" in text.lower():
        value = json.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
    return value


def checked_depth(value: Any, text: str) -> Any:
    """Return a JSON value from its spelling `text`.

    Raises:
        ValueError: when it is nested deeper than any row: the later steps may fill Python's stack.
    """
    if text.count("[") + text.count("{") <= MOST_NESTED:
        return value
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MOST_NESTED:
            raise ValueError(f"nested deeper than {MOST_NESTED} lists and objects")
        inside = chain.from_iterable(each.values() if isinstance(each, dict) else each for each in level)
        level = [each for each in inside if isinstance(each, dict | list)]
    return value


class JoinedRow(dict[str, Any]):
    """A row of a table over several lines, each of which could be a row: a quote may have been left open."""


class _TableLines:
    """The lines of a table, as the csv module asks for them; the lines of the present row are kept."""

    def __init__(self, file: Path, stream: IO[str], limit: int):
        self.file, self.stream, self.limit = file, stream, limit
        self.number, self.row, self.size = 0, [], 0

    def delimiter(self) -> str:
        """Return what separates the columns of a csv file: a comma, or where the header has none a semicolon."""
        header = self.stream.readline(self.limit + 1 if self.limit else -1)
        self.stream.seek(0)
        return ";" if ";" in header and "," not in header else ","

    def begin_row(self) -> None:
        """Forget the lines of the row before."""
        self.row, self.size = [], 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.stream.readline(self.limit + 1 if self.limit else -1)
        if not line:
            raise StopIteration
        self.number += 1
        # Empty lines between rows are passed over.
        if self.row or line.strip("\r\n"):
            self.row.append(line)
            self.size += len(line)
        if self.limit and self.size > self.limit:
            raise too_long(f"{self.file}, line {self.first}", self.limit)
        return line

    @property
    def first(self) -> int:
        """The number of the line in which the present row begins."""
        return self.number - len(self.row) + 1


def _read_csv(file: Path, limit: int) -> Iterator[dict[str, Any]]:
    # The standard limit of 128 kB is less than a long document.
    csv.field_size_limit(2**31 - 1)
    with file.open(encoding="utf-8-sig", newline="") as stream:
        lines = _TableLines(file, stream, limit)
        delimiter = "\t" if file.suffix == ".tsv" else lines.delimiter()
        # An unclosed quote would swallow rows up to the next one.
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
        for number in count(1):
            try:
                # The first time, this reads the header.
                names = reader.fieldnames
                if number == 1 and names is not None:
                    reader.fieldnames = names = _column_names(file, names)
                lines.begin_row()
                row = next(reader, None)
            except csv.Error as error:
                raise InputError(
                    f"{file}, line {lines.number}: {error}, in a row that begins in line {lines.first}: a quote in a "
                    "field is written twice, and the field stands in quotes"
                ) from None
            if row is None:
                return
            if None in row:
                result, expected = len(row) - 1 + len(row[None]), len(names)
                raise InputError(f"{file}, row {number}: {result} fields, and the header names {expected}")
            is_doubtful = len(lines.row) > 1 and all(line.count(delimiter) == len(names) - 1 > 0 for line in lines.row)
            if is_doubtful and len(lines.row) > MOST_LINES:
                raise InputError(
                    f"{file}, line {lines.first}: a quoted field goes on to line {lines.number}, and each of these "
                    "lines could be a row: a quote was left open, or write this table as .jsonl"
                )
            yield JoinedRow(row) if is_doubtful else row


def _column_names(file: Path, names: Sequence[str]) -> list[str]:
    """Return the names of a table's columns without spaces around them; refuse one that occurs twice.

    A spreadsheet ends its lines in columns without a name: they get one by their number.
    """
    names = [name.strip() or f"(column {number})" for number, name in enumerate(names, 1)]
    if twice := next((name for at, name in enumerate(names) if name in names[:at]), None):
        raise InputError(f"{file}, line 1: the column {twice!r} occurs twice in the header, and one would be lost")
    return names


def _read_paragraphs(file: Path, limit: int) -> Iterator[str]:
    """Yield the paragraphs between empty lines and lines with only spaces."""
    lines: list[str] = []
    size = 0
    with file.open("rb") as stream:
        for number, raw in enumerate(chain(_limited_lines(file, stream, limit), [b"\n"]), 1):
            # Line by line, so that paragraphs before a line with invalid UTF-8 are counted correctly.
            lines.append(raw.decode("utf-8-sig").replace("\r\n", "\n"))
            size += len(raw)
            if not lines[-1].strip():
                text = "".join(lines).strip()
                if text:
                    yield text
                lines, size = [], 0
            elif limit and size > limit:
                raise too_long(f"{file}, line {number - len(lines) + 1}", limit)


def _read_document(file: Path, limit: int) -> Iterator[dict[str, Any]]:
    """Yield the text of a file of one document, of HTML the visible one; nothing where it is blank."""
    with file.open("rb") as stream:
        raw = stream.read(limit + 1 if limit else -1)
    if limit and len(raw) > limit:
        raise too_long(f"{file}", limit)
    text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    if file.suffix in (".html", ".htm"):
        from hfllm.data.curation.text import html_to_text

        text, _ = html_to_text(text, "plain")
    if text.strip():
        yield {"text": text.strip()}


def _read_json(file: Path, limit: int) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8-sig") as stream:
        items = _JsonItems(file, stream, limit)
        if not items.skip("["):
            raise InputError(f"{file}: expected a JSON list of objects; for one object per line name it .jsonl")
        is_first = True
        while not items.skip("]"):
            if not is_first and not items.skip(","):
                raise items.error(json.JSONDecodeError("Expecting ',' delimiter", items.text, items.at))
            row = items.next_value()
            if not isinstance(row, dict):
                raise InputError(f"{file}: expected a JSON list of objects, got {type(row).__name__} in it")
            yield row
            is_first = False
        if items.peek():
            raise items.error(json.JSONDecodeError("Extra data", items.text, items.at))


class _JsonItems:
    """A JSON file, read piece by piece: the text at hand, and the values in it."""

    CHUNK = 1 << 20

    def __init__(self, file: Path, stream: IO[str], limit: int):
        self.file, self.stream, self.limit = file, stream, limit
        self.text, self.at, self.lines_before, self.is_whole = "", 0, 0, False
        self.scan = json.JSONDecoder(object_pairs_hook=_object_of).raw_decode

    def more(self) -> None:
        """Read on; characters already taken are forgotten."""
        self.lines_before += self.text.count("\n", 0, self.at)
        # Twice as much each time, so that a long value is not looked at many times.
        chunk = self.stream.read(max(self.CHUNK, len(self.text) - self.at))
        self.text, self.at, self.is_whole = self.text[self.at :] + chunk, 0, not chunk

    def peek(self) -> str:
        """Return the next character other than a space, or nothing at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text) or self.is_whole:
                return self.text[self.at : self.at + 1]
            self.more()

    def skip(self, character: str) -> bool:
        """Take a character if it is the next one."""
        is_next = self.peek() == character
        self.at += is_next
        return is_next

    def next_value(self) -> Any:
        """Take the next value.

        Raises:
            InputError: when it is not JSON, or longer than the limit.
        """
        self.peek()
        while True:
            try:
                value, end = self.scan(self.text, self.at)
            except json.JSONDecodeError as error:
                # Not whole yet, unless the complaint is about a position long before the end.
                is_open = error.msg.startswith("Unterminated") or error.pos + 16 > len(self.text)
                if self.is_whole or not is_open:
                    raise self.error(error) from None
            except (ValueError, RecursionError) as error:
                raise self.error(error) from None
            else:
                break
            if self.limit and len(self.text) - self.at > self.limit:
                raise too_long(self.line_of(self.at), self.limit)
            self.more()
        text = self.text[self.at : end]
        if self.limit and len(text) > self.limit:
            raise too_long(self.line_of(self.at), self.limit)
        try:
            value = _without_surrogates(checked_depth(value, text), text)
        except ValueError as error:
            raise self.error(error) from None
        self.at = end
        return value

    def line_of(self, at: int) -> str:
        return f"{self.file}, line {self.lines_before + self.text.count(chr(10), 0, at) + 1}"

    def error(self, error: Exception) -> InputError:
        reason = getattr(error, "msg", str(error))
        index = self.line_of(getattr(error, "pos", self.at))
        return InputError(f"{index}: not JSON ({reason}); for one object per line name it .jsonl")


def not_loaded(name: str, error: Exception) -> InputError:
    """Return the refusal of a dataset that is neither on this machine nor on the Hub."""
    where = "is neither a local file or folder nor could it be loaded from the Hub"
    return InputError(f"dataset {name!r} {where}: {_kind_and_line(error)}")


def _kind_and_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


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
        raise not_loaded(name, error) from error
    refuse_if(first is None, f"dataset {name!r}, split {part.split!r}, is empty")
    yield first
    number = 1
    try:
        for row in rows:
            yield row
            number += 1
    except Exception as error:
        raise InputError(f"dataset {name!r}: cannot be read after row {number}: {_kind_and_line(error)}") from error


# ---- pydoc corpus ----
#
# A real corpus without a download: the documentation of the running Python.
#
# Docstrings are read from the standard library's source without importing it, since some modules have side effects
# when imported (`import this` prints, `antigravity` opens a browser). The language reference's topics come from
# `pydoc_data.topics`, one large dictionary. The texts are under the PSF License, version 2.


LICENSE = "PSF-2.0"
# Not documentation: tests, and third-party code added by installers.
LEFT_OUT = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data")


def pydoc_documents() -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every distinct docstring and topic, in the order of their names.

    Names are like `argparse.ArgumentParser.parse_args` and `topics.BOOLEANS`. They depend only on the Python build,
    not on installed or imported modules.
    """
    unique_texts: set[str] = set()
    for name, text in chain(_topics(), _docstrings()):
        if text and text not in unique_texts:
            unique_texts.add(text)
            yield name, text


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topics.{name}", topics[name].strip()


def _docstrings() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if any(part in LEFT_OUT for part in parts):
            continue
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old code need no report
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        yield from _of_node(tree, module)


def _of_node(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yield the docstring of a module, class or function, then the docstrings of its members."""
    text = ast.get_docstring(node)
    if text:
        yield name, text.strip()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _of_node(child, f"{name}.{child.name}")
        elif isinstance(child, ast.If | ast.Try | ast.With):
            for inner in ast.walk(child):
                if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    yield from _of_node(inner, f"{name}.{inner.name}")


# ---- hub pictures ----
#
# Read images of a dataset on the Hub in their stored form: the bytes, or the path, of each.
#
# Decoded by datasets, one broken file would end the reading, and all would be held in memory with all their pixels.


# A feature of datasets, or a dictionary or list of such.
Feature: TypeAlias = Any
# Protocols for the content of a file: fsspec opens them within the address that follows after `::`.
ARCHIVES = ("zip", "tar", "gzip", "bz2", "xz", "lz4", "zstd")


def undecoded(name: str, rows: "Dataset | IterableDataset") -> "Iterable[dict[str, Any]]":
    """Return rows whose images, at any depth, are paths or bytes; where no feature is an image, the given rows.

    Streamed images have paths on the Hub, and images in files of their own have paths where datasets has stored
    them. Paths within the dataset's own repository are read here, and all others are left as they are: rows are
    written by other people, and may name files that are not theirs to read. `images.rows.to_pictures` refuses these.

    Args:
        name: the dataset's id on the Hub.
        rows: as `datasets.load_dataset` gives them.
    """
    from datasets import Dataset

    features = rows.features
    if not features or not _has_picture(features):
        return rows
    is_stored = isinstance(rows, Dataset)
    rows = (rows.to_iterable_dataset() if is_stored else rows).decode(False)
    # Everything else stored in another form, such as values as JSON, is decoded as ever.
    decode = type(features)({column: _as_stored(each) for column, each in features.items()}).decode_example
    return (_fetched(name, features, decode(row)) for row in rows)


def _inside(feature: Feature) -> Feature | None:
    """Return the feature of a list's entries, `None` for a value other than a list of datasets."""
    from datasets import LargeList, List

    return feature.feature if isinstance(feature, (List, LargeList)) else None


def _has_picture(feature: Feature) -> bool:
    from datasets import Image

    if isinstance(feature, (dict, list)):
        return any(map(_has_picture, feature.values() if isinstance(feature, dict) else feature))
    inside = _inside(feature)
    return isinstance(feature, Image) if inside is None else _has_picture(inside)


def _as_stored(feature: Feature) -> Feature:
    """Return a feature in which images, and nothing else, are not decoded."""
    from datasets import Image

    if isinstance(feature, dict):
        return {name: _as_stored(each) for name, each in feature.items()}
    if isinstance(feature, list):
        return [_as_stored(each) for each in feature]
    if isinstance(feature, Image):
        return replace(feature, decode=False)
    inside = _inside(feature)
    return feature if inside is None else replace(feature, feature=_as_stored(inside))


def _fetched(name: str, feature: Feature, value: Any) -> Any:
    """Return a value of a row with the bytes of its images in the dataset's repository."""
    from datasets import Image

    if isinstance(feature, dict) and isinstance(value, dict):
        return {key: _fetched(name, feature[key], each) if key in feature else each for key, each in value.items()}
    inside = feature[0] if isinstance(feature, list) else _inside(feature)
    if inside is not None and isinstance(value, list):
        return [_fetched(name, inside, each) for each in value]
    if not isinstance(feature, Image) or not isinstance(value, dict) or value.get("bytes") is not None:
        return value
    if is_downloaded(name, value.get("path") or ""):
        return {**value, "bytes": Path(value["path"]).read_bytes()}
    if not is_in_repository(name, value.get("path") or ""):
        return value
    import fsspec

    with fsspec.open(value["path"], "rb") as stream:
        return {**value, "bytes": stream.read()}


def is_downloaded(name: str, path: str) -> bool:
    """Return whether a path belongs to a file downloaded with a dataset of the Hub, links resolved."""
    from datasets.config import EXTRACTED_DATASETS_PATH
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        result = Path(path).resolve(strict=True)
        if not path or not result.is_file():
            return False
        if result.is_relative_to(Path(EXTRACTED_DATASETS_PATH).resolve()):
            return True
        cache = Path(HF_HUB_CACHE).resolve()
    except (OSError, ValueError):
        return False
    repository = f"datasets--{name.replace('/', '--')}".lower()
    return result.is_relative_to(cache) and result.relative_to(cache).parts[0].lower() == repository


def is_in_repository(name: str, address: str) -> bool:
    """Return whether an address belongs to a file in a dataset's repository, or in an archive there."""
    *archives, file = address.split("::")
    begins = re.match(rf"hf://datasets/{re.escape(name)}(@[^/]+)?/", file, re.IGNORECASE)
    is_above = ".." in file.split("/")
    return bool(begins) and not is_above and all(each.partition("://")[0] in ARCHIVES for each in archives)
