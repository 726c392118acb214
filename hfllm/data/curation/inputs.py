"""The files of a dataset name: found, checked, read (WARC too), and shown as examples of dropped texts.

Every error that a user can fix is reported here, before the first document is read.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING

from hfllm.data.curation.options import CurationOptions
from hfllm.data.curation.text import html_to_text, looks_like_html
from hfllm.data.sources import PYDOC, not_loaded
from hfllm.errors import InputError, refuse_if

if TYPE_CHECKING:
    from warcio.recordloader import ArcWarcRecord


# ---- the files of a dataset name ----


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
        refuse_if(not files, f"dataset folder {name!r} holds no file that ends in {', '.join(ENDINGS)}")
        inputs = [Input(ending_of(file), str(file), str(file.relative_to(path))) for file in files]
    elif path.is_file():
        refuse_if(not ending_of(path), f"{name}: cannot read this kind of file; accepted: {', '.join(ENDINGS)}")
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
    """Refuse web archives without the libraries for reading them, and for the text of their pages."""
    refuse_if(find_spec("warcio") is None, f"{archive.path}: a web archive needs warcio: pip install 'hfllm[data]'")
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
    """Return files of unsupported kinds in the dataset's folder, except hidden ones."""
    files = sorted(path for path in Path(options.dataset_name).rglob("*") if path.is_file() and not ending_of(path))
    return [str(path) for path in files if not path.name.startswith(".")]


def ending_of(path: Path) -> str:
    """Return the longest of `ENDINGS` that the file's name ends in, else an empty string."""
    return max((ending for ending in ENDINGS if path.name.lower().endswith(ending)), key=len, default="")


def text_column(columns: Sequence[str], column: str | None) -> str | None:
    """Return the column of the text, or `None`."""
    return next((name for name in ([column] if column else TEXT_COLUMNS) if name in columns), None)


def _check(item: Input, column: str | None) -> None:
    """Open a file, and look for the column of text where its format has columns."""
    try:
        columns = _columns(item)
    except OSError as error:
        raise InputError(f"{item.path}: cannot be opened: {error.strerror or error}") from None
    if columns is not None and text_column(columns, column) is None:
        expected = repr(column) if column else " or ".join(map(repr, TEXT_COLUMNS))
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
        raise not_loaded(name, error) from error
    if columns is not None and text_column(columns, options.text_column) is None:
        raise InputError(f"dataset {name!r}: no column of text among {', '.join(columns)}: see --text_column")
    return Input("hub", name, name)


# ---- web archives ----
#
# Read web archives: pages as their text, and a counted reason for every record without text.
#
# A page is the payload of a `response`, `resource` or `conversion` record (ISO 28500:2017; the last is the text of
# Common Crawl's WET files). Its type is given by `WARC-Identified-Payload-Type`, else by the `Content-Type` that came
# with it, else by its beginning. Records of other types, such as requests, are no documents: their reason begins with
# `NOT_A_DOCUMENT`.


# A position in the file; the text, or the reason for a record that is no document; a remark on a text may be both.
Item = tuple[str, str | None, str | None]
NOT_A_DOCUMENT = "record_"
PAGES = ("response", "resource", "conversion")
OTHERS = ("warcinfo", "request", "metadata", "revisit", "continuation")
HTML = ("text/html", "application/xhtml+xml")
UNKNOWN = ("", "application/octet-stream", "unknown/unknown", "application/unknown", "unk")
STEP = 1 << 16
BLOCK = 1 << 12  # compressed bytes at once, which may become a thousand times as many
_CHARSET = re.compile(rb"charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)
_MARKS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))
# Encodings of the web (https://encoding.spec.whatwg.org), since Python has others that take quadratic time.
_ENCODINGS = re.compile(
    r"utf-?8|utf-16(?:le|be)?|(?:us-)?ascii|latin-?1|iso-8859-\d+(?:-[ei])?|windows-\d+|cp\d+|ibm866|koi8-[ru]|macintosh|"
    r"gbk|gb2312|gb18030|big5(?:-hkscs)?|euc-(?:jp|kr|tw)|(?:x-)?s(?:hift)?[_-]?jis|iso-2022-jp|ks_c_5601-1987|tis-620",
    re.IGNORECASE,
)
_NOT_ITSELF_IN_UTF8 = ("utf-16", "iso-2022")  # their bytes are valid UTF-8, and mean something else
DAMAGED_SHARE = 100  # of so many characters beyond ASCII one may be damaged
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")


