"""Give readers damaged and hostile files: each must end in rows or in one line of bad input, whatever is in it.

    python .ci/fuzz.py jsonl --count 2000 --seed 0
    python .ci/fuzz.py all --count 200
    python .ci/fuzz.py parquet --keep outputs/fuzz      # keeps what a reader failed on

Good files of each kind are changed by chance, the same ones for the same seed: bits and bytes, pieces taken out,
doubled or put together from two files, words that programs stumble over, and values of JSON of another type. Child
processes read them, a hundred each, in at most 2 GB more than they begin with and 60 seconds a file. A traceback, a
complaint of several lines, a hang and a child that dies are failures, by which the exit code is 1.
"""

import argparse
import contextlib
import gzip
import io
import json
import os
import random
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hfllm.errors import InputError

MEMORY, SECONDS, FILES_PER_CHILD, MOST_SHOWN = 2 << 30, 60, 100, 40
ROWS = (
    {"prompt": "What is it?", "completion": "A fox.", "label": True},
    {"instruction": "Say é.", "input": "x", "output": "y\nz", "response": "\U0001f98a"},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}], "tools": None},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}], "system": "Be brief."},
    {"prompt": "Which?", "chosen": "a", "rejected": "b"},
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes.", "rejected": "\n\nHuman: Hi\n\nAssistant: No."},
    {"instruction": "Which?", "response1": "a", "response2": "b", "label": 1},
    {"instruction": "Which?", "completions": [{"response": "a", "score": 1}, {"response": "b", "score": 2.5}]},
    {
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
        "images": ["a.png"],
    },
    {"text": "Once there was an owl.", "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
)
# What programs stumble over.
WORDS = (
    *(
        b"\0",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\r",
        b"\n\n",
        b'"',
        b'""',
        b"\\",
        b"\\ud83d",
        b"'",
        b",",
        b"\t",
        b"{",
        b"}",
        b"[",
        b"]",
    ),
    *(
        b"null",
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"9" * 5000,
        b"-0",
        b"true",
        b"[" * 3000,
        b'{"a":' * 3000,
        b"<image>",
        b"../" * 9,
    ),
    *(
        b"/etc/passwd",
        b"2001-99-99",
        b"!!int abc",
        b"!!binary x",
        b"&a [*a]",
        b"<<: ",
        b": ",
        b"- ",
        b"\xf0\x9f\xa6",
        b"\x1f\x8b",
    ),
    *(
        b"\xff\xff\xff\xff",
        b"\x7f\xff\xff\xff",
        b"\0\0\0\x80",
        b"PAR1",
        b"WARC/1.0\r\n",
        b"Content-Length: 99999999999\r\n",
    ),
    *(b"\r\n\r\n", b"<html>" * 500, b"<!--", b"data:image/png;base64,", b"%s%n", b"{{ 9 }}", b"a" * 70_000),
)
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        2**63,
        10**30,
        0.5,
        -1e308,
        "",
        " ",
        "x" * 5000,
        "\0",
        "\ud800",
        "é",
        "nan",
        "1e400",
    ),
    *(
        [],
        {},
        [[]],
        [None],
        {"": None},
        [1, "a", None],
        {"role": "user"},
        {"role": 1, "content": []},
        ["a"] * 500,
        "../../x",
    ),
)
Read = Callable[[Path], object]


@dataclass(frozen=True)
class Reader:
    """A reader and what is given to it.

    Args:
        suffix: of its files.
        seeds: good files.
        read: reads a file to its end.
        is_json: whether values of the good files may be changed by type, line by line or as a whole.
        is_gzip: whether the good files are changed before they are compressed, or after.
    """

    suffix: str
    seeds: tuple[bytes, ...]
    read: Read
    is_json: bool = False
    is_gzip: bool = False


# ---- what is read ----


def read_source(path: Path) -> int:
    from hfllm.data.sources import iterate_source

    return sum(1 for _ in iterate_source(str(path)))


