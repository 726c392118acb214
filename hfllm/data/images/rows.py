"""Images of a dataset's rows: put at their positions in a conversation, named by files, and in batches.

A row has a column `image` or `images`, or parts `{"type": "image", "image": ...}` in the content of its messages. An
image is a path (relative to the dataset's folder), bytes, a PIL image, or the form of datasets' Image feature,
`{"bytes": ..., "path": ...}`. There must be as many `<image>` marks and such parts as images; without any, the images
come before the first question, as in TRL.
"""

import hashlib
import io
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hfllm.data.formats import (
    ANSWERED,
    LABELED,
    BadRow,
    Message,
    as_messages,
    content_text,
    counted,
    flaw_of,
    learned_turns,
    role_of,
    spells,
)
from hfllm.data.images.files import MAX_PIXELS, BadImage, image_key, path_of, read_image, to_rgb
from hfllm.data.receipt import noting_as
from hfllm.data.row_limits import MAX_ROW_BYTES
from hfllm.data.sources import EMBEDDED, HubPart, folder_of, iterate_source, renamed, source_files
from hfllm.errors import InputError, refuse_if
from hfllm.flags import Fact, flag

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image
    from transformers import ProcessorMixin


# ---- pictures of a row ----


Row = dict[str, Any]
Converted = TypeVar("Converted")
# Mark of an image in a text, as LLaVA's datasets write it.
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
    """Return whether a row has images, in a column or in its messages."""
    return bool(_in_columns(row)) or any(_is_picture(part) for column in MESSAGES for part in _parts(row.get(column)))


def refuse_images(origin: str, row: Mapping[str, Any], model: str) -> None:
    """Refuse a row with images for a text-only model."""
    if has_images(row):
        raise InputError(
            f"{origin}: the row has pictures, and {model} reads text alone: leave their column out; hfllm vision, "
            "sft, reward, evaluate and rlhf take such rows for a model that sees"
        )


def without_images(mapper: Callable[[str, Row], Converted], model: str) -> Callable[[str, Row], Converted]:
    """Return a conversion of text rows that refuses rows with images; `model` names the text-only model."""

    def convert(origin: str, row: Row) -> Converted:
        refuse_images(origin, row, model)
        return mapper(origin, row)

    return convert


def take_images(origin: str, row: Mapping[str, Any], columns: Sequence[str] = MESSAGES) -> tuple[Row, list[Any]]:
    """Return a row without its images, with a mark at the position of each one in its messages, and the images.

    Where `chosen` and `rejected` are whole conversations, their images are the same and count once.

    Args:
        origin: the row, for errors.
        row: its columns.
        columns: columns to search for messages; all others stay as they are.

    Raises:
        InputError: when both a column and the messages have images, a part of a message is of another kind, or
            compared conversations show different images.
    """
    rest = noting_as(row, {name: value for name, value in row.items() if name not in COLUMNS})
    images, inside = _in_columns(row), {}
    for column in columns:
        messages, inside[column] = dict.get(rest, column), []
        if isinstance(messages, list):
            rest[column] = [_flat(origin, message, inside[column]) for message in messages]
        elif isinstance(messages, Mapping):
            rest[column] = _flat(origin, messages, inside[column])
    inline_images = _shown_once(origin, rest, inside)
    if images and any(each is not None for each in inline_images):
        raise InputError(f"{origin}: pictures in a column and in the messages: expected one of the two")
    return rest, images or [each for each in inline_images if each is not None]


def _shown_once(origin: str, row: Row, inside: Mapping[str, list[Any]]) -> list[Any]:
    """Return the images in a row's messages, by column; of compared conversations the images of one."""
    sides = ("chosen", "rejected")
    if not any(_begins_with_a_question(row.get(side)) for side in sides if side in inside):
        return [each for images in inside.values() for each in images]
    # They repeat the prompt, so that a column with it has the same images.
    keys = {
        tuple(each if each is None else image_key(each) for each in images)
        for column, images in inside.items()
        if images or column in sides
    }
    if len(keys) > 1:
        raise InputError(
            f"{origin}: chosen and rejected are conversations that show different pictures: they must begin with the "
            "same prompt, and its pictures"
        )
    return inside["chosen"]


