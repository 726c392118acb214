"""Whatever a file holds, its reader gives rows or one line: what `.ci/fuzz.py` finds in a few files of each kind."""

import importlib.util
import random
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci" / "fuzz.py"
SPEC = importlib.util.spec_from_file_location("fuzz", SCRIPT)
fuzz = sys.modules["fuzz"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fuzz)
# Those that need the extra 'data', or seconds for each file.
NEEDS = {"warc": "datatrove", "warc.gz": "datatrove"}
SLOW = ("yaml", "config", "report")
GOOD = "read"


def outcomes(name, count, folder, seed=1):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason="needs the extra 'data'")
    reader = fuzz.readers()[name]()
    path = folder / f"fuzz{reader.suffix}"
    for number, content in fuzz.files_of(name, seed, range(count)):
        path.write_bytes(content)
        yield number, *fuzz.outcome(reader, path)


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz.readers())
def test_damaged_files_end_in_rows_or_in_one_line(name, tmp_path):
    failures = [
        each for each in outcomes(name, 6 if name in SLOW else 30, tmp_path) if each[1] not in (GOOD, "refused")
    ]
    assert not failures


@pytest.mark.parametrize("name", [name for name in fuzz.readers() if name not in NEEDS])
def test_files_are_the_same_for_the_same_seed_and_good_ones_are_read(name, tmp_path):
    first, again, other = (dict(fuzz.files_of(name, seed, range(8))) for seed in (3, 3, 4))
    assert first == again != other
    reader = fuzz.readers()[name]()
    path = tmp_path / f"good{reader.suffix}"
    for content in reader.seeds:
        path.write_bytes(fuzz.gzip.compress(content) if reader.is_gzip else content)
        result, said = fuzz.outcome(reader, path)
        # Flags of several recipes are in one file, and none has all of them.
        assert result == GOOD or (name == "yaml" and result == "refused"), said


def test_what_a_reader_does_wrong_is_found(tmp_path):
    from hfllm.errors import InputError

    def reads(error):
        def read(path):
            raise error

        return fuzz.Reader(".txt", (b"a",), read)

    for error, result in (
        (InputError("a.txt, line 1: no"), "refused"),
        (InputError("a.txt:\nno"), "no line"),
        (InputError(""), "no line"),
        (ValueError("no"), "traceback"),
        (RecursionError(), "traceback"),
        (MemoryError(), "traceback"),
        (KeyboardInterrupt(), "traceback"),
    ):
        assert fuzz.outcome(reads(error), tmp_path)[0] == result
    changed = {fuzz.mutated(fuzz.Reader(".txt", (b"abc" * 50,), reads), random.Random(n)) for n in range(50)}
    assert len(changed) > 40


CHILD = """
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("fuzz", {script!r})
fuzz = sys.modules["fuzz"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)
def read(path):
    number = int(path.read_text())
    if number == 1:
        os._exit(0)
    if number == 3:
        time.sleep(60)
    if number == 4:
        return "x" * (3 << 30)
fuzz.readers = lambda: {{"mine": lambda: fuzz.Reader(".txt", (b"0",), read)}}
fuzz.files_of = lambda name, seed, numbers: ((each, str(each).encode()) for each in numbers)
fuzz.work("mine", 0, int(sys.argv[-2]), int(sys.argv[-1]))
"""


@pytest.mark.slow
def test_children_that_hang_or_die_are_left_behind(tmp_path, monkeypatch):
    child = tmp_path / "child.py"
    child.write_text(CHILD.format(script=str(SCRIPT)))
    monkeypatch.setattr(fuzz, "__file__", str(child))
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    found = [(number, result) for number, result, _ in fuzz.results("mine", 0, 6)]
    assert found == [(0, GOOD), (1, "killed"), (2, GOOD), (3, "hang"), (4, "traceback"), (5, GOOD)]


@pytest.mark.slow
@pytest.mark.turn(6)
@pytest.mark.parametrize("name", fuzz.readers())
def test_children_read_many(name, capfd):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason="needs the extra 'data'")
    assert fuzz.fuzz(name, seed=2, count=60 if name in SLOW else 400) == []
