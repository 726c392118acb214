"""Data in, and complaints that say where."""

import csv
import gzip
import io
import json
import tracemalloc

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from hfllm.data import formats, row_limits
from hfllm.data.loading import DataArguments
from hfllm.data.row_limits import MAX_ROW_BYTES, _row_groups, arrow_bytes
from hfllm.data.sources import HubPart, iterate_source, load_source
from hfllm.errors import InputError


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_every_local_format_gives_its_rows(tmp_path):
    rows = [{"text": "one"}, {"text": "two"}]
    write(tmp_path / "a.jsonl", rows[0], "", rows[1])
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.csv").write_text("text\none\ntwo\n")
    (tmp_path / "d.tsv").write_text("text\tmore\none\t1\n")
    (tmp_path / "e.txt").write_text("one\nstill one\n \t\n\ntwo\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "f.parquet")
    for name in ("a.jsonl", "b.json", "c.csv", "f.parquet"):
        assert list(load_source(str(tmp_path / name)).rows) == rows
    assert load_source(str(tmp_path / "d.tsv")).rows == [{"text": "one", "more": "1"}]
    assert [row["text"] for row in load_source(str(tmp_path / "e.txt")).rows] == ["one\nstill one", "two"]
    assert len(load_source(str(tmp_path))) == 11
    assert load_source(str(tmp_path / "a.jsonl")).origins[1].endswith("a.jsonl, line 3")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"text": "fine"}\n{"text": ', "bad.jsonl, line 2: not JSON"),
        pytest.param('{"text": "fine"}\n' + "[" * 100_000, "bad.jsonl, line 2: not JSON", id="deep"),
        pytest.param(f'{{"text": {"9" * 5000}}}', "bad.jsonl, line 1: not JSON", id="digits"),
        ("[1, 2]", "bad.jsonl, line 1: a row must be a JSON object, got list"),
        ("", "is empty"),
    ],
)
def test_bad_jsonl_is_named_by_line(tmp_path, content, complaint):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"bad\.jsonl") as error:
        load_source(str(tmp_path / "bad.jsonl"))
    assert complaint in str(error.value)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./no/folder", "noslash", "a/b/c", "/abs/path"])
def test_a_path_that_does_not_exist_is_named(name):
    with pytest.raises(InputError, match="does not exist"):
        load_source(name)


def test_an_unreachable_hub_id_is_named():
    with pytest.raises(InputError, match="'nobody/nothing' is neither a local file or folder"):
        load_source("nobody/nothing")


def asked(text):
    return [{"role": "user", "content": text}]


def said(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Q", "input": "", "output": "A"},
        {"instruction": "Q", "output": "A"},
        {"instruction": "Q", "context": "", "response": "A", "category": "open"},
        {"prompt": "Q", "completion": "A"},
        {"prompt": asked("Q"), "completion": said("A")},
        {"inputs": "Q", "targets": "A"},
        {"messages": asked("Q") + said("A")},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    ],
)
def test_instruction_formats_mean_the_same(row):
    assert formats.to_sft("here", row) == {"prompt": asked("Q"), "completion": said("A")}


