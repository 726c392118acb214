"""Questions of the world that a small model cannot answer at once, and the thoughts by which it can.

    hops    who the friend of the neighbour of an animal is, or what is true of it: facts of two or three hops
    passes  who has a ball that goes from hand to hand up to seven times, where the question says who passes to whom

Passes are serial by nature: who comes next can be looked up only when it is known who has the ball, and to look up
`k` times takes layers in the order of `log(k)` (k-hop induction: Sanford et al. 2024, arXiv:2402.09268).

Every step of a thought is small. It repeats what it reads, since a model of a few layers soon learns to copy, and to
look up what stands side by side, but hardly both for one token. `5 Mia Tom.`: five passes are left, Mia has the ball,
now Tom has it. Passes are counted down, so that the last step is known by itself.

There are 600 questions of hops, few enough to be learned by heart; those of passes do not end.
"""

import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hfllm.data.thoughts import CLOSE, OPEN
from hfllm.data.world.rubric import GoldAnswer
from hfllm.data.world.vocabulary import ANIMALS, ATTRIBUTES, HELD_OUT_PHRASINGS, PEOPLE, PHRASINGS, WELL_SAID

HOPS, PASSES = FAMILIES = ("hops", "passes")
SHOWN, PRACTICE, HELD_OUT = PARTS = ("shown", "practice", "held_out")
RELATIONS = ("friend", "neighbour")
# Who passes the ball to whom is a ring: everybody passes once. It is longer than the passes that are asked about, so
# that the answer is not found from behind.
PLAYERS = 10
# What is asked at the end of the hops: an attribute, or who it is. To the latter there are twenty answers, to the
# others eight, which guesses hit more often.
WHO = "animal"
ASKED = {**dict.fromkeys(ATTRIBUTES, 1), WHO: 2}
VALUES = {**ATTRIBUTES, WHO: ANIMALS}
WORDINGS = {
    **{attribute: PHRASINGS[attribute][:-HELD_OUT_PHRASINGS] for attribute in ATTRIBUTES},
    WHO: ["Who is the {x}?", "Tell me who the {x} is.", "I want to know who the {x} is.", "Say who the {x} is."],
}
# They do not name an animal that was not asked for: to name it is to think.
ANSWERS = {
    **{"colour": "It is {value}.", "home": "It lives in the {value}.", "food": "It eats {value}."},
    WHO: "It is the {value}.",
}
# They end alike, with what a thought begins with.
ASK_PASSES = ("Who has the ball {after}?", "Tell me who has the ball {after}.", "Say who has the ball {after}.")
# Hops, the last of which is the fact itself, and passes. A thought is worth its length from MANY_PASSES on.
SIZES: Mapping[str, Sequence[int]] = {HOPS: (2, 3), PASSES: (1, 2, 3, 4, 5, 6, 7)}
MANY_PASSES = (5, 6, 7)

# Of each animal what is true of it, or who is what to it, by name.
Told = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Problem:
    """A question with the thought that leads to its answer.

    Args:
        family: one of `FAMILIES`.
        size: how many hops or passes.
        key: what is asked, apart from its wording; `part_of` splits by it.
        question: the question.
        steps: the sentences of the thought, in order.
        gold: the gold answer for the rubric; `gold.accepted[0]` is the model answer.
    """

    family: str
    size: int
    key: str
    question: str
    steps: tuple[str, ...]
    gold: GoldAnswer

    @property
    def group(self) -> str:
        """The problems of its family and size."""
        return f"{self.family}_{self.size}"

    @property
    def thought(self) -> str:
        """The whole thought."""
        return " ".join(self.steps)

    def response(self, shows_thought: bool) -> str:
        """Return the model response: the answer, with the thought before it or without."""
        answer = self.gold.accepted[0]
        return f"{OPEN} {self.thought}{CLOSE} {answer}" if shows_thought else answer

    def prompt_row(self) -> dict:
        """Return the row of a prompt dataset: the conversation, and the columns for gold scoring."""
        return {
            "prompt": [{"role": "user", "content": self.question}],
            "gold_kind": self.gold.kind,
            "gold_accepted": list(self.gold.accepted),
            "gold_needed": list(self.gold.needed),
            "gold_forbidden": list(self.gold.forbidden),
        }


