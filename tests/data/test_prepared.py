"""Tables of a run on disk: made once, whole or not at all, and made anew when the run is another one."""

import pyarrow
import pytest

from hfllm.data import packing as module
from hfllm.data.packing import Prepared, pack, packed_tables, windows


def test_texts_come_back_as_they_were_and_are_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 10)
    texts, made = ["one", "zwölf\n\n", "", "a long text of several words", "🦊"], []
    for _ in range(2):
        stored = Prepared(tmp_path / "it", {"seed": 1}).texts("texts", lambda: made.append(1) or iter(texts))
        assert stored["text"][:] == texts and len(made) == 1
    Prepared(tmp_path / "it", {"seed": 2}).texts("texts", lambda: made.append(1) or iter(texts))
    assert len(made) == 2


def test_only_folders_made_here_are_removed_and_none_where_runs_share(tmp_path):
    def write(seed, **more):
        prepared = Prepared(tmp_path / "it", {"seed": seed}, **more)
        prepared.table("numbers", lambda: [pyarrow.table({"number": [seed]})])
        return prepared

    photos = tmp_path / "it" / "photos" / "one.png"
    photos.parent.mkdir(parents=True)
    photos.touch()
    first, second = write(1, is_shared=True), write(2, is_shared=True)
    assert first.folder.is_dir() and second.folder.is_dir()
    third = write(3)
    assert sorted(path.name for path in (tmp_path / "it").iterdir()) == sorted([third.folder.name, "photos"])
    third.remove()
    assert photos.is_file() and not third.folder.exists()


def test_what_is_interrupted_leaves_nothing_behind(tmp_path):
    def broken():
        yield pyarrow.table({"number": [1, 2]})
        raise RuntimeError("cut")

    prepared = Prepared(tmp_path / "it", {})
    with pytest.raises(RuntimeError, match="cut"):
        prepared.table("numbers", broken)
    assert list(prepared.folder.iterdir()) == []
    assert prepared.table("numbers", lambda: [pyarrow.table({"number": [3]})])["number"][:] == [3]
    with pytest.raises(ValueError, match="nothing to write"):
        prepared.table("empty", list)
    prepared.remove()
    assert not (tmp_path / "it").exists()


def test_machines_that_share_a_disk_do_not_disturb_each_other(tmp_path):
    first, second = Prepared(tmp_path / "it", {"seed": 1}), None

    def slow():
        nonlocal second
        yield pyarrow.table({"number": [1]})
        # Another machine begins, and ends, while this one writes.
        second = Prepared(tmp_path / "it", {"seed": 1})
        assert second.table("numbers", lambda: [pyarrow.table({"number": [1, 2]})])["number"][:] == [1, 2]
        yield pyarrow.table({"number": [2]})

    assert first.table("numbers", slow)["number"][:] == [1, 2]
    assert second.table("numbers", lambda: pytest.fail("made again"))["number"][:] == [1, 2]
    assert len(list((tmp_path / "it").rglob("*.*"))) == 1


def test_rows_on_disk_are_the_rows_in_memory(tmp_path, world, tokenizer):
    texts = world.documents(300, seed=2)
    stored = Prepared(tmp_path / "it", {}).table("rows", lambda: packed_tables(texts, tokenizer, 64))
    assert stored[:] == pack(texts, tokenizer, 64)[:]


def test_windows_close_at_either_limit():
    assert list(windows(["aa"] * 5, 2, 100)) == [["aa"] * 2, ["aa"] * 2, ["aa"]]
    assert list(windows(["aa", "b" * 9, "c"], 10, 8)) == [["aa", "b" * 9], ["c"]]
    assert list(windows([], 2, 2)) == []
