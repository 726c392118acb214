"""Rows with pictures: the drawn ones, and the user's, to train on and held out."""

from collections.abc import Mapping, Sequence
from typing import Any

from hfllm.data.images import text_of
from hfllm.data.sources import DIGITS, PICTURES
from hfllm.data.world.pictures import (
    CAPTIONS,
    QUESTIONS,
    TRAINED_NUMBERS,
    DrawnWorld,
    PictureRow,
    TwoDigits,
    trained_families,
)
from hfllm.evaluation.pictures import Asked, shuffled_questions
from hfllm.stages.own_pictures import Convert, Rows, by_turns, picture_mapper, png_of
from hfllm.stages.vision import VisionArguments

SEEN, HELD_OUT, SHUFFLED = "seen", "held_out", "shuffled"
# The evaluation's pictures are the same whatever the seed of training.
EVAL_SEED = 777
# For each question of the evaluation so many others, by which the best guess without a picture is found.
PRIOR = 20
# Of so many pictures with questions one has captions, too.
CAPTION_EVERY = 3


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
    families = trained_families(script_args.share_absent)
    mix = {"caption_every": CAPTION_EVERY, "families": families, "numbers": TRAINED_NUMBERS}
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


def parts_of(held_out: list[Asked]) -> dict[str, list[Asked]]:
    """Return the parts of the evaluation of the user's held-out rows: themselves, and with pictures of others.

    Rows for which no other has other pictures are left out of the second, which may then be missing.
    """
    pairs = zip(held_out, shuffled_questions(held_out), strict=True)
    shuffled = [other for own, other in pairs if other.images is not own.images]
    return {HELD_OUT: held_out, **({SHUFFLED: shuffled} if shuffled else {})}


def prior_of(script_args: VisionArguments) -> list[Asked]:
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


def own_rows(script_args: VisionArguments, seed: int, tokens: Sequence[str] = ()) -> tuple[Rows, list[Asked]]:
    """Return rows with `prompt`, `completion` and `images` to train on, and the held-out ones as questions.

    Args:
        seed: of the split.
        tokens: what the processor writes at a picture's place; rows whose words spell one are left out.

    Raises:
        InputError: when a row cannot be read or has tools, or with `--bad_images refuse` a picture.
    """
    from hfllm.data.formats import to_sft
    from hfllm.data.images import flaw_of_pictures
    from hfllm.stages.user_rows import user_rows

    def mapper(name: str) -> Convert:
        return picture_mapper(script_args, name, to_sft, "hfllm vision", tokens)

    name, eval_name = script_args.dataset_name, script_args.eval_dataset_name or script_args.dataset_name
    settings = {"most": script_args.max_eval_samples, "flaw_of": flaw_of_pictures, "eval_mapper": mapper(eval_name)}
    train, held_out = user_rows(script_args, mapper(name), seed, **settings)
    return [turn for row in train for turn in by_turns(row)], [asked_of(by_turns(row)[0]) for row in held_out]


def drawn_rows(script_args: VisionArguments, seed: int) -> Rows:
    """Return drawn rows as `own_rows` does, for a model of the user's."""
    made: Rows = []
    for row in question_rows(script_args, seed):
        asked, *rest = row.messages()
        made += by_turns({"prompt": [asked], "completion": rest, "images": [png_of(row.picture)]})
    return made


def asked_of(row: Mapping[str, Any]) -> Asked:
    """Return a row of `by_turns` as a question."""
    return Asked(row["prompt"], row["images"], text_of(row["completion"][0]).strip(), "all")