def test_an_alpaca_input_follows_the_instruction():
    row = formats.to_sft("here", {"instruction": "Q", "input": "passage", "output": "A"})
    assert row["prompt"] == asked("Q\npassage")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "response_a": "good", "response_b": "bad", "preference": "a"},
        {"prompt": "Q", "response_a": "bad", "response_b": "good", "preference": "b"},
        {"prompt": asked("Q"), "chosen": said("good"), "rejected": said("bad")},
        {"chosen": asked("Q") + said("good"), "rejected": asked("Q") + said("bad")},
        {"chosen": "\n\nHuman: Q\n\nAssistant: good", "rejected": "\n\nHuman: Q\n\nAssistant: bad"},
        {
            "conversations": [{"from": "human", "value": "Q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
    ],
)
def test_preference_formats_mean_the_same(row):
    expected = {"prompt": asked("Q"), "chosen": said("good"), "rejected": said("bad")}
    assert formats.to_preference("here", row) == expected


def test_prompts_keep_their_other_columns():
    assert formats.to_prompt("here", {"prompt": "Q", "answer": 3}) == {"prompt": "Q", "answer": 3}
    assert formats.to_prompt("here", {"instruction": "Q", "input": "p"})["prompt"] == asked("Q\np")
    assert formats.to_prompt("here", {"messages": asked("Q") + said("A")})["prompt"] == asked("Q")
    assert formats.to_prompt("here", {"text": "Once"})["prompt"] == "Once"


@pytest.mark.parametrize(
    ("mapper", "row", "complaint"),
    [
        (formats.to_sft, {"question": "Q", "reply": "A"}, "x.jsonl, line 3: columns question, reply; expected one of"),
        (formats.to_preference, {"prompt": "Q", "chosen": "A"}, "columns prompt, chosen"),
        (
            formats.to_preference,
            {"prompt": "Q", "response_a": "1", "response_b": "2", "preference": "c"},
            "x.jsonl, line 3: preference is 'c'; expected 'a' or 'b'",
        ),
        (formats.to_preference, {"chosen": "A", "rejected": "B"}, "must be messages or transcripts"),
        (formats.to_preference, {"chosen": asked("Q") + said("A"), "rejected": asked("P") + said("B")}, "same prompt"),
        (formats.to_prompt, {"question": "Q"}, "columns question"),
        (formats.to_prompt, {"prompt": [{"role": "robot", "content": "Q"}]}, "robot"),
        (formats.to_sft, {"messages": asked("Q")}, "must end with the assistant"),
        (formats.to_text, {"body": "words"}, "columns body"),
    ],
)
def test_unreadable_rows_name_their_origin_and_columns(mapper, row, complaint):
    with pytest.raises(InputError, match=r"x\.jsonl, line 3") as error:
        mapper("x.jsonl, line 3", row)
    assert complaint in str(error.value)


def test_code_llamas_infilling_prompts():
    assert (
        formats.infilling_prompt("def f(x):\n    ", "\n    return y")
        == "<PRE> def f(x):\n     <SUF>\n    return y <MID>"
    )
    assert formats.infilling_prompt("a = ", "\n", suffix_first=True) == "<PRE> <SUF>\n <MID> a = "


def test_the_line_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n' + b'{"text": "two"}\n{"text": "\xff"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl: not UTF-8 after row 2"):
        load_source(str(tmp_path / "a.jsonl"))
    (tmp_path / "b.txt").write_bytes(b"one\r\nstill one\r\n\r\ntwo\n\nthree \xff\n")
    with pytest.raises(InputError, match=r"b\.txt: not UTF-8 after row 2"):
        load_source(str(tmp_path / "b.txt"))
    (tmp_path / "b.txt").write_bytes(b"one\r\nstill one\r\n\r\ntwo\n")
    assert [row["text"] for row in load_source(str(tmp_path / "b.txt")).rows] == ["one\nstill one", "two"]


@pytest.mark.parametrize(
    ("name", "content"), [("a.csv", "text\none\n"), ("a.json", '[{"text": "one"}]'), ("a.txt", "one\n")]
)
def test_the_mark_that_some_editors_begin_with_is_no_text(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert load_source(str(tmp_path / name)).rows == [{"text": "one"}]


def test_rows_are_counted_file_by_file(tmp_path):
    write(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"})
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "three"}\n{"text": "\xff"}\n')
    with pytest.raises(InputError, match=r"b\.jsonl: not UTF-8 after row 1"):
        load_source(str(tmp_path))


def test_halves_of_surrogate_pairs_become_question_marks(tmp_path):
    whole = '{"text": "a \\ud83e\\udd8a fox"}'
    name = write(tmp_path / "a.jsonl", whole, '{"text": "half: \\ud83e", "more": ["\\uDD8A!"]}')
    assert list(load_source(name).rows) == [{"text": "a 🦊 fox"}, {"text": "half: ?", "more": ["?!"]}]
    (tmp_path / "a.json").write_text('[{"text": "half: \\ud83e"}]')
    assert load_source(str(tmp_path / "a.json")).rows == [{"text": "half: ?"}]


def test_a_damaged_parquet_file_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no table")
    with pytest.raises(InputError, match=r"a\.parquet: not parquet, or damaged: "):
        load_source(str(tmp_path / "a.parquet"))


def test_a_csv_row_with_more_fields_than_the_header_is_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,k\nq1,1\nq2,1,extra\n")
    with pytest.raises(InputError, match=r"rows.csv, row 2: 3 fields, and the header names 2"):
        load_source(str(path))


# ---- how long a row may be ----

LONG = 8_000_000


def parquet(rows, **options):
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream, **options)
    return stream.getvalue()


LONG_ROWS = {
    "a.jsonl": (lambda text: b'{"text": "ok"}\n{"text": "%s"}\n' % text, "line 2"),
    "a.jsonl.gz": (lambda text: gzip.compress(b'{"text": "ok"}\n{"text": "%s"}\n' % text, 1), "line 2"),
    "a.json": (lambda text: b'[{"text": "ok"},\n {"text": "%s"}]' % text, "line 2"),
    "open.json": (lambda text: b'[{"text": "ok"},\n {"text": "%s' % text, "line 2"),
    "a.csv": (lambda text: b"text,b\nok,1\n%s,2\n" % text, "line 3"),
    "quoted.csv": (lambda text: b'text,b\nok,1\n"\n%s\n",2\n' % text, "line 3"),
    "a.tsv": (lambda text: b"text\tb\nok\t1\n%s\t2\n" % text, "line 3"),
    "a.txt": (lambda text: b"ok\n\n%s\n" % text, "line 3"),
    "lines.txt": (lambda text: b"ok\n\n" + b"\n".join([text[:500]] * 5) + b"\n", "line 3"),
    "a.parquet": (lambda text: parquet([{"text": "ok"}, {"text": text.decode()}]), "row 1 or one after it"),
}


@pytest.mark.parametrize("name", LONG_ROWS)
def test_a_row_that_is_too_long_is_named_before_it_is_in_memory(name, tmp_path):
    content, place = LONG_ROWS[name]
    (tmp_path / name).write_bytes(content(b"x" * LONG))
    (tmp_path / f"short {name}").write_bytes(content(b"x" * 900 if name != "lines.txt" else b"x" * 100))
    if name != "open.json":
        for limit in (1000 if name != "a.parquet" else 2000, 0):
            assert len([*iterate_source(str(tmp_path / f"short {name}"), HubPart(max_row_bytes=limit))]) == 2
    read = []
    tracemalloc.start()
    with pytest.raises(InputError) as error:
        for origin, _ in iterate_source(str(tmp_path / name), HubPart(max_row_bytes=1000)):
            read.append(origin)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"{name}, {place}: a row of more than 1,000 bytes; --max_row_bytes N" in str(error.value)
    # A piece of a JSON file is a megabyte.
    assert peak < LONG / 3
    assert len(read) == (0 if name == "a.parquet" else 1)


def test_rows_of_the_hub_have_a_limit_too(monkeypatch):
    rows = [{"text": "ok", "parts": [{"image": b"0" * 900}]}, {"text": "x" * 500, "parts": [{"image": b"0" * 501}]}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: datasets.Dataset.from_list(rows))
    with pytest.raises(InputError, match=r"^me/rows, row 2: a row of more than 1,000 bytes"):
        load_source("me/rows", HubPart(max_row_bytes=1000))
    assert len(load_source("me/rows", HubPart(max_row_bytes=0))) == 2


def test_only_who_has_the_flag_is_told_of_it(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * MAX_ROW_BYTES}))
    with pytest.raises(InputError, match=r"a\.jsonl, line 1: a row of more than 16,777,216 bytes$"):
        load_source(str(path))
    with pytest.raises(InputError, match=r"bytes; --max_row_bytes N reads longer ones, 0 all of them$"):
        load_source(str(path), DataArguments().hub_part)
    monkeypatch.setattr(row_limits, "MUCH", 1_000)
    path = tmp_path / "b.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "%s"}' % (b"x" * 1_000_000)))
    with pytest.raises(InputError, match=r"times its [\d,]+ bytes$"):
        load_source(str(path))
    with pytest.raises(InputError, match=r"; if that is meant, --max_row_bytes 0 reads it$"):
        load_source(str(path), DataArguments().hub_part)


