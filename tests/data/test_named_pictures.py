"""Files of pictures that rows name by path are found in any form of a row, and a replaced one is noticed."""

import json
import os
import shutil

import pytest
from PIL import Image

from hfllm.data.images.rows import contents_of, existing, named_pictures, written_when
from hfllm.data.sources import PICTURES


@pytest.fixture
def folder(tmp_path):
    for number in range(6):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
    parts = [{"type": "image", "image": "3.png"}, {"type": "text", "text": "What?"}]
    rows = [
        {"prompt": "a", "completion": "b", "photo": "0.png"},
        {"prompt": "a", "completion": "b", "images": ["1.png", str(tmp_path / "2.png")]},
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "A."}]},
        {"prompt": "a", "completion": "b", "image": {"bytes": None, "path": "4.png"}},
        {"prompt": "a", "completion": "b", "image": "not/there.png"},
        {"prompt": "a", "completion": "b", "image": "data:image/png;base64,AAAA"},
        {"prompt": "a", "completion": "b", "image": "https://x.org/a.png"},
        {"prompt": "a", "completion": "b", "image": "A" * 9999},
        {"prompt": "a", "completion": "b", "image": {"bytes": "AAAA", "path": "5.png"}},
        {"prompt": [{"role": "user", "content": [{"type": "audio"}]}]},
        {"prompt": "of text"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_files_are_found_in_every_form(folder):
    name = str(folder / "rows.jsonl")
    found = existing(named_pictures(name))
    absolute = str(folder / "2.png")
    assert found == {path: folder / path for path in ("1.png", absolute, "3.png", "4.png")}
    mapped = existing(named_pictures(name, ["image=photo"], 1))
    assert mapped == {"0.png": folder / "0.png"}
    assert "not/there.png" in named_pictures(name)
    for other in (None, PICTURES, "me/rows", str(folder / "none.jsonl")):
        assert named_pictures(other) == {}


def test_rows_that_cannot_be_read_hide_no_others(folder):
    """Of a file that breaks off what comes before is found."""
    with (folder / "rows.jsonl").open("a") as stream:
        stream.write('\n{"prompt": "cut')
    assert len(existing(named_pictures(str(folder / "rows.jsonl")))) == 4


def test_a_long_row_that_the_run_reads_hides_no_others(folder):
    rows, name = (folder / "rows.jsonl").read_text(), str(folder / "rows.jsonl")
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "x" * 20_000}) + "\n" + rows)
    assert named_pictures(name, max_row_bytes=10_000) == {}
    assert len(existing(named_pictures(name, max_row_bytes=0))) == len(existing(named_pictures(name))) == 4


def test_a_replaced_file_is_noticed_and_no_other(folder):
    files = named_pictures(str(folder / "rows.jsonl"))
    before = written_when(files)
    assert before.startswith(f"{len(files)} files, ") and written_when(files) == before
    (folder / "5.png").write_bytes(b"of no row")
    assert written_when(files) == before
    time = (folder / "1.png").stat().st_mtime_ns
    # By one that is as old as itself, and by one of the same size that is older than all others.
    (folder / "1.png").write_bytes(b"another size")
    os.utime(folder / "1.png", ns=(time, time))
    assert written_when(files) != before
    before = written_when(files)
    os.utime(folder / "3.png", ns=(1, 1))
    assert written_when(files) != before
    before = written_when(files)
    (folder / "4.png").unlink()
    assert written_when(files) != before
    (folder / "not").mkdir()
    before = written_when(files)
    shutil.copy(folder / "3.png", folder / "not" / "there.png")
    assert written_when(files) != before


def test_what_is_no_file_is_no_picture_and_what_cannot_be_read_has_a_name(folder, monkeypatch):
    rows = [{"prompt": "a", "completion": "b", "image": value} for value in ("", ".", "not", "1.png")]
    (folder / "not").mkdir()
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = existing(named_pictures(str(folder / "rows.jsonl")))
    assert files == {"1.png": folder / "1.png"}
    before = contents_of(files)

    def refuse(*args, **options):
        raise PermissionError

    monkeypatch.setattr(type(folder), "open", refuse)
    assert contents_of(files) != before
    # As are folders and what is gone since.
    monkeypatch.undo()
    assert contents_of({"1.png": folder}) == contents_of({"1.png": folder / "none.png"})


def test_contents_are_compared_and_no_times(folder):
    """All of them, wherever the file lies."""
    file, moved = folder / "large.png", folder / "moved.png"
    for size in (1000, 1 << 17):
        file.write_bytes(bytes(size))
        before = contents_of({"a": file})
        for place in (0, 60, size // 2, size - 1):
            changed = bytearray(size)
            changed[place] = 1
            file.write_bytes(changed)
            os.utime(file, ns=(5, 5))
            assert contents_of({"a": file}) != before
        file.write_bytes(bytes(size))
        os.utime(file, ns=(6, 6))
        assert contents_of({"a": file}) == before
        assert contents_of({"a": shutil.copy(file, moved)}) == before != contents_of({"b": file})


def test_of_a_large_picture_the_ends_and_the_time_count_and_no_more_is_read(folder, monkeypatch):
    file, size = folder / "photo.jpg", 1 << 20
    file.write_bytes(bytes(size))
    read = []
    opened = type(folder).open

    def watched(*args, **options):
        stream = opened(*args, **options)

        class Watched:
            fileno, seek = stream.fileno, stream.seek
            __enter__, __exit__ = lambda self: self, lambda self, *_: stream.close()

            def read(self, count=-1):
                read.append(len(found := stream.read(count)))
                return found

        return Watched()

    os.utime(file, ns=(5, 5))
    before = contents_of({"a": file})
    with monkeypatch.context() as patch:
        patch.setattr(type(folder), "open", watched)
        assert contents_of({"a": file}) == before and sum(read) == 1 << 17
    os.utime(file, ns=(6, 6))
    assert contents_of({"a": file}) != before
    for place in (0, size - 1):
        changed = bytearray(size)
        changed[place] = 1
        file.write_bytes(changed)
        os.utime(file, ns=(5, 5))
        assert contents_of({"a": file}) != before
