"""Pictures with questions and answers, row by row: the drawn world, and the digits that come with scikit-learn.

A row is drawn when it is read, from its number alone, so that a million of them take no memory and a run that is
resumed sees the same ones.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING

from hfllm.data.sources import DIGITS, PICTURES
from hfllm.data.world import pictures
from hfllm.data.world.pictures import Question
from hfllm.errors import InputError

if TYPE_CHECKING:
    import numpy
    from PIL.Image import Image

SIDES = ("left", "right")
NUMERALS = tuple(map(str, range(10)))
# Of scikit-learn's 1,797 digits those that are trained on; the rest are held out.
TRAINED_DIGITS = 1400
DIGITS_SIZE = 16
CAPTIONS, QUESTIONS = "captions", "questions"


def picture_side(name: str) -> int | None:
    """Return the side of the drawn pictures of a dataset in pixels, `None` for one that is not drawn."""
    return {PICTURES: pictures.SIZE, DIGITS: DIGITS_SIZE}.get(name)


@dataclass(frozen=True)
class PictureRow:
    """A picture, and what is asked and answered about it, turn by turn.

    Args:
        picture: in RGB.
        turns: (question, answer) in order.
        family: of its one question, for evaluation.
        gold: columns for the gold reward of its one question.
        scene: what the picture shows, of the drawn world.
    """

    picture: "Image"
    turns: tuple[tuple[str, str], ...]
    family: str = ""
    gold: Mapping[str, object] = field(default_factory=dict)
    scene: pictures.Scene | None = None

    def prompt(self) -> list[dict[str, object]]:
        """Return its first question as messages with parts; the picture comes first."""
        content = [{"type": "image"}, {"type": "text", "text": self.turns[0][0]}]
        return [{"role": "user", "content": content}]

    def messages(self) -> list[dict[str, object]]:
        """Return all turns as messages with parts."""
        (_, answer), *more = self.turns
        said = [*self.prompt(), _message("assistant", answer)]
        return said + [_message(*each) for ask, reply in more for each in (("user", ask), ("assistant", reply))]


def _message(role: str, text: str) -> dict[str, object]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _row(picture: "Image", questions: Sequence[Question]) -> PictureRow:
    first = questions[0]
    turns = tuple((question.text, question.answer) for question in questions)
    return PictureRow(picture, turns, first.family, first.gold_columns())


class DrawnWorld(Sequence[PictureRow]):
    """Rows of the drawn world: captions, or questions.

    Args:
        seed: of the pictures.
        count: how many.
        kind: `captions` or `questions`.
        num_questions: turns of a row of questions.
        held_out: whether all are about held-out pairs of color and shape.
        part: which stream of pictures; captions and questions for training are of different ones.
        caption_every: of so many rows of questions one has both captions before them; 0 gives none.
        families: of questions, see `draw_example`.
        numbers: of things, likewise.
    """

    def __init__(
        self,
        seed: int,
        count: int,
        kind: str = QUESTIONS,
        num_questions: int = 1,
        held_out: bool = False,
        part: str = "train",
        caption_every: int = 0,
        families: Sequence[str] = pictures.FAMILIES,
        numbers: Sequence[int] = pictures.NUMBERS,
    ):
        self.seed, self.count, self.kind, self.num_questions = seed, count, kind, num_questions
        self.held_out, self.part, self.caption_every = held_out, part, caption_every
        self.families, self.numbers = families, numbers

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> PictureRow:
        if not 0 <= number < self.count:
            raise IndexError(number)
        stream = f"{self.part} {self.kind}"
        example = pictures.draw_example(
            self.seed, number, self.held_out, self.num_questions, stream, self.families, self.numbers
        )
        turns = pictures.captions(example.scene)
        if self.kind == QUESTIONS:
            row = replace(_row(example.picture, example.questions), scene=example.scene)
            has_captions = self.caption_every and number % self.caption_every == 0
            return replace(row, turns=turns + row.turns) if has_captions else row
        # Either may come first, so that neither is learned from the other alone.
        return PictureRow(example.picture, turns[:: 1 if number % 2 else -1])

    def texts(self) -> list[str]:
        """Return what is asked and answered in a sample of rows, for a tokenizer."""
        sample = (self[number] for number in range(min(self.count, 3000)))
        return [text for row in sample for turn in row.turns for text in turn]


@cache
def _digits() -> "tuple[numpy.ndarray, list[int], list[int]]":
    """Return scikit-learn's digits (1797, 8, 8) from 0 to 16, their labels, and their order by chance."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("--dataset_name digits needs scikit-learn: pip install scikit-learn") from None
    digits = load_digits()
    order = list(range(len(digits.target)))
    random.Random(0).shuffle(order)
    return digits.images, [int(label) for label in digits.target], order


class TwoDigits(Sequence[PictureRow]):
    """Rows of two handwritten digits side by side, (16, 16), and the question which one is left or right.

    Handwritten by 43 people and scanned: Alpaydin and Kaynak 1998, "Optical recognition of handwritten digits".

    Args:
        seed: of which digits come together.
        count: how many rows.
        is_held_out: whether of the digits that no training row shows.
        num_questions: 1, or 2 for both sides in one row.
    """

    def __init__(self, seed: int, count: int, is_held_out: bool = False, num_questions: int = 1):
        self.seed, self.count, self.num_questions = seed, count, num_questions
        order = _digits()[2]
        self.places = order[TRAINED_DIGITS:] if is_held_out else order[:TRAINED_DIGITS]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> PictureRow:
        import numpy
        from PIL import Image

        if not 0 <= number < self.count:
            raise IndexError(number)
        images, labels, _ = _digits()
        rng = random.Random(f"digits {self.seed} {number}")
        pair = [rng.choice(self.places) for _ in SIDES]
        gray = numpy.concatenate([images[place] for place in pair], 1) * (255 / 16)
        # Twice as high as scanned, so that both fill a square.
        gray = gray.astype(numpy.uint8).repeat(2, 0)
        picture = Image.fromarray(gray).convert("RGB")
        sides = rng.sample(range(len(SIDES)), self.num_questions)
        return _row(picture, [_which_digit(SIDES[side], str(labels[pair[side]])) for side in sides])

    def texts(self) -> list[str]:
        """Return what is asked and answered in a sample of rows, for a tokenizer."""
        return [text for number in range(min(self.count, 300)) for turn in self[number].turns for text in turn]


def _which_digit(side: str, digit: str) -> Question:
    others = tuple(other for other in (*NUMERALS, *SIDES) if other not in (digit, side))
    return Question(side, f"Which digit is on the {side}?", f"{side}: {digit}", others)
