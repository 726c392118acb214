"""Pictures of a dataset's rows: read from paths, bytes or PIL into RGB, and put at their places in a conversation.

A row has a column `image` or `images`, or parts `{"type": "image", "image": ...}` in the content of its messages. A
picture is a path (relative to the dataset's folder), bytes, a PIL image, or what datasets keeps of its Image feature,
`{"bytes": ..., "path": ...}`. Of `<image>` marks and such parts there must be as many as pictures; where there are
none, the pictures come before the first question, as in TRL.

What is read is RGB: palettes, gray, 16 bits and CMYK are converted, what is transparent lies on white, and pictures
are turned as the camera was held. Of an animation the first frame is read.
"""

import base64
import binascii
import hashlib
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hfllm.data.formats import as_messages
from hfllm.data.messages import Message, content_text
from hfllm.data.rows import BadRow, flaw_of
from hfllm.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

Row = dict[str, Any]
Converted = TypeVar("Converted")
# Where a picture stands in a text, as LLaVA's datasets write it.
MARK = "<image>"
COLUMNS = ("image", "images")
MESSAGES = ("messages", "conversations", "prompt", "completion")
# A picture of more pixels is refused: in RGB it takes 120 MB, and models see it much smaller.
MAX_PIXELS = 40_000_000
# Sides of one pixel are those of broken downloads and of marks that count visitors.
MIN_SIDE = 2
# Letters of a picture's name in an error.
MOST_SHOWN = 200
# How to turn a picture by what its camera says (the EXIF tag Orientation): `PIL.Image.Transpose`, by its name.
ORIENTATION = 0x0112
TURNS = {
    **{2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270"},
    **{7: "TRANSVERSE", 8: "ROTATE_90"},
}
UNREADABLE = "with a picture that cannot be read"


class BadImage(BadRow):
    """A picture that cannot be read; `--bad_images drop` leaves its row out."""

    def __init__(self, message: str):
        super().__init__(message, UNREADABLE)


def has_images(row: Mapping[str, Any]) -> bool:
    """Return whether a row has pictures, in a column or in its messages."""
    # A row of text in a table of pictures has an empty list.
    in_columns = any(each is not None for column in COLUMNS for each in _as_list(row.get(column)))
    return in_columns or any(_is_picture(part) for column in MESSAGES for part in _parts(row.get(column)))


def refuse_images(origin: str, row: Mapping[str, Any], model: str) -> None:
    """Refuse a row with pictures for a model of text alone.

    Raises:
        InputError: naming the row and the model.
    """
    if has_images(row):
        raise InputError(
            f"{origin}: the row has pictures, and {model} reads text alone: leave their column out; hfllm vision, "
            "sft, reward, evaluate and rlhf take such rows for a model that sees"
        )


def without_images(mapper: Callable[[str, Row], Converted], model: str) -> Callable[[str, Row], Converted]:
    """Return a conversion of rows of text that refuses rows with pictures; `model` names what would not see them."""

    def convert(origin: str, row: Row) -> Converted:
        refuse_images(origin, row, model)
        return mapper(origin, row)

    return convert


def read_image(
    value: Any, origin: str, folder: Path | None = None, max_pixels: int = MAX_PIXELS, min_side: int = MIN_SIDE
) -> "Image":
    """Return a picture in RGB, wholly decoded.

    Args:
        value: a path, bytes, a PIL image, a `data:` address, or a dictionary with `bytes` or `path`.
        origin: the row, for errors.
        folder: what paths are relative to.
        max_pixels: width times height at most, known before anything is decoded.
        min_side: the shorter side at least.

    Raises:
        BadImage: in one line that names the row and the file, when it cannot be read or is too large or too small.
    """
    from PIL import Image, UnidentifiedImageError

    where = f"{origin}: picture in memory"
    try:
        if isinstance(value, Image.Image):
            return _checked(value, where, max_pixels, min_side)
        source, name = _source(value, origin, folder)
        where = f"{origin}: picture {name}"
        with warnings.catch_warnings():
            # Pillow warns of more pixels than it likes, and we have a limit of our own.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(source) as opened:
                return _checked(opened, where, max_pixels, min_side)
    except BadImage:
        raise
    except Image.DecompressionBombError:
        most = min(max_pixels, 2 * Image.MAX_IMAGE_PIXELS)
        raise BadImage(f"{where}: more pixels than {most:,}, the most that are read") from None
    except UnidentifiedImageError:
        raise BadImage(f"{where}: no picture in a format that Pillow reads") from None
    except Exception as error:  # of broken files Pillow's decoders raise whatever they stumble over
        raise BadImage(f"{where}: cannot be read: {_first_line(error)}") from None


def _source(value: Any, origin: str, folder: Path | None) -> tuple[Any, str]:
    """Return what Pillow opens, and the name that errors give it."""
    if isinstance(value, Mapping):
        if isinstance(value.get("bytes"), (bytes, bytearray)):
            return io.BytesIO(value["bytes"]), _shown(value.get("path") or "in bytes")
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, (bytes, bytearray)):
        return io.BytesIO(value), f"of {len(value):,} bytes"
    if isinstance(value, str) and value.startswith("data:"):
        try:
            return io.BytesIO(base64.b64decode(value.partition(",")[2], validate=True)), "in a data: address"
        except (binascii.Error, ValueError):
            raise BadImage(f"{origin}: picture in a data: address: not base64") from None
    if isinstance(value, str) and "://" in value:
        advice = "nothing is downloaded here; save it as a file and name its path"
        raise BadImage(f"{origin}: picture {_shown(value)}: {advice}")
    if not isinstance(value, (str, Path)) or not str(value):
        raise BadImage(f"{origin}: a picture must be a path, bytes or a PIL image, got {str(value)[:60]!r}")
    path = Path(folder or "", value)
    # What is no name, such as base64 without `data:`, the system may refuse to look for.
    with suppress(OSError):
        if path.is_file():
            return path, _shown(path)
    raise BadImage(f"{origin}: picture {_shown(path)}: no such file")


