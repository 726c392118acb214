"""A fingerprint of contents: equal for equal values in every process and on every machine, and for no others.

All checks for unchanged contents (a checkpoint's rows, a teacher's cache, the rounds of a federation, the files read
by a finished run) are made here. Values are written with their type and their length, so `"1"` is not `1` and `["a",
"b"]` is not `["ab"]`. A value without contents of its own, such as an object identified by its address in memory, is
refused: its text would differ in the next process.

    fingerprint({"text": "a", "label": 1})
    file_fingerprint([("rows.jsonl", Path("data/rows.jsonl"))])
"""

import datetime
import decimal
import hashlib
import math
import os
import struct
import sys
import time
import uuid
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

from hfllm.errors import InputError

# The form of fingerprints of values, for later comparison of records: it changes with the written bytes.
FORM = "fingerprint 1"
# Largest size in bytes of a file read whole; from a larger one so many bytes are read, from all over it.
MAX_BYTES, BLOCK = 1 << 28, 1 << 20
# Seconds after which a file's times reveal a rewrite: clocks of file systems advance in steps.
SETTLED = 2.0
KNOWN = (
    "None, bool, int, float, str, bytes, lists, sets, mappings, dataclasses, enumerations, dates, paths, PIL images, "
    "numpy arrays and torch tensors"
)
# The form of an image or a sound stored by `datasets`.
STORED = frozenset(("bytes", "path"))
# The tag in an image's EXIF data for the camera's orientation.
ORIENTATION = 0x0112

# Takes the next bytes.
Write = Callable[[bytes], object]
# Files read by this process: per call its names and the state of its files, with the digest.
_read: dict[tuple, str] = {}


class _Unknown(Exception):
    """A value without a fingerprint; `path` leads to it from the outermost one."""

    def __init__(self, why: str):
        super().__init__(why)
        self.path: list[str] = []