def read_formats(path: Path) -> int:
    """Convert each row by every format; what is no row of one is refused by it."""
    from hfllm.data import formats
    from hfllm.data.formats import flaw_of, flaw_of_prompt
    from hfllm.data.images.rows import flaw_of_pictures, refuse_images, to_picture_prompts, to_pictures
    from hfllm.data.loading import prompt_key
    from hfllm.data.sources import iterate_source

    count = 0
    for origin, row in iterate_source(str(path)):
        for mapper, flaw in (
            (formats.to_text, None),
            (formats.to_sft, flaw_of),
            (formats.to_preference, flaw_of),
            (formats.to_prompt, flaw_of_prompt),
            (to_pictures(formats.to_sft, path.parent), flaw_of_pictures),
            (to_pictures(formats.to_preference, path.parent), flaw_of_pictures),
            (to_picture_prompts(formats.to_prompt, path.parent), None),
            (lambda where, each: refuse_images(where, each, "a model"), None),
        ):
            with contextlib.suppress(InputError):
                converted = mapper(origin, dict(row))
                if flaw is not None and flaw(converted) is None:
                    prompt_key(converted)
                count += 1
    return count


def read_image(path: Path) -> object:
    from hfllm.data.images import files as image_files

    return image_files.read_image(str(path), "a row", path.parent).size


def read_archive(path: Path) -> int:
    from hfllm.data.curation.inputs import find_inputs
    from hfllm.data.curation.options import CurationOptions
    from hfllm.data.curation.pipeline import DocumentReader

    options = CurationOptions(dataset_name=str(path))
    return sum(1 for _ in DocumentReader(find_inputs(options), options).run())


def read_flags(path: Path) -> object:
    from hfllm.runs.recipes import load_recipe

    for name in ("push", "curate", "sft"):
        refused = contextlib.suppress(InputError) if name != "sft" else contextlib.nullcontext()
        with refused:
            load_recipe(name).parse(["--config", str(path)])
    return path


def read_message(path: Path) -> object:
    from hfllm.federation.updates import from_bytes, read_update, size_limit, weights_from_bytes

    expected, data = _update()[1], path.read_bytes()
    for read in (
        lambda: weights_from_bytes(data),
        lambda: from_bytes(data, size_limit(expected), expected),
        lambda: read_update(path, size_limit(expected), expected, "clinic"),
    ):
        with contextlib.suppress(InputError):
            read()
    return read_update(path, size_limit(expected), expected)


def read_config(path: Path) -> object:
    from hfllm.runs.models import load_config

    return load_config(str(_as_named(path, "config.json")))


def read_report(path: Path) -> object:
    from hfllm.outputs.card import lineage, model_card, public_report
    from hfllm.outputs.report import flag_sections
    from hfllm.outputs.report import read_report as read
    from hfllm.runs.identity import finished_run

    folder = _as_named(path, "report.json", _model_files())
    report = read(folder)
    with contextlib.suppress(InputError):
        finished_run(str(folder), {"seed": 1})
    if report is not None:
        flag_sections(report["arguments"], report.get("given"))
        lineage({"model": str(folder)})
    model_card(folder)
    return public_report(folder, "report.json")


def _as_named(path: Path, name: str, others: Mapping[str, bytes] | None = None) -> Path:
    """Return a folder of its own that holds a file under another name."""
    folder = path.parent / "folder"
    folder.mkdir(exist_ok=True)
    for other, content in (others or {}).items():
        (folder / other).write_bytes(content)
    (folder / name).write_bytes(path.read_bytes())
    return folder


# ---- good files ----


def _lines(rows: tuple) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _table(delimiter: str) -> bytes:
    import csv

    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter)
    writer.writerows([["prompt", "completion", "n"], *([f"q {n}, “x”", 'said "no"\nand left', n] for n in range(40))])
    return stream.getvalue().encode()


def _parquets() -> tuple[bytes, ...]:
    import pyarrow
    import pyarrow.parquet

    texts = [{"text": f"row {number % 3}", "n": number, "on": None} for number in range(200)]
    nested = [{"messages": row["messages"]} for row in ROWS if "messages" in row] * 20
    image = [{"image": {"bytes": b"\x89PNG" * 9, "path": "a.png"}, "at": [1.5, None], "day": None}] * 30
    found = []
    for rows, options in ((texts, {}), (nested, {"compression": "zstd"}), (image, {"use_dictionary": False})):
        stream = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream, **options)
        found.append(stream.getvalue())
    return tuple(found)


