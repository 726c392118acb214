"""Pictures of a dataset's rows, put at their places in a conversation; `image_files` reads them.

A row has a column `image` or `images`, or parts `{"type": "image", "image": ...}` in the content of its messages. A
picture is a path (relative to the dataset's folder), bytes, a PIL image, or what datasets keeps of its Image feature,
`{"bytes": ..., "path": ...}`. Of `<image>` marks and such parts there must be as many as pictures; where there are
none, the pictures come before the first question, as in TRL.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from hfllm.data.formats import ANSWERED, LABELED, as_messages
from hfllm.data.image_files import MAX_PIXELS, image_key, path_of, read_image
from hfllm.data.rows import BadRow, Message, content_text, flaw_of, role_of
from hfllm.errors import InputError

Row = dict[str, Any]
Converted = TypeVar("Converted")
# Where a picture stands in a text, as LLaVA's datasets write it.
MARK = "<image>"
COLUMNS = ("image", "images")
# Columns that may hold messages, in any format.
MESSAGES = tuple(
    dict.fromkeys(
        (
            *("messages", "conversations", "chosen", "rejected", "response_a", "response_b", "input"),
            *chain(*ANSWERED, *LABELED),
        )
    )
)


def has_images(row: Mapping[str, Any]) -> bool:
    """Return whether a row has pictures, in a column or in its messages."""
    return bool(_in_columns(row)) or any(_is_picture(part) for column in MESSAGES for part in _parts(row.get(column)))


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


def take_images(origin: str, row: Mapping[str, Any], columns: Sequence[str] = MESSAGES) -> tuple[Row, list[Any]]:
    """Return a row without its pictures, with a mark at the place of each that its messages hold, and the pictures.

    Where `chosen` and `rejected` are whole conversations, their pictures are the same and count once.

    Args:
        origin: the row, for errors.
        row: its columns.
        columns: those in which messages are looked for; all others stay as they are.

    Raises:
        InputError: when both a column and the messages bring pictures, a part of a message is of another kind, or
            conversations that are compared show different pictures.
    """
    rest = {name: value for name, value in row.items() if name not in COLUMNS}
    images, inside = _in_columns(row), {}
    for column in columns:
        said, inside[column] = rest.get(column), []
        if isinstance(said, list):
            rest[column] = [_flat(origin, message, inside[column]) for message in said]
        elif isinstance(said, Mapping):
            rest[column] = _flat(origin, said, inside[column])
    shown = _shown_once(origin, rest, inside)
    if images and any(each is not None for each in shown):
        raise InputError(f"{origin}: pictures in a column and in the messages: expected one of the two")
    return rest, images or [each for each in shown if each is not None]


def _shown_once(origin: str, row: Row, inside: Mapping[str, list[Any]]) -> list[Any]:
    """Return the pictures in a row's messages, by column; of conversations that are compared those of one."""
    sides = ("chosen", "rejected")
    if not any(_begins_with_a_question(row.get(side)) for side in sides if side in inside):
        return [each for shown in inside.values() for each in shown]
    # They repeat the prompt, so that a column with it has the same pictures.
    keys = {
        tuple(each if each is None else image_key(each) for each in shown)
        for column, shown in inside.items()
        if shown or column in sides
    }
    if len(keys) > 1:
        raise InputError(
            f"{origin}: chosen and rejected are conversations that show different pictures: they must begin with the "
            "same prompt, and its pictures"
        )
    return inside["chosen"]


def _begins_with_a_question(said: Any) -> bool:
    first = said[0] if isinstance(said, list) and said and isinstance(said[0], Mapping) else {}
    return role_of(first) in ("system", "user")


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
    answers = [side for side in ("chosen", "rejected") if side in row]
    if any(MARK in message["content"] for side in answers for message in row[side]):
        raise InputError(f"{origin}: a place ({MARK}) in an answer: pictures are shown in the prompt")
    if places and places != count:
        raise InputError(f"{origin}: {counted(count, 'picture')} and {counted(places, 'place')} ({MARK}) for them")
    if any(MARK in message["content"] for side in sides for message in row[side] if message["role"] == "assistant"):
        raise InputError(f"{origin}: a place ({MARK}) in what the assistant says: pictures are shown by the user")
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
        folder: the dataset's own, see `check_paths`.
        max_pixels: of a picture at most.
        needs_images: whether a row without pictures is refused.
    """

    def convert(origin: str, row: Row) -> Row:
        rest, images = take_images(origin, row)
        if needs_images and not images:
            raise BadRow(f"{origin}: no picture; expected a column image or images", "without a picture")
        converted = place_images(origin, mapper(origin, rest), len(images))
        check_paths(origin, row, images, folder)
        for each in images:
            read_image(each, origin, folder, max_pixels)
        return {**converted, "images": [found_in(folder, each) for each in images]}

    return convert


def to_picture_prompts(mapper: Callable[[str, Row], Row], folder: Path | None = None) -> Callable[[str, Row], Row]:
    """Return a conversion of prompts of which some have pictures: `mapper`'s, as `to_pictures` gives them.

    A prompt with pictures is a conversation whose messages have parts, with the pictures in `images`; a column `image`
    stays, for reward functions. Nothing is decoded: who reads the prompts does. A row without pictures is converted by
    `mapper` alone. Only the columns of a prompt are looked at: others are for reward functions.

    Args:
        mapper: converts a row of text, such as `formats.to_prompt`.
        folder: the dataset's own, see `check_paths`.
    """

    def convert(origin: str, row: Row) -> Row:
        columns = _of_prompt(row)
        rest, images = take_images(origin, row, columns)
        has_places = any(_is_picture(part) for column in columns for part in _parts(row.get(column)))
        if not images and not has_places:
            return mapper(origin, {**rest, **{name: row[name] for name in COLUMNS if name in row}})
        check_paths(origin, row, images, folder)
        converted = mapper(origin, rest)
        converted["prompt"] = as_messages(converted["prompt"])
        placed = place_images(origin, {"prompt": converted["prompt"]}, len(images))
        kept = {"image": found_in(folder, row["image"])} if row.get("image") is not None else {}
        return {**converted, **placed, **kept, "images": [found_in(folder, each) for each in images]}

    return convert


def _of_prompt(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the columns of messages that `formats.to_prompt` reads: one, or none."""
    if "prompt" in row or "instruction" in row:
        return ("prompt",) if "prompt" in row else ("instruction",)
    return next(((column,) for column in ("messages", "conversations") if column in row), ())


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


