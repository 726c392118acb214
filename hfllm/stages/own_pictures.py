"""Rows with pictures of the user's: their flags, what is refused of them, and the form in which they are learned."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.data.image_files import MAX_PIXELS, BadImage, read_image, to_rgb
from hfllm.data.images import Row, has_images, to_pictures
from hfllm.data.loading import DataArguments
from hfllm.data.row_limits import MAX_ROW_BYTES
from hfllm.data.rows import BadRow, spells
from hfllm.data.sources import folder_of
from hfllm.errors import InputError, refuse

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image
    from trl import ModelConfig

Rows = list[dict[str, Any]]
Convert = Callable[[str, Row], Row]
# Endings of a `file_name` that is a picture's.
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


@dataclass(frozen=True)
class PictureArguments:
    """Which pictures are read."""

    bad_images: str = field(
        default="refuse",
        metadata={
            "help": "What happens to rows with a picture that cannot be read: refuse (name the first and stop) or "
            "drop (and count).",
            "choices": ["refuse", "drop"],
        },
    )
    max_pixels: int = field(default=MAX_PIXELS, metadata={"help": "Width times height of a picture at most."})


@dataclass(frozen=True)
class FreezingArguments:
    """Which parts of a model that sees learn."""

    freeze_vision: bool = field(
        default=False, metadata={"help": "Leave the tower of your model as it is; the projector learns."}
    )
    freeze_text: bool = field(
        default=False,
        metadata={
            "help": "Leave the decoder of your model as it is; with --freeze_vision the projector learns alone."
        },
    )


WORDS_FOR_A_PICTURE = "with words for a picture"
FREEZING, OF_PICTURES = ("freeze_vision", "freeze_text"), ("bad_images", "max_pixels")


def given_flags(script_args: PictureArguments | FreezingArguments, names: tuple[str, ...]) -> list[str]:
    """Return those of the named flags that are not at their defaults."""
    return [name for name in names if getattr(script_args, name) != getattr(type(script_args), name)]


def check_freezing(script_args: FreezingArguments, model_args: "ModelConfig") -> None:
    """Refuse to freeze parts of a model whose weights are all frozen below an adapter.

    Raises:
        InputError: naming the flag.
    """
    for flag in FREEZING:
        is_both = model_args.use_peft and getattr(script_args, flag)
        refuse(is_both, f"--{flag}", "with --use_peft all weights are frozen, and --lora_target_modules get adapters")


def files_changed(
    script_args: DataArguments | PictureArguments, models: Sequence[str | None], revision: str = "main"
) -> dict[str, str]:
    """Return what tells whether files of pictures that local rows name were replaced, by flag, for `Stage`.

    Args:
        script_args: with `dataset_name`, and perhaps `eval_dataset_name`.
        models: those that would see them; where none sees, rows are not looked at.
        revision: of the models.
    """
    from transformers import AutoModelForImageTextToText

    from hfllm.data.named_pictures import contents_of, existing, named_pictures, written_when
    from hfllm.outputs.report import CHANGED, CONTENTS
    from hfllm.runs.identity import PICTURES_OF
    from hfllm.runs.models import load_config

    def sees(model: str) -> bool:
        try:
            return type(load_config(model, revision)) in AutoModelForImageTextToText._model_mapping
        except InputError:
            # Named where the model is needed.
            return False

    flags = ("dataset_name", "eval_dataset_name")
    sets = {flag: name for flag in flags if (name := getattr(script_args, flag, None)) and Path(name).exists()}
    if not sets or not any(sees(model) for model in models if model):
        return {}
    mapping, most = getattr(script_args, "column_mapping", None), getattr(script_args, "max_samples", None)
    limit = getattr(script_args, "max_row_bytes", MAX_ROW_BYTES)
    files = {
        flag: named_pictures(name, mapping, most if flag == flags[0] else None, limit) for flag, name in sets.items()
    }
    told = {}
    for flag, found in files.items():
        if found:
            told[f"{PICTURES_OF.format(flag)}{CHANGED}"] = written_when(found)
            told[f"{PICTURES_OF.format(flag)}{CONTENTS}"] = contents_of(existing(found))
    return told


# ---- reading ----


def picture_mapper(
    script_args: PictureArguments,
    dataset_name: str,
    convert: Convert,
    stage: str,
    tokens: Sequence[str] = (),
    needs_images: bool = True,
) -> Convert:
    """Return the conversion of a dataset's rows with pictures, which refuses bad ones as the flags say.

    Args:
        script_args: what happens to a picture that cannot be read.
        dataset_name: whose folder paths of pictures are relative to.
        convert: converts a row of text, such as `formats.to_sft`.
        stage: the command, for complaints.
        tokens: what the processor writes at a picture's place; rows whose words spell one are left out.
        needs_images: whether rows without pictures are left out.
    """
    read = to_pictures(convert, folder_of(dataset_name), script_args.max_pixels, needs_images)

    def mapper(origin: str, row: Row) -> Row:
        try:
            converted = read(origin, with_named_file(row))
        except BadImage as error:
            if script_args.bad_images == "drop":
                raise
            raise InputError(f"{error}; --bad_images drop leaves such rows out") from None
        refuse_tools(origin, converted, stage)
        refuse_token(origin, converted, tokens)
        return converted

    return mapper


def with_named_file(row: Row) -> Row:
    """Return a row of `metadata.jsonl` as the Hub's folders of images have it, whose `file_name` is its picture."""
    name = row.get("file_name")
    if has_images(row) or not isinstance(name, str) or Path(name).suffix.lower() not in PICTURE_SUFFIXES:
        return row
    return {**{column: value for column, value in row.items() if column != "file_name"}, "image": name}


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [message for side in ("prompt", "completion", "chosen", "rejected") for message in row.get(side, ())]


