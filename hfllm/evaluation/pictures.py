"""Questions about pictures with right answers, and the control: the same questions about other pictures."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

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
    """Return questions, each with the pictures of another that has as many."""
    others = other_places([len(question.images) for question in questions], seed)
    shown = [questions[other] for other in others]
    return [replace(each, images=it.images, scene=it.scene) for each, it in zip(questions, shown, strict=True)]


def other_places(counts: Sequence[int], seed: int = 0) -> list[int]:
    """Return for each row the place of another with as many pictures, each once; its own where there is no other.

    Args:
        counts: pictures of each row.
    """
    groups: dict[int, list[int]] = {}
    for place, count in enumerate(counts):
        groups.setdefault(count, []).append(place)
    other: dict[int, int] = {}
    for places in groups.values():
        random.Random(seed).shuffle(places)
        other |= dict(zip(places, [*places[1:], places[0]], strict=True))
    return [other[place] for place in range(len(counts))]


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
