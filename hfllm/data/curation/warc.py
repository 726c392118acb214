"""Read web archives: pages as their text, and a counted reason for every record that gives none.

A page is the payload of a `response`, `resource` or `conversion` record (ISO 28500:2017; the last is the text of
Common Crawl's WET files). What it is, `WARC-Identified-Payload-Type` says, else the `Content-Type` that came with it,
else its beginning. Records of other types, such as requests, are no documents: their reason begins with
`NOT_A_DOCUMENT`.
"""

import re
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hfllm.data.curation.html_text import html_to_text
from hfllm.data.curation.html_tokens import looks_like_html
from hfllm.data.curation.inputs import Input
from hfllm.data.curation.options import CurationOptions

if TYPE_CHECKING:
    from warcio.recordloader import ArcWarcRecord

# A position in the file; the text, or for what cannot be a document the reason; a remark on a text may be both.
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
# Those of the web (https://encoding.spec.whatwg.org), since Python has others that take quadratic time.
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
                place = record.rec_headers.get_header("WARC-Record-ID") or f"record {number}"
                text, reason = _document(record, options)
            except (ArchiveLoadFailed, EOFError, zlib.error):
                yield "the rest", None, "damaged_warc"
                return
            yield place, text, reason
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
    """Return a record's payload without its encodings, or the reason why it cannot be had."""
    from warcio.bufferedreaders import ChunkedDataReader

    headers = record.http_headers
    is_chunked = headers and (headers.get_header("Transfer-Encoding") or "").strip().lower() == "chunked"
    stream = ChunkedDataReader(record.raw_stream) if is_chunked else record.raw_stream
    parts, size = [], 0
    while size <= limit and (part := stream.read(STEP)):
        parts.append(part)
        size += len(part)
    # What is left of a record that the end of the file, or damage, cut off.
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
    often declare what they are not) with at most one damaged character in a hundred, `declared` (by the HTTP header),
    that of its own `meta` tag, or the one that its bytes look like: the first under which each byte means something.
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
    # As browsers do: pages that say Latin-1 mean Windows' superset of it.
    name = "cp1252" if name.lower() in ("iso-8859-1", "latin1", "latin-1", "us-ascii", "ascii") else name
    try:
        return raw.decode(name.removeprefix("x-"))
    except (UnicodeDecodeError, LookupError):
        return None


def _charset(source: bytes) -> str | None:
    found = _CHARSET.search(source)
    return found[1].decode("ascii", "replace") if found else None


def _media_type(value: str | None) -> str:
    return (value or "").partition(";")[0].strip().lower()
