"""Rows with pictures: the drawn ones, and the user's, to train on and held out."""

import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.data.images import text_of
from hfllm.data.picture_rows import (
    CAPTIONS,
    QUESTIONS,
    DrawnWorld,
    PictureRow,
    TwoDigits,
)
from hfllm.data.rows import BadRow
from hfllm.data.sources import DIGITS, PICTURES, folder_of
from hfllm.data.world.pictures import TRAINED_FAMILIES, TRAINED_NUMBERS, Scene
from hfllm.errors import InputError
from hfllm.stages.vision import VisionArguments

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

SEEN, HELD_OUT, SHUFFLED = "seen", "held_out", "shuffled"
# The evaluation's pictures are the same whatever the seed of training.
EVAL_SEED = 777
# For each question of the evaluation so many others, by which the best guess without a picture is found.
PRIOR = 20
# Of so many pictures with questions one has captions, too.
CAPTION_EVERY = 3


@dataclass(frozen=True)
class Asked:
    """A question with its answer, as the evaluation asks it.

    Args:
        prompt: messages with parts.
        images: the pictures, or what `read_image` reads.
        answer: the right one.
        family: of the question.
        gold: columns of the gold reward, if there is one.
        scene: what the picture shows, of the drawn world.
    """

    prompt: list[dict[str, Any]]
    images: Sequence[Any]
    answer: str
    family: str = ""
    gold: Mapping[str, Any] = field(default_factory=dict)
    scene: Scene | None = None

    @property
    def question(self) -> str:
        """The text of the last turn."""
        return text_of(self.prompt[-1])


def caption_rows(script_args: VisionArguments, seed: int) -> DrawnWorld | None:
    """Return the captions that are learned first, `None` where there are none."""
    if script_args.dataset_name != PICTURES or not script_args.num_captions:
        return None
    return DrawnWorld(seed, script_args.num_captions, CAPTIONS)


def question_rows(script_args: VisionArguments, seed: int) -> DrawnWorld | TwoDigits:
    """Return the drawn rows of questions to train on."""
    count, turns = script_args.num_examples, script_args.questions_per_picture
    if script_args.dataset_name == DIGITS:
        return TwoDigits(seed, count, num_questions=turns)
    # Captions go on: from answers about single things alone colors and shapes are learned much later.
    mix = {"caption_every": CAPTION_EVERY, "families": TRAINED_FAMILIES, "numbers": TRAINED_NUMBERS}
    return DrawnWorld(seed, count, QUESTIONS, turns, **mix)


def eval_parts(script_args: VisionArguments) -> dict[str, list[Asked]]:
    """Return the drawn questions of each part of the evaluation, and those of the first with other pictures."""
    count = script_args.num_eval_examples
    if script_args.dataset_name == DIGITS:
        rows: dict[str, Sequence[PictureRow]] = {HELD_OUT: TwoDigits(EVAL_SEED, count, is_held_out=True)}
    else:
        rows = {
            SEEN: DrawnWorld(EVAL_SEED, count, part="evaluation"),
            HELD_OUT: DrawnWorld(EVAL_SEED, count, held_out=True, part="evaluation"),
        }
    parts = {name: [asked(row) for row in each] for name, each in rows.items()}
    return {**parts, SHUFFLED: shuffled_questions(next(iter(parts.values())))}


def parts_of(held_out: list["Asked"]) -> dict[str, list["Asked"]]:
    """Return the parts of the evaluation of the user's held-out rows: themselves, and with pictures of others."""
    return {HELD_OUT: held_out, SHUFFLED: shuffled_questions(held_out)}


def prior_of(script_args: VisionArguments) -> list["Asked"]:
    """Return more drawn questions, by which the best answer without a picture is found; none for the user's rows."""
    count = PRIOR * script_args.num_eval_examples
    if script_args.dataset_name == DIGITS:
        # Of two questions so many answers tell as much.
        return [asked(row) for row in TwoDigits(EVAL_SEED + 1, script_args.num_eval_examples)]
    drawn = script_args.dataset_name == PICTURES
    return [asked(row) for row in DrawnWorld(EVAL_SEED + 1, count, part="evaluation")] if drawn else []


