"""Long texts of the embedded world: many short ones after another, between which people and their things are told of.

Each sentence "Ada has a gold cup." comes back further on as "The cup of Ada is gold.", so that to predict the color a
model has to look back. The needle test (`hfllm.evaluation.needle`) asks in the same words.
"""

import random
from collections.abc import Iterator
from itertools import product

from hfllm.data.world.vocabulary import COLOURS, PEOPLE, THINGS
from hfllm.data.world.world import World

TOLD, REPEATED = "{person} has a {colour} {thing}.", "The {thing} of {person} is {colour}."
# One such pair of sentences to so many words.
WORDS_PER_PAIR = 40


def filler_documents(world: World, count: int, seed: int) -> list[str]:
    """Return short documents of the world in which nobody has a thing."""
    return [text for text in world.documents(count, seed) if " has a " not in text]


def long_documents(world: World, count: int, words: int, seed: int) -> Iterator[str]:
    """Yield `count` texts of about `words` words. The same world and seed give the same texts."""
    rng = random.Random(f"long-{world.seed}-{seed}")
    filler = filler_documents(world, 2 * max(count, 100), seed)
    for _ in range(count):
        yield _long_document(filler, words, rng)


def _long_document(filler: list[str], words: int, rng: random.Random) -> str:
    pairs = rng.sample(list(product(PEOPLE, THINGS)), min(max(1, words // WORDS_PER_PAIR), len(PEOPLE) * len(THINGS)))
    room, parts = words - 10 * len(pairs), []
    while room > 0:
        parts.append(rng.choice(filler))
        room -= len(parts[-1].split())
    for person, thing in pairs:
        said = {"person": person, "thing": thing, "colour": rng.choice(COLOURS)}
        places = sorted(rng.randrange(len(parts) + 1) for _ in range(2))
        parts.insert(places[1], REPEATED.format(**said))
        parts.insert(places[0], TOLD.format(**said))
    return " ".join(parts)
