"""Questions about pictures with right answers, and the control: the same questions about other pictures."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hfllm.data.image_files import image_key
from hfllm.data.images import text_of
from hfllm.data.world.pictures import Scene


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


def shuffled_questions(questions: Sequence[Asked], seed: int = 0) -> list[Asked]:
    """Return questions, each with the pictures of another that has as many; with its own where all others' are."""
    others = other_places([question.images for question in questions], seed)
    shown = [questions[other] for other in others]
    return [replace(each, images=it.images, scene=it.scene) for each, it in zip(questions, shown, strict=True)]


def other_places(images: Sequence[Sequence[Any]], seed: int = 0) -> list[int]:
    """Return for each row the place of one with as many pictures, but others; its own where there is none.

    Rows of one conversation, or several questions about a picture, have the same pictures: shown to each other they
    would be no control.

    Args:
        images: the pictures of each row, as `image_key` takes them.
    """
    keys = [tuple(map(image_key, row)) for row in images]
    groups: dict[int, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(len(key), []).append(place)
    other = dict(enumerate(range(len(keys))))
    for places in groups.values():
        random.Random(seed).shuffle(places)
        alike: dict[tuple[str, ...], list[int]] = {}
        for place in places:
            alike.setdefault(keys[place], []).append(place)
        # Equal pictures stand together, and a shift by the largest of these groups leads out of each.
        order, shift = [place for group in alike.values() for place in group], max(map(len, alike.values()))
        pairs = zip(order, order[shift:] + order[:shift], strict=True)
        other |= {place: shown for place, shown in pairs if keys[place] != keys[shown]}
    return [other[place] for place in range(len(keys))]


def is_right(said: str, answer: str) -> bool:
    """Return whether an answer is the right one, apart from case, spaces and a full stop."""
    return _plain(said) == _plain(answer)


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".")


def best_guesses(questions: Sequence[Asked], others: Sequence[Asked] = ()) -> list[str]:
    """Return for each question the most frequent answer to the same words: the best that is known without a picture.

    Args:
        questions: those to guess.
        others: drawn likewise, by which the answers are counted; without them the questions themselves, and then the
            guesses are better than anybody could know.
    """
    answers: dict[str, Counter[str]] = {}
    for question in others or questions:
        answers.setdefault(question.question, Counter())[question.answer] += 1
    overall = Counter(question.answer for question in others or questions)
    return [answers.get(question.question, overall).most_common(1)[0][0] for question in questions]
