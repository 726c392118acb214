"""Rows that one run writes for the next."""

import json

from hfllm.runs.pipeline import write_rows


def test_rows_are_written_again_wherever_the_file_holds_others(tmp_path, capsys):
    path = tmp_path / "rows" / "sft.jsonl"
    write_rows("reason", path, [{"text": "é 1"}, {"text": "b"}])
    first = path.read_text(encoding="utf-8")
    assert [json.loads(line) for line in first.splitlines()] == [{"text": "é 1"}, {"text": "b"}]
    before = path.stat()
    write_rows("reason", path, iter([{"text": "é 1"}, {"text": "b"}]))
    # The same rows: the file is not touched, and nothing is said.
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_ino == before.st_ino
    assert not capsys.readouterr().out
    # Others of the same length, fewer, and none.
    for rows in ([{"text": "é 2"}, {"text": "b"}], [{"text": "b"}], []):
        write_rows("reason", path, rows)
        assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == rows
        assert "does not hold the rows of this run" in capsys.readouterr().out
    path.write_bytes(b"\xff\xfe")
    write_rows("reason", path, [{"text": "b"}])
    assert path.read_text(encoding="utf-8") == '{"text": "b"}\n'