def fingerprint(value: object, where: str = "value") -> str:
    """Return a hash of a value's contents, 32 hexadecimal digits.

    Lists and tuples are alike, since files hold no tuples, and so are mappings in any order of their keys. Everything
    else differs by type: True from 1, 1 from 1.0, 0.0 from -0.0. All NaNs are one. Of arrays and tensors the type of
    their elements and the shape count, of PIL images mode, size and pixels, of a stored image or sound (a mapping of
    `bytes` and `path`, as `datasets` keeps them) the bytes or, without them, the bytes of the file at its path.

    Args:
        value: any of `KNOWN`, nested.
        where: the name of the value in an error, such as `row 3`.

    Raises:
        InputError: for a value of another type, naming the type, and its row and field.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        _write(value, digest.update)
    except _Unknown as unknown:
        raise InputError(f"{where}{''.join(unknown.path)}: {unknown}") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply, or holds itself") from None
    return digest.hexdigest()


def file_fingerprint(paths: Iterable[tuple[str, Path]], dates_large: bool = False) -> str:
    """Return a hash of files' names and contents; of a file above 256 MB of its size and 256 parts from all over it.

    Times do not count. Within a process a file is read again only when they, its size or its number have changed.

    Args:
        paths: pairs of a file's name (hashed) and its path (not hashed).
        dates_large: whether the time of the last write of a file above 256 MB counts, as evidence of an edit between
            the parts; it differs on another machine.
    """
    named = sorted(paths)
    states = [path.stat() for _, path in named]
    file_stats = (
        (name, str(path), each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns)
        for (name, path), each in zip(named, states, strict=True)
    )
    key = (dates_large, *file_stats)
    if key in _read:
        return _read[key]
    began, digest = time.time(), hashlib.blake2b(digest_size=16)
    for (name, path), state in zip(named, states, strict=True):
        _hash_file(digest, name, path)
        if dates_large and state.st_size > MAX_BYTES:
            digest.update(f"{state.st_mtime_ns}\0".encode())
    if all(max(each.st_mtime, each.st_ctime) < began - SETTLED for each in states):
        _read[key] = digest.hexdigest()
    return digest.hexdigest()


def _hash_file(digest: "hashlib._Hash", name: str, path: Path) -> None:
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        digest.update(f"{name}\0{size}\0".encode(errors="surrogateescape"))
        if size <= MAX_BYTES:
            while block := stream.read(BLOCK):
                digest.update(block)
            return
        parts = MAX_BYTES // BLOCK
        for part in range(parts):
            stream.seek((size - BLOCK) * part // (parts - 1))
            digest.update(stream.read(BLOCK))


# ---- how values are written ----


def _write(value: Any, write: Write) -> None:
    writer = WRITERS.get(type(value))
    if writer is None:
        writer = next((each for is_one, each in OTHERS if is_one(value)), None)
    if writer is None:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise _Unknown(f"a value of type {kind} has no contents that could be compared; expected {KNOWN}")
    writer(value, write)


def _tagged(write: Write, tag: bytes, content: bytes) -> None:
    write(tag + len(content).to_bytes(8, "little") + content)


def _text(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _write_int(value: int, write: Write) -> None:
    _tagged(write, b"i", value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))


def _write_float(value: float, write: Write) -> None:
    write(b"f" + struct.pack("<d", math.nan if value != value else value))


def _write_sequence(values: Sequence[Any], write: Write) -> None:
    # Numbers of one type are written at once: token ids are most of the hashed data.
    kinds = set(map(type, values))
    numbers = None
    if kinds == {int}:
        try:
            numbers = array("q", values)
        except OverflowError:
            numbers = None
    elif kinds == {float}:
        has_nan = any(map(math.isnan, values))
        numbers = array("d", [math.nan if each != each else each for each in values] if has_nan else values)
    if numbers is not None:
        if sys.byteorder == "big":
            numbers.byteswap()
        _tagged(write, b"q" if kinds == {int} else b"d", numbers.tobytes())
        return
    write(b"l" + len(values).to_bytes(8, "little"))
    for index, each in enumerate(values):
        _write_at(f"[{index}]", each, write)


def _write_at(step: str, value: object, write: Write) -> None:
    try:
        _write(value, write)
    except _Unknown as unknown:
        unknown.path.insert(0, step)
        raise


def _written(value: object) -> bytes:
    content = bytearray()
    _write(value, content.extend)
    return bytes(content)


def _write_set(values: Set[Any], write: Write) -> None:
    write(b"s" + len(values).to_bytes(8, "little"))
    for each in sorted(map(_written, values)):
        write(each)


def _write_mapping(values: Mapping[Any, Any], write: Write) -> None:
    if len(values) == 2 and set(values) == STORED:
        _write_stored(values["bytes"], values["path"], write)
        return
    write(b"m" + len(values).to_bytes(8, "little"))
    # By their written form: keys of several types have no order of their own.
    for key, name in sorted(((_written(name), name) for name in values), key=lambda pair: pair[0]):
        write(key)
        _write_at(f"[{name!r}]", values[name], write)


def _write_stored(content: Any, path: Any, write: Write) -> None:
    """Write an image or sound as stored by `datasets`: its bytes count, and not their path."""
    if content is None and isinstance(path, str | PurePath) and Path(path).is_file():
        write(b"F" + bytes.fromhex(file_fingerprint([("", Path(path))])))
        return
    write(b"B")
    _write(path if content is None else content, write)


def _write_dataclass(value: Any, write: Write) -> None:
    _tagged(write, b"C", _text(f"{type(value).__name__} {len(fields(value))}"))
    for each in fields(value):
        _tagged(write, b"", _text(each.name))
        _write_at(f".{each.name}", getattr(value, each.name), write)


def _write_by(tag: bytes, text: Callable[[Any], str]) -> Callable[[Any, Write], None]:
    return lambda value, write: _tagged(write, tag, _text(text(value)))


def _write_array(value: Any, write: Write) -> None:
    kind = value.dtype
    is_masked = isinstance(value, sys.modules["numpy"].ma.MaskedArray)
    if is_masked or (kind.hasobject and kind.fields):
        what = "with masked elements" if is_masked else f"of {kind}"
        raise _Unknown(f"an array {what} has no contents that could be compared")
    name = kind.str if kind.fields is None else repr(kind.descr)
    _tagged(write, b"a", _text(f"{name} {value.shape}"))
    if kind.hasobject:
        _write_sequence(value.ravel().tolist(), write)
    else:
        _tagged(write, b"", value.tobytes())


def _write_tensor(value: Any, write: Write) -> None:
    import torch

    if value.layout is not torch.strided or value.is_quantized or value.is_meta:
        kind = "meta" if value.is_meta else "quantized" if value.is_quantized else str(value.layout)
        raise _Unknown(f"a tensor that is {kind} has no contents that could be compared")
    _tagged(write, b"T", _text(f"{value.dtype} {tuple(value.shape)}"))
    value = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    _tagged(write, b"", value.reshape(-1).view(torch.uint8).numpy().tobytes())


def _write_image(image: Any, write: Write) -> None:
    try:
        pixels = image.tobytes()
        palette = image.getpalette(image.palette.mode) if image.palette is not None and "P" in image.mode else None
    except (OSError, ValueError, SyntaxError) as error:
        raise _Unknown(f"an image that cannot be read: {error}") from None
    try:
        turned = image.getexif().get(ORIENTATION)
    except Exception:  # unreadable tags turn nothing
        turned = None
    _tagged(write, b"P", _text(f"{image.mode} {image.size}"))
    _tagged(write, b"", pixels)
    _write([palette, image.info.get("transparency"), turned], write)


def _is_of(module: str, *names: str) -> Callable[[object], bool]:
    """Return whether a value is of a library's classes; a library not imported has made none."""

    def is_one(value: object) -> bool:
        result = sys.modules.get(module)
        return result is not None and isinstance(value, tuple(getattr(result, name) for name in names))

    return is_one