def read_warc(item: Input, options: CurationOptions) -> Iterator[Item]:
    """Yield the documents of a WARC file, in the memory of one record."""
    from warcio.archiveiterator import ArchiveIterator
    from warcio.exceptions import ArchiveLoadFailed

    with open(item.path, "rb") as stream:
        # warcio decompresses each record by itself, and a truncated file loses only its last record. Headers of HTTP
        # are read below: warcio ends at the first record whose headers are damaged.
        archive, number = ArchiveIterator(stream, no_record_parse=True, block_size=BLOCK), 0
        while True:
            number += 1
            try:
                record = next(archive, None)
                if record is None:
                    break
                index = record.rec_headers.get_header("WARC-Record-ID") or f"record {number}"
                text, reason = _document(record, options)
            except (ArchiveLoadFailed, EOFError, zlib.error):
                yield "the rest", None, "damaged_warc"
                return
            yield index, text, reason
        # A record whose first compressed block was cut off gives nothing at all.
        if item.kind.endswith(".gz") and sum(archive.member_info or ()) < Path(item.path).stat().st_size:
            yield "the rest", None, "damaged_warc"


def _document(record: "ArcWarcRecord", options: CurationOptions) -> tuple[str | None, str | None]:
    if record.length is None or record.length < 0:
        return None, "damaged_warc"
    if record.rec_type not in PAGES:
        return None, NOT_A_DOCUMENT + (record.rec_type if record.rec_type in OTHERS else "of_another_type")
    content_type = record.content_type or ""
    if record.rec_type == "response" and not content_type.startswith("text/dns"):
        _read_http_headers(record)
        status = record.http_headers.get_statuscode() if record.http_headers else "200"
        if not status.startswith("2"):
            return None, "http_status"  # an error page or a redirection
        content_type = (record.http_headers and record.http_headers.get_header("Content-Type")) or ""
    identified = _media_type(record.rec_headers.get_header("WARC-Identified-Payload-Type"))
    kind = identified if identified not in UNKNOWN else _media_type(content_type)
    if kind not in (*HTML, "text/plain", *UNKNOWN):
        return None, "not_text"
    raw, reason = _payload(record, options.max_document_bytes)
    if reason:
        return None, reason
    text = decoded_page(raw, _charset(content_type.encode("latin-1", "replace")))
    if text is None or (kind in UNKNOWN and "\0" in text):
        return None, "not_text" if kind in UNKNOWN else "unknown_encoding"
    if kind in HTML or (record.rec_type != "conversion" and looks_like_html(text)):
        text, how = html_to_text(text, options.html_extractor)
        return text, None if how == options.html_extractor else how
    return text, None


def _read_http_headers(record: "ArcWarcRecord") -> None:
    from warcio.statusandheaders import StatusAndHeadersParser

    if record.length:
        record.http_headers = StatusAndHeadersParser([], verify=False).parse(record.raw_stream)


def _payload(record: "ArcWarcRecord", limit: int) -> tuple[bytes, str | None]:
    """Return a record's payload without its encodings, or the reason for a failure."""
    from warcio.bufferedreaders import ChunkedDataReader

    headers = record.http_headers
    is_chunked = headers and (headers.get_header("Transfer-Encoding") or "").strip().lower() == "chunked"
    stream = ChunkedDataReader(record.raw_stream) if is_chunked else record.raw_stream
    parts, size = [], 0
    while size <= limit and (part := stream.read(STEP)):
        parts.append(part)
        size += len(part)
    # The rest of a record that the end of the file, or damage, cut off.
    if size <= limit and getattr(record.raw_stream, "limit", 0) > 0 and not record.raw_stream.read(1):
        return b"", "damaged_warc"
    raw, reason = b"".join(parts), None
    if size <= limit:
        raw, reason = _decompressed(raw, (headers and headers.get_header("Content-Encoding")) or "", limit)
    return (raw, reason) if len(raw) <= limit else (b"", "too_long")