def _begins_with_a_question(messages: Any) -> bool:
    first = messages[0] if isinstance(messages, list) and messages and isinstance(messages[0], Mapping) else {}
    return role_of(first) in ("system", "user")


def place_images(origin: str, row: Mapping[str, Any], count: int) -> Row:
    """Return a converted row whose messages have lists of parts, with `{"type": "image"}` at the positions of images.

    Args:
        origin: the row, for errors.
        row: with `prompt` and perhaps `completion`, or `chosen` and `rejected` messages; `<image>` marks are the
            positions.
        count: how many images the row has. Without any position they come before the first question.

    Raises:
        InputError: when there are more or fewer images than positions, or one is in an answer.
    """
    sides = [side for side in ("prompt", "completion") if side in row]
    indices = sum(message["content"].count(MARK) for side in sides for message in row[side])
    answers = [side for side in ("chosen", "rejected") if side in row]
    if any(MARK in message["content"] for side in answers for message in row[side]):
        raise InputError(f"{origin}: a place ({MARK}) in an answer: pictures are shown in the prompt")
    if indices and indices != count:
        raise InputError(f"{origin}: {counted(count, 'picture')} and {counted(indices, 'place')} ({MARK}) for them")
    if any(MARK in message["content"] for side in sides for message in row[side] if message["role"] == "assistant"):
        raise InputError(f"{origin}: a place ({MARK}) in what the assistant says: pictures are shown by the user")
    placed, first = dict(row), not indices
    for side in (*sides, *answers):
        placed[side] = []
        for message in row[side]:
            parts = _split(message["content"])
            if first and message["role"] == "user":
                parts, first = [*({"type": "image"} for _ in range(count)), *parts], False
            placed[side].append({**message, "content": parts})
    refuse_if(first and count, f"{origin}: {counted(count, 'picture')}, and no turn of the user to show them in")
    return placed


def to_pictures(
    mapper: Callable[[str, Row], Row],
    folder: Path | None = None,
    max_pixels: int = MAX_PIXELS,
    needs_images: bool = True,
) -> Callable[[str, Row], Row]:
    """Return a conversion of rows with images: `mapper`'s, with parts as content and the images in `images`.

    Images are decoded once, so that bad ones are named before any training; `images` keeps their paths or bytes,
    with the folder in paths.

    Args:
        mapper: converts a row of text, such as `formats.to_sft`.
        folder: the dataset's own, see `check_paths`.
        max_pixels: of an image at most.
        needs_images: whether a row without images is refused.
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
    """Return a conversion of prompts, some of them with images: `mapper`'s, as `to_pictures` gives them.

    A prompt with images is a conversation whose messages have parts, with the images in `images`; a column `image`
    stays, for reward functions. Nothing is decoded: the reader of the prompts does this. A row without images is
    converted only by `mapper`. Only the columns of a prompt are looked at: others are for reward functions.

    Args:
        mapper: converts a row of text, such as `formats.to_prompt`.
        folder: the dataset's own, see `check_paths`.
    """

    def convert(origin: str, row: Row) -> Row:
        columns = _of_prompt(row)
        rest, images = take_images(origin, row, columns)
        has_places = any(_is_picture(part) for column in columns for part in _parts(row.get(column)))
        if not images and not has_places:
            return mapper(origin, noting_as(row, {**rest, **{name: row[name] for name in COLUMNS if name in row}}))
        check_paths(origin, row, images, folder)
        converted = mapper(origin, rest)
        converted["prompt"] = as_messages(converted["prompt"])
        placed = place_images(origin, {"prompt": converted["prompt"]}, len(images))
        image_column = {"image": found_in(folder, row["image"])} if row.get("image") is not None else {}
        return {**converted, **placed, **image_column, "images": [found_in(folder, each) for each in images]}

    return convert


def _of_prompt(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the columns of messages for `formats.to_prompt`: one, or none."""
    if "prompt" in row or "instruction" in row:
        return ("prompt",) if "prompt" in row else ("instruction",)
    return next(((column,) for column in ("messages", "conversations") if column in row), ())


