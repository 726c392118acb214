"""Pictures of all kinds become RGB, bad ones are named in a line, and each stands at its place in the conversation."""

import base64
import io
import json
from pathlib import Path

import numpy
import pytest
from PIL import Image

from hfllm.data.formats import BadRow, is_blank, to_prompt, to_sft
from hfllm.data.images.files import BadImage, read_image, to_rgb
from hfllm.data.images.rows import (
    has_images,
    place_images,
    refuse_images,
    take_images,
    to_picture_prompts,
    to_pictures,
    without_images,
)
from hfllm.data.loading import prompt_key
from hfllm.errors import InputError

ORIGIN = "rows.jsonl, line 3"


def picture(mode="RGB", size=(8, 6), color=(200, 100, 50)):
    return Image.new("RGB", size, color).convert(mode)


def as_bytes(image, kind="PNG", **kwargs):
    stream = io.BytesIO()
    image.save(stream, kind, **kwargs)
    return stream.getvalue()


def test_all_that_names_a_picture_reads_the_same(tmp_path):
    image = picture()
    data = as_bytes(image)
    (tmp_path / "a.png").write_bytes(data)
    address = "data:image/png;base64," + base64.b64encode(data).decode()
    ways = ["a.png", str(tmp_path / "a.png"), data, image, {"bytes": data, "path": None}]
    ways += [{"bytes": None, "path": "a.png"}, address]
    for value in ways:
        read = read_image(value, ORIGIN, tmp_path)
        assert read.mode == "RGB" and read.tobytes() == image.tobytes(), value


@pytest.mark.parametrize("mode", ["CMYK", "P", "L", "1", "LA", "RGBA", "I;16", "I;16B", "I", "F"])
def test_modes_become_rgb(mode):
    gray = Image.new("RGB", (8, 6), (128, 128, 128)).convert("L")
    if mode.startswith("I"):
        kind = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
        image = Image.fromarray(numpy.full((6, 8), 128 * 257).astype(kind))
        assert image.mode == mode
    else:
        image = gray.convert("RGB").convert(mode) if mode in ("CMYK", "RGBA") else gray.convert(mode)
    read = to_rgb(image)
    assert read.mode == "RGB" and read.size == (8, 6)
    values = numpy.asarray(read).astype(int)
    # Black and white alone are dithered.
    assert abs(values.mean() - 128) < (30 if mode == "1" else 2), mode


def test_a_gray_picture_of_8_bits_in_32_keeps_its_values():
    values = numpy.arange(48).reshape(6, 8) * 5
    read = to_rgb(Image.fromarray(values.astype("<i4")))
    assert (numpy.asarray(read)[..., 0] == values).all()


@pytest.mark.parametrize("most", [1, 255])
def test_floats_are_read_by_their_range(most):
    """A float TIFF has values up to 1 as a rule, which Pillow reads as black."""
    values = (numpy.arange(48).reshape(6, 8) / 47 * most).astype("<f4")
    values[0, 0] = numpy.nan
    read = read_image(as_bytes(Image.fromarray(values), "TIFF"), ORIGIN)
    expected = (numpy.nan_to_num(values) / most * 255).round()
    assert (numpy.asarray(read)[..., 0] == expected).all()


def test_what_is_transparent_lies_on_white():
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    image.putpixel((1, 1), (200, 0, 0, 255))
    read = to_rgb(image)
    assert read.getpixel((0, 0)) == (255, 255, 255) and read.getpixel((1, 1)) == (200, 0, 0)
    # A palette with a transparent entry, as in a GIF.
    flat = Image.new("P", (4, 4), 0)
    flat.putpalette([10, 20, 30])
    read = read_image(as_bytes(flat, "GIF", transparency=0), ORIGIN)
    assert read.getpixel((0, 0)) == (255, 255, 255)


def test_the_camera_is_held_upright():
    image = picture()
    exif = image.getexif()
    exif[0x0112] = 6
    assert read_image(as_bytes(image, "JPEG", exif=exif), ORIGIN).size == (6, 8)


def test_of_an_animation_the_first_frame_is_read():
    frames = [picture(color=(255, 0, 0)), picture(color=(0, 0, 255))]
    data = as_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert read_image(data, ORIGIN).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.slow