def _shown(name: str | Path) -> str:
    """Return a name as a line of an error holds it."""
    name = " ".join(str(name).split())
    return name if len(name) <= MOST_SHOWN else f"{name[:MOST_SHOWN]}..."


def _checked(image: "Image", where: str, max_pixels: int, min_side: int) -> "Image":
    width, height = image.size
    if width * height > max_pixels:
        raise BadImage(f"{where}: {width} x {height} pixels; at most {max_pixels:,} are read")
    if min(width, height) < min_side:
        raise BadImage(f"{where}: {width} x {height} pixels; each side must have at least {min_side}")
    return to_rgb(image)


def image_key(value: Any) -> str:
    """Return what is equal for equal pictures, as rows hold them: the path, or a hash of the bytes."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if hasattr(value, "tobytes"):
        value = value.tobytes()
    return hashlib.sha256(value).hexdigest() if isinstance(value, (bytes, bytearray)) else str(value)


def to_rgb(image: "Image") -> "Image":
    """Return a copy in RGB, upright, of its first frame; what is transparent lies on white."""
    import numpy
    from PIL import Image

    if image.tell():
        image.seek(0)
    image.load()
    image = _upright(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow would cut 16 bits off at 255; some formats have them in 32, and others no more than 8 of them.
        values = numpy.asarray(image)
        values = values >> 8 if values.max(initial=0) > 255 else values
        image = Image.fromarray(values.clip(0, 255).astype(numpy.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _upright(image: "Image") -> "Image":
    """Return a picture turned as its camera was held.

    Pillow's `exif_transpose` would write all other tags anew, and fail at the first that it cannot.
    """
    from PIL.Image import Transpose

    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # tags that cannot be read say nothing of the pixels
        turn = None
    return image if turn is None else image.transpose(Transpose[turn])


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


# ---- rows ----


def take_images(origin: str, row: Mapping[str, Any]) -> tuple[Row, list[Any]]:
    """Return a row without its pictures, with a mark at the place of each that its messages hold, and the pictures.

    Raises:
        InputError: when both a column and the messages bring pictures, or a part of a message is of another kind.
    """
    rest = {name: value for name, value in row.items() if name not in COLUMNS}
    images = [each for column in COLUMNS for each in _as_list(row.get(column)) if each is not None]
    inside: list[Any] = []
    for column in MESSAGES:
        if isinstance(rest.get(column), list):
            rest[column] = [_flat(origin, message, inside) for message in rest[column]]
    if images and any(each is not None for each in inside):
        raise InputError(f"{origin}: pictures in a column and in the messages: expected one of the two")
    return rest, images or [each for each in inside if each is not None]


def place_images(origin: str, row: Mapping[str, Any], count: int) -> Row:
    """Return a converted row whose messages have lists of parts, with `{"type": "image"}` at the places of pictures.

    Args:
        origin: the row, for errors.
        row: with `prompt` and perhaps `completion`, or `chosen` and `rejected` messages; `<image>` marks are places.
        count: how many pictures the row has. Without any place they come before the first question.

    Raises:
        InputError: when there are more or fewer pictures than places, or one is in an answer.
    """
    sides = [side for side in ("prompt", "completion") if side in row]
    places = sum(message["content"].count(MARK) for side in sides for message in row[side])
    if places and places != count:
        raise InputError(f"{origin}: {counted(count, 'picture')} and {counted(places, 'place')} ({MARK}) for them")
    if any(MARK in message["content"] for side in sides for message in row[side] if message["role"] == "assistant"):
        raise InputError(f"{origin}: a place ({MARK}) in what the assistant says: pictures are shown by the user")
    answers = [side for side in ("chosen", "rejected") if side in row]
    if any(MARK in message["content"] for side in answers for message in row[side]):
        raise InputError(f"{origin}: a place ({MARK}) in an answer: pictures are shown in the prompt")
    placed, first = dict(row), not places
    for side in (*sides, *answers):
        placed[side] = []
        for message in row[side]:
            parts = _split(message["content"])
            if first and message["role"] == "user":
                parts, first = [*({"type": "image"} for _ in range(count)), *parts], False
            placed[side].append({**message, "content": parts})
    if first and count:
        raise InputError(f"{origin}: {counted(count, 'picture')}, and no turn of the user to show them in")
    return placed


def to_pictures(
    mapper: Callable[[str, Row], Row],
    folder: Path | None = None,
    max_pixels: int = MAX_PIXELS,
    needs_images: bool = True,
) -> Callable[[str, Row], Row]:
    """Return a conversion of rows with pictures: `mapper`'s, with parts as content and the pictures in `images`.

    Pictures are decoded once, so that bad ones are named before anything is trained; `images` keeps their paths or
    bytes, with the folder in paths.

    Args:
        mapper: converts a row of text, such as `formats.to_sft`.
        folder: what paths are relative to.
        max_pixels: of a picture at most.
        needs_images: whether a row without pictures is refused.
    """

    def convert(origin: str, row: Row) -> Row:
        rest, images = take_images(origin, row)
        if needs_images and not images:
            raise BadRow(f"{origin}: no picture; expected a column image or images", "without a picture")
        converted = place_images(origin, mapper(origin, rest), len(images))
        for each in images:
            read_image(each, origin, folder, max_pixels)
        return {**converted, "images": [found_in(folder, each) for each in images]}

    return convert


def to_picture_prompts(mapper: Callable[[str, Row], Row], folder: Path | None = None) -> Callable[[str, Row], Row]:
    """Return a conversion of prompts of which some have pictures: `mapper`'s, as `to_pictures` gives them.

    A prompt with pictures is a conversation whose messages have parts, with the pictures in `images`; a column `image`
    stays, for reward functions. Nothing is decoded: who reads the prompts does. A row without pictures is converted by
    `mapper` alone.

    Args:
        mapper: converts a row of text, such as `formats.to_prompt`.
        folder: what paths are relative to.
    """

    def convert(origin: str, row: Row) -> Row:
        rest, images = take_images(origin, row)
        has_places = has_images({name: value for name, value in row.items() if name not in COLUMNS})
        if not images and not has_places:
            return mapper(origin, {**rest, **{name: row[name] for name in COLUMNS if name in row}})
        converted = mapper(origin, rest)
        converted["prompt"] = as_messages(converted["prompt"])
        placed = place_images(origin, {"prompt": converted["prompt"]}, len(images))
        kept = {"image": found_in(folder, row["image"])} if row.get("image") is not None else {}
        return {**converted, **placed, **kept, "images": [found_in(folder, each) for each in images]}

    return convert


def flaw_of_pictures(row: Row) -> str | None:
    """Return why a row with parts cannot be learned from, as `rows.flaw_of` does for texts, or `None`."""
    sides = ("prompt", "completion", "chosen", "rejected")
    return flaw_of({side: [_as_text(message) for message in row[side]] for side in sides if side in row})


def text_of(message: Message) -> str:
    """Return the text of a message with parts; pictures are left out."""
    return content_text(message["content"], "")


def _as_text(message: Message) -> Message:
    """Return a message with a text in which pictures count as something said."""
    parts = [MARK if part["type"] == "image" else part["text"] for part in message["content"]]
    return {**message, "content": "".join(parts)}


def found_in(folder: Path | None, value: Any) -> Any:
    """Return a picture, or a list of them, as it can be read without knowing the folder that paths are relative to."""
    if isinstance(value, (list, tuple)):
        return [found_in(folder, each) for each in value]
    if isinstance(value, Mapping) and value.get("bytes") is None:
        value = value.get("path")
    is_path = isinstance(value, (str, Path)) and str(value) and "://" not in str(value)
    return str(Path(folder or "", value)) if is_path and not str(value).startswith("data:") else value


def _as_list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]


def _parts(messages: Any) -> list[Any]:
    """Return all parts of the contents of messages, if these are messages."""
    contents = [message.get("content") for message in messages or () if isinstance(message, Mapping)]
    return [part for content in contents if isinstance(content, (list, tuple)) for part in content]


def _is_picture(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in ("image", "image_url")


def _flat(origin: str, message: Any, images: list[Any]) -> Any:
    """Return a message whose content is text, with marks; `images` gets its pictures, None for a place alone."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, (list, tuple)):
        return message
    text = ""
    for part in content:
        if _is_picture(part):
            given = [part.get(name) for name in ("image", "image_url", "url", "path")]
            found = next((each for each in given if each is not None), None)
            images.append(found.get("url") if isinstance(found, Mapping) and "url" in found else found)
            text += MARK
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            text += part["text"]
        else:
            raise InputError(f"{origin}: a part of a message must be a text or an image, got {str(part)[:80]!r}")
    return {**message, "content": text}


def _split(text: str) -> list[Message]:
    """Return the parts of a text with marks; a line break after a mark, as LLaVA writes it, goes with the mark."""
    texts = text.split(MARK)
    parts: list[Message] = [{"type": "text", "text": texts[0]}] if texts[0] or len(texts) == 1 else []
    for after in texts[1:]:
        parts.append({"type": "image"})
        if after := after.removeprefix("\n"):
            parts.append({"type": "text", "text": after})
    return parts


def counted(count: int, what: str) -> str:
    """Return a number with its noun, such as `1 picture` and `2 pictures`."""
    return f"{count} {what}{'' if count == 1 else 's'}"