def test_the_flag_reaches_the_readers():
    assert DataArguments().hub_part.max_row_bytes == MAX_ROW_BYTES == 16 * 2**20
    assert DataArguments(max_row_bytes=7).hub_part.max_row_bytes == 7


def repeated(count, text="y" * 300):
    """Rows that name one text again and again, by a dictionary: in a column, in lists and in structures."""
    indices = pyarrow.array([0] * count, pyarrow.int32())
    column = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array([text]))
    lists = pyarrow.ListArray.from_arrays(pyarrow.array([0] * count + [count], pyarrow.int32()), column)
    both = pyarrow.StructArray.from_arrays([column, pyarrow.array(range(count))], ["a", "b"])
    return pyarrow.table({"text": column, "lists": lists, "both": both})


def test_a_dictionary_of_parquet_stands_for_no_more_than_a_row_may_have(tmp_path):
    count, path = 1000, tmp_path / "a.parquet"
    pyarrow.parquet.write_table(repeated(count), path, compression="zstd", store_schema=False)
    # The last row's list has all of them.
    assert path.stat().st_size < 20_000
    with pytest.raises(InputError, match=r"a\.parquet, row 1000: a row of more than 100,000 bytes"):
        load_source(str(path), HubPart(max_row_bytes=100_000))
    rows = load_source(str(path)).rows
    assert rows == repeated(count).to_pylist()


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet"])
def test_a_file_that_holds_far_more_than_its_length_is_refused(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(row_limits, "MUCH", 1_000_000)
    path, rows = tmp_path / f"a.{kind}", [{"text": "y" * 5000}] * 1000
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(lines) if kind == "jsonl.gz" else parquet(rows, compression="zstd"))
    with pytest.raises(InputError, match=rf"a\.{kind}: holds more than 200 times its [\d,]+ bytes"):
        load_source(str(path))
    assert load_source(str(path), HubPart(max_row_bytes=0)).rows == rows


