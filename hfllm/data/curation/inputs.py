"""Find the files of a dataset name, and check that each can be read.

Every error that a user can fix is reported here, before the first document is read.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from hfllm.data.curation.options import CurationOptions
from hfllm.data.sources import PYDOC
from hfllm.errors import InputError

ENDINGS = (
    *(".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz"),
    *(".warc", ".warc.gz"),
)
TEXT_COLUMNS = ("text", "content")
PEEK_BYTES = 1 << 20


@dataclass(frozen=True)
class Input:
    """One input to read.

    Args:
        kind: an ending out of `ENDINGS`, `pydoc` or `hub`.
        path: the file, or the id of the dataset on the Hub.
        name: its name in reports and document ids.
    """

    kind: str
    path: str
    name: str

    @property
    def is_file(self) -> bool:
        return self.kind.startswith(".")


def find_inputs(options: CurationOptions) -> list[Input]:
    """Return the inputs of `options.dataset_name`, in the order of their names.

    Raises:
        InputError: when nothing is found, a file cannot be read, or a table has no column of text.
    """
    name = options.dataset_name
    if name == PYDOC:
        return [Input("pydoc", name, name)]
    path = Path(name)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and ending_of(file))
        if not files:
            raise InputError(f"dataset folder {name!r} holds no file that ends in {', '.join(ENDINGS)}")
        inputs = [Input(ending_of(file), str(file), str(file.relative_to(path))) for file in files]
    elif path.is_file():
        if not ending_of(path):
            raise InputError(f"{name}: cannot read this kind of file; accepted: {', '.join(ENDINGS)}")
        inputs = [Input(ending_of(path), str(path), path.name)]
    elif name.count("/") == 1 and not name.startswith((".", "/", "~")) and not ending_of(path):
        return [_on_the_hub(name, options)]
    else:
        raise InputError(f"dataset {name!r} does not exist: no such file or folder (and not a Hub id like user/name)")
    for item in inputs:
        _check(item, options.text_column)
    archive = next((item for item in inputs if item.kind.startswith(".warc")), None)
    if archive:
        _check_installed(archive, options.html_extractor)
    return inputs


def _check_installed(archive: Input, html_extractor: str) -> None:
    """Refuse web archives without the libraries that read them, and the text of their pages."""
    if find_spec("warcio") is None:
        raise InputError(f"{archive.path}: a web archive needs warcio: pip install 'hfllm[data]'")
    needed = {"plain": (), "trafilatura": ("trafilatura", "lxml_html_clean")}
    needed["resiliparse"] = (*needed["trafilatura"], "resiliparse")
    missing = next((name for name in needed[html_extractor] if find_spec(name) is None), None)
    if missing:
        other = "trafilatura" if missing == "resiliparse" else "plain, which keeps menus too"
        raise InputError(
            f"{archive.path}: the text of web pages needs {missing}: pip install 'hfllm[data]' "
            f"(or --html_extractor {other})"
        )


def ignored_files(options: CurationOptions) -> list[str]:
    """Return files of the dataset's folder whose kind is not read, except hidden ones."""
    files = sorted(path for path in Path(options.dataset_name).rglob("*") if path.is_file() and not ending_of(path))
    return [str(path) for path in files if not path.name.startswith(".")]


def ending_of(path: Path) -> str:
    """Return the longest of `ENDINGS` that the file's name ends in, else an empty string."""
    return max((ending for ending in ENDINGS if path.name.lower().endswith(ending)), key=len, default="")


def text_column(columns: Sequence[str], wanted: str | None) -> str | None:
    """Return the column that holds the text, or `None`."""
    return next((name for name in ([wanted] if wanted else TEXT_COLUMNS) if name in columns), None)


def _check(item: Input, wanted: str | None) -> None:
    """Open a file, and look for the column of text where its format has columns."""
    try:
        columns = _columns(item)
    except OSError as error:
        raise InputError(f"{item.path}: cannot be opened: {error.strerror or error}") from None
    if columns is not None and text_column(columns, wanted) is None:
        expected = repr(wanted) if wanted else " or ".join(map(repr, TEXT_COLUMNS))
        raise InputError(
            f"{item.path}: no column of text: columns {', '.join(columns) or '(none)'}; expected {expected} "
            f"(name another with --text_column)"
        )


def _columns(item: Input) -> list[str] | None:
    """Return the columns of a table; `None` if the format has none, or the file's beginning does not show them."""
    if item.kind == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_schema(item.path).names
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{item.path}: not parquet, or damaged: {str(error).splitlines()[0]}") from None
    with open(item.path, "rb") as raw:
        stream = gzip.GzipFile(fileobj=raw) if item.kind.endswith(".gz") else raw
        try:
            line = stream.readline(PEEK_BYTES)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            return None  # the reader counts damaged files
    if not line.strip() or item.kind.startswith((".txt", ".warc")):
        return None
    text = line.decode("utf-8-sig", errors="replace")
    if item.kind.startswith(".jsonl"):
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            return None  # the reader counts bad lines
        return list(row) if isinstance(row, dict) else []
    return next(csv.reader([text], delimiter=delimiter_of(item.kind)))


def delimiter_of(kind: str) -> str:
    """Return the delimiter of a .csv or .tsv file."""
    return "\t" if kind.startswith(".tsv") else ","


def _on_the_hub(name: str, options: CurationOptions) -> Input:
    from datasets import load_dataset

    try:
        columns = load_dataset(name, split=options.dataset_train_split, streaming=True).column_names
    except Exception as error:
        raise InputError(
            f"dataset {name!r} is neither a local file or folder nor could it be loaded from the Hub: "
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    if columns is not None and text_column(columns, options.text_column) is None:
        raise InputError(f"dataset {name!r}: no column of text among {', '.join(columns)}: see --text_column")
    return Input("hub", name, name)