def test_bad_pictures_are_named_in_a_line(tmp_path):
    cut = as_bytes(Image.effect_noise((64, 64), 50))[:900]
    (tmp_path / "cut.png").write_bytes(cut)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "one.png").write_bytes(as_bytes(picture(size=(1, 1))))
    (tmp_path / "large.png").write_bytes(as_bytes(Image.new("L", (8000, 6250))))
    (tmp_path / "bomb.png").write_bytes(as_bytes(Image.new("1", (15000, 15000))))
    found = {
        "cut.png": "cannot be read",
        "text.png": "no picture in a format",
        "empty.jpg": "no picture in a format",
        "one.png": "1 x 1 pixels; each side must have at least 2",
        "large.png": "8000 x 6250 pixels; at most 40,000,000",
        "bomb.png": "more pixels than 40,000,000",
        "none.png": "no such file",
        "https://x.org/a.png": "nothing is downloaded",
        "data:image/png;base64,?": "not base64",
    }
    for value, words in found.items():
        with pytest.raises(BadImage) as error:
            read_image(value, ORIGIN, tmp_path)
        line = str(error.value)
        assert words in line and line.startswith(ORIGIN) and "\n" not in line, line
        assert error.value.kind == "with a picture that cannot be read"
        assert value[:5] in line
    with pytest.raises(BadImage, match="got '3'"):
        read_image(3, ORIGIN)
    assert read_image("one.png", ORIGIN, tmp_path, min_side=1).size == (1, 1)
    assert read_image("large.png", ORIGIN, tmp_path, max_pixels=60_000_000).size == (8000, 6250)


def row(content="What is it?", **columns):
    said = {"role": "assistant", "content": "A fox."}
    return {"messages": [{"role": "user", "content": content}, said], **columns}


def convert(tmp_path=None, **kwargs):
    return lambda each: to_pictures(to_sft, tmp_path, **kwargs)(ORIGIN, each)


def test_pictures_stand_where_the_row_puts_them():
    image, other = picture(), picture(color=(1, 2, 3))
    text, place = {"type": "text", "text": "What is it?"}, {"type": "image"}
    for each in (
        row(image=image),
        row(images=[image]),
        row("<image>\nWhat is it?", image=image),
        row([{"type": "image"}, {"type": "text", "text": "What is it?"}], images=[image]),
        row([{"type": "image", "image": image, "text": None}, {"type": "text", "text": "What is it?"}]),
    ):
        assert has_images(each)
        read = convert()(each)
        assert read["prompt"] == [{"role": "user", "content": [place, text]}] and read["images"] == [image]
        assert read["completion"][0]["content"] == [{"type": "text", "text": "A fox."}]
    read = convert()(row("Here <image> and there <image>?", images=[image, other]))
    (asked,) = read["prompt"]
    assert [part["type"] for part in asked["content"]] == ["text", "image", "text", "image", "text"]
    assert read["images"] == [image, other]


def prompt_of(tmp_path, **columns):
    return to_picture_prompts(to_prompt, tmp_path)(ORIGIN, columns)


def test_prompts_have_their_pictures_at_their_places(tmp_path):
    text, place = {"type": "text", "text": "which side"}, {"type": "image"}
    asked = [{"role": "user", "content": [place, text]}]
    path = str(tmp_path / "a.png")
    for columns in (
        {"prompt": "which side", "images": ["a.png"]},
        {"prompt": "<image>\nwhich side", "image": "a.png", "side": "left"},
        {"prompt": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, text]}]},
        {"prompt": [{"role": "user", "content": [place, text]}], "images": ["a.png"]},
    ):
        read = prompt_of(tmp_path, **columns)
        assert read["prompt"] == asked and read["images"] == [path]
        assert read.get("image") == (path if "image" in columns else None)
        assert read.get("side") == columns.get("side") and not is_blank(read["prompt"])
    with pytest.raises(InputError, match="line 3: 1 picture and 2 places"):
        prompt_of(tmp_path, prompt="<image> <image> which", image="a.png")
    with pytest.raises(InputError, match="line 3: 0 pictures and 1 place"):
        prompt_of(tmp_path, prompt=[{"role": "user", "content": [place, text]}])