def flaw_of_pictures(row: Row) -> str | None:
    """Return why a row with parts cannot be learned from, as `hfllm.data.formats.flaw_of` for texts, or `None`."""
    sides = ("prompt", "completion", "chosen", "rejected")
    # An image counts as something said.
    texts = {
        side: [{**message, "content": content_text(message["content"], MARK)} for message in row[side]]
        for side in sides
        if side in row
    }
    return flaw_of(texts)


def text_of(message: Message) -> str:
    """Return the text of a message with parts; images are left out."""
    return content_text(message["content"], "")


def check_paths(origin: str, row: Mapping[str, Any], images: Sequence[Any], folder: Path | None) -> None:
    """Refuse images of a row that lie outside of its dataset: a run may publish its shown images.

    Args:
        origin: the row, for errors.
        row: its columns.
        images: its images, from `take_images`.
        folder: the dataset's own, to which paths are relative; `None` for one of the Hub: its rows name no file here.

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
    """Return whether a column's value is an image, or holds it at any depth."""
    if value is image:
        return True
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return any(_holds(part, image) for part in parts)


def _is_inside(folder: Path, path: str) -> bool:
    try:
        own, result = folder.resolve(), Path(folder, path).resolve()
        stored = (each.parent / "blobs" for each in own.parents if each.name == "snapshots")
        # In the Hub's cache the files of a snapshot are links to where their dataset is stored.
        is_stored = any(each.parent.name.startswith("datasets--") and result.is_relative_to(each) for each in stored)
        return is_stored or result.is_relative_to(own)
    except (OSError, RuntimeError, ValueError):
        # A circle of links, or no name for a file: reading it says so.
        return True


def found_in(folder: Path | None, value: Any) -> Any:
    """Return an image, or a list of them, in a form that can be read without the folder of relative paths."""
    if isinstance(value, (list, tuple)):
        return [found_in(folder, each) for each in value]
    if (path := path_of(value)) is not None:
        return str(Path(folder or "", path))
    return value.get("path") if isinstance(value, Mapping) and value.get("bytes") is None else value


def _in_columns(row: Mapping[str, Any]) -> list[Any]:
    """Return the images in a row's columns; a row of text in a table of images has an empty list or nothing."""
    columns = [row.get(column) for column in COLUMNS]
    values = (each for column in columns for each in (column if isinstance(column, (list, tuple)) else [column]))
    return [each for each in map(_image_or_none, values) if each is not None]


def _image_or_none(value: Any) -> Any:
    """Return an image, `None` for the value of a table without one."""
    is_empty = isinstance(value, Mapping) and value and all(each is None for each in value.values())
    return None if is_empty else value


def _parts(messages: Any) -> list[Any]:
    """Return all parts of the contents of messages, if these are messages."""
    messages = [messages] if isinstance(messages, Mapping) else messages if isinstance(messages, (list, tuple)) else ()
    contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
    return [part for content in contents if isinstance(content, (list, tuple)) for part in content]