def refuse_tools(origin: str, row: Mapping[str, Any], stage: str) -> None:
    """Refuse a row with tools beside pictures.

    Raises:
        InputError: naming the row.
    """
    if row.get("tools") or any("tool_calls" in each or each["role"] == "tool" for each in _messages(row)):
        raise InputError(f"{origin}: the row has tools, of which {stage} teaches nothing: leave them out")


def refuse_token(origin: str, row: Mapping[str, Any], tokens: Sequence[str]) -> None:
    """Refuse a converted row whose words spell a token of a picture's place: no picture would belong to it.

    Args:
        tokens: see `words_of_places`.

    Raises:
        BadRow: naming the row.
    """
    said = [_messages(row), row.get("tools")]
    for token in tokens:
        if spells([token], said):
            raise BadRow(f"{origin}: the words spell {token!r}, which stands for a picture", WORDS_FOR_A_PICTURE)


def words_or_pictures(pictures: Convert, words: Convert, tokens: Sequence[str]) -> Convert:
    """Return the conversion of rows of which some have pictures, for a model that sees.

    Args:
        pictures: converts a row with pictures: see `picture_mapper`.
        words: converts a row of text.
        tokens: as in `picture_mapper`; rows of text that spell one are left out, too.
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
    """Return a row for each answer of a conversation, with what was said and shown before it as the prompt.

    TRL learns all of a completion, so that with several turns in it a model would learn to ask, too.
    """
    made: Rows = []
    for place, message in enumerate(row["completion"]):
        if message["role"] != "assistant":
            continue
        prompt = [*row["prompt"], *row["completion"][:place]]
        shown = sum(part["type"] == "image" for each in prompt for part in each["content"])
        made.append({**row, "prompt": prompt, "completion": [message], "images": row["images"][:shown]})
    return made


def png_of(picture: "Image") -> bytes:
    """Return a picture as the bytes of a PNG file, which change no pixel."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def as_dataset(rows: Rows, max_pixels: int, columns: tuple[str, ...] = ("prompt", "completion")) -> "Dataset":
    """Return rows as a dataset that decodes their pictures, in RGB, when a batch needs them.

    Args:
        rows: with `images`, which may be empty.
        max_pixels: of a picture at most.
        columns: the others that are kept.
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

    kept = [
        {**{name: row[name] for name in columns}, "images": [stored(each) for each in row["images"]]} for row in rows
    ]
    return Dataset.from_list(kept).with_transform(decode)
