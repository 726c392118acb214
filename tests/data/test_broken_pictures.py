"""Whatever is broken in a picture's file, it is read or refused in a line that names it; nothing else comes out."""

import base64
import io
import random

import numpy
import PIL
import pytest
from PIL import EpsImagePlugin, Image, ImageOps

from hfllm.data.images.files import BadImage, read_image

ORIGIN = "rows.jsonl, line 3"
KINDS = ("PNG", "APNG", "JPEG", "GIF", "moving GIF", "WEBP", "moving WEBP", "TIFF", "packed TIFF", "BMP", "DDS")


def drawn(seed=0, size=(32, 24)):
    """Blocks of colors with noise, which no encoder makes trivial."""
    rng, (width, height) = numpy.random.RandomState(seed), size
    blocks = numpy.kron(rng.randint(0, 235, (height // 4, width // 4, 3)), numpy.ones((4, 4, 1)))
    return Image.fromarray((blocks + rng.randint(0, 20, (height, width, 3))).astype("uint8"))


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def file_of(kind):
    first, further = drawn(), [drawn(1), drawn(2)]
    exif = first.getexif()
    exif[0x0112], exif[0x010E] = 6, "a fox"
    if kind == "APNG" or kind.startswith("moving"):
        return encoded(first, kind.removeprefix("moving ").removeprefix("A"), save_all=True, append_images=further)
    if kind == "packed TIFF":
        return encoded(first, "TIFF", compression="tiff_lzw")
    return encoded(first, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}))


def broken(data, rng):
    """Return a file cut short, with some bits flipped, with others' bytes at its beginning, or with some replaced."""
    made, how = bytearray(data), rng.randrange(4)
    if how == 0:
        return bytes(made[: rng.randrange(len(made))])
    if how == 1:
        for _ in range(rng.choice((1, 2, 5, 20))):
            made[rng.randrange(len(made))] ^= 1 << rng.randrange(8)
    if how == 2:
        for _ in range(2):
            made[rng.randrange(min(len(made), 120))] = rng.choice((0, 1, 127, 128, 255))
    if how == 3:
        at = rng.randrange(len(made))
        made[at : at + rng.randrange(1, 9)] = bytes(rng.choice((0, 255)) for _ in range(rng.randrange(9)))
    return bytes(made)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_broken_files_are_read_or_refused_in_a_line(kind):
    data, rng = file_of(kind), random.Random(kind)
    assert read_image(data, ORIGIN).size in ((32, 24), (24, 32))
    outcomes = set()
    for _ in range(300):
        try:
            outcomes.add(read_image(broken(data, rng), ORIGIN).mode)
        except BadImage as error:
            line = str(error)
            assert line.startswith(ORIGIN) and "\n" not in line and len(line) < 400
            outcomes.add("refused")
    assert outcomes == {"RGB", "refused"}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_pictures_are_turned_as_pillow_turns_them(kind, orientation):
    image = drawn()
    exif = image.getexif()
    exif[0x0112] = orientation
    data = encoded(image, kind, exif=exif)
    with Image.open(io.BytesIO(data)) as opened:
        expected = ImageOps.exif_transpose(opened).convert("RGB")
    read = read_image(data, ORIGIN)
    assert read.size == expected.size and read.tobytes() == expected.tobytes()


@pytest.mark.filterwarnings("ignore:Tag data larger")
def test_tags_that_cannot_be_read_do_not_hide_a_picture():
    """As cameras write them: pixels are whole, and a tag has another type than the standard says."""
    image = drawn()
    exif = image.getexif()
    exif[0x0112], exif[0x010E] = 6, "a fox"
    # The description as a list of shorts and the count of one that is longer than the tags are.
    data = bytearray(encoded(image, "JPEG", exif=exif))
    at = data.index(bytes.fromhex("010e0002"))
    data[at + 4 : at + 8] = bytes.fromhex("7fffffff")
    # The turn stands in the same tags; Pillow reads it beside a damaged one from 13 on.
    is_turned = int(PIL.__version__.partition(".")[0]) >= 13
    assert read_image(bytes(data), ORIGIN).size == ((24, 32) if is_turned else (32, 24))
    data[data.index(b"Exif\0\0") + 6 : data.index(b"Exif\0\0") + 10] = b"none"
    assert read_image(bytes(data), ORIGIN).size == (32, 24)


def test_of_a_cut_animation_the_first_frame_is_read():
    data = file_of("moving GIF")
    first = read_image(data, ORIGIN)
    assert read_image(data[: len(data) * 3 // 5], ORIGIN).tobytes() == first.tobytes()


def test_what_is_no_name_is_shown_short(tmp_path):
    whole = encoded(drawn(), "PNG")
    for value, words in (
        (base64.b64encode(whole).decode(), "no such file"),
        ({"bytes": base64.b64encode(whole).decode()}, "no such file"),
        ("https://x.org/" + "a" * 9999, "nothing is downloaded"),
        ("a\nb\0c.png", "no such file"),
        ({"bytes": [137, 80, 78, 71]}, "got '\\[137, 80, 78, 71\\]'"),
    ):
        with pytest.raises(BadImage, match=words) as error:
            read_image(value, ORIGIN, tmp_path)
        assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_a_picture_that_was_opened_and_not_yet_read():
    whole = encoded(drawn(), "PNG")
    with pytest.raises(BadImage, match=f"^{ORIGIN}: picture in memory: cannot be read: "):
        read_image(Image.open(io.BytesIO(whole[: len(whole) // 2])), ORIGIN)


def test_the_limit_that_is_named_is_the_one_that_counts(monkeypatch):
    """Pillow has one of its own, which may be the lower."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    with pytest.raises(BadImage, match="more pixels than 600, the most"):
        read_image(encoded(drawn(), "PNG"), ORIGIN)
    with pytest.raises(BadImage, match="more pixels than 500, the most"):
        read_image(encoded(drawn(), "PNG"), ORIGIN, max_pixels=500)


def in_iptc(data):
    """A file of news agencies, as its reader in Pillow wants it: some fields, and a file of any format."""

    def field(record, number, value):
        return bytes((0x1C, record, number)) + len(value).to_bytes(2, "big") + value

    fields = [(3, 20, (8).to_bytes(4, "big")), (3, 30, (8).to_bytes(4, "big")), (3, 60, b"\1\0"), (3, 65, b"\0")]
    begun = b"".join(field(*each) for each in [*fields, (3, 120, b"\5")])
    return begun + field(8, 10, data)


@pytest.mark.parametrize("kind", ["EPS", "IPTC"])
@pytest.mark.parametrize("is_opened", [False, True])
def test_no_file_is_run(kind, is_opened, monkeypatch):
    """An EPS file is a program; Pillow gives it to Ghostscript where that is installed, also within another file."""
    data, ran = encoded(drawn(), "EPS"), []
    data = in_iptc(data) if kind == "IPTC" else data
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **options: ran.append(args) or drawn().im)
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.format == kind
        opened.load()
        assert ran
        ran.clear()
    value = Image.open(io.BytesIO(data)) if is_opened else data
    with pytest.raises(BadImage, match=r"^rows\.jsonl, line 3: picture .*: no picture in a format that is read: PNG"):
        read_image(value, ORIGIN)
    assert not ran


@pytest.mark.filterwarnings("ignore:Image was not the expected size")
def test_the_size_is_that_of_what_is_loaded():
    """An icon tells the size of the picture that it holds, and may tell another."""
    whole = bytearray(encoded(drawn(size=(64, 64)), "ICO", sizes=[(64, 64)]))
    assert read_image(bytes(whole), ORIGIN, max_pixels=64 * 64).size == (64, 64)
    whole[6:8] = 8, 8
    with pytest.raises(BadImage, match="64 x 64 pixels; at most 1,000 are read"):
        read_image(bytes(whole), ORIGIN, max_pixels=1000)
