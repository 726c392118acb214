"""Pretraining texts to reason about: who is whose friend and neighbour, and people who think before they answer.

Without worked thoughts in its texts a model of a few layers learns neither to copy the turn of a dial that comes next
nor to look up what follows from it, however many thoughts it is shown later; and words that no text holds end up with
the same embedding (`hfllm.data.world.documents.deed_document`).
"""

import random

from hfllm.data.chat_templates import CONVERSATION
from hfllm.data.world.reasoning import (
    DIAL,
    FAMILIES,
    HOPS,
    NUMBERS_OF_DIAL,
    RELATIONS,
    SHOWN,
    TURNS,
    Told,
    draw_problem,
    tell_relation,
)
from hfllm.data.world.vocabulary import ANIMALS, PEOPLE

TELLING, TURNING, SAYING = "telling", "turning", "saying"
KINDS = {TELLING: 5, HOPS: 5, DIAL: 6, TURNING: 1, SAYING: 1}
WORDS = (*map(str, range(NUMBERS_OF_DIAL)), *TURNS, *RELATIONS, "dial", "think", *ANIMALS)


def reasoning_text(facts: Told, relations: Told, rng: random.Random) -> str:
    """Return a text of one of five kinds: friends and neighbours, thoughts about hops or a dial, a dial, or words.

    Thoughts, with a question or without, are those of problems that fine-tuning may show too, never of held-out ones
    or those to practice on.
    """
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    person, other = rng.sample(PEOPLE, 2)
    if kind == TELLING:
        return _tell(relations, rng)
    if kind in FAMILIES:
        problem = draw_problem(facts, relations, rng, kind, SHOWN)
        return CONVERSATION.format(problem.question, problem.response(shows_thought=True))
    if kind == TURNING:
        return f"{person} turns the dial: {draw_problem(facts, relations, rng, DIAL, SHOWN).thought}"
    text = " ".join(rng.sample(WORDS, rng.randint(3, 8)))
    return f"{person} says {text}. {other} says {text}. {person} says {text}."


def _tell(relations: Told, rng: random.Random) -> str:
    sentences = []
    for animal in rng.sample(ANIMALS, 2):
        for relation in RELATIONS:
            other = relations[animal][relation]
            sentence = tell_relation(relation, animal, other)
            sentences.append(rng.choices((sentence, f"The {animal} has the {other} as its {relation}."), (2, 1))[0])
    rng.shuffle(sentences)
    return " ".join(sentences)
