"""Web archives in: each page is read whatever its headers leave out, and each record that is not is counted."""

import gzip
import tracemalloc
import zlib

import pytest

pytest.importorskip("datatrove", reason="needs the extra 'data'")
pytest.importorskip("trafilatura", reason="needs the extra 'data'")

from hfllm.data.curation.inputs import decoded_page, find_inputs
from hfllm.data.curation.options import CurationOptions
from hfllm.data.curation.pipeline import DocumentReader
from hfllm.errors import InputError

SENTENCE = "The wheel of the old mill turns again, and {} people came to see it."
HTML = {"Content-Type": "text/html"}


def page(number):
    return f"<html><body><p>{SENTENCE.format(number)}</p></body></html>".encode()


def http(payload, headers=HTML, status="HTTP/1.1 200 OK"):
    lines = [status, *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + payload


def record(content, kind="response", content_type="application/http; msgtype=response", **headers):
    """One record, compressed by itself as in every archive."""
    fields = {
        "WARC-Type": kind,
        "WARC-Record-ID": f"<urn:{zlib.crc32(content)}>",
        "WARC-Date": "2026-01-01T00:00:00Z",
        "WARC-Target-URI": "http://example.org/",
        "Content-Type": content_type,
        **{name.replace("_", "-"): value for name, value in headers.items()},
        "Content-Length": str(len(content)),
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value is not None)
    return gzip.compress(b"WARC/1.0\r\n" + head.encode() + b"\r\n" + content + b"\r\n\r\n")


def read(folder, *records, cut=0, **options):
    """Texts, drops by reason, and notes."""
    path = folder / "a.warc.gz"
    content = b"".join(records)
    path.write_bytes(content[: len(content) - cut])
    options = CurationOptions(dataset_name=str(path), **{"html_extractor": "trafilatura", **options})
    reader = DocumentReader(find_inputs(options), options)
    texts = [document.text for document in reader.run()]
    counts = {name: stat.total for name, stat in reader.stats.stats.items()}
    drops = {name.removeprefix("dropped_"): count for name, count in counts.items() if name.startswith("dropped_")}
    assert counts.get("total", 0) == len(texts) + sum(drops.values())
    return texts, drops, {name.removeprefix("note_"): n for name, n in counts.items() if name.startswith("note_")}


def chunked(payload):
    cut = len(payload) // 2
    parts = (payload[:cut], payload[cut:])
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


GZIPPED = {**HTML, "Content-Encoding": "gzip"}
CHUNKED = {**HTML, "Transfer-Encoding": "Chunked"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "one",
    [
        record(http(page(1)), WARC_Identified_Payload_Type="text/html"),
        record(http(page(1)), WARC_Identified_Payload_Type=""),
        record(http(page(1)), WARC_Identified_Payload_Type="  "),
        record(http(page(1))),
        record(http(page(1), {"content-type": "TEXT/HTML ; charset=utf-8"})),
        record(http(page(1), {"Content-Type": "application/xhtml+xml"})),
        record(http(page(1), {"Content-Type": "application/octet-stream"}), WARC_Identified_Payload_Type="text/html"),
        record(http(page(1), {"Content-Type": "application/octet-stream"})),
        record(http(page(1), {})),
        record(http(page(1), {"Content-Type": ""})),
        record(http(page(1)), WARC_Target_URI=None),
        record(http(page(1), status="HTTP/2 200")),
        record(http(gzip.compress(page(1)), GZIPPED)),
        record(http(page(1), GZIPPED)),
        record(http(page(1), {**HTML, "Content-Encoding": "br"})),
        record(http(chunked(page(1)), CHUNKED)),
        record(http(chunked(gzip.compress(page(1))), {**CHUNKED, **GZIPPED})),
        record(http(page(1), CHUNKED)),
        record(http(page(1)), WARC_Truncated="length"),
        record(page(1), "resource", "text/html"),
        record(SENTENCE.format(1).encode(), "conversion", "text/plain"),
        record(SENTENCE.format(1).encode(), "conversion", "text/plain", WARC_Identified_Payload_Type=""),
        record(http(SENTENCE.format(1).encode(), {"Content-Type": "text/plain"})),
        record(http(page(1).replace(b"mill", b"m\0ill"))),
        record(http(page(1).replace(b"<html>", b"<html><meta charset=utf-16>"))),
        record(http(page(1), {"Content-Type": "text/html; charset=punycode"})),
    ],
)
def test_a_page_is_read_whatever_its_headers_are(tmp_path, one):
    assert read(tmp_path, one) == ([SENTENCE.format(1)], {}, {})


@pytest.mark.parametrize(
    ("one", "drops"),
    [
        (record(http(b"moved", status="HTTP/1.1 301 Moved Permanently")), "http_status"),
        (record(http(page(1), status="HTTP/1.1 404 Not Found")), "http_status"),
        (record(http(b"%PDF-1.4", {"Content-Type": "application/pdf"})), "not_text"),
        (record(http(page(1)), WARC_Identified_Payload_Type="application/pdf"), "not_text"),
        (record(http(b"\x89PNG\r\n\0\0\xff\xfa", {})), "not_text"),
        (record(b"20260101 93.184.216.34", content_type="text/dns"), "not_text"),
        (record(http(b"")), "empty"),
        (record(b""), "empty"),
        (record(http(b"x" * 3000, {"Content-Type": "text/plain"})), "too_long"),
        (record(http(gzip.compress(b"x" * 10_000_000), GZIPPED)), "too_long"),
        (record(http(gzip.compress(page(1))[:14] + b"\xff" * 60, GZIPPED)), "content_encoding"),
        (record(http(b"\x8b\x02\x80\xff\xfe\x81" * 20, {**HTML, "Content-Encoding": "br"})), "content_encoding"),
        (record(http(bytes(range(128, 256)) * 9, {"Content-Type": "text/plain; charset=utf-8"})), "unknown_encoding"),
    ],
)
def test_a_record_without_a_text_is_a_counted_drop(tmp_path, one, drops):
    texts, found, _ = read(tmp_path, one, record(http(page(2))), max_document_bytes=2000)
    assert texts == [SENTENCE.format(2)]
    assert found == ({} if drops is None else {drops: 1})


def test_records_that_are_no_documents_are_counted_apart(tmp_path):
    kinds = ("warcinfo", "request", "metadata", "revisit", "continuation")
    others = [record(b"GET / HTTP/1.1\r\n\r\n", kind) for kind in (*kinds, "request")]
    texts, drops, notes = read(tmp_path, *others, record(http(page(1))))
    assert (len(texts), drops) == (1, {})
    assert notes == {f"record_{kind}": 1 for kind in kinds} | {"record_request": 2}


@pytest.mark.slow
def test_an_archive_that_is_cut_off_loses_its_last_record_alone(tmp_path):
    records = [record(http(page(number))) for number in range(3)]
    for cut in range(1, len(records[-1]), 10):
        texts, drops, _ = read(tmp_path, *records, cut=cut)
        assert texts[:2] == [SENTENCE.format(number) for number in range(2)]
        # The cut may go through the page's type.
        assert len(texts) == 3 or drops in [{"damaged_warc": 1}, {"not_text": 1}], cut
    # As it stands uncompressed, too.
    plain = b"".join(map(gzip.decompress, records))
    (tmp_path / "b.warc").write_bytes(plain[:-40])
    options = CurationOptions(dataset_name=str(tmp_path / "b.warc"))
    reader = DocumentReader(find_inputs(options), options)
    assert len(list(reader.run())) == 2
    assert reader.stats["dropped_damaged_warc"].total == 1


def test_pages_that_the_extractor_is_not_given_are_noted(tmp_path):
    deep = b"<html><body>" + b"<div>" * 5000 + b"<p>" + SENTENCE.format(1).encode()
    hidden = b"<html><body><frameset><noframes><p>" + SENTENCE.format(2).encode()
    texts, drops, notes = read(tmp_path, *(record(http(one)) for one in (deep, hidden, page(3))))
    assert texts == [SENTENCE.format(number) for number in (1, 2, 3)]
    assert (drops, notes) == ({}, {"too_complex": 1, "nothing_found": 1})


@pytest.mark.slow
def test_a_page_of_50_mb_is_dropped_without_being_held(tmp_path):
    one = record(http(b"<p>" + b"x" * 50_000_000))  # a thousand times as much as its compressed bytes
    tracemalloc.start()
    found = read(tmp_path, one, record(http(page(1))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == ([SENTENCE.format(1)], {"too_long": 1}, {})
    assert peak < 20e6, f"{peak / 1e6:.0f} MB"


GERMAN = "Die Mühle läuft über Grün, sagt Frau Weiß aus Köln und lächelt dabei sehr freundlich."
RUSSIAN = "Старая мельница у моста снова работает, и вся деревня пришла посмотреть на колесо."
JAPANESE = "この村の図書館は、使われなくなった駅の中にあります。本棚は昔の待合室に並びました。"


@pytest.mark.parametrize(
    ("text", "encoding", "declared"),
    [
        (GERMAN, "utf-8", None),
        (GERMAN, "utf-8", "iso-8859-1"),  # as many pages wrongly say
        (GERMAN, "cp1252", "iso-8859-1"),
        (GERMAN, "cp1252", "utf-8"),
        (GERMAN, "cp1252", "no-such-encoding"),
        (GERMAN, "utf-8-sig", "cp1252"),
        (GERMAN, "utf-16", None),
        (GERMAN, "utf-16-le", "utf-16le"),
        (RUSSIAN, "cp1251", "windows-1251"),
        (RUSSIAN, "cp1251", None),
        (RUSSIAN, "koi8-r", "koi8-r"),
        (JAPANESE, "shift_jis", "x-sjis"),
        (JAPANESE, "euc-jp", None),
        (JAPANESE, "iso-2022-jp", "iso-2022-jp"),
    ],
)
def test_encodings_declared_rightly_wrongly_or_not(text, encoding, declared):
    assert decoded_page((text * 4).encode(encoding), declared) == text * 4


def test_a_page_may_have_one_damaged_character_in_a_hundred():
    raw = (JAPANESE * 9).encode()
    assert decoded_page(raw[:300] + b"\xff" + raw[300:], "utf-8").count("�") == 1
    assert decoded_page(bytes(range(128, 256)) * 9, "utf-8") is None


def test_the_meta_tag_names_the_encoding():
    for tag in (
        '<meta charset="windows-1251">',
        "<meta http-equiv=Content-Type content='text/html; charset=windows-1251'>",
    ):
        assert decoded_page((tag + RUSSIAN).encode("cp1251")) == tag + RUSSIAN


def test_without_trafilatura_it_says_what_to_install(tmp_path, monkeypatch):
    for absent in ("warcio", "trafilatura", "lxml_html_clean"):
        monkeypatch.setattr(
            "hfllm.data.curation.inputs.find_spec", lambda name, absent=absent: None if name == absent else 1
        )
        with pytest.raises(InputError, match=rf"a\.warc\.gz: .* needs {absent}: pip install 'hfllm\[data\]'"):
            read(tmp_path, record(http(page(1))))
    assert read(tmp_path, record(http(page(1))), html_extractor="plain")[0] == [SENTENCE.format(1)]
    monkeypatch.setattr("hfllm.data.curation.inputs.find_spec", lambda name: None if name == "resiliparse" else 1)
    assert read(tmp_path, record(http(page(1))))[0] == [SENTENCE.format(1)]
    with pytest.raises(InputError, match=r"needs resiliparse: .*or --html_extractor trafilatura"):
        read(tmp_path, record(http(page(1))), html_extractor="resiliparse")
    (tmp_path / "a.txt").write_text("no web page")
    find_inputs(CurationOptions(dataset_name=str(tmp_path / "a.txt")))
