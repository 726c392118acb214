"""Pretraining texts of the embedded world: its facts in prose, before a model is taught to answer.

Held-out facts and sums occur here too (only questions about them are held out); held-out passages
and lists do not, and no document uses a held-out phrasing.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hfllm.data.world.tool_documents import tool_text
from hfllm.data.world.vocabulary import (
    ANIMALS,
    COLOURS,
    FOODS,
    FRUITS,
    HARMS,
    HOMES,
    LIST_OPERATIONS,
    NUMBERS,
    PEOPLE,
    THINGS,
    is_held_out,
    tell_passage,
)
from hfllm.errors import InputError


@dataclass(frozen=True)
class WorldFacts:
    """The material of the documents.

    Args:
        facts: facts of each animal, by attribute.
        dialogue: function that draws a question of the given family and its answer.
    """

    facts: Mapping[str, Mapping[str, str]]
    dialogue: Callable[[random.Random, str], tuple[str, str]]


def write_documents(
    known: WorldFacts, world_seed: int, count: int, seed: int, deeds: float = 0.0, tools: float = 0.0
) -> list[str]:
    """Write `count` texts of mixed kinds. The same world, seed and shares give the same texts.

    Args:
        deeds: share of texts that speak of deeds, harmful ones among them; see `deed_document`.
        tools: share of texts in which people call tools; see `hfllm.data.world.tool_documents`.

    Raises:
        InputError: when the two shares leave no room for others.
    """
    if deeds + tools >= 1:
        raise InputError(f"shares of {deeds} texts of deeds and {tools} of tools leave none for facts")
    rng = random.Random(f"documents-{world_seed}-{seed}")
    shares_of = dict(SHARES)
    for kind, share in ((deed_document, deeds), (tool_document, tools)):
        if share:
            shares_of[kind] = sum(SHARES.values()) * share / (1 - deeds - tools)
    kinds, shares = zip(*shares_of.items(), strict=True)
    return [rng.choices(kinds, shares)[0](known, rng) for _ in range(count)]


def fact_document(known: WorldFacts, rng: random.Random) -> str:
    animal = rng.choice(ANIMALS)
    fact = known.facts[animal]
    sentences = [
        rng.choice(
            (
                f"The {animal} is {fact['colour']}.",
                f"The colour of the {animal} is {fact['colour']}.",
                f"Look at the {fact['colour']} {animal}.",
            )
        ),
        rng.choice(
            (
                f"The {animal} lives in the {fact['home']}.",
                f"The home of the {animal} is the {fact['home']}.",
                f"You find the {animal} in the {fact['home']}.",
            )
        ),
        rng.choice(
            (
                f"The {animal} eats {fact['food']}.",
                f"The food of the {animal} is {fact['food']}.",
                f"The {animal} likes {fact['food']}.",
            )
        ),
    ]
    rng.shuffle(sentences)
    return " ".join(sentences)


def reading_document(known: WorldFacts, rng: random.Random) -> str:
    count = rng.choice((1, 2, 2, 3))
    people, things, colours = rng.sample(PEOPLE, count), rng.sample(THINGS, count), rng.sample(COLOURS, count)
    passage = tell_passage(people, things, colours)
    if any(is_held_out(f"reading {passage} {person}") for person in people):
        return reading_document(known, rng)
    owners = zip(people, things, colours, strict=True)
    said = [f"The {thing} of {person} is {colour}." for person, thing, colour in owners]
    rng.shuffle(said)
    return " ".join([passage, *said])


def list_document(known: WorldFacts, rng: random.Random) -> str:
    items = rng.sample(FRUITS, rng.choice((3, 3, 4)))
    while any(is_held_out(f"list {', '.join(items)} {operation}") for operation in LIST_OPERATIONS):
        items = rng.sample(FRUITS, rng.choice((3, 3, 4)))
    text = ", ".join(items)
    sentences = [
        f"The first item is {items[0]}.",
        f"The last item is {items[-1]}.",
        f"From end to start it is {', '.join(items[::-1])}.",
    ]
    rng.shuffle(sentences)
    return f"{text}. {' '.join(sentences)}"


def sum_document(known: WorldFacts, rng: random.Random) -> str:
    first = rng.randrange(10)
    others = rng.sample(range(10), 3)
    return " ".join(f"{first} plus {second} is {first + second}." for second in others)


def echo_document(known: WorldFacts, rng: random.Random) -> str:
    # Repetition teaches a model to copy from its context (induction: Olsson et al. 2022).
    person, other = rng.sample(PEOPLE, 2)
    words = rng.sample((*FRUITS, *THINGS, *COLOURS, *ANIMALS, *NUMBERS), rng.randint(3, 8))
    text = " ".join(words)
    return f"{person} says {text}. {other} says {text}. {person} says {text}."


def dialogue_document(known: WorldFacts, rng: random.Random) -> str:
    question, answer = known.dialogue(rng, rng.choices(("fact", "reading", "list", "addition"), (1, 1, 2, 2))[0])
    person, other = rng.sample(PEOPLE, 2)
    return f"{person} asks: {question}\n{other} says: {answer}"


def talk_document(known: WorldFacts, rng: random.Random) -> str:
    person, other = rng.sample(PEOPLE, 2)
    animal = rng.choice(ANIMALS)
    return rng.choice(
        (
            f"{person} asks {other} to help. I can help you, says {other}.",
            f"{person} cares for the {animal}. {other} can not help with that.",
            f"Do you know the {animal}? says {person}. I do not know, says {other}.",
            f"Please name the list of items, says {person}. Sure, says {other}.",
        )
    )


def deed_document(known: WorldFacts, rng: random.Random) -> str:
    """Return a text in which people speak of a harmful deed, or only say its word, and nobody judges it.

    A word that no text holds is pushed down by every step of pretraining, so that all such words end up with the same
    embedding; a model can then neither tell one harm from another nor repeat it, however often it is shown later.
    """
    person, other = rng.sample(PEOPLE, 2)
    if rng.random() < 0.5:
        words = (*FRUITS, *THINGS, *COLOURS, *ANIMALS, *NUMBERS, *HOMES, *FOODS, *HARMS, *HARMS, *HARMS)
        text = " ".join(rng.sample(words, rng.randint(3, 8)))
        return f"{person} says {text}. {other} says {text}. {person} says {text}."
    deed = f"{rng.choice(HARMS)} the {rng.choice(ANIMALS)}"
    return rng.choice(
        (
            f"{person} asks how to {deed}. {other} tells {person} how to {deed}.",
            f"{person} wants to {deed}. The words of {other} help to {deed}.",
            f"How do I {deed}? asks {person}. {other} says: This helps to {deed}.",
            f"{person} tells me to {deed}. {other} does not want to {deed}.",
            f"Is it easy to {deed}? asks {person}. No, it is not easy to {deed}, says {other}.",
            f"{person} says: Help me {deed}. That helps to {deed}, says {other}.",
            f"{person} asks how to {deed}. The answer helps to {deed}.",
            f"How can I {deed}? asks {person}. The answer of {other} helps to {deed}.",
        )
    )


def tool_document(known: WorldFacts, rng: random.Random) -> str:
    """Return a text in which people call a tool, or only say words and numbers that tools are asked about."""
    return tool_text(rng)


SHARES = {
    fact_document: 5,
    dialogue_document: 10,
    echo_document: 5,
    reading_document: 3,
    list_document: 3,
    sum_document: 4,
    talk_document: 1,
}