def asked(row: PictureRow) -> Asked:
    """Return a drawn row's question."""
    return Asked(row.prompt(), [row.picture], row.turns[0][1], row.family, row.gold, row.scene)


class JoinedRows(Sequence[PictureRow]):
    """Rows of several sequences, one after the other."""

    def __init__(self, *parts: Sequence[PictureRow]):
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, number: int) -> PictureRow:
        for part in self.parts:
            if number < len(part):
                return part[number]
            number -= len(part)
        raise IndexError(number)


# ---- the user's rows, and drawn ones for the user's model ----

Rows = list[dict[str, Any]]


def own_rows(script_args: VisionArguments, seed: int, image_token: str | None = None) -> tuple[Rows, list[Asked]]:
    """Return rows with `prompt`, `completion` and `images` to train on, and the held-out ones as questions.

    Args:
        seed: of the split.
        image_token: what the processor writes at a picture's place; rows whose words spell it are left out.

    Raises:
        InputError: when a row cannot be read or has tools, or with `--bad_images refuse` a picture.
    """
    from hfllm.data.formats import to_sft
    from hfllm.data.images import BadImage, Row, flaw_of_pictures, to_pictures
    from hfllm.stages.user_rows import user_rows

    convert = to_pictures(to_sft, folder_of(script_args.dataset_name), script_args.max_pixels)

    def mapper(origin: str, row: Row) -> Row:
        try:
            converted = convert(origin, row)
        except BadImage as error:
            if script_args.bad_images == "drop":
                raise
            raise InputError(f"{error}; --bad_images drop leaves such rows out") from None
        _refuse_tools(origin, converted)
        _refuse_token(origin, converted, image_token)
        return converted

    train, held_out = user_rows(script_args, mapper, seed, most=script_args.max_eval_samples, flaw_of=flaw_of_pictures)
    return [turn for row in train for turn in by_turns(row)], [_asked(by_turns(row)[0]) for row in held_out]


def drawn_rows(script_args: VisionArguments, seed: int) -> Rows:
    """Return drawn rows as `own_rows` does, for a model of the user's."""
    made: Rows = []
    for row in question_rows(script_args, seed):
        asked, *rest = row.messages()
        made += by_turns({"prompt": [asked], "completion": rest, "images": [png_of(row.picture)]})
    return made


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


def _refuse_tools(origin: str, row: Mapping[str, Any]) -> None:
    said = [*row["prompt"], *row["completion"]]
    if row.get("tools") or any("tool_calls" in message or message["role"] == "tool" for message in said):
        raise InputError(f"{origin}: the row has tools, of which hfllm vision teaches nothing: leave them out")


def _refuse_token(origin: str, row: Mapping[str, Any], token: str | None) -> None:
    if token is not None and any(token in text_of(each) for each in (*row["prompt"], *row["completion"])):
        raise BadRow(f"{origin}: the words spell {token!r}, which stands for a picture", "with words for a picture")


def _asked(row: Mapping[str, Any]) -> Asked:
    return Asked(row["prompt"], row["images"], text_of(row["completion"][0]).strip(), "all")


def png_of(picture: "Image") -> bytes:
    """Return a picture as the bytes of a PNG file, which change no pixel."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def shuffled_questions(questions: Sequence[Asked], seed: int = 0) -> list[Asked]:
    """Return questions, each with the pictures of another that has as many."""
    groups: dict[int, list[int]] = {}
    for place, question in enumerate(questions):
        groups.setdefault(len(question.images), []).append(place)
    other: dict[int, int] = {}
    for places in groups.values():
        random.Random(seed).shuffle(places)
        other |= dict(zip(places, [*places[1:], places[0]], strict=True))
    shown = [questions[other[place]] for place in range(len(questions))]
    return [replace(each, images=it.images, scene=it.scene) for each, it in zip(questions, shown, strict=True)]


def as_dataset(rows: Rows, max_pixels: int) -> "Dataset":
    """Return rows as a dataset that decodes their pictures, in RGB, when a batch needs them."""
    from datasets import Dataset

    from hfllm.data.images import read_image, to_rgb

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
        {**{side: row[side] for side in ("prompt", "completion")}, "images": [stored(each) for each in row["images"]]}
        for row in rows
    ]
    return Dataset.from_list(kept).with_transform(decode)
