"""Documents in: every kind of file, and every way in which one can be damaged."""

import gzip
import json
import tracemalloc
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

pytest.importorskip("datatrove", reason="needs the extra 'data'")

from hfllm.data.curation.inputs import find_inputs
from hfllm.data.curation.options import CurationOptions
from hfllm.data.curation.pipeline import DocumentReader
from hfllm.errors import InputError

ROWS = [{"text": "one document"}, {"text": "two\ndocuments"}]


def read(path, **options):
    """Texts, and drops by reason."""
    options = CurationOptions(dataset_name=str(path), **options)
    reader = DocumentReader(find_inputs(options), options)
    texts = [document.text for document in reader.run()]
    drops = {name[8:]: stat.total for name, stat in reader.stats.stats.items() if name.startswith("dropped_")}
    assert reader.stats["total"].total == len(texts) + sum(drops.values())
    return texts, drops


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "csv.gz", "tsv", "parquet"])
def test_tables_give_their_texts(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"n": 1, **row} for row in ROWS]), path)
    elif kind.startswith("jsonl"):
        content = b"\xef\xbb\xbf" + jsonl(ROWS)
    else:
        mark = "\t" if kind == "tsv" else ","
        content = f'n{mark}text\n1{mark}one document\n2{mark}"two\ndocuments"\n'.encode()
    if kind != "parquet":
        path.write_bytes(gzip.compress(content) if kind.endswith(".gz") else content)
    assert read(path) == ([row["text"] for row in ROWS], {})
    assert read(path, max_samples=1)[0] == ["one document"]


def test_another_column_can_hold_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"body": "here", "text": "not here"}]))
    assert read(tmp_path, text_column="body")[0] == ["here"]


def test_text_files_as_passages_lines_or_whole(tmp_path):
    paragraphs = [f"Paragraph {number}\nhas two lines." for number in range(6)]
    (tmp_path / "a.txt").write_text("\n\n\n".join(paragraphs))
    texts, _ = read(tmp_path, passage_bytes=50)
    # Whole paragraphs, joined until there are fifty bytes.
    assert [text.count("Paragraph") for text in texts] == [2, 2, 2]
    assert " ".join(texts).split() == " ".join(paragraphs).split()
    assert len(read(tmp_path, txt_documents="line")[0]) == 12
    assert read(tmp_path, txt_documents="file")[0] == ["\n\n\n".join(paragraphs)]
    # A line that is long enough is a document, as where each line holds an article.
    (tmp_path / "a.txt").write_text("\n".join("word " * 40 for _ in range(3)))
    assert len(read(tmp_path, passage_bytes=50)[0]) == 3