def test_prompts_without_pictures_stay_as_they_are(tmp_path):
    for columns in (
        {"prompt": "spell <image>"},
        {"prompt": "a", "image": None},
        {"prompt": "a", "images": [], "b": 1},
    ):
        assert prompt_of(tmp_path, **columns) == to_prompt(ORIGIN, columns) == columns


def test_of_a_prompt_nothing_else_is_looked_at(tmp_path):
    """Other columns are for reward functions, whatever they hold; results of tools are as in any conversation."""
    picture_part = [{"type": "image", "image": "a.png"}]
    others = {
        "chosen": [{"role": "user", "content": picture_part}, {"role": "assistant", "content": [{"type": "audio"}]}],
        "rejected": [{"role": "user", "content": "b"}, {"role": "assistant", "content": [3]}],
        "input": [{"role": "user", "content": picture_part}],
        "output": {"role": "assistant", "content": [{"anything": 1}]},
        "messages": [{"role": "user", "content": picture_part}],
    }
    asked = {"role": "user", "content": "a"}
    results = ([{"passage": "b"}, "c"], [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}], [3], [])
    told = [[asked, {"role": "tool", "content": content}] for content in results]
    for prompt in ("a", [asked], *told):
        columns = {"prompt": prompt, **others}
        assert prompt_of(tmp_path, **columns) == to_prompt(ORIGIN, columns)
        seen = prompt_of(tmp_path, **columns, image="a.png")
        assert seen["images"] == [str(tmp_path / "a.png")] and seen["chosen"] == others["chosen"]
        if isinstance(prompt, list) and len(prompt) == 2:
            expected = to_prompt(ORIGIN, columns)["prompt"][1]["content"]
            assert seen["prompt"][1]["content"] == [{"type": "text", "text": expected}]


def test_rows_with_the_same_picture_have_one_key():
    one, other = as_bytes(picture()), as_bytes(picture(color=(1, 2, 3)))
    rows = [
        {"prompt": "What?", "image": one},
        {"prompt": "Where?", "images": [one]},
        {"prompt": "What?", "image": other},
    ]
    keys = [prompt_key(each) for each in rows]
    assert keys[0] == keys[1] != keys[2]


def test_paths_know_their_folder(tmp_path):
    picture().save(tmp_path / "a.png")
    read = convert(tmp_path)(row(image="a.png"))
    assert read["images"] == [str(tmp_path / "a.png")] and json.dumps(read)
    address = "data:image/png;base64," + base64.b64encode(as_bytes(picture())).decode()
    assert convert(tmp_path)(row([{"type": "image_url", "image_url": {"url": address}}]))["images"] == [address]


OUTSIDE = {
    "absolute": "{outside}/secret.png",
    "above": "../outside/secret.png",
    "link": "link.png",
    "linked folder": "linked/secret.png",
    "not there": "/nowhere/at/all.png",
}
HOLDERS = {
    "image": lambda path: {"image": path},
    "images": lambda path: {"images": [{"bytes": None, "path": path}]},
    "bytes": lambda path: {"images": [{"bytes": path, "path": "x.png"}]},
    "messages": lambda path: {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": path}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A."},
        ]
    },
}


@pytest.fixture
def folders(tmp_path):
    """A dataset's folder with links out of it, and a folder beside it with a picture that is not the dataset's."""
    own, outside = tmp_path / "own", tmp_path / "outside"
    for folder in (own / "in", outside):
        folder.mkdir(parents=True)
    for path in (own / "in" / "a.png", outside / "secret.png"):
        picture().save(path)
    (own / "link.png").symlink_to(outside / "secret.png")
    (own / "linked").symlink_to(outside)
    (own / "good.png").symlink_to(own / "in" / "a.png")
    return own, outside


def prompted(each):
    return each if "messages" in each else {"prompt": "What?", "completion": "A.", **each}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("where", OUTSIDE)
