"""Data in, and complaints that say where."""

import json

import pytest

from hfllm.data import formats
from hfllm.data.sources import load_source
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
    import pyarrow
    import pyarrow.parquet

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