def test_every_document_says_where_it_comes_from(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jsonl").write_bytes(jsonl([{"text": "x"}, {"text": "y"}]))
    options = CurationOptions(dataset_name=str(tmp_path))
    documents = list(DocumentReader(find_inputs(options), options).run())
    assert [document.id for document in documents] == ["sub/a.jsonl:line 1", "sub/a.jsonl:line 2"]
    assert documents[0].metadata["source"] == "sub/a.jsonl"


def test_tasks_share_files_and_what_is_no_file(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl([{"text": name}]))
    options = CurationOptions(dataset_name=str(tmp_path))
    shares = [[d.text for d in DocumentReader(find_inputs(options), options).run(None, rank, 2)] for rank in (0, 1)]
    assert shares == [["a", "c"], ["b"]]
    options = CurationOptions(max_samples=3)
    pydoc = [[d.id for d in DocumentReader(find_inputs(options), options).run(None, rank, 2)] for rank in (0, 1)]
    assert len(pydoc[0]) == len(pydoc[1]) == 3
    assert not set(pydoc[0]) & set(pydoc[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content", "texts", "drops"),
    [
        ("utf8.txt", b"fine\n\xff\xfe broken\nfine too", 2, {"invalid_utf8": 1}),
        ("utf8.jsonl", jsonl(ROWS) + b'{"text": "\xff"}\n{"text": "\\ud800"}\n', 2, {"invalid_utf8": 2}),
        ("utf8.csv", b"text\nfine\n\xff\n", 1, {"invalid_utf8": 1}),
        (
            "cut.jsonl.gz",
            gzip.compress(jsonl([{"text": str(n)} for n in range(50000)]))[:-9000],
            None,
            {"damaged_gz": 1},
        ),
        ("no.txt.gz", b"this is not gzip", 0, {"damaged_gz": 1}),
        ("empty.jsonl", b"", 0, {"empty_file": 1}),
        ("blank.txt", b"\n\n  \n", 0, {}),
        ("nul.txt", b"fine\n\0\0\0\nfine too", 2, {"nul_bytes": 1}),
        ("nul.jsonl", jsonl([{"text": "a\0b"}, {"text": "fine"}]), 1, {"nul_bytes": 1}),
        ("odd.jsonl", b'{"text": "fine"}\n{"text": \n[1]\n{"n": 1}\n{"text": 3}\n{"text": " "}\n', 1, None),
        ("deep.jsonl", b'{"text": "fine"}\n' + b"[" * 1900 + b"\n", 1, {"not_json": 1}),
        ("begins_deep.jsonl", b"[" * 1900 + b'\n{"text": "fine"}\n', 1, {"not_json": 1}),
        ("long.csv", b"n,text\n1,fine\n2," + b"x" * 3000 + b"\n3,fine\n", 2, {"too_long": 1}),
        ("open.csv", b'n,text\n1,fine\n2,"' + b"x\n" * 3000, 1, None),
    ],
)
def test_damage_is_a_counted_drop_and_the_rest_is_read(tmp_path, name, content, texts, drops):
    path = tmp_path / name
    path.write_bytes(content)
    found, counted = read(path, txt_documents="line", max_document_bytes=2000)
    if name == "odd.jsonl":
        drops = {"not_json": 1, "not_an_object": 1, "no_text": 2, "empty": 1}
    elif name == "open.csv":
        # What follows the cell that never ends is read as rows again, which have no text.
        drops = {"too_long": 1, "no_text": counted["no_text"]}
    assert counted == drops
    assert len(found) == texts if texts is not None else 1000 < len(found) < 50000


@pytest.mark.slow
def test_a_line_of_50_mb_is_dropped_without_being_held(tmp_path):
    for name, start in (("a.jsonl", b'{"text": "'), ("b.txt", b""), ("c.csv", b"text\n")):
        path = tmp_path / name
        with path.open("wb") as stream:
            stream.write(start)
            for _ in range(50):
                stream.write(b"x" * 1_000_000)
            stream.write(b'"}\n' if name == "a.jsonl" else b"\n")
            stream.write(b'{"text": "fine"}\n' if name == "a.jsonl" else b"fine\n")
        tracemalloc.start()
        found = read(path, max_document_bytes=2_000_000, txt_documents="line")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found == (["fine"], {"too_long": 1})
        assert peak < 20e6, f"{name}: {peak / 1e6:.0f} MB"
    for unit in ("passage", "file"):
        expected = (["fine"] if unit == "passage" else [], {"too_long": 1})
        assert read(tmp_path / "b.txt", max_document_bytes=2_000_000, txt_documents=unit) == expected


def test_one_file_of_a_folder_may_be_damaged(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(ROWS))[:-10])
    (tmp_path / "c.jsonl").write_bytes(jsonl(ROWS))
    texts, drops = read(tmp_path)
    assert texts[-2:] == [row["text"] for row in ROWS]
    assert drops == {"empty_file": 1, "damaged_gz": 1}


def test_damaged_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"row {n}" for n in range(5000)]}), path, row_group_size=500)
    content = bytearray(path.read_bytes())
    content[len(content) // 4 : len(content) // 4 + 600] = b"\xff" * 600
    path.write_bytes(content)
    texts, drops = read(path)
    assert texts and Counter(drops) == {"damaged_parquet": 1}
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match=r"a\.parquet: not parquet, or damaged"):
        read(path)


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_a_table_without_text_is_refused_before_anything_is_read(tmp_path, kind):
    path = tmp_path / f"z.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), path)
    else:
        path.write_text("body,n\nx,1\n" if kind == "csv" else '{"body": "x", "n": 1}\n')
    with pytest.raises(
        InputError, match=rf"z\.{kind}: no column of text: columns body, n; expected 'text' or 'content'"
    ):
        read(tmp_path)
    with pytest.raises(InputError, match="expected 'words'"):
        read(tmp_path, text_column="words")


def test_what_is_not_there_or_not_readable_is_named(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK")
    for name, complaint in (
        (tmp_path / "none.jsonl", "does not exist"),
        (tmp_path / "a.zip", "cannot read this kind of file; accepted: .txt"),
        (tmp_path, "holds no file that ends in .txt"),
        ("nobody/nothing", "nor could it be loaded from the Hub"),
    ):
        with pytest.raises(InputError, match=complaint):
            read(name)
