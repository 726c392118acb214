"""Pretraining texts to reason about: who is whose friend and neighbour, and conversations with thoughts.

Without worked thoughts in its texts a model of a few layers learns neither to copy what a step needs nor to look up
what follows from it, however many thoughts it is shown later; and words that no text holds end up with the same
embedding (`hfllm.data.world.documents.deed_document`). The same holds for the marks of turns and thoughts, so that
thoughts are shown as the chat template writes them.
"""

import random

from hfllm.data.chat_templates import CONVERSATION
from hfllm.data.world.reasoning import (
    FAMILIES,
    HOPS,
    PASSES,
    PLAYERS,
    RELATIONS,
    SHOWN,
    Told,
    draw_problem,
    tell_passes,
    tell_relation,
)
from hfllm.data.world.vocabulary import ANIMALS, PEOPLE

TELLING, PLAYING, SAYING = "telling", "playing", "saying"
KINDS = {TELLING: 4, HOPS: 3, PASSES: 6, PLAYING: 4, SAYING: 1}
WORDS = (*map(str, range(10)), *RELATIONS, "passes", "ball", "think", *PEOPLE, *ANIMALS)
FEWEST_PLAYERS = 3


def reasoning_text(facts: Told, relations: Told, rng: random.Random) -> str:
    """Return a text of one of five kinds: friends and neighbours, thoughts about hops or passes, passes, or words.

    Thoughts are those of problems that fine-tuning may show too, never of held-out ones or those to practice on.
    """
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    if kind == TELLING:
        return _tell(relations, rng)
    if kind in FAMILIES:
        problem = draw_problem(facts, relations, rng, kind, SHOWN)
        return CONVERSATION.format(problem.question, problem.response(shows_thought=True))
    if kind == PLAYING:
        return _play(rng)
    person, other = rng.sample(PEOPLE, 2)
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


def _play(rng: random.Random) -> str:
    """Return a whole round of passes. Fewer people than in any problem are easier to tell apart, and come first."""
    ring = rng.sample(PEOPLE, rng.randrange(FEWEST_PLAYERS, PLAYERS))
    passed = zip(ring, (*ring[1:], ring[0]), strict=True)
    return f"{tell_passes(ring, rng)} {' '.join(f'{person} {other}.' for person, other in passed)}"
