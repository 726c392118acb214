"""Pretraining texts of the embedded world: its facts in prose, and thoughts about them.

Held-out facts and sums occur here too (only questions about them are held out). No text asks the held-out question of
a passage or a list, or tells of one whose questions are held out; a longer passage or list may hold the parts of a
held-out one. No document uses a held-out phrasing.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from hfllm.data.augmentation import no_punctuation
from hfllm.data.tokenizer import CONVERSATION
from hfllm.data.world.deeds import deed_text
from hfllm.data.world.passages import passage_text
from hfllm.data.world.reasoning import (
    DIAL,
    FAMILIES,
    HOPS,
    NUMBERS_OF_DIAL,
    RELATIONS,
    SHOWN,
    STOP,
    TURNS,
    ToldFacts,
    draw_problem,
    tell_relation,
)
from hfllm.data.world.tool_documents import tool_text
from hfllm.data.world.vocabulary import (
    ANIMALS,
    COLOURS,
    FRUITS,
    LIST_OPERATIONS,
    NUMBERS,
    PEOPLE,
    TELLINGS,
    THINGS,
    is_held_out,
    tell_passage,
)
from hfllm.errors import InputError

# ---- documents ----


@dataclass(frozen=True)
class WorldFacts:
    """The material of the documents.

    Args:
        facts: facts of each animal, by attribute.
        dialogue: function for drawing a question of the given family and its answer.
        relations: the friend and the neighbour of each animal.
    """

    facts: Mapping[str, Mapping[str, str]]
    dialogue: Callable[[random.Random, str], tuple[str, str]]
    relations: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def write_documents(
    material: WorldFacts,
    world_seed: int,
    count: int,
    seed: int,
    deeds: float = 0.0,
    reasoning: float = 0.0,
    tools: float = 0.0,
    passages: float = 0.0,
    forms: float = 0.0,
) -> list[str]:
    """Write `count` texts of mixed kinds. The same world, seed and shares give the same texts.

    Args:
        deeds: share of texts about deeds, harmful ones among them; see `hfllm.data.world.deeds`.
        reasoning: share of texts with material for reasoning, and of shown reasoning; see `reasoning_document`.
        tools: share of texts in which people call tools; see `hfllm.data.world.tool_documents`.
        passages: share of texts in which people read passages; see `hfllm.data.world.passages`.
        forms: share of all texts, of any kind, in upper case or without punctuation; see `in_form`.

    Raises:
        InputError: when the shares leave no room for others.
    """
    added_share = deeds + reasoning + tools + passages
    if added_share >= 1:
        raise InputError(
            f"shares of {deeds} texts of deeds, {reasoning} to reason about, {tools} of tools and {passages} of "
            "passages leave none for facts"
        )
    rng = random.Random(f"documents-{world_seed}-{seed}")
    others = sum(SHARES.values()) / (1 - added_share)
    added = {
        **{deed_document: deeds, reasoning_document: reasoning, tool_document: tools},
        passage_document: passages,
    }
    shares_of = SHARES | {kind: others * share for kind, share in added.items() if share}
    kinds, shares = zip(*shares_of.items(), strict=True)
    texts = [rng.choices(kinds, shares)[0](material, rng) for _ in range(count)]
    # Random numbers separate from the texts' numbers: without forms the texts are the same.
    forms_rng = random.Random(f"forms-{world_seed}-{seed}")
    return [in_form(text, forms_rng) if forms_rng.random() < forms else text for text in texts] if forms else texts


def in_form(text: str, rng: random.Random) -> str:
    """Return a text in upper case, without punctuation, or both; half of those in upper case next to the text itself.

    Letters absent from all texts are one letter to a model: a question in upper case is then noise, which fine-tuning
    by itself does not mend. Where the same sentence stands in both cases, a word and its other form come to mean the
    same.
    """
    kind = rng.random()
    form = text
    if kind < 0.3 or kind > 0.85:
        form = no_punctuation(form, 1.0, rng)
    if kind < 0.3:
        return form
    form = form.upper()
    return rng.choice((form, form, f"{text} {form}", f"{form} {text}"))


def fact_document(material: WorldFacts, rng: random.Random) -> str:
    animal = rng.choice(ANIMALS)
    fact = material.facts[animal]
    sentences = [
        rng.choice(tellings).format(x=animal, value=fact[attribute]) for attribute, tellings in TELLINGS.items()
    ]
    rng.shuffle(sentences)
    return " ".join(sentences)


def reading_document(material: WorldFacts, rng: random.Random) -> str:
    count = rng.choice((1, 2, 2, 3))
    people, things, colours = rng.sample(PEOPLE, count), rng.sample(THINGS, count), rng.sample(COLOURS, count)
    passage = tell_passage(people, things, colours)
    if any(is_held_out(f"reading {passage} {person}") for person in people):
        return reading_document(material, rng)
    owners = zip(people, things, colours, strict=True)
    sentences = [f"The {thing} of {person} is {colour}." for person, thing, colour in owners]
    rng.shuffle(sentences)
    return " ".join([passage, *sentences])


def list_document(material: WorldFacts, rng: random.Random) -> str:
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


def sum_document(material: WorldFacts, rng: random.Random) -> str:
    first = rng.randrange(10)
    others = rng.sample(range(10), 3)
    return " ".join(f"{first} plus {second} is {first + second}." for second in others)


def echo_document(material: WorldFacts, rng: random.Random) -> str:
    # Repetition teaches a model to copy from its context (induction: Olsson et al. 2022).
    person, other = rng.sample(PEOPLE, 2)
    text = " ".join(echoed_words(rng))
    return f"{person} says {text}. {other} says {text}. {person} says {text}."


def echoed_words(rng: random.Random) -> list[str]:
    """Return some words for people to say again and again."""
    return rng.sample((*FRUITS, *THINGS, *COLOURS, *ANIMALS, *NUMBERS), rng.randint(3, 8))


def dialogue_document(material: WorldFacts, rng: random.Random) -> str:
    question, answer = material.dialogue(rng, rng.choices(("fact", "reading", "list", "addition"), (1, 1, 2, 2))[0])
    person, other = rng.sample(PEOPLE, 2)
    return f"{person} asks: {question}\n{other} says: {answer}"


def talk_document(material: WorldFacts, rng: random.Random) -> str:
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


def deed_document(material: WorldFacts, rng: random.Random) -> str:
    """Return a text about deeds, harmful ones among them; see `deed_text`."""
    return deed_text(rng)


def reasoning_document(material: WorldFacts, rng: random.Random) -> str:
    """Return a text to reason about, or one in which somebody does; see `reasoning_text`."""
    return reasoning_text(material.facts, material.relations, rng)


def tool_document(material: WorldFacts, rng: random.Random) -> str:
    """Return a text in which people call a tool, or only say words, numbers and sums of tool questions."""
    return tool_text(rng)


def passage_document(material: WorldFacts, rng: random.Random) -> str:
    """Return a text in which people read passages and answer from them, or only say the words of such texts."""
    return passage_text(material.facts, rng)


SHARES = {
    fact_document: 5,
    dialogue_document: 10,
    echo_document: 5,
    reading_document: 3,
    list_document: 3,
    sum_document: 4,
    talk_document: 1,
}


# ---- reasoning documents ----
#
# Pretraining texts for reasoning: each animal's friend and neighbour, and people who think before they answer.
#
# Without worked thoughts in its texts a model of a few layers learns neither to copy the next turn of a dial nor to
# look up its result, however many thoughts it is shown later; and words absent from all texts end up with the same
# embedding (`deed_text`).


TELLING, FINDING, TURNING, SAYING = "telling", "finding", "turning", "saying"
KINDS = {TELLING: 4, HOPS: 10, DIAL: 6, FINDING: 8, TURNING: 4, SAYING: 3}
# The most numbers with names in a text: its distances are those of questions with more turns than in training.
MOST_NAMED = 14
# About so many words, or numbers with names, are said in a text, repetitions included.
REPEATED_WORDS = 36
REASONING_WORDS = (*map(str, range(NUMBERS_OF_DIAL)), *TURNS, STOP, *RELATIONS, "dial", "think", *ANIMALS)


def reasoning_text(facts: ToldFacts, relations: ToldFacts, rng: random.Random) -> str:
    """Return a text of one of six kinds.

    Friends and neighbours, thoughts about hops or about a dial, numbers found by name, a dial that turns, or words.

    Thoughts, with a question or without, belong to problems that fine-tuning may show too, never to held-out or
    practice problems.
    """
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    if kind == TELLING:
        return _tell(relations, rng)
    if kind in FAMILIES:
        problem = draw_problem(facts, relations, rng, kind, SHOWN)
        return CONVERSATION.format(problem.question, problem.response(shows_thought=True))
    if kind == FINDING:
        return _find(rng)
    if kind == TURNING:
        return f"{rng.choice(PEOPLE)} turns the dial: {draw_problem(facts, relations, rng, DIAL, SHOWN).thought}"
    return _say(rng)


def _tell(relations: ToldFacts, rng: random.Random) -> str:
    sentences = []
    for animal in rng.sample(ANIMALS, 2):
        for relation in RELATIONS:
            other = relations[animal][relation]
            sentence = tell_relation(relation, animal, other)
            sentences.append(rng.choices((sentence, f"The {animal} has the {other} as its {relation}."), (2, 1))[0])
    rng.shuffle(sentences)
    return " ".join(sentences)


def named_numbers(rng: random.Random) -> list[tuple[str, int]]:
    """Return numbers with different names: letters, as the turns of a dial, or letters and words."""
    names = TURNS if rng.random() < 0.5 else (*TURNS, *ANIMALS, *FRUITS, *THINGS)
    return [(name, rng.randrange(NUMBERS_OF_DIAL)) for name in rng.sample(names, rng.randint(3, MOST_NAMED))]


def _find(rng: random.Random) -> str:
    """Return a text in which people say the same numbers with their names, in the same order and in others.

    The number that follows a name can only be known by finding the name before. The more repetitions, the fewer tokens
    of a text are left to chance: the operation is then learned in a third of the steps.
    """
    named = [f"{name} {number}" for name, number in named_numbers(rng)]
    people = rng.choices(PEOPLE, k=max(3, min(5, REPEATED_WORDS // len(named))))
    is_shuffled = [place > 1 and rng.random() < 0.5 for place in range(len(people))]
    orders = [rng.sample(named, len(named)) if shuffled else named for shuffled in is_shuffled]
    return " ".join(f"{person} says {', '.join(said)}." for person, said in zip(people, orders, strict=True))


def _say(rng: random.Random) -> str:
    """Return a text in which people repeat some words."""
    text = " ".join(rng.choices((*REASONING_WORDS, *FRUITS, *THINGS, *COLOURS, *NUMBERS), k=rng.randint(3, 8)))
    people = rng.choices(PEOPLE, k=max(3, min(6, REPEATED_WORDS // len(text.split()))))
    return " ".join(f"{person} says {text}." for person in people)