def _pictures() -> tuple[bytes, ...]:
    from PIL import Image

    found, image = [], Image.frombytes("RGB", (40, 30), random.Random(0).randbytes(3600))
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "TGA", "DDS", "JPEG2000"):
        stream = io.BytesIO()
        with contextlib.suppress(KeyError, OSError):
            image.save(stream, kind)
            found.append(stream.getvalue())
    for mode in ("P", "1", "I;16", "LA", "CMYK"):
        stream = io.BytesIO()
        image.convert("L" if mode == "I;16" else mode).convert(mode).save(stream, "TIFF" if mode == "CMYK" else "PNG")
        found.append(stream.getvalue())
    return tuple(found)


def _archive() -> bytes:
    page = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n"
        + b"<p>The wheel turns, and people came.</p>" * 9
    )
    records = []
    for kind, content_type, content in (
        ("warcinfo", "application/warc-fields", b"software: x\r\n"),
        ("response", "application/http; msgtype=response", page),
        ("response", "application/http", page.replace(b"200 OK\r\n", b"200 OK\r\nTransfer-Encoding: chunked\r\n")),
        ("resource", "text/plain", "The owl, é, sat here for a long time.".encode("latin-1")),
        ("conversion", "text/plain", b"Plain text of a page."),
    ):
        head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:1>\r\nWARC-Date: 2026-01-01T00:00:00Z\r\n"
        head += (
            f"WARC-Target-URI: http://e.org/\r\nContent-Type: {content_type}\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        records.append(head.encode() + content + b"\r\n\r\n")
    return b"".join(records)


FLAGS = (
    b"output_dir: outputs/x\nlearning_rate: 1e-4\nseed: 3\n",
    b"hub_model_id: me/x\nprivate: true\nrevision: 'a b'\n",
    b"dataset_name: a.jsonl\nfilters: [length]\nworkers: 2\nmodel_init_kwargs: {dtype: auto, a: [1, 2.5, null]}\n",
    b"base: &a {seed: 1}\nother:\n  <<: *a\nwhen: 2026-01-02\n",
)


@cache
def _update() -> tuple[tuple[bytes, ...], Any]:
    import torch

    from hfllm.federation.updates import Expected, Update, to_bytes

    tensors = {"w": torch.ones(4, 3), "v": torch.zeros(5).double(), "c": torch.ones(2, 2, 3).bfloat16()}
    update = Update("clinic", tensors, 70, 7, "0" * 64)
    return (to_bytes(update), to_bytes(update, "int8")), Expected.of(tensors, "0" * 64)


@cache
def _model_files() -> dict[str, bytes]:
    import torch
    from safetensors.torch import save

    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return {"config.json": json.dumps(config).encode(), "model.safetensors": save({"a": torch.zeros(2)})}


CONFIGS = (
    {"model_type": "hfllm", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 300},
    {
        "model_type": "llama",
        "hidden_size": 16,
        "num_attention_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "hidden_size": 64,
        "layer_types": ["full_attention"] * 2,
        "num_hidden_layers": 2,
    },
)
REPORTS = (
    {
        "stage": "sft",
        "hfllm_version": "0.1.0",
        "summary": "Learned from /home/me/My Data/rows.jsonl.",
        "arguments": {
            "seed": 1,
            "dataset_name": "/home/me/My Data/rows.jsonl",
            "reward_funcs": ["a.py:f"],
            "betas": [0.9],
        },
        "given": {"seed": 1},
        "parents": [
            {"role": "model", "model": "org/base", "hub_id": "org/base", "stage": "sft", "rows": 3, "data": "world"}
        ],
        "metrics": {"loss": 1.5, "gold_before": 0.1, "gold_after": 0.4, "gold_after_stderr": 0.01, "examples": 9},
        "artifacts": {"model": ".", "loss": "loss.png"},
        "wall_seconds": 3.5,
        "environment": {"python": "3.11", "cpus": 2},
    },
)


@cache
def readers() -> dict[str, Callable[[], Reader]]:
    """Return what builds each reader, by name; the good files of some need libraries."""
    lines, whole = _lines(ROWS), json.dumps(ROWS, indent=1).encode()
    paragraphs = b"One paragraph.\nIt goes on.\n\nAnother, \xc3\xa9.\n" * 20
    return {
        "jsonl": lambda: Reader(".jsonl", (lines,), read_source, is_json=True),
        "jsonl.gz": lambda: Reader(".jsonl.gz", (lines * 20,), read_source, is_gzip=True),
        "json": lambda: Reader(".json", (whole,), read_source, is_json=True),
        "csv": lambda: Reader(".csv", (_table(","),), read_source),
        "tsv": lambda: Reader(".tsv", (_table("\t"),), read_source),
        "txt": lambda: Reader(".txt", (paragraphs,), read_source),
        "parquet": lambda: Reader(".parquet", _parquets(), read_source),
        "formats": lambda: Reader(".jsonl", (lines,), read_formats, is_json=True),
        "images": lambda: Reader(".png", _pictures(), read_image),
        "warc": lambda: Reader(".warc", (_archive(),), read_archive),
        "warc.gz": lambda: Reader(".warc.gz", (_archive(),), read_archive, is_gzip=True),
        "yaml": lambda: Reader(".yaml", FLAGS, read_flags),
        "messages": lambda: Reader(".safetensors", _update()[0], read_message),
        "config": lambda: Reader(".config", tuple(json.dumps(each).encode() for each in CONFIGS), read_config, True),
        "report": lambda: Reader(".report", tuple(json.dumps(each).encode() for each in REPORTS), read_report, True),
    }


# ---- changes ----


def mutated(reader: Reader, rng: random.Random) -> bytes:
    """Return a good file with some changes."""
    content = rng.choice(reader.seeds)
    if reader.is_json and rng.random() < 0.6:
        content = _other_values(content, rng)
        if rng.random() < 0.7:
            return content
    packed = reader.is_gzip and rng.random() < 0.5
    content = gzip.compress(content, 1) if packed else content
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        content = rng.choice(CHANGES)(content, rng, reader)
    return gzip.compress(content, 1) if reader.is_gzip and not packed else content


def _other_values(content: bytes, rng: random.Random) -> bytes:
    """Change values of JSON, in one document or in a line of several."""
    is_lines = not content.startswith(b"[") and content.count(b"\n") > 1
    parts = content.splitlines() if is_lines else [content]
    at = rng.randrange(len(parts))
    value = json.loads(parts[at])
    for _ in range(rng.choice((1, 1, 2, 4))):
        value = _with_another(value, rng)
    parts[at] = json.dumps(value).encode()
    return b"\n".join(parts) + b"\n"


def _with_another(value: Any, rng: random.Random) -> Any:
    """Return JSON in which one value, or a key, is another."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return rng.choice(VALUES)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        return [_with_another(each, rng) if place == at else each for place, each in enumerate(value)]
    key = rng.choice([*value])
    if rng.random() < 0.1:
        return {name: each for name, each in value.items() if name != key}
    if rng.random() < 0.1:
        return {(str(rng.choice(VALUES)) if name == key else name): each for name, each in value.items()}
    return {**value, key: _with_another(value[key], rng)}


def _flip(content: bytes, rng: random.Random, reader: Reader) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 4, 40)) if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _span(content: bytes, rng: random.Random) -> tuple[int, int]:
    begin = rng.randrange(len(content) + 1)
    return begin, min(len(content), begin + rng.choice((1, 2, 4, 16, 200, 5000)))


def _cut(content: bytes, rng: random.Random, reader: Reader) -> bytes:
    begin, end = _span(content, rng)
    return content[:begin] + content[end:]


def _truncate(content: bytes, rng: random.Random, reader: Reader) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _double(content: bytes, rng: random.Random, reader: Reader) -> bytes:
    begin, end = _span(content, rng)
    return content[:begin] + content[begin:end] * rng.choice((2, 2, 3, 1000)) + content[end:]


def _overwrite(content: bytes, rng: random.Random, reader: Reader) -> bytes:
    begin, end = _span(content, rng)
    return content[:begin] + rng.randbytes(min(end - begin, 64)) + content[begin + min(end - begin, 64) :]


def _word(content: bytes, rng: random.Random, reader: Reader) -> bytes:
    begin, end = _span(content, rng)
    return content[:begin] + rng.choice(WORDS) + content[end if rng.random() < 0.5 else begin :]


def _splice(content: bytes, rng: random.Random, reader: Reader) -> bytes:
    other = rng.choice(reader.seeds)
    return content[: rng.randrange(len(content) + 1)] + other[rng.randrange(len(other) + 1) :]


CHANGES = (_flip, _flip, _cut, _truncate, _double, _overwrite, _word, _word, _splice)


# ---- running ----


def outcome(reader: Reader, path: Path) -> tuple[str, str]:
    """Read a file. Return `read`, `refused` or what is a failure, and what was said."""
    try:
        reader.read(path)
    except InputError as error:
        said = str(error)
        is_line = said.strip() and len(said.splitlines()) == 1 and len(said) < 2000
        return ("refused" if is_line else "no line"), said[:300]
    except BaseException as error:
        where = "; ".join(
            f"{Path(each.filename).name}:{each.lineno}" for each in traceback.extract_tb(error.__traceback__)[-4:]
        )
        return "traceback", f"{type(error).__name__}: {str(error)[:200]} ({where})"
    return "read", ""


def files_of(name: str, seed: int, numbers: range) -> Iterator[tuple[int, bytes]]:
    """Yield the changed files of these numbers, each by its number alone."""
    reader = readers()[name]()
    for number in numbers:
        yield number, mutated(reader, random.Random(f"{name} {seed} {number}"))


def work(name: str, seed: int, first: int, last: int) -> None:
    """Be a child: read the files, with a line for each before and after it."""
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    # What libraries print goes nowhere.
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    reader = readers()[name]()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"fuzz{reader.suffix}")
        # Libraries are loaded before there is a limit.
        path.write_bytes(reader.seeds[0] if not reader.is_gzip else gzip.compress(reader.seeds[0]))
        outcome(reader, path)
        _limit_memory()
        for number, content in files_of(name, seed, range(first, last)):
            path.write_bytes(content)
            lines.write(json.dumps(["begin", number]) + "\n")
            lines.write(json.dumps([*outcome(reader, path), number]) + "\n")


def _limit_memory() -> None:
    """Allow so much more memory than there is now, where the system can say it."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def results(name: str, seed: int, count: int) -> Iterator[tuple[int, str, str]]:
    """Yield number, outcome and what was said of each file, read by children that may hang or die."""
    first = 0
    while first < count:
        last = min(count, first + FILES_PER_CHILD)
        command = [sys.executable, __file__, name, "--seed", str(seed), "--numbers", str(first), str(last)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE)
        with child:
            for number, result, said in _told(child):
                yield number, result, said
                first = number + 1
            child.kill()


def _told(child: subprocess.Popen) -> Iterator[tuple[int, str, str]]:
    """Yield what a child says of each file; the file at which it hangs or dies is the last."""
    buffer, begun, limit = b"", None, time.monotonic() + 10 * SECONDS
    while True:
        ready, _, _ = select.select([child.stdout], [], [], max(0.0, limit - time.monotonic()))
        if not ready:
            yield begun or 0, "hang", f"over {SECONDS} seconds"
            return
        chunk = os.read(child.stdout.fileno(), 1 << 16)
        if not chunk:
            code = child.wait()
            if begun is not None or code:
                yield begun or 0, "killed", f"exit code {code}"
            return
        buffer += chunk
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            first, *rest = json.loads(line)
            if first == "begin":
                begun, limit = rest[0], time.monotonic() + SECONDS
            else:
                yield begun, first, rest[0]
                begun, limit = None, time.monotonic() + 10 * SECONDS


def fuzz(name: str, seed: int, count: int, keep: Path | None = None) -> list[str]:
    """Give a reader so many files, print the counts, and return a line for each failure.

    Args:
        keep: where files that a reader failed on are written.
    """
    counts: Counter[str] = Counter()
    failures = []
    for number, result, said in results(name, seed, count):
        counts[result] += 1
        if result in ("read", "refused"):
            continue
        failures.append(f"{name} {number}: {result}: {said}")
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            ((_, content),) = files_of(name, seed, range(number, number + 1))
            (keep / f"{name}_{seed}_{number}{readers()[name]().suffix}").write_bytes(content)
    print(
        f"{name}: {sum(counts.values())} files: {', '.join(f'{n} {each}' for each, n in counts.most_common())}",
        flush=True,
    )
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=[*readers(), "all"])
    parser.add_argument("--count", type=int, default=2000, help="Files for each reader.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="Where to keep files that a reader failed on.")
    parser.add_argument("--numbers", type=int, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.numbers:
        work(given.reader, given.seed, *given.numbers)
        return 0
    failures = []
    for name in readers() if given.reader == "all" else [given.reader]:
        failures += fuzz(name, given.seed, given.count, given.keep)
    print("\n".join(failures[:MOST_SHOWN]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
