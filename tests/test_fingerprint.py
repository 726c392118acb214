"""Fingerprints of contents: equal for equal values wherever and whenever they are made, and for no others."""

import datetime
import decimal
import enum
import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType

import numpy as np
import pytest
import row_kinds
import torch
from PIL import Image

from hfllm import fingerprint as module
from hfllm.errors import InputError
from hfllm.fingerprint import file_fingerprint, fingerprint

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Pair:
    one: object
    other: object = ""


@dataclass(frozen=True)
class Couple(Pair):
    pass


class Color(enum.IntEnum):
    RED = 1


def dotted(mode="RGB", at=(0, 0), size=(3, 2)):
    image = Image.new(mode, size)
    image.putpixel(at, 1 if mode in ("L", "P", "1", "I") else (1, 2, 3))
    return image


def palette(color):
    image = dotted("P")
    image.putpalette([0, 0, 0, *color])
    return image


def turned(image):
    image.getexif()[module.ORIENTATION] = 6
    return image


# All of them differ.
DIFFERENT = [
    *(None, True, False, 1, 0, 2, -1, 2**63, -(2**70), 10**5000, 1.0, 0.0, -0.0, math.inf, -math.inf, math.nan, 0.1),
    *("", "1", "None", "True", "a", "\ud800", "1.0", b"", b"1", b"a", np.float64(1), np.float32(1), np.int64(1)),
    *([], [[]], [None], ["a", "b"], ["ab"], ["a", ["b"]], [["a"], "b"], [["a", "b"]], ["", "ab"], ["ab", ""]),
    *([1, 2], [1, True], [1.0, 2.0], [1, 2.0], [12], ["1", "2"], [1, 2, 2**64], [0.0], [-0.0], [math.nan], [256]),
    *({}, {"a": 1}, {"a": "1"}, {"a": 1, "b": None}, {"a": None, "b": 1}, {"ab": 1}, {1: "a"}, {"1": "a"}, {"a": {}}),
    *({"a": {"b": 1}}, {"a": 1, "b": {}}, {"bytes": b"x", "path": None}, {"bytes": None, "path": "x"}),
    *({"bytes": None, "path": None}, {"bytes": b"x"}, frozenset(), {1, 2}, {"1", "2"}, {1, 2, 3}),
    *(Pair(1, 2), Pair(2, 1), Couple(1, 2), Pair("1", 2), Pair([1, 2]), Color.RED, Path("a"), Path("a/b")),
    *(np.zeros(2), np.zeros(2, np.float32), np.zeros((2, 1)), np.zeros((1, 2)), np.zeros(2, np.int64), np.ones(2)),
    *(np.zeros(()), np.zeros(0), np.array([-0.0, 0.0]), np.array(["a", "b"]), np.array(["a", "b"], object)),
    *(np.array([None, 1], object), np.zeros(2, "M8[s]"), np.zeros(2, "M8[ns]"), np.zeros(2, [("a", "<i4")])),
    *(np.zeros(2, [("b", "<i4")]), torch.zeros(2), torch.zeros(2, 1), torch.zeros(1, 2), torch.zeros(2).half()),
    *(torch.zeros(2).bfloat16(), torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.bool), torch.ones(2)),
    *(torch.tensor(0.0), torch.zeros(0), torch.zeros(0, 3), torch.zeros(2, dtype=torch.complex64), torch.float32),
    *(torch.bfloat16, torch.device("cpu"), dotted(), dotted(at=(1, 0)), dotted("L"), dotted("L", size=(2, 3))),
    *(dotted("1"), dotted("P"), palette((9, 9, 9)), palette((8, 8, 8)), turned(dotted()), dotted("RGBA")),
    *(datetime.date(2000, 1, 1), datetime.datetime(2000, 1, 1), datetime.timedelta(1), datetime.time(1)),
    *(decimal.Decimal("1"), decimal.Decimal("1.0")),
]


def test_what_differs_has_another_fingerprint():
    found = [fingerprint(value) for value in DIFFERENT]
    for (one, first), (other, second) in itertools.combinations(zip(DIFFERENT, found, strict=True), 2):
        assert first != second, (one, other)
    assert {len(each) for each in found} == {32}


SAME = [
    [[1, "a"], (1, "a"), [1, "a"]],
    [{"a": 1, "b": [2]}, {"b": (2,), "a": 1}, MappingProxyType({"b": [2], "a": 1})],
    [math.nan, -math.nan, float("nan") * 0],
    [[1.5, math.nan], [1.5, -math.nan]],
    [{1: 2, "1": 3, None: 4}, {None: 4, "1": 3, 1: 2}],
    [{"x", "y", "z"}, frozenset("zyx")],
    [b"ab", bytearray(b"ab"), memoryview(b"ab")],
    [np.arange(6).reshape(2, 3), np.arange(6).reshape(3, 2).T.reshape(2, 3)[:] * 0 + np.arange(6).reshape(2, 3)],
    [np.arange(4)[::2], np.array([0, 2])],
    [torch.arange(4)[::2], torch.tensor([0, 2])],
    [torch.ones(2, requires_grad=True), torch.nn.Parameter(torch.ones(2)), torch.ones(2)],
    [dotted(), dotted().copy(), dotted().crop((0, 0, 3, 2))],
    [{"bytes": b"x", "path": None}, {"path": "elsewhere/x.png", "bytes": b"x"}],
    [Path("a/b"), PurePosixPath("a/b")],
    [range(3), [0, 1, 2]],
]


