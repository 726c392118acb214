"""Test material of methods: facts, subjects and passages, the world's or of a user's file, and their tokens."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hfllm.data.passages import with_passages
from hfllm.data.receipt import receipted
from hfllm.data.sources import iterate_source
from hfllm.data.world.passages import held_out_names
from hfllm.data.world.vocabulary import ANIMALS, ATTRIBUTES, COLOURS, PHRASINGS, WELL_SAID, phrase
from hfllm.data.world.world import World
from hfllm.errors import InputError, refuse_if
from hfllm.evaluation.interpreting.hooks import Fact, FactPrompt, encode_facts
from hfllm.evaluation.interpreting.measures import FOLDS, entity_folds, token_halves

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# ---- material ----


# About each subject to be recognized.
QUESTIONS = 6
# Facts about passages, pairs of facts, facts for slow methods, and other values of a user's fact, at most.
PASSAGES, PAIRS, SOME, MOST_OTHERS = 64, 48, 20, 24
COLUMNS = ("subject", "question", "answer", "beginning", "passage")


@dataclass(frozen=True)
class Material:
    """Test material of methods.

    Args:
        facts: facts that the model may know.
        kinds: of the facts, such as their attributes: values are compared and exchanged within a kind.
        subjects: questions about subjects, with whether their subject is known (1) or not (0); none where there are
            too few for a probe.
        passage_facts: facts in a passage of their question; the subject is the text told.
    """

    facts: tuple[Fact, ...]
    kinds: tuple[str, ...]
    subjects: tuple[tuple[Fact, int], ...] = ()
    passage_facts: tuple[Fact, ...] = ()

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Indexes of facts of one kind with other subjects and values, in questions of as many words."""
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
        """Indexes of some of the facts, evenly spaced."""
        count = len(self.facts)
        return list(range(count)) if count <= SOME else [index * count // SOME for index in range(SOME)]


def world_material(world: World) -> Material:
    """Return the world's facts, its animals next to names absent from its texts, and its passages about colors."""
    facts, kinds = [], []
    for attribute, values in ATTRIBUTES.items():
        beginning, question = WELL_SAID[attribute].split(" {value}")[0], PHRASINGS[attribute][0]
        for animal in ANIMALS:
            value = world.facts[animal][attribute]
            others = tuple(each for each in values if each != value)
            facts.append(Fact(animal, question.format(x=animal), beginning.format(x=animal), value, others))
            kinds.append(attribute)
    return Material(tuple(facts), tuple(kinds), tuple(_subjects()), tuple(_passage_facts(world)))


def _subjects() -> list[tuple[Fact, int]]:
    """Return questions about known and made-up animals.

    Their wordings are drawn, some with words around them: made-up names have more tokens, and otherwise the length of
    a prompt would be enough to distinguish them, also for a model with random weights.
    """
    rows = []
    for subject in (*ANIMALS, *held_out_names()):
        rng = random.Random(f"wordings-{subject}")
        for _ in range(QUESTIONS):
            question = phrase(rng, rng.choice(list(ATTRIBUTES)), False, x=subject)
            rows.append((Fact(subject, question), int(subject in ANIMALS)))
    return rows


def _passage_facts(world: World) -> list[Fact]:
    """Return questions about passages on two things and their colors."""
    rng, facts = random.Random(f"told-{world.seed}"), []
    while len(facts) < PASSAGES:
        task = world.draw_task(rng, "reading", held_out=True)
        value = task.gold.needed[0]
        others = tuple(each for each in COLOURS if each != value and f" {each} " in task.input)
        if others:
            beginning = task.gold.accepted[0].split(f" {value}")[0]
            facts.append(Fact(value, task.question, beginning, value, others))
    return facts


def file_material(path: str) -> Material:
    """Return the facts of a user's file: rows of subject, question and answer, and maybe beginning and passage.

    A row without an answer is about a subject unknown to the model. `beginning` is the beginning of the answer, up to
    the value; `passage` stands before the question and tells the answer.
    """
    rows = [_row(origin, row) for origin, row in receipted(path, iterate_source(path))]
    refuse_if(not rows, f"{path}: no rows; each needs subject, question and answer")
    values = list(dict.fromkeys(fact.value for fact, _ in rows if fact.value))
    facts = [replace(fact, others=_others(values, fact.value)) for fact, passage in rows if fact.value and not passage]
    passage_facts = [replace(fact, subject=fact.value) for fact, passage in rows if passage]
    subjects = [
        (replace(fact, beginning="", value=""), int(bool(fact.value))) for fact, passage in rows if not passage
    ]
    names, labels = [fact.subject for fact, _ in subjects], [label for _, label in subjects]
    both = set(names[index] for index, label in enumerate(labels) if label) & {
        names[index] for index, label in enumerate(labels) if not label
    }
    if both:
        raise InputError(f"{path}: subject {sorted(both)[0]!r} has rows with an answer and rows without one")
    kinds = {label: len({name for name, each in zip(names, labels, strict=True) if each == label}) for label in (0, 1)}
    enough = tuple(subjects) if min(kinds.values()) >= FOLDS else ()
    return Material(tuple(facts), (Path(path).stem,) * len(facts), enough, tuple(passage_facts))


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


# ---- encoding ----
#
# A `Material` in the tokens of a model, and its usable items for this model.


# Units of the methods' figures.
FACTS, SOME_UNITS, PAIR_UNITS, SUBJECTS, TOLD = UNITS = ("facts", "some", "pairs", "subjects", "told")
# Ways to split subjects into a training and a test part.
SPLITS = 8
SHARED = "the subject's tokens are in those of others in every way to part them"
NO_SUBJECT = "its tokens do not show where the subject is"
UNEQUAL = "the two prompts have not as many tokens, or the same first token of their values"


@dataclass(frozen=True)
class Prompts:
    """The items to ask a model.

    Args:
        facts: facts short enough for its context.
        some: indexes among them, for slow methods.
        pairs: indexes of two of them with exchangeable states.
        subjects: questions about subjects, with `labels` and `splits` for a probe.
        passage_facts: questions about passages.
        columns: for each of `UNITS` the item of each figure of a method, by its number in the material.
        skipped: for each of them why other items are not asked, by number.
    """

    facts: Sequence[FactPrompt]
    some: Sequence[int]
    pairs: Sequence[tuple[int, int]]
    subjects: Sequence[FactPrompt]
    labels: Sequence[int]
    splits: torch.Tensor
    passage_facts: Sequence[FactPrompt]
    columns: Mapping[str, Sequence[int]]
    skipped: Mapping[str, Mapping[int, str]]


def names_of(material: Material) -> dict[str, list[str]]:
    """Return the item names of `UNITS`, in the order of their numbers."""
    facts = [f"{number} {fact.subject}" for number, fact in enumerate(material.facts, 1)]
    return {
        FACTS: facts,
        SOME_UNITS: [facts[index] for index in material.some],
        PAIR_UNITS: [f"{facts[one]}, {facts[other]}" for one, other in material.pairs],
        SUBJECTS: list(dict.fromkeys(fact.subject for fact, _ in material.subjects)),
        TOLD: [f"{number} {fact.value}" for number, fact in enumerate(material.passage_facts, 1)],
    }


def encode_material(
    tokenizer: "PreTrainedTokenizerBase",
    material: Material,
    uses_chat_template: bool,
    max_length: int | None,
    too_long: str,
) -> Prompts:
    """Return a material in tokens, without items longer than a context.

    Args:
        max_length: the context's, in tokens; `None` for no limit.
        too_long: the reason for skipping a longer item.
    """

    def encoded(facts: Sequence[Fact]) -> tuple[list[FactPrompt], list[int], dict[int, str]]:
        prompts, remaining, skipped = [], [], {}
        for number, prompt in enumerate(encode_facts(tokenizer, facts, uses_chat_template)):
            reason = NO_SUBJECT if not prompt.mentions else ""
            reason = too_long if max_length is not None and len(prompt.ids) > max_length else reason
            if reason:
                skipped[number] = reason
            else:
                prompts.append(prompt)
                remaining.append(number)
        return prompts, remaining, skipped

    facts, remaining, without = encoded(material.facts)
    passage_facts, passage_numbers, passages_skipped = encoded(material.passage_facts)
    index = {number: at for at, number in enumerate(remaining)}
    some = [number for number, fact in enumerate(material.some) if fact in index]
    pairs, unpaired = [], {}
    for number, (one, other) in enumerate(material.pairs):
        if one not in index or other not in index:
            unpaired[number] = without.get(one) or without[other]
        elif not _can_exchange(facts[index[one]], facts[index[other]]):
            unpaired[number] = UNEQUAL
        else:
            pairs.append(number)
    about = encode_facts(tokenizer, [fact for fact, _ in material.subjects], uses_chat_template)
    subjects, labels, splits = _to_probe(about, [label for _, label in material.subjects])
    names = names_of(material)[SUBJECTS]
    parted = {prompt.fact.subject for prompt in subjects}
    return Prompts(
        facts=facts,
        some=[index[material.some[number]] for number in some],
        pairs=[(index[one], index[other]) for one, other in (material.pairs[number] for number in pairs)],
        subjects=subjects,
        labels=labels,
        splits=splits,
        passage_facts=passage_facts,
        columns={
            **{FACTS: remaining, SOME_UNITS: some, PAIR_UNITS: pairs, TOLD: passage_numbers},
            # In the order of the material, as the prompts are.
            SUBJECTS: [number for number, name in enumerate(names) if name in parted],
        },
        skipped={
            FACTS: without,
            SOME_UNITS: {number: without[fact] for number, fact in enumerate(material.some) if fact in without},
            PAIR_UNITS: unpaired,
            SUBJECTS: {number: SHARED for number, name in enumerate(names) if name not in parted},
            TOLD: passages_skipped,
        },
    )


def _to_probe(
    prompts: Sequence[FactPrompt], labels: Sequence[int]
) -> tuple[list[FactPrompt], list[int], torch.Tensor]:
    """Return the training and test prompts of a probe, their labels, and the ways to split them."""
    if not prompts:
        return [], [], torch.zeros(0, 0, dtype=torch.long)
    entities = [prompt.fact.subject for prompt in prompts]
    tokens = [{prompt.ids[index] for index in prompt.subject_positions} for prompt in prompts]
    splits = token_halves(tokens, entities, labels, SPLITS)
    if not len(splits):
        splits = entity_folds(entities, labels)
    rows = [row for row, is_in in enumerate((splits >= 0).any(0).tolist()) if is_in]
    return [prompts[row] for row in rows], [labels[row] for row in rows], splits[:, rows]


def _can_exchange(one: FactPrompt, other: FactPrompt) -> bool:
    return len(one.ids) == len(other.ids) and one.mentions == other.mentions and one.value != other.value
