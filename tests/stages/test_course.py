"""Rows that one run writes for the next."""

import json
from pathlib import Path
from types import SimpleNamespace

from hfllm.runs import pipeline, schedule
from hfllm.runs.pipeline import Course, data_file, write_rows


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


def test_a_course_writes_the_rows_of_a_run_before_it_runs_it(tmp_path, monkeypatch):
    rows = {name: [{"text": name}] for name in ("sft", "rlhf")}
    runs = {}
    for name in ("pretrain", *rows):
        dataset = data_file(str(tmp_path), name) if name in rows else "world"
        runs[name] = (SimpleNamespace(dataset_name=str(dataset), output_dir=str(tmp_path / name)),)
    course, events = Course({name: name for name in runs}, runs), []

    def run_stage(recipe, parsed, later):
        events.append((recipe, sorted(path.name for path in tmp_path.rglob("*.jsonl")), [*later.values()]))
        return {"loss": float(len(events))}

    monkeypatch.setattr(schedule, "_job", None)
    monkeypatch.setattr(pipeline, "run_stage", run_stage)
    metrics = course.run_all({name: lambda name=name: rows[name] for name in rows})
    assert metrics == {"pretrain": {"loss": 1.0}, "sft": {"loss": 2.0}, "rlhf": {"loss": 3.0}}
    assert events == [
        ("pretrain", [], ["sft", "rlhf"]),
        ("sft", ["sft.jsonl"], ["rlhf"]),
        ("rlhf", ["rlhf.jsonl", "sft.jsonl"], []),
    ]
    assert json.loads(Path(runs["rlhf"][0].dataset_name).read_text(encoding="utf-8")) == rows["rlhf"][0]