@pytest.mark.parametrize("values", SAME, ids=range(len(SAME)))
def test_what_is_the_same_has_the_same(values):
    assert len({fingerprint(value) for value in values}) == 1


def test_what_has_no_contents_is_refused_with_its_type_and_where_it_is():
    class Mine:
        pass

    rows = [
        (Mine(), r"row 3: a value of type .*Mine has no contents .* expected None, bool, int"),
        ({"a": [1, Mine()]}, r"row 3\['a'\]\[1\]: a value of type .*Mine"),
        (Pair(1, {"x": open}), r"row 3\.other\['x'\]: a value of type builtins.builtin_function_or_method"),
        ({"f": lambda: 0}, r"row 3\['f'\]: a value of type builtins.function"),
        ([iter([])], r"row 3\[0\]: a value of type builtins.list_iterator"),
        (Pair, r"row 3: a value of type builtins.type"),
        (np.array([Mine()], object), r"row 3\[0\]: a value of type .*Mine"),
        (np.ma.array([1, 2], mask=[0, 1]), "row 3: an array with masked elements"),
        (torch.zeros(2, device="meta"), "row 3: a tensor that is meta"),
        (torch.zeros(2).to_sparse(), "row 3: a tensor that is torch.sparse_coo"),
    ]
    for value, message in rows:
        with pytest.raises(InputError, match=message) as error:
            fingerprint(value, "row 3")
        assert "\n" not in str(error.value) and "0x" not in str(error.value)
    endless = []
    endless.append(endless)
    with pytest.raises(InputError, match="row 1: nested too deeply, or holds itself"):
        fingerprint(endless, "row 1")


def test_an_image_file_counts_by_its_pixels_and_a_stored_one_by_its_bytes(tmp_path):
    dotted().save(tmp_path / "a.png")
    dotted().save(tmp_path / "b.png", compress_level=0)
    opened = [Image.open(tmp_path / name) for name in ("a.png", "b.png")]
    assert fingerprint(opened[0]) == fingerprint(opened[1]) == fingerprint(dotted())
    stored = [fingerprint({"bytes": None, "path": str(tmp_path / name)}) for name in ("a.png", "b.png")]
    assert stored[0] != stored[1]
    os.replace(tmp_path / "a.png", tmp_path / "c.png")
    assert fingerprint({"bytes": None, "path": str(tmp_path / "c.png")}) == stored[0]
    (tmp_path / "cut.png").write_bytes((tmp_path / "b.png").read_bytes()[:60])
    with pytest.raises(InputError, match=r"row 2\['image'\]: an image that cannot be read"):
        fingerprint({"image": Image.open(tmp_path / "cut.png")}, "row 2")


def test_a_process_of_its_own_finds_the_same():
    """With another order of sets, and other addresses."""
    kept = [object() for _ in range(10_000)]
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, row_kinds.__file__]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr[-2000:]
    assert json.loads(printed.stdout) == row_kinds.found() and kept


# ---- files ----


def test_files_count_by_name_and_contents_and_not_by_time_or_place(tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    before = file_fingerprint([("x", tmp_path / "a")])
    # What checkpoints of earlier versions hold.
    assert before == hashlib.blake2b(b"x\0003\0one", digest_size=16).hexdigest()
    os.utime(tmp_path / "a", (1, 1))
    os.replace(tmp_path / "a", tmp_path / "b")
    assert file_fingerprint([("x", tmp_path / "b")]) == before != file_fingerprint([("y", tmp_path / "b")])
    time = (tmp_path / "b").stat().st_mtime_ns
    # As large and as old.
    (tmp_path / "b").write_bytes(b"two")
    os.utime(tmp_path / "b", ns=(time, time))
    assert file_fingerprint([("x", tmp_path / "b")]) != before


def test_a_file_is_read_again_once_it_may_have_changed(tmp_path, monkeypatch):
    read, hash_file = [], module._hash_file
    monkeypatch.setattr(module, "_hash_file", lambda *given: (read.append(given[2].name), hash_file(*given)))
    monkeypatch.setattr(module, "_read", {})
    file = tmp_path / "a"
    file.write_bytes(b"one")
    # It has just been written: another text may get the same time.
    assert len({file_fingerprint([("", file)]) for _ in range(2)}) == 1 and len(read) == 2
    monkeypatch.setattr(module, "SETTLED", -60.0)
    found = [file_fingerprint([("", file)]) for _ in range(3)]
    assert len(set(found)) == 1 and len(read) == 3
    file.write_bytes(b"three")
    assert file_fingerprint([("", file)]) != found[0] and len(read) == 4


def test_a_large_file_is_compared_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 64)
    monkeypatch.setattr(module, "BLOCK", 8)
    file = tmp_path / "large"
    text = bytearray(os.urandom(1000))
    file.write_bytes(text)
    before = file_fingerprint([("", file)])
    for place in (0, 999):
        changed = bytearray(text)
        changed[place] ^= 1
        file.write_bytes(changed)
        assert file_fingerprint([("", file)]) != before
    file.write_bytes(text + b"!")
    assert file_fingerprint([("", file)]) != before
    file.write_bytes(text)
    assert file_fingerprint([("", file)]) == before
    # Between the parts only the time tells of an edit, where it is asked for; those of small files never count.
    dated = file_fingerprint([("", file)], dates_large=True)
    assert dated != before
    text[70] ^= 1
    file.write_bytes(text)
    os.utime(file, ns=(5, 5))
    assert file_fingerprint([("", file)]) == before
    assert file_fingerprint([("", file)], dates_large=True) != dated
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    assert file_fingerprint([("", file)], dates_large=True) == file_fingerprint([("", file)])