def _is_picture(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in ("image", "image_url")


def _flat(origin: str, message: Any, images: list[Any]) -> Any:
    """Return a message whose content is text, with marks; `images` gets its images, None for a mere position."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, (list, tuple)):
        return message
    if role_of(message) == "tool" and not any(map(_is_picture, content)):
        # A tool's result may be a list of anything, which `read_messages` reads.
        return message
    text = ""
    for part in content:
        if _is_picture(part):
            candidates = [_image_or_none(part.get(name)) for name in ("image", "image_url", "url", "path")]
            result = next((each for each in candidates if each is not None), None)
            images.append(result.get("url") if isinstance(result, Mapping) and "url" in result else result)
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


# ---- the user's pictures ----
#
# The user's rows with images: their flags, refused cases, and the form for learning.


Rows = list[dict[str, Any]]
Convert = Callable[[str, Row], Row]
# Endings of a `file_name` of an image.
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


# Known once the rows are read.
NO_PICTURES = Fact(lambda flags: flags.shows is False, "no row has a picture")
SHOWS = Fact(lambda flags: flags.shows, "the rows have pictures")
SEES = Fact(lambda flags: flags.sees, "the model sees: its processor has one")


@dataclass(frozen=True)
class ImageReading:
    """How the images of a dataset's rows are read.

    Args:
        max_pixels: width times height of an image at most.
        bad_images: what happens to rows with an unreadable image: refuse or drop.
        tokens: the processor's tokens at an image's position; rows whose words spell one are left out.
    """

    max_pixels: int = MAX_PIXELS
    bad_images: str = "refuse"
    tokens: Sequence[str] = ()


@dataclass(frozen=True)
class PictureArguments:
    """Which pictures are read."""

    bad_images: str = flag(
        "refuse",
        "What happens to rows with a picture that cannot be read: refuse (name the first and stop) or "
        "drop (and count).",
        choices=["refuse", "drop"],
        never=NO_PICTURES,
    )
    max_pixels: int = flag(MAX_PIXELS, "Width times height of a picture at most.", never=NO_PICTURES)

    def image_reading(self, tokens: Sequence[str] = ()) -> ImageReading:
        """Return how these pictures are read, for a processor with these tokens."""
        return ImageReading(self.max_pixels, self.bad_images, tokens)


BELOW_AN_ADAPTER = Fact(
    lambda flags: flags.use_peft, "with --use_peft all weights are frozen, and --lora_target_modules get adapters"
)


@dataclass(frozen=True)
class FreezingArguments:
    """Which parts of a vision-language model learn."""

    freeze_vision: bool = flag(
        False, "Leave the tower of your model as it is; the projector learns.", never=(NO_PICTURES, BELOW_AN_ADAPTER)
    )
    freeze_text: bool = flag(
        False,
        "Leave the decoder of your model as it is; with --freeze_vision the projector learns alone.",
        never=(NO_PICTURES, BELOW_AN_ADAPTER),
    )


WORDS_FOR_A_PICTURE = "with words for a picture"
FREEZING, OF_PICTURES = ("freeze_vision", "freeze_text"), ("bad_images", "max_pixels")


# ---- reading ----


def picture_mapper(dataset_name: str, reading: ImageReading, convert: Convert, stage: str) -> Convert:
    """Return the conversion of a dataset's rows with images.

    Args:
        dataset_name: the dataset whose folder image paths are relative to.
        reading: with the treatment of bad images.
        convert: converts a row of text, such as `formats.to_sft`.
        stage: the command, for complaints.
    """
    read = to_pictures(convert, folder_of(dataset_name), reading.max_pixels)

    def mapper(origin: str, row: Row) -> Row:
        try:
            converted = read(origin, with_named_file(row))
        except BadImage as error:
            if reading.bad_images == "drop":
                raise
            raise InputError(f"{error}; --bad_images drop leaves such rows out") from None
        refuse_tools(origin, converted, stage)
        refuse_token(origin, converted, reading.tokens)
        return converted

    return mapper


def with_named_file(row: Row) -> Row:
    """Return a row of `metadata.jsonl` in the form of the Hub's image folders, with `file_name` as its image."""
    name = dict.get(row, "file_name")
    if has_images(row) or not isinstance(name, str) or Path(name).suffix.lower() not in PICTURE_SUFFIXES:
        return row
    return noting_as(row, {**{column: value for column, value in row.items() if column != "file_name"}, "image": name})


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [message for side in ("prompt", "completion", "chosen", "rejected") for message in row.get(side, ())]


def refuse_tools(origin: str, row: Mapping[str, Any], stage: str) -> None:
    """Refuse a row with both tools and images."""
    if row.get("tools") or any("tool_calls" in each or each["role"] == "tool" for each in _messages(row)):
        raise InputError(f"{origin}: the row has tools, of which {stage} teaches nothing: leave them out")


def refuse_token(origin: str, row: Mapping[str, Any], tokens: Sequence[str]) -> None:
    """Refuse a converted row whose words spell a token of an image's position: no image would belong to it.

    Args:
        tokens: see `words_of_places`.

    Raises:
        BadRow: naming the row.
    """
    contents = [_messages(row), row.get("tools")]
    for token in tokens:
        if spells([token], contents):
            raise BadRow(f"{origin}: the words spell {token!r}, which stands for a picture", WORDS_FOR_A_PICTURE)


def words_or_pictures(pictures: Convert, words: Convert, tokens: Sequence[str]) -> Convert:
    """Return the conversion of rows, some of them with images, for a vision-language model.

    Args:
        pictures: converts a row with images: see `picture_mapper`.
        words: converts a row of text.
        tokens: see `ImageReading`; rows of text that spell one are left out, too.
    """

    def mapper(origin: str, row: Row) -> Row:
        if has_images(with_named_file(row)):
            return pictures(origin, row)
        converted = words(origin, row)
        refuse_token(origin, converted, tokens)
        return converted

    return mapper


# ---- learning ----


def by_turns(row: Mapping[str, Any]) -> Rows:
    """Return a row for each learned answer of a conversation, with everything said and shown before it as the prompt.

    TRL learns all of a completion, so that with several turns in it a model would also learn to ask.
    """
    rows: Rows = []
    for index in learned_turns(row["completion"]):
        message = row["completion"][index]
        prompt = [*row["prompt"], *row["completion"][:index]]
        num_images = sum(part["type"] == "image" for each in prompt for part in each["content"])
        rows.append({**row, "prompt": prompt, "completion": [message], "images": row["images"][:num_images]})
    return rows


def png_of(picture: "Image") -> bytes:
    """Return an image as the bytes of a PNG file, which changes no pixel."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def as_dataset(rows: Rows, max_pixels: int, columns: tuple[str, ...] = ("prompt", "completion")) -> "Dataset":
    """Return rows as a dataset that decodes their images, in RGB, when a batch needs them.

    Args:
        rows: with `images`, which may be empty.
        max_pixels: of an image at most.
        columns: other columns to keep.
    """
    from datasets import Dataset

    def stored(value: Any) -> dict[str, Any]:
        if isinstance(value, Mapping):
            return {"bytes": value.get("bytes"), "path": value.get("path")}
        if isinstance(value, (str, Path)):
            return {"bytes": None, "path": str(value)}
        return {"bytes": value if isinstance(value, bytes) else png_of(to_rgb(value)), "path": None}

    def decode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        opened = [[read_image(each, "a row", max_pixels=max_pixels) for each in row] for row in batch["images"]]
        return {**batch, "images": opened}

    records = [
        {**{name: row[name] for name in columns}, "images": [stored(each) for each in row["images"]]} for row in rows
    ]
    return Dataset.from_list(records).with_transform(decode)


# ---- picture batches ----
#
# Conversations with images as a batch of tensors, by a model's processor.


def conversation_batch(
    processor: "ProcessorMixin",
    conversations: Sequence[list[dict[str, Any]]],
    images: Sequence[Sequence["Image"]],
    padding_side: str = "right",
    add_generation_prompt: bool = False,
) -> Mapping[str, Any]:
    """Return a model's inputs for conversations with images.

    Args:
        conversations: messages with parts; `{"type": "image"}` without an image stands for the next of its images.
        images: of each conversation, in their order.
        padding_side: the side where shorter ones are padded.
        add_generation_prompt: whether to begin the assistant's turn.
    """
    filled = [_filled(conversation, pictures) for conversation, pictures in zip(conversations, images, strict=True)]
    with padding_on(padding_side, processor.tokenizer):
        return processor.apply_chat_template(
            filled,
            tokenize=True,
            add_generation_prompt=add_generation_prompt,
            return_dict=True,
            processor_kwargs={"padding": True, "return_tensors": "pt"},
        )


def _filled(conversation: Sequence[Mapping[str, Any]], pictures: Sequence["Image"]) -> list[dict[str, Any]]:
    left = iter(pictures)

    def put(part: Mapping[str, Any]) -> Mapping[str, Any]:
        if part["type"] != "image":
            return {"type": part["type"], "text": part["text"]}
        return part if part.get("image") is not None else {"type": "image", "image": next(left)}

    def parts(content: str | Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        return [{"type": "text", "text": content}] if isinstance(content, str) else [put(part) for part in content]

    return [{**message, "content": parts(message["content"])} for message in conversation]


@contextmanager
def padding_on(side: str, tokenizer: Any) -> Iterator[None]:
    """Context manager in which a tokenizer pads on a side, such as the left, which generation needs."""
    before = tokenizer.padding_side
    tokenizer.padding_side = side
    try:
        yield
    finally:
        tokenizer.padding_side = before


def words_of_places(processor: object) -> tuple[str, ...]:
    """Return the texts of the image tokens, which the words of a row must not spell.

    Some processors replace a token by another one at its position: Gemma 3 writes `<image_soft_token>` for each
    `<start_of_image>`, and image features replace it.

    Args:
        processor: a tokenizer, or anything without support for images, has none.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    number = getattr(processor, "image_token_id", None)
    result = [getattr(processor, "image_token", None), getattr(tokenizer, "image_token", None)]
    if tokenizer is not None and isinstance(number, int):
        result.append(tokenizer.convert_ids_to_tokens(number))
    # An AddedToken in some.
    return tuple(dict.fromkeys(str(each) for each in result if each and str(each)))


# ---- named pictures ----
#
# The image files named by path in a dataset's rows: their list, and whether one was replaced since.


# Bytes read at both ends of a file when it is not read whole.
END = 1 << 16


def named_pictures(
    name: str | None,
    column_mapping: Sequence[str] | None = None,
    most: int | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
) -> dict[str, Path]:
    """Return the image files named by path in the rows of a local dataset, by these names; they need not exist.

    Unreadable rows are skipped: the code that learns from them reports the error. No image is read.

    Args:
        name: of the dataset; one on the Hub has no files of its own here, and neither have the embedded ones.
        column_mapping: see `DataArguments.renaming`.
        most: the number of rows to look at, from the first.
        max_row_bytes: see `HubPart`; as in the run, or the rows after a longer one would not be found.
    """
    result: dict[str, Path] = {}
    try:
        if not name or name in EMBEDDED or source_files(name) is None:
            return result
        renaming = {ours: theirs for ours, _, theirs in (entry.partition("=") for entry in column_mapping or ())}
        for origin, row in islice(iterate_source(name, HubPart(max_row_bytes=max_row_bytes)), most):
            for value in _pictures(origin, row, renaming):
                if (path := path_of(value)) is not None and path not in result:
                    result[path] = Path(folder_of(name) or "", path)
    except InputError:
        pass
    return result


def _pictures(origin: str, row: dict[str, Any], renaming: dict[str, str]) -> Iterator[Any]:
    try:
        yield from take_images(origin, renamed(origin, row, renaming))[1]
    except InputError:
        return


def existing(files: dict[str, Path]) -> dict[str, Path]:
    """Return the names of existing files, not of folders or pipes."""
    return {name: path for name, path in files.items() if (result := _stat(path)) and stat.S_ISREG(result.st_mode)}


def contents_of(files: dict[str, Path]) -> str:
    """Return a hash of files' names and contents; of a file above 128 KiB of its size, its time and both its ends.

    Reading all bytes of all images of a large dataset would take hours, in every process. For unreadable files only
    the name counts.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, path in sorted(files.items()):
        digest.update(f"{name}\0".encode(errors="surrogatepass"))
        with suppress(OSError), path.open("rb") as stream:
            result = os.fstat(stream.fileno())
            if result.st_size <= 2 * END:
                content = stream.read(2 * END)
            else:
                beginning = stream.read(END)
                stream.seek(-END, os.SEEK_END)
                content = f"{result.st_mtime_ns}\0".encode() + beginning + stream.read(END)
            digest.update(f"{result.st_size}\0".encode() + content)
    return digest.hexdigest()


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (OSError, ValueError):
        # Not there, or no name that the system looks for.
        return None


def written_when(files: dict[str, Path]) -> str:
    """Return how many files there are, with a hash of their names, sizes and times; none is read."""
    digest = hashlib.blake2b(digest_size=8)
    for name, path in sorted(files.items()):
        result = _stat(path)
        metadata = "missing" if result is None else f"{result.st_size} {result.st_mtime_ns}"
        digest.update(f"{name}\0{metadata}\0".encode(errors="replace"))
    return f"{len(files)} files, {digest.hexdigest()}"