def check_paths(origin: str, row: Mapping[str, Any], images: Sequence[Any], folder: Path | None) -> None:
    """Refuse pictures of a row that lie outside of its dataset: what a run shows of them may be published.

    Args:
        origin: the row, for errors.
        row: its columns.
        images: its pictures, from `take_images`.
        folder: the dataset's own, which paths are relative to; `None` for one of the Hub: its rows name no file here.

    Raises:
        InputError: naming the row, the field and the path. It does not say whether there is such a file.
    """
    for each in images:
        path = path_of(each)
        if path is None:
            continue
        field = next((name for name, value in row.items() if _holds(value, each)), "image")
        if folder is None:
            raise InputError(
                f"{origin}: {field} names a file of this machine, {path!r:.200}: rows of a dataset on the Hub must "
                "hold their pictures themselves; download it with its pictures, and name its folder"
            )
        if not _is_inside(folder, path):
            raise InputError(
                f"{origin}: {field} names {path!r:.200}, which is not in the dataset's folder {folder} (links are "
                "followed): move the pictures there"
            )


def _holds(value: Any, image: Any) -> bool:
    """Return whether a column's value is a picture, or holds it at any depth."""
    if value is image:
        return True
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return any(_holds(part, image) for part in parts)


def _is_inside(folder: Path, path: str) -> bool:
    try:
        own, found = folder.resolve(), Path(folder, path).resolve()
        stored = (each.parent / "blobs" for each in own.parents if each.name == "snapshots")
        # In the Hub's cache the files of a snapshot are links to where their dataset is stored.
        is_stored = any(each.parent.name.startswith("datasets--") and found.is_relative_to(each) for each in stored)
        return is_stored or found.is_relative_to(own)
    except (OSError, RuntimeError, ValueError):
        # A circle of links, or no name for a file: reading it says so.
        return True


def found_in(folder: Path | None, value: Any) -> Any:
    """Return a picture, or a list of them, as it can be read without knowing the folder that paths are relative to."""
    if isinstance(value, (list, tuple)):
        return [found_in(folder, each) for each in value]
    if (path := path_of(value)) is not None:
        return str(Path(folder or "", path))
    return value.get("path") if isinstance(value, Mapping) and value.get("bytes") is None else value


def _in_columns(row: Mapping[str, Any]) -> list[Any]:
    """Return the pictures in a row's columns; a row of text in a table of pictures has an empty list or nothing."""
    found = (_given(each) for column in COLUMNS for each in _as_list(row.get(column)))
    return [each for each in found if each is not None]


def _given(value: Any) -> Any:
    """Return a picture, `None` for what a table has in place of one."""
    is_empty = isinstance(value, Mapping) and value and all(each is None for each in value.values())
    return None if is_empty else value


def _as_list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]


def _parts(messages: Any) -> list[Any]:
    """Return all parts of the contents of messages, if these are messages."""
    messages = [messages] if isinstance(messages, Mapping) else messages if isinstance(messages, (list, tuple)) else ()
    contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
    return [part for content in contents if isinstance(content, (list, tuple)) for part in content]


def _is_picture(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in ("image", "image_url")


def _flat(origin: str, message: Any, images: list[Any]) -> Any:
    """Return a message whose content is text, with marks; `images` gets its pictures, None for a place alone."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, (list, tuple)):
        return message
    if role_of(message) == "tool" and not any(map(_is_picture, content)):
        # What a tool returned may be a list of anything, which `read_messages` reads.
        return message
    text = ""
    for part in content:
        if _is_picture(part):
            given = [_given(part.get(name)) for name in ("image", "image_url", "url", "path")]
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