def _is(*kinds: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kinds)


WRITERS: Mapping[type, Callable[[Any, Write], None]] = {
    type(None): lambda value, write: write(b"n"),
    bool: lambda value, write: write(b"1" if value else b"0"),
    int: _write_int,
    float: _write_float,
    str: _write_by(b"u", str),
    **dict.fromkeys((bytes, bytearray, memoryview), lambda value, write: _tagged(write, b"b", bytes(value))),
    list: _write_sequence,
    tuple: _write_sequence,
    dict: _write_mapping,
}
# For values of other types, the first match: numpy's scalars before the numbers some of them are.
OTHERS: Sequence[tuple[Callable[[object], bool], Callable[[Any, Write], None]]] = (
    (_is_of("numpy", "ndarray", "generic"), _write_array),
    (_is_of("torch", "Tensor"), _write_tensor),
    (_is_of("torch", "dtype", "device"), _write_by(b"t", str)),
    (_is_of("PIL.Image", "Image"), _write_image),
    # A sound or film of `datasets`, by its encoded source.
    (
        lambda value: getattr(value, "_hf_encoded", None) is not None,
        lambda value, write: _write(value._hf_encoded, write),
    ),
    (_is(Enum), _write_by(b"E", lambda value: f"{type(value).__name__}.{value.name}")),
    (lambda value: is_dataclass(value) and not isinstance(value, type), _write_dataclass),
    (_is(str), _write_by(b"u", str.__str__)),
    (_is(int), lambda value, write: _write_int(int(value), write)),
    (_is(float), lambda value, write: _write_float(float(value), write)),
    (_is(datetime.datetime, datetime.date, datetime.time), _write_by(b"D", lambda value: value.isoformat())),
    (_is(datetime.timedelta), _write_by(b"Z", lambda value: f"{value.days} {value.seconds} {value.microseconds}")),
    (_is(decimal.Decimal), _write_by(b"N", str)),
    (_is(uuid.UUID), _write_by(b"U", str)),
    (_is(PurePath), _write_by(b"p", lambda value: value.as_posix())),
    (_is(Mapping), _write_mapping),
    (_is(Set), _write_set),
    (_is(Sequence), _write_sequence),
)
