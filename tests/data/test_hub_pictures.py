"""Pictures of a dataset on the Hub, in columns and in messages, are read as they are stored, and bad ones left out."""

import io

import datasets
import fsspec
import pytest
from PIL import Image

from hfllm.data.formats import to_sft
from hfllm.data.images import flaw_of_pictures
from hfllm.data.loading import RowArguments
from hfllm.data.sources import HubPart, iterate_source
from hfllm.errors import InputError
from hfllm.stages.own_pictures import PictureArguments, picture_mapper
from hfllm.stages.user_rows import kept_rows

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


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_pictures_are_left_out_or_named(on_the_hub, streaming, capsys):
    with pytest.raises(Exception, match="cannot identify image file"):
        list(datasets.load_dataset("me/rows", split="train"))
    rows = [row for _, row in iterate_source("me/rows", HubPart(streaming=streaming))]
    # What parquet holds, with no picture decoded.
    assert rows == [on_the_hub({"bytes": data, "path": None}) for data in PICTURES]
    given = RowArguments("me/rows", dataset_streaming=streaming, max_samples=9)
    for choice in ("drop", "refuse"):
        mapper = picture_mapper(PictureArguments(bad_images=choice), "me/rows", to_sft, "hfllm sft")
        if choice == "drop":
            kept = kept_rows(given, mapper, flaw_of_pictures)
            assert [row["images"][0]["bytes"] for row in kept] == [PICTURES[0], *PICTURES[2:]]
            assert "1 with a picture that cannot be read (me/rows, row 2)" in capsys.readouterr().out
        else:
            with pytest.raises(InputError, match=r"^me/rows, row 2: picture in bytes: no picture") as error:
                kept_rows(given, mapper, flaw_of_pictures)
            assert "--bad_images drop" in str(error.value)


def streamed(monkeypatch, rows):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows.to_iterable_dataset())
    return [row for _, row in iterate_source("me/rows", HubPart(streaming=True))]


def test_what_is_streamed_is_read_where_it_lies(monkeypatch):
    """Files beside the rows have an address on the Hub, of which nothing later knows."""
    stored = fsspec.filesystem("memory")
    for number, data in enumerate(PICTURES):
        stored.pipe_file(f"/rows/{number}.png", data)
    features = datasets.Features({**SAID, "images": datasets.List(IMAGE)})
    rows = [in_list({"bytes": None, "path": f"memory://rows/{number}.png"}) for number in range(4)]
    rows = datasets.Dataset.from_list(rows, features=features)
    read = streamed(monkeypatch, rows)
    assert [row["images"][0]["bytes"] for row in read] == PICTURES
    stored.rm("/rows/2.png")
    with pytest.raises(InputError, match="'me/rows': cannot be read after row 2: FileNotFoundError") as error:
        streamed(monkeypatch, rows)
    assert "\n" not in str(error.value)


def test_rows_without_pictures_stay_as_they_are(monkeypatch):
    rows = [{"prompt": "a", "tools": [{"bytes": "x", "path": None}], "number": 3, "empty": None}] * 3
    assert streamed(monkeypatch, datasets.Dataset.from_list(rows)) == rows
