"""Pictures of a dataset on the Hub, in columns and in messages, are read as they are stored, and bad ones left out."""

import io
import json

import datasets
import fsspec
import pytest
from PIL import Image

from hfllm.data.formats import to_sft
from hfllm.data.images.rows import ImageReading, flaw_of_pictures, picture_mapper
from hfllm.data.loading import RowSource
from hfllm.data.sources import HubPart, iterate_source
from hfllm.errors import InputError
from hfllm.stages.shared import kept_rows

BROKEN = b"no picture"
TEXT, IMAGE = datasets.Value("string"), datasets.Image()
MESSAGES = datasets.List({"role": TEXT, "content": datasets.List({"type": TEXT, "text": TEXT, "image": IMAGE})})
SAID = {"prompt": TEXT, "completion": TEXT}


def png(color):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(stream, "PNG")
    return stream.getvalue()


PICTURES = [png("red"), BROKEN, png("blue"), png("green")]


def in_column(data):
    return {"prompt": "What?", "completion": "A.", "image": data}


def in_list(data):
    return {"prompt": "What?", "completion": "A.", "images": [data]}


def in_messages(data):
    asked = [{"type": "image", "image": data, "text": None}, {"type": "text", "text": "What?", "image": None}]
    answer = [{"type": "text", "text": "A.", "image": None}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


FORMS = {
    "column": (in_column, {**SAID, "image": IMAGE}),
    "list": (in_list, {**SAID, "images": datasets.List(IMAGE)}),
    "messages": (in_messages, {"messages": MESSAGES}),
}


@pytest.fixture(params=FORMS)
def on_the_hub(request, tmp_path, monkeypatch):
    """`me/rows`, of which the second picture is broken, in a parquet file that the real `load_dataset` reads."""
    form, features = FORMS[request.param]
    rows = [form({"bytes": data, "path": None}) for data in PICTURES]
    (tmp_path / "hub").mkdir()
    made = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    made.to_parquet(tmp_path / "hub" / "train.parquet")
    load = datasets.load_dataset

    def load_dataset(name, config=None, *, revision=None, **options):
        return load(str(tmp_path / "hub"), config, cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return form


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_pictures_are_left_out_or_named(on_the_hub, streaming, capsys):
    with pytest.raises(Exception, match="cannot identify image file"):
        list(datasets.load_dataset("me/rows", split="train"))
    rows = [row for _, row in iterate_source("me/rows", HubPart(streaming=streaming))]
    # What parquet holds, with no picture decoded.
    assert rows == [on_the_hub({"bytes": data, "path": None}) for data in PICTURES]
    given = RowSource("me/rows", HubPart(streaming=streaming), max_samples=9)
    for choice in ("drop", "refuse"):
        mapper = picture_mapper("me/rows", ImageReading(bad_images=choice), to_sft, "hfllm sft")
        if choice == "drop":
            kept = kept_rows(given, mapper, flaw_of_pictures)
            assert [row["images"][0]["bytes"] for row in kept] == [PICTURES[0], *PICTURES[2:]]
            assert "1 with a picture that cannot be read (me/rows, row 2)" in capsys.readouterr().out
        else:
            with pytest.raises(InputError, match=r"^me/rows, row 2: picture in bytes: no picture") as error:
                kept_rows(given, mapper, flaw_of_pictures)
            assert "--bad_images drop" in str(error.value)


def read(monkeypatch, rows, streaming=True):
    given = rows.to_iterable_dataset() if streaming else rows
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: given)
    return [row for _, row in iterate_source("me/rows", HubPart(streaming=streaming))]


@pytest.fixture
def opened(monkeypatch):
    """The addresses that fsspec was asked for; the file named `N.png` is the N-th picture."""
    asked = []

    def open_address(address, mode):
        asked.append(address)
        number = int(address.rpartition(".png")[0].rpartition("/")[2])
        if number >= len(PICTURES):
            raise FileNotFoundError(address)
        return io.BytesIO(PICTURES[number])

    monkeypatch.setattr(fsspec, "open", open_address)
    return asked


ADDRESSES = [
    "hf://datasets/me/rows@main/{}.png",
    "hf://datasets/me/rows/a folder/{}.png",
    "zip://in/{}.png::hf://datasets/Me/Rows@abc/a.zip",
]


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("threads", [0, 2])
def test_what_is_streamed_is_read_where_it_lies(monkeypatch, opened, address, threads):
    """Files beside the rows have an address on the Hub, of which nothing later knows."""
    features = datasets.Features({**SAID, "images": datasets.List(IMAGE)})

    def rows(numbers):
        made = [in_list({"bytes": None, "path": address.format(number)}) for number in numbers]
        made = datasets.Dataset.from_list(made, features=features)
        if threads:
            # As load_dataset gives what is not on this machine.
            streamed = made.to_iterable_dataset().decode(num_threads=threads)
            monkeypatch.setattr(made, "to_iterable_dataset", lambda: streamed)
        return made

    found = read(monkeypatch, rows(range(4)))
    assert [row["images"][0]["bytes"] for row in found] == PICTURES and len(opened) == 4
    with pytest.raises(InputError, match="'me/rows': cannot be read after row 2: FileNotFoundError") as error:
        read(monkeypatch, rows((0, 1, 9)))
    assert "\n" not in str(error.value)


ELSEWHERE = [
    *("file:///etc/0.png", "http://169.254.169.254/0.png", "reference://0.png::file:///etc/refs.json", "/etc/0.png"),
    *("hf://datasets/you/rows@main/0.png", "hf://me/rows/0.png", "zip://0.png::file:///a.zip"),
    *("reference://0.png::hf://datasets/me/rows@main/refs.json", "hf://datasets/me/rows/../../you/rows/0.png"),
    *("hf://datasets/me/rows-too/0.png", "hf://datasets/me/rows@main/a.zip::file:///etc/0.png"),
]


@pytest.mark.parametrize("address", ELSEWHERE)
def test_nothing_outside_of_the_repository_is_opened(monkeypatch, opened, address):
    given = in_column({"bytes": None, "path": address})
    rows = datasets.Dataset.from_list([given], features=datasets.Features({**SAID, "image": IMAGE}))
    assert read(monkeypatch, rows) == [given] and not opened


def test_what_is_no_picture_is_not_opened(monkeypatch, opened):
    tool = {"bytes": None, "path": "hf://datasets/me/rows@main/0.png"}
    features = datasets.Features({**SAID, "image": IMAGE, "tool": {"bytes": TEXT, "path": TEXT}})
    given = {**in_column({"bytes": PICTURES[0], "path": None}), "tool": tool}
    assert read(monkeypatch, datasets.Dataset.from_list([given], features=features)) == [given] and not opened


JSON = datasets.Json()
MIXED = {"prompt": JSON, "content": datasets.List(JSON)}
VARYING = [
    {"prompt": "hi", "content": ["a", {"b": [1]}]},
    {"prompt": [{"role": "user", "content": "hi"}], "content": []},
    {"prompt": "3", "content": ["3", None]},
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("pictures", [{}, {"image": {"bytes": BROKEN, "path": None}}])
def test_fields_whose_type_varies_are_values(monkeypatch, streaming, threads, pictures):
    features = datasets.Features(MIXED | ({"image": IMAGE} if pictures else {}))
    given = [row | pictures for row in VARYING]
    # Encoded as files of JSON are: `from_list` takes a text that is JSON for what is encoded already.
    encoded = [{**row, "prompt": json.dumps(row["prompt"])} for row in given]
    encoded = [{**row, "content": [json.dumps(each) for each in row["content"]]} for row in encoded]
    rows = datasets.Dataset.from_list(encoded, features=features)
    if threads:
        streamed = rows.to_iterable_dataset().decode(num_threads=threads)
        monkeypatch.setattr(rows, "to_iterable_dataset", lambda: streamed) if streaming else None
    assert read(monkeypatch, rows, streaming) == given


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_text_are_not_cast(monkeypatch, streaming):
    for kind in (datasets.Dataset, datasets.IterableDataset):
        for name in ("cast", "cast_column", "decode"):
            monkeypatch.setattr(kind, name, None, raising=False)
    rows = datasets.Dataset.from_list([{"text": "a"}] * 3)
    assert read(monkeypatch, rows, streaming) == [{"text": "a"}] * 3


def test_rows_without_pictures_stay_as_they_are(monkeypatch):
    rows = [{"prompt": "a", "tools": [{"bytes": "x", "path": None}], "number": 3, "empty": None}] * 3
    assert read(monkeypatch, datasets.Dataset.from_list(rows)) == rows


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """The Hub's cache: a picture of `me/rows`, linked as it stores them, and one of another dataset."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("me--rows", "me--others"):
        blob, snapshot = (tmp_path / "cache" / f"datasets--{name}" / part for part in ("blobs/1", "snapshots/2"))
        blob.parent.mkdir(parents=True)
        blob.write_bytes(PICTURES[0])
        snapshot.mkdir(parents=True)
        (snapshot / "0.png").symlink_to(blob)
    (tmp_path / "0.png").write_bytes(PICTURES[0])
    return tmp_path


def test_only_its_own_downloaded_pictures_are_read_from_the_disk(own_cache, monkeypatch):
    """A dataset of files has paths in the cache; its features may as well say that a path of anything is a picture."""
    snapshot = own_cache / "cache" / "datasets--me--rows" / "snapshots" / "2"
    leak = snapshot / "1.png"
    leak.symlink_to(own_cache / "0.png")
    other = own_cache / "cache" / "datasets--me--others" / "snapshots" / "2" / "0.png"
    paths = [snapshot / "0.png", own_cache / "0.png", leak, other, snapshot / ".." / ".." / ".." / "none.png"]
    features = datasets.Features({**SAID, "image": IMAGE})
    given = [in_column({"bytes": None, "path": str(path)}) for path in paths]
    rows = read(monkeypatch, datasets.Dataset.from_list(given, features=features), streaming=False)
    assert [row["image"]["bytes"] for row in rows] == [PICTURES[0], None, None, None, None]
    mapper = picture_mapper("me/rows", ImageReading(), to_sft, "hfllm sft")
    assert mapper("me/rows, row 1", rows[0])["images"][0]["bytes"] == PICTURES[0]
    for number, row in enumerate(rows[1:], 2):
        with pytest.raises(InputError, match=rf"^me/rows, row {number}: image names a file of this machine"):
            mapper(f"me/rows, row {number}", row)
