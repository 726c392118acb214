"""Several wordings of each question about an image: those of training, and held-out ones in the same words.

The first wording of a kind is the usual one. `{}` stands for the names that are asked about, in order, or by number.
"""

import re
from dataclasses import dataclass
from functools import cache, lru_cache

COLOR, SHAPE, COUNT, PLACE, RELATION, TEXT = ("color", "shape", "count", "place", "relation", "text")


@dataclass(frozen=True)
class Wordings:
    """Wordings of one kind of question: `trained`, the usual one first, and `held_out`, which are in no training."""

    trained: tuple[str, ...]
    held_out: tuple[str, ...]


WORDINGS = {
    COLOR: Wordings(
        (
            "What color is the {}?",
            "Which color does the {} have?",
            "What is the color of the {}?",
            "Tell me the color of the {}.",
            "The {} is of what color?",
            "The color of the {}?",
        ),
        ("What color does the {} have?", "Which color is the {}?", "Tell me what color the {} is."),
    ),
    SHAPE: Wordings(
        (
            "What shape is {}?",
            "Which shape is {}?",
            "What is the shape of the {} thing?",
            "Tell me which shape is {}.",
            "The {} thing is of what shape?",
            "The shape of the {} thing?",
        ),
        ("Which shape does the {} thing have?", "What shape is the {} thing?", "Tell me the shape of the {} thing."),
    ),
    COUNT: Wordings(
        (
            "How many shapes are there?",
            "What is the number of shapes?",
            "How many shapes do you see?",
            "Tell me how many shapes there are.",
            "The number of shapes?",
        ),
        ("How many shapes are in the picture?", "Tell me the number of shapes.", "What number of shapes do you see?"),
    ),
    PLACE: Wordings(
        (
            "Where is the {}?",
            "Which corner is the {} in?",
            "In which corner is the {}?",
            "Tell me where the {} is.",
            "What is the corner of the {}?",
            "The corner of the {}?",
        ),
        ("Where do you see the {}?", "What corner is the {} in?", "Tell me the corner of the {}."),
    ),
    RELATION: Wordings(
        (
            "Where is the {} from the {}?",
            "Tell me where the {} is from the {}.",
            "From the {1}, where is the {0}?",
            "Seen from the {1}, where is the {0}?",
        ),
        ("Where is the {}, seen from the {}?", "From the {1}, where do you see the {0}?"),
    ),
    TEXT: Wordings(
        (
            "Which word is written?",
            "What is the word?",
            "Which word do you see?",
            "Tell me which word is written.",
            "The word in the picture?",
        ),
        ("What word is written?", "Tell me the word.", "Which word is in the picture?"),
    ),
}
# The slot of a name: of a color and a shape together where a place is asked for.
ONE, TWO = "([a-z]+)", "([a-z]+(?: [a-z]+)?)"


@cache
def _readers() -> list[tuple[str, list[int], re.Pattern[str]]]:
    """Return a pattern per wording, with its kind and the order of its names."""
    readers = []
    for kind, wordings in WORDINGS.items():
        for wording in (*wordings.trained, *wordings.held_out):
            order = [int(number) for number in re.findall(r"\{(\d)\}", wording)]
            slot = TWO if kind == PLACE else ONE
            parts = re.split(r"\{\d?\}", wording)
            readers.append((kind, order, re.compile(slot.join(map(re.escape, parts)))))
    return readers


@lru_cache(4096)
def meaning_of(text: str) -> tuple[str, tuple[str, ...]] | None:
    """Return the kind of a question and the names in it, in any wording; `None` where it is none of ours."""
    for kind, order, pattern in _readers():
        if found := pattern.fullmatch(text):
            names = found.groups()
            return kind, tuple(names[order.index(number)] for number in range(len(names))) if order else names
    return None


def usual_wording(text: str) -> str:
    """Return a question in the usual wording of its kind; other texts as they are."""
    meaning = meaning_of(text)
    return text if meaning is None else WORDINGS[meaning[0]].trained[0].format(*meaning[1])
