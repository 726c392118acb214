"""What methods are tried on: facts, known and unknown subjects, and passages; the world's, or of a user's file."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hfllm.data.passages import with_passages
from hfllm.data.sources import iterate_source
from hfllm.data.world.passages import held_out_names
from hfllm.data.world.vocabulary import ANIMALS, ATTRIBUTES, COLOURS, PHRASINGS, WELL_SAID, phrase
from hfllm.data.world.world import World
from hfllm.errors import InputError
from hfllm.evaluation.interpreting.probes import FOLDS
from hfllm.evaluation.interpreting.prompts import Fact

# About each subject that is to be recognized.
QUESTIONS = 6
# Facts about passages, pairs of facts, facts for methods that take long, and other values of a user's fact, at most.
PASSAGES, PAIRS, SOME, MOST_OTHERS = 64, 48, 20, 24
COLUMNS = ("subject", "question", "answer", "beginning", "passage")


@dataclass(frozen=True)
class Material:
    """What methods are tried on.

    Args:
        facts: those that the model may know.
        kinds: of each fact, such as its attribute: values are compared and exchanged within a kind.
        subjects: questions about subjects, each with whether its subject is known (1) or not (0); none where there are
            too few for a probe.
        told: facts that stand in a passage of their question; the subject is what is told.
    """

    facts: tuple[Fact, ...]
    kinds: tuple[str, ...]
    subjects: tuple[tuple[Fact, int], ...] = ()
    told: tuple[Fact, ...] = ()

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Places of facts of one kind with other subjects and values, in questions of as many words."""
        words = [len(f"{fact.question} {fact.beginning}".split()) for fact in self.facts]
        pairs = [
            (one, other)
            for one, first in enumerate(self.facts)
            for other, second in enumerate(self.facts)
            if self.kinds[one] == self.kinds[other] and words[one] == words[other]
            if first.subject != second.subject and first.value != second.value
        ]
        random.Random("pairs").shuffle(pairs)
        return pairs[:PAIRS]

    @property
    def some(self) -> list[int]:
        """Places of some of the facts, evenly spaced."""
        count = len(self.facts)
        return list(range(count)) if count <= SOME else [place * count // SOME for place in range(SOME)]


def world_material(world: World) -> Material:
    """Return the world's facts, its animals beside names that nothing tells of, and its passages about colors."""
    facts, kinds = [], []
    for attribute, values in ATTRIBUTES.items():
        beginning, question = WELL_SAID[attribute].split(" {value}")[0], PHRASINGS[attribute][0]
        for animal in ANIMALS:
            value = world.facts[animal][attribute]
            others = tuple(each for each in values if each != value)
            facts.append(Fact(animal, question.format(x=animal), beginning.format(x=animal), value, others))
            kinds.append(attribute)
    return Material(tuple(facts), tuple(kinds), tuple(_subjects()), tuple(_told(world)))


def _subjects() -> list[tuple[Fact, int]]:
    """Return questions about known and made-up animals.

    Their wordings are drawn, some with words around them: made-up names have more tokens, and without that the length
    of a prompt alone would tell which is which, also to a model of random weights.
    """
    rows = []
    for subject in (*ANIMALS, *held_out_names()):
        rng = random.Random(f"wordings-{subject}")
        for _ in range(QUESTIONS):
            question = phrase(rng, rng.choice(list(ATTRIBUTES)), False, x=subject)
            rows.append((Fact(subject, question), int(subject in ANIMALS)))
    return rows


def _told(world: World) -> list[Fact]:
    """Return questions about passages that tell of two things, whose colors are told."""
    rng, told = random.Random(f"told-{world.seed}"), []
    while len(told) < PASSAGES:
        task = world.draw_task(rng, "reading", held_out=True)
        value = task.gold.needed[0]
        others = tuple(each for each in COLOURS if each != value and f" {each} " in task.input)
        if others:
            beginning = task.gold.accepted[0].split(f" {value}")[0]
            told.append(Fact(value, task.question, beginning, value, others))
    return told


def file_material(path: str) -> Material:
    """Return the facts of a user's file: rows of subject, question and answer, and maybe beginning and passage.

    A row without an answer is about a subject that the model cannot know. `beginning` is how the answer begins, up to
    what is asked; `passage` stands before the question and tells the answer.

    Raises:
        InputError: naming the file, the row and the column.
    """
    rows = [_row(origin, row) for origin, row in iterate_source(path)]
    if not rows:
        raise InputError(f"{path}: no rows; each needs subject, question and answer")
    values = list(dict.fromkeys(fact.value for fact, _ in rows if fact.value))
    facts = [replace(fact, others=_others(values, fact.value)) for fact, passage in rows if fact.value and not passage]
    told = [replace(fact, subject=fact.value) for fact, passage in rows if passage]
    subjects = [
        (replace(fact, beginning="", value=""), int(bool(fact.value))) for fact, passage in rows if not passage
    ]
    names, labels = [fact.subject for fact, _ in subjects], [label for _, label in subjects]
    both = set(names[place] for place, label in enumerate(labels) if label) & {
        names[place] for place, label in enumerate(labels) if not label
    }
    if both:
        raise InputError(f"{path}: subject {sorted(both)[0]!r} has rows with an answer and rows without one")
    kinds = {label: len({name for name, each in zip(names, labels, strict=True) if each == label}) for label in (0, 1)}
    enough = tuple(subjects) if min(kinds.values()) >= FOLDS else ()
    return Material(tuple(facts), (Path(path).stem,) * len(facts), enough, tuple(told))


def _row(origin: str, row: dict) -> tuple[Fact, str]:
    texts = {name: row.get(name) or "" for name in COLUMNS}
    for name in ("subject", "question"):
        if not isinstance(texts[name], str) or not texts[name].strip():
            raise InputError(f"{origin}: needs a text as {name}, got {row.get(name)!r:.80}; columns: {', '.join(row)}")
    if "answer" not in row:
        raise InputError(f"{origin}: needs answer, empty for a subject that is not known; columns: {', '.join(row)}")
    texts = {name: str(text).strip() for name, text in texts.items()}
    if texts["subject"] not in texts["question"]:
        raise InputError(f"{origin}: subject {texts['subject']!r} is not in its question {texts['question']!r:.80}")
    passage = texts["passage"]
    if passage and (not texts["answer"] or texts["answer"] not in passage):
        raise InputError(f"{origin}: the answer {texts['answer']!r} is not in its passage {passage!r:.80}")
    question = with_passages(texts["question"], [passage] if passage else [])
    return Fact(texts["subject"], question, texts["beginning"], texts["answer"]), passage


def _others(values: Sequence[str], value: str) -> tuple[str, ...]:
    others = [each for each in values if each != value]
    random.Random(f"others-{value}").shuffle(others)
    return tuple(others[:MOST_OTHERS])