def test_figures_of_a_parquet_file_are_looked_at_first(tmp_path, monkeypatch):
    """A list of so many nothings takes no space, until its levels are read."""
    monkeypatch.setattr(row_limits, "MUCH", 1_000_000)
    path = tmp_path / "a.parquet"
    column = pyarrow.array([[None] * 500_000] * 2, pyarrow.list_(pyarrow.int8()))
    pyarrow.parquet.write_table(pyarrow.table({"a": column}), path)
    with pytest.raises(InputError, match="row 1 or one after it: a row of more than 1,000,000 bytes"):
        load_source(str(path), HubPart(max_row_bytes=1_000_000))
    with pytest.raises(InputError, match="holds more than 200 times"):
        load_source(str(path))


def test_figures_of_a_parquet_file_are_those_that_pyarrow_reads(tmp_path):
    rows = [{"text": f"row {number % 7}", "at": [number, None], "on": number % 2 == 0} for number in range(50)]
    (tmp_path / "a.parquet").write_bytes(parquet(rows, row_group_size=20))
    metadata, found = pyarrow.parquet.read_metadata(tmp_path / "a.parquet"), []
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        columns = map(group.column, range(group.num_columns))
        found.append((group.num_rows, [(each.total_uncompressed_size, each.num_values) for each in columns]))
    assert _row_groups(tmp_path / "a.parquet") == found and len(found) == 3