def _decompressed(raw: bytes, coding: str, limit: int) -> tuple[bytes, str | None]:
    """Undo a content coding as far as `limit` bytes and one. Many archives name one that they have undone."""
    coding = coding.strip().lower()
    if coding in ("gzip", "x-gzip", "deflate"):
        for window in (zlib.MAX_WBITS | 32, -zlib.MAX_WBITS):  # gzip or zlib by its header, and deflate without any
            with suppress(zlib.error):
                return zlib.decompressobj(window).decompress(raw, limit + 1), None
    if coding in ("", "identity", "none") or _is_utf8(raw):
        return raw, None
    return b"", "content_encoding"


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def decoded_page(raw: bytes, declared: str | None = None) -> str | None:
    """Return a page as text, or `None` when no encoding fits it.

    The encoding is that of its byte order mark, UTF-8 (other text is hardly ever valid UTF-8 by chance, while pages
    often declare a wrong encoding) with at most one damaged character in a hundred, `declared` (by the HTTP header),
    that of its own `meta` tag, or the apparent one of its bytes: the first under which each byte means something.
    """
    for mark, name in _MARKS:
        if raw.startswith(mark):
            return raw[len(mark) :].decode(name, errors="replace")
    own = _charset(raw[:4096])
    # A tag that can be read byte by byte is not in UTF-16.
    own = None if own and own.lower().startswith("utf-16") else own
    names = [name for name in (declared, own) if name and _ENCODINGS.fullmatch(name)]
    first = [name for name in names if name.lower().startswith(_NOT_ITSELF_IN_UTF8)]
    for name in (*first, "utf-8"):
        text = _decoded(raw, name)
        if text is not None:
            return text
    text = raw.decode(errors="replace")
    if text.count("\ufffd") * DAMAGED_SHARE <= sum(map(len, _NOT_ASCII.findall(text))):
        return text
    import cchardet

    guess = cchardet.detect(raw)["encoding"]
    for name in (*names, guess):
        text = _decoded(raw, name) if name and _ENCODINGS.fullmatch(name) else None
        if text is not None:
            return text
    return None


def _decoded(raw: bytes, name: str) -> str | None:
    # As browsers do: pages declaring Latin-1 mean Windows' superset of it.
    name = "cp1252" if name.lower() in ("iso-8859-1", "latin1", "latin-1", "us-ascii", "ascii") else name
    try:
        return raw.decode(name.removeprefix("x-"))
    except (UnicodeDecodeError, LookupError):
        return None


def _charset(source: bytes) -> str | None:
    result = _CHARSET.search(source)
    return result[1].decode("ascii", "replace") if result else None


def _media_type(value: str | None) -> str:
    return (value or "").partition(";")[0].strip().lower()


# ---- files ----
#
# Read each kind of file one document at a time, in memory independent of the file's size.
#
# Every reader yields `(place, text, reason)`: a position in the file such as `line 3`, and either the text or, for
# a part that cannot be a document, the reason. A damaged file also ends with such a reason. A text with a reason is a
# document, and the reason a remark on how it was read.


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


def decoded(origin: str, raw: bytes) -> Item:
    """Decode a document from its bytes, which must be UTF-8."""
    try:
        return origin, raw.decode("utf-8"), None
    except UnicodeDecodeError:
        return origin, None, "invalid_utf8"


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
        index = f"line {number}"
        if line is None:
            yield index, None, "too_long"
            continue
        if not line.strip():
            continue
        _, text, reason = decoded(index, line.removeprefix(b"\xef\xbb\xbf"))
        if reason is None:
            try:
                row = json.loads(text)
            except (ValueError, RecursionError):
                yield index, None, "not_json"
                continue
            text, reason = _text_of(row, options) if isinstance(row, dict) else (None, "not_an_object")
        yield index, text, reason


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
                # Invalid UTF-8 bytes become surrogates, by which the reader detects them in the cell.
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