@pytest.mark.parametrize(
    "read", [lambda folder: to_pictures(to_sft, folder), lambda folder: to_picture_prompts(to_prompt, folder)]
)
def test_a_row_names_no_picture_outside_of_its_dataset(holder, where, read, folders):
    own, outside = folders
    path = OUTSIDE[where].format(outside=outside)
    field = "images" if holder == "bytes" else holder
    # Never left out as one that cannot be read: it does not even say whether there is such a file.
    with pytest.raises(InputError, match=rf"{ORIGIN}: {field} names '{path}', which is not in the .* {own} ") as error:
        read(own)(ORIGIN, prompted(HOLDERS[holder](path)))
    assert not isinstance(error.value, BadRow)
    # A dataset of the Hub has no folder here.
    for named in (path, "good.png", str(own / "in" / "a.png")):
        with pytest.raises(InputError, match=rf"{ORIGIN}: {field} names a file of this machine, '{named}'"):
            read(None)(ORIGIN, prompted(HOLDERS[holder](named)))


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("path", ["in/a.png", "./in/../in/a.png", "good.png", "{own}/in/a.png"])
def test_what_lies_in_the_datasets_folder_is_read(holder, path, folders):
    own, _ = folders
    read = convert(own)(prompted(HOLDERS[holder](path.format(own=own))))
    (found,) = read["images"]
    assert Path(found).samefile(own / "in" / "a.png")


def test_a_snapshot_of_the_hubs_cache_names_pictures_that_are_stored_beside_it(tmp_path):
    stored = {name: tmp_path / name / "blobs" / "0a1b" for name in ("datasets--u--d", "datasets--u--other", "plain")}
    for blob in stored.values():
        blob.parent.mkdir(parents=True)
        picture().save(blob, "PNG")
    for repository in ("datasets--u--d", "plain"):
        own = tmp_path / repository / "snapshots" / "5f" / "img"
        own.mkdir(parents=True)
        for name, blob in stored.items():
            (own / f"{name}.png").symlink_to(Path("../../../..", *blob.relative_to(tmp_path).parts))
    snapshot = tmp_path / "datasets--u--d" / "snapshots" / "5f"
    for folder, path in ((snapshot, "img/datasets--u--d.png"), (snapshot / "img", "datasets--u--d.png")):
        (found,) = convert(folder)(row(image=path))["images"]
        assert Path(found).samefile(stored["datasets--u--d"])
    # Those of another data set, and of a folder that only looks like one, are not its own.
    for folder, path in (
        (snapshot, "img/datasets--u--other.png"),
        (snapshot, str(stored["plain"])),
        (tmp_path / "plain" / "snapshots" / "5f", "img/plain.png"),
    ):
        with pytest.raises(InputError, match="which is not in the dataset's folder"):
            convert(folder)(row(image=path))


@pytest.mark.parametrize(
    ("content", "count", "words"),
    [
        ("<image> <image> What?", 1, "1 picture and 2 places"),
        ("<image> What?", 2, "2 pictures and 1 place "),
        ("<image> What?", 0, "no picture"),
    ],
)
def test_as_many_pictures_as_places(content, count, words):
    with pytest.raises(InputError, match=words) as error:
        convert()(row(content, images=[picture()] * count))
    assert str(error.value).startswith(ORIGIN)


def test_other_rows_are_refused_in_a_line():
    with pytest.raises(InputError, match="in a column and in the messages"):
        convert()(row([{"type": "image", "image": picture()}], image=picture()))
    with pytest.raises(InputError, match="must be a text or an image"):
        convert()(row([{"type": "audio", "audio": "a.wav"}], image=picture()))
    with pytest.raises(InputError, match="no turn of the user"):
        place_images(ORIGIN, {"prompt": [{"role": "system", "content": "x"}]}, 1)
    with pytest.raises(InputError, match="reads text alone") as error:
        refuse_images(ORIGIN, row(image="a.png"), "model 'm'")
    assert str(error.value).startswith(ORIGIN) and "'m'" in str(error.value)
    refuse_images(ORIGIN, row(), "model 'm'")
    reader = without_images(to_sft, "hfllm reward")
    assert reader(ORIGIN, row()) == to_sft(ORIGIN, row())
    with pytest.raises(InputError, match="hfllm reward reads text alone"):
        reader(ORIGIN, row(image="a.png"))
    assert convert(needs_images=False)(row())["images"] == []


def test_taking_pictures_changes_no_row():
    each = row([{"type": "image", "image": "a.png"}])
    before = json.dumps(each)
    rest, images = take_images(ORIGIN, each)
    assert images == ["a.png"] and json.dumps(each) == before and rest["messages"][0]["content"] == "<image>"