def test_bytes_of_arrow_are_those_of_their_values():
    texts = pyarrow.array(["ab", None, "cdef"])
    lists = pyarrow.array([["ab"], [], ["cd", "efg"]])
    maps = pyarrow.array([[("k", 1)], [("long", 2), ("x", 3)]], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    structs = pyarrow.array([{"a": "xy", "b": 1}, {"a": None, "b": 2}])
    assert arrow_bytes(texts) == 24 + 6 and arrow_bytes(texts[2:]) == 8 + 4
    assert arrow_bytes(texts.dictionary_encode()) == 24 + 6
    assert arrow_bytes(lists) == 24 + 24 + 7 and arrow_bytes(lists[2:]) == 8 + 16 + 5
    assert arrow_bytes(maps[1:]) == 8 + (16 + 5) + 16
    assert arrow_bytes(structs) == 16 + (16 + 2) + 16
    assert arrow_bytes(pyarrow.array([1, 2], pyarrow.int8())) == 16


# ---- quotes ----


def table(*lines):
    return "\n".join(["id,text", *lines, ""])


PLAIN = [f"{number},some words" for number in range(1000)]


def with_lines(**changes):
    lines = list(PLAIN)
    for number, line in changes.items():
        lines[int(number.removeprefix("at"))] = line
    return table(*lines)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            with_lines(at500='500,"5 inch'),
            "line 1001: unexpected end of data, in a row that begins in line 502: a quote",
        ),
        (
            with_lines(at500='500,"5 inch', at700='700,6" long'),
            "line 702: ',' expected after '\"', in a row that begins",
        ),
        (with_lines(at500='500,"5 inch', at700='700,7"'), "line 502: a quoted field goes on to line 702, and each"),
        (table('1,"said "yes" and left"'), "line 2: ',' expected after '\"'"),
        (table("1,a\0b", "2,c"), None),
        ('id,"text\n1,a\n2,b\n', "line 3: unexpected end of data, in a row that begins in line 1"),
    ],
)
def test_a_quote_that_is_left_open_is_named(content, words, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(content)
    if words is None:
        assert len(load_source(str(path))) == 2
        return
    with pytest.raises(InputError) as error:
        load_source(str(path))
    assert f"a.csv, {words}" in str(error.value)
    path.rename(tmp_path / "a.tsv").write_text(content.replace(",", "\t"))
    with pytest.raises(InputError, match=r"a\.tsv, line \d+: "):
        load_source(str(tmp_path / "a.tsv"))


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_texts_with_line_breaks_and_quotes_are_read_back(quoting, end, tmp_path):
    texts = ["a\nb", 'he said "no", twice', '"', '""', '5" x', "\n\n", "x, y\nz, w\n" * 3, "one\n" * 30, " ", "a\r\nb"]
    texts.append("Here it is:\n" + "name,age,town\n" * 40)
    rows = [{"id": str(number), "text": text} for number, text in enumerate(texts)]
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["id", "text"], quoting=quoting, lineterminator=end)
        writer.writeheader()
        writer.writerows(rows)
    assert load_source(str(tmp_path / "a.csv")).rows == rows


# ---- JSON files ----


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 100_000, "a.json, line 1: not JSON (maximum recursion depth"),
        ('[{"a": ' + "[" * 150 + "]" * 150 + "}]", "a.json, line 1: not JSON (nested deeper than 100 lists"),
        (f'[{{"a": {"9" * 5000}}}]', "a.json, line 1: not JSON (Exceeds the limit"),
        ('[{"a": 1},\n{"a": }]', "a.json, line 2: not JSON (Expecting value)"),
        ('[{"a": 1}\n{"a": 2}]', "a.json, line 2: not JSON (Expecting ',' delimiter)"),
        ('[{"a": 1}', "a.json, line 1: not JSON (Expecting ',' delimiter)"),
        ('[{"a": 1}, ', "a.json, line 1: not JSON (Expecting value)"),
        ('[{"a": "x', "a.json, line 1: not JSON (Unterminated string starting at)"),
        ('[{"a": 1}] 2', "a.json, line 1: not JSON (Extra data)"),
        ('{"a": 1}\n{"a": 2}', "a.json: expected a JSON list of objects; for one object per line name it .jsonl"),
        ("[1, 2]", "a.json: expected a JSON list of objects, got int in it"),
        ("[]", "is empty"),
    ],
)
def test_bad_json_is_named(content, words, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError) as error:
        load_source(str(tmp_path / "a.json"))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_a_json_file_is_read_piece_by_piece(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr("hfllm.data.sources._JsonItems.CHUNK", chunk)
    rows = [{"a": 'x"\\', "b": [1.5, -2e7, None, True, {"c": "é🦊"}]}, {}, {"text": "y" * 300}, {"n": -12}]
    (tmp_path / "a.json").write_text("\ufeff \n" + json.dumps(rows, indent=3) + "\n")
    assert load_source(str(tmp_path / "a.json")).rows == rows
    (tmp_path / "a.jsonl").write_text('{"a": ' + "[" * 150 + "]" * 150 + "}")
    with pytest.raises(InputError, match=r"a\.jsonl, line 1: not JSON \(nested deeper than 100"):
        load_source(str(tmp_path / "a.jsonl"))