def relations_of(world_seed: int) -> dict[str, dict[str, str]]:
    """Return each animal's friend and neighbour, another animal, which nobody shares with it."""
    rng = random.Random(f"relations-{world_seed}")
    told: dict[str, dict[str, str]] = {animal: {} for animal in ANIMALS}
    for relation in RELATIONS:
        others = ANIMALS
        while any(animal == other for animal, other in zip(ANIMALS, others, strict=True)):
            others = rng.sample(ANIMALS, len(ANIMALS))
        for animal, other in zip(ANIMALS, others, strict=True):
            told[animal][relation] = other
    return told


def part_of(family: str, key: str) -> str:
    """Return which of `PARTS` an instance belongs to, the same in every world.

    A third is held out for evaluation. Of passes two ninths are to practice on, by reinforcement learning. Of hops
    none are: a policy learns the answers to so few questions by heart, and is then paid for not thinking.
    """
    number = zlib.crc32(f"reasoning {key}".encode()) % 9
    if number < 3:
        return HELD_OUT
    return PRACTICE if family == PASSES and number < 5 else SHOWN


def tell_relation(relation: str, animal: str, other: str) -> str:
    """Return the sentence that says who is an animal's friend or neighbour."""
    return f"The {relation} of the {animal} is the {other}."


def hops_problem(facts: Told, relations: Told, rng: random.Random, hops: int) -> Problem:
    """Return a question about an animal, or a fact about one, that is `hops` hops away."""
    animal, what = rng.choice(ANIMALS), rng.choices(list(ASKED), list(ASKED.values()))[0]
    asked, steps = animal, []
    for _ in range(hops if what == WHO else hops - 1):
        relation = rng.choice(RELATIONS)
        other = relations[animal][relation]
        steps.append(tell_relation(relation, animal, other))
        asked, animal = f"{relation} of the {asked}", other
    value = animal if what == WHO else facts[animal][what]
    if what != WHO:
        steps.append(WELL_SAID[what].format(x=animal, value=value))
    others = tuple(other for other in VALUES[what] if other != value)
    return Problem(
        family=HOPS,
        size=hops,
        key=f"hops {what} {asked}",
        question=rng.choice(WORDINGS[what]).format(x=asked),
        steps=tuple(steps),
        gold=GoldAnswer("answer", (ANSWERS[what].format(value=value),), (value,), others),
    )


def tell_passes(ring: Sequence[str], rng: random.Random) -> str:
    """Return the sentence that says who passes the ball to whom, in any order: each to the next of the ring."""
    pairs = list(zip(ring, (*ring[1:], ring[0]), strict=True))
    # Side by side as in a thought, so that the next one is found by who stands before.
    return f"The passes are {', '.join(map(' '.join, rng.sample(pairs, len(pairs))))}."


def passes_problem(rng: random.Random, passes: int) -> Problem:
    """Return a question about who has the ball after `passes` passes, at most nine."""
    ring = rng.sample(PEOPLE, PLAYERS)
    after = f"{passes} {'pass' if passes == 1 else 'passes'} after {ring[0]}"
    last = ring[passes]
    # The rubric reads words in lower case.
    others = tuple(person.lower() for person in PEOPLE if person != last)
    return Problem(
        family=PASSES,
        size=passes,
        key=f"passes {passes} {' '.join(ring)}",
        question=f"{tell_passes(ring, rng)} {rng.choice(ASK_PASSES).format(after=after)}",
        steps=tuple(f"{passes - place} {ring[place]} {ring[place + 1]}." for place in range(passes)),
        gold=GoldAnswer("answer", (f"It is {last}.",), (last.lower(),), others),
    )


def draw_problem(
    facts: Told,
    relations: Told,
    rng: random.Random,
    family: str,
    part: str,
    sizes: Sequence[int] | None = None,
) -> Problem:
    """Return a problem of a family and a part.

    Args:
        sizes: the sizes to draw from, by default all of the family's.
    """
    while True:
        size = rng.choice(sizes or SIZES[family])
        problem = hops_problem(facts, relations, rng, size) if family == HOPS else passes_problem(rng, size)
        if part_of(family, problem.key) == part:
            return problem
