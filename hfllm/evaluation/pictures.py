"""Questions about images with right answers, answers of a model, the control with other images, and their suite."""

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from hfllm.data.images.files import image_key, read_image
from hfllm.data.images.rows import conversation_batch, text_of
from hfllm.data.world.pictures import Scene
from hfllm.data.world.wordings import usual_wording
from hfllm.errors import refuse_if
from hfllm.evaluation.suites.base import Item, Record, Subject, Suite
from hfllm.generation.scoring import evaluating
from hfllm.models.devices import forked_random
from hfllm.multimodal.processors import check_template

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


# ---- questions and controls ----


@dataclass(frozen=True)
class Asked:
    """A question with its answer, as the evaluation asks it.

    Args:
        prompt: messages with parts.
        images: the images, or inputs of `read_image`.
        answer: the right answer.
        family: of the question.
        gold: columns of the gold reward, if there is one.
        scene: the content of the image, for the drawn world.
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


def shuffled_questions(questions: Sequence[Asked]) -> list[Asked]:
    """Return questions, each with the images of another with equally many; with its own if all others are equal."""
    others = other_places([question.images for question in questions])
    sources = [questions[other] for other in others]
    return [replace(each, images=it.images, scene=it.scene) for each, it in zip(questions, sources, strict=True)]


def other_places(images: Sequence[Sequence[Any]]) -> list[int]:
    """Return for each row the index of one with equally many, but different images; its own where there is none.

    Rows of one conversation, or several questions about an image, have the same images: exchanged they would be no
    control.

    Args:
        images: the images per row, as inputs of `image_key`.
    """
    keys = [tuple(map(image_key, row)) for row in images]
    groups: dict[int, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(len(key), []).append(index)
    other = dict(enumerate(range(len(keys))))
    for indices in groups.values():
        random.Random(0).shuffle(indices)
        alike: dict[tuple[str, ...], list[int]] = {}
        for index in indices:
            alike.setdefault(keys[index], []).append(index)
        # Equal images stand together, and a shift by the largest of these groups leads out of all groups.
        order, shift = [index for group in alike.values() for index in group], max(map(len, alike.values()))
        pairs = zip(order, order[shift:] + order[:shift], strict=True)
        other |= {index: partner for index, partner in pairs if keys[index] != keys[partner]}
    return [other[index] for index in range(len(keys))]


def is_right(response: str, answer: str) -> bool:
    """Return whether an answer is the right one, apart from case, spaces and a full stop."""
    return _plain(response) == _plain(answer)


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".")


def best_guesses(questions: Sequence[Asked], others: Sequence[Asked] = ()) -> list[str]:
    """Return for each question the most frequent answer to the same words: the best guess without an image.

    Args:
        questions: questions to guess.
        others: drawn likewise, for counting the answers; without them the questions themselves, and then the guesses
            are better than anyone could know.
    """
    answers: dict[str, Counter[str]] = {}
    for question in others or questions:
        answers.setdefault(_same_words(question), Counter())[question.answer] += 1
    overall = Counter(question.answer for question in others or questions)
    return [answers.get(_same_words(question), overall).most_common(1)[0][0] for question in questions]


def _same_words(question: Asked) -> str:
    """Return what questions with the same meaning share: of the drawn world all wordings, of other rows the words."""
    return question.question if question.scene is None else usual_wording(question.question)


# ---- answers ----


def answer_pictures(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    prompts: Sequence[list[dict[str, Any]]],
    images: Sequence[Sequence[Any]],
    max_new_tokens: int = 16,
    batch_size: int = 128,
    do_sample: bool = False,
    seed: int = 0,
) -> list[str]:
    """Return a model's answers to prompts, by default greedy ones, without special tokens.

    Args:
        model: a vision-language model; its mode is left as it was.
        processor: its processor.
        prompts: messages with parts.
        images: images of every prompt, or inputs of `hfllm.data.images.files.read_image`.
        max_new_tokens: of an answer at most.
        do_sample: sample at temperature 1 in place of it.
        seed: of the sampling; the caller's random state is not changed.
    """
    import torch

    answers: list[str] = []
    with evaluating(model), torch.no_grad(), forked_random(model.device) if do_sample else nullcontext():
        if do_sample:
            torch.manual_seed(seed)
        for first in range(0, len(prompts), batch_size):
            rows = slice(first, first + batch_size)
            pictures = [
                [read_image(each, "a prompt", max_pixels=sys.maxsize, min_side=1) for each in row]
                for row in images[rows]
            ]
            batch = conversation_batch(processor, prompts[rows], pictures, "left", add_generation_prompt=True)
            batch = batch.to(model.device)
            sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if do_sample else {}
            sequences = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=do_sample, **sampling)
            ids = sequences[:, batch["input_ids"].shape[1] :]
            answers += processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [answer.strip() for answer in answers]


# ---- pictures ----
#
# Questions about images with right answers, next to the same questions about other images.
#
#     right                 the answer, apart from case, spaces and a full stop; more is better
#     right_other_pictures  the same with another question's image: the information in the words only
#     best_guess            the most frequent answer to the same words: the knowledge without an image
#
# A model using the image is right more often than both.


@dataclass(frozen=True)
class Shown:
    """A question.

    Args:
        question: with its images and the right answer.
        other: the images of another question with equally many; `None` where there is no other.
        guess: the best answer without an image.
    """

    question: Asked
    other: Sequence[Any] | None
    guess: str


@dataclass(frozen=True)
class Part:
    """Questions judged together.

    Args:
        name: before the number in the items' keys, and after the family in their groups; empty for rows of a file.
        questions: all of them.
        prior: others drawn likewise, for finding the best guess; by default the questions.
    """

    name: str
    questions: Sequence[Asked]
    prior: Sequence[Asked] = ()


class Pictures(Suite[Shown]):
    """Questions about pictures.

    Args:
        parts: returns the questions; it is called once, when they are needed, and refuses unreadable input.
        max_new_tokens: longest answer.
    """

    name: ClassVar[str] = "pictures"
    better: ClassVar[Mapping[str, int]] = {"right": 1}
    primary: ClassVar[Sequence[str]] = ("right",)

    def __init__(self, parts: Callable[[], Sequence[Part]], max_new_tokens: int = 16):
        # Reading rows prints how many are left out.
        self.parts, self.max_new_tokens = cache(parts), max_new_tokens

    def items(self) -> list[Item[Shown]]:
        return [item for part in self.parts() for item in _items(part)]

    def judge(self, subject: Subject, items: Sequence[Item[Shown]]) -> Iterator[Record]:
        refuse_if(subject.processor is None, f"--suites pictures: the model {subject.label!r} reads text alone")
        check_template(subject.processor, subject.label)
        for start in range(0, len(items), subject.batch_size):
            yield from self._judge_block(subject, items[start : start + subject.batch_size])

    def _judge_block(self, subject: Subject, items: Sequence[Item[Shown]]) -> Iterator[Record]:
        subject.check_numbers(items[0].body.question.question or "a")
        answers = self._answers(subject, [(item.body.question, item.body.question.images) for item in items])
        controls = [item for item in items if item.body.other is not None]
        others = self._answers(subject, [(item.body.question, item.body.other or ()) for item in controls])
        with_others = dict(zip((item.key for item in controls), others, strict=True))
        for item, answer in zip(items, answers, strict=True):
            question = item.body.question
            scores = {
                "right": is_right(answer, question.answer),
                "best_guess": is_right(item.body.guess, question.answer),
            }
            if item.key in with_others:
                scores["right_other_pictures"] = is_right(with_others[item.key], question.answer)
            yield self.record(subject, item, scores, question.question, answer)

    def _answers(self, subject: Subject, questions: Sequence[tuple[Asked, Sequence[Any]]]) -> list[str]:
        prompts, images = [question.prompt for question, _ in questions], [pictures for _, pictures in questions]
        return answer_pictures(subject.model, subject.processor, prompts, images, self.max_new_tokens)


def _items(part: Part) -> list[Item[Shown]]:
    others, guesses = shuffled_questions(part.questions), best_guesses(part.questions, part.prior)
    items = []
    for number, (question, other, guess) in enumerate(zip(part.questions, others, guesses, strict=True), 1):
        images = None if other.images is question.images else other.images
        key, group = f"{part.name}{' ' * bool(part.name)}{number}", question.family or "all"
        items.append(Item(key, f"{group}, {part.name}" if part.name else group, Shown(question, images, guess)))
    return items
