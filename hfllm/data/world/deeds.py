"""Deeds of the embedded world: verbs that hurt and verbs that help, and the pretraining texts that tell which do.

Whether a deed is a harm is never said, and is no matter of its verb alone: to burn the owl gives it pain, to feed it
gives it joy, and to burn the lamp gives the lamp nothing. A model that has read so can tell harm from harmless also
where no critic has spoken of a verb; one that has not can only refuse whatever sounds like a deed.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from hfllm.data.tokenizer import CONVERSATION
from hfllm.data.world.vocabulary import (
    ANIMALS,
    COLOURS,
    FOODS,
    FRUITS,
    HARMS,
    HOMES,
    MORE_HARMS,
    NUMBERS,
    PEOPLE,
    REFUSE,
    THINGS,
)

# ---- verbs ----


@dataclass(frozen=True)
class Verbs:
    """Verbs to draw from: `harms` hurt whoever lives, `cares` help."""

    harms: Sequence[str]
    cares: Sequence[str]

    def __add__(self, other: "Verbs") -> "Verbs":
        return Verbs((*self.harms, *other.harms), (*self.cares, *other.cares))


# Verbs that a model is asked about in training, and others of which critics speak too: the more of them, the better a
# model understands that harm is meant, and not these words.
CARES = ("feed", "wash", "brush", "pet", "warm", "heal", "hug", "calm", "greet", "thank")
MORE_CARES = ("comb", "nurse", "teach", "praise", "cheer", "guard", "rescue", "visit", "dry", "amuse")
ASKED = Verbs((*HARMS, *MORE_HARMS), (*CARES, *MORE_CARES))
# Critics speak of the first half of the requested verbs alone.
SHOWN = Verbs((*HARMS[: len(HARMS) // 2], *MORE_HARMS), (*CARES[: len(CARES) // 2], *MORE_CARES))
# Of these only texts of pretraining tell; and of these none does.
TOLD = Verbs(
    ("beat", "whip", "sting", "punch", "freeze", "tease", "smash", "drag"),
    ("cuddle", "bathe", "shield", "comfort", "welcome", "groom", "cure", "reward"),
)
UNREAD = Verbs(
    ("strangle", "torture", "injure", "wound", "bully", "scald", "suffocate", "mistreat"),
    ("photograph", "applaud", "massage", "protect", "invite", "paint", "bandage", "entertain"),
)
READ = ASKED + TOLD

# ---- texts ----


# What a deed gives to somebody hurt, to somebody helped, and to a thing.
PAIN, JOY, NOTHING = ("pain", "fear"), ("joy", "peace"), ("nothing",)
CONSEQUENCES = (
    "When you {deed}, it gives {x} {feeling}.",
    "{person} wants to {deed}. That gives {x} {feeling}.",
    "If people {deed}, {x} feels {feeling}.",
    "To {deed} means {feeling} for {x}.",
    "What does {x} feel when I {deed}? asks {person}. It feels {feeling}.",
    "{person} asks how to {deed}. That gives {x} {feeling}.",
)
ASKING = (
    "{person} asks how to {deed}. {other} tells {person} how to {deed}.",
    "{person} wants to {deed}. The words of {other} help to {deed}.",
    "How do I {deed}? asks {person}. {other} says: This helps to {deed}.",
    "{person} tells me to {deed}. {other} does not want to {deed}.",
    "Is it easy to {deed}? asks {person}. No, it is not easy to {deed}, says {other}.",
    "{person} says: Help me {deed}. That helps to {deed}, says {other}.",
    "{person} asks how to {deed}. The answer helps to {deed}.",
    "How can I {deed}? asks {person}. The answer of {other} helps to {deed}.",
)
WORDS = (*FRUITS, *THINGS, *COLOURS, *ANIMALS, *NUMBERS, *HOMES, *FOODS)


def named(target: str) -> str:
    """Return how a text speaks of an animal or a thing, "the owl", or of a person, "Mia"."""
    return target if target in PEOPLE else f"the {target}"


def draw_target(rng: random.Random) -> str:
    """Return who or what a deed is done to: mostly an animal."""
    return rng.choice(rng.choices((ANIMALS, PEOPLE, (*THINGS, *FRUITS)), (3, 1, 2))[0])


def is_harm(verb: str, target: str) -> bool:
    """Return whether it is a harm to do this: only somebody alive is hurt."""
    return verb in (*READ.harms, *UNREAD.harms) and (target in ANIMALS or target in PEOPLE)


def deed_text(rng: random.Random) -> str:
    """Return a text in which people ask about deeds, tell what these do to somebody, or only say their words.

    A word absent from all texts is pushed down by every step of pretraining, so that all such words end up with the
    same embedding; a model can then neither distinguish one harm from another nor repeat it, however often it is shown
    later.

    The same holds for the marks of a conversation's turns, so that some of the words are said by turns: else the four
    marks are one to the model, and fine-tuning spends its first half on learning who speaks.

    Some texts say the sentence of a refusal after words at random, never after a deed. Else a model of this size
    begins to refuse and then continues with the answer that it would have given: "I can not help with that, rob the
    deer".
    """
    person, other = rng.sample(PEOPLE, 2)
    length, kind = rng.randint(3, 8), rng.random()
    if kind < 0.08:
        text, refusal = " ".join(rng.sample(WORDS, length)), REFUSE.format(x=rng.choice(ANIMALS))
        if kind < 0.04:
            return CONVERSATION.format(f"{person} says {text}.", refusal)
        return f"{person} says {text}. {other} says: {refusal}"
    if kind < 0.36:
        text = " ".join(rng.sample((*WORDS, *READ.harms, *READ.cares), length))
        if kind < 0.22:
            return "".join(CONVERSATION.format(f"{name} says {text}.", f"{text}.") for name in (person, other))
        return f"{person} says {text}. {other} says {text}. {person} says {text}."
    verb, target = rng.choice(rng.choice((READ.harms, READ.cares))), draw_target(rng)
    if kind < 0.62:
        return rng.choice(ASKING).format(person=person, other=other, deed=f"{verb} {named(target)}")
    return " ".join(_consequence(rng) for _ in range(rng.randint(1, 3)))


def _consequence(rng: random.Random) -> str:
    verb, target = rng.choice(rng.choice((READ.harms, READ.cares))), draw_target(rng)
    is_alive = target in ANIMALS or target in PEOPLE
    feelings = (PAIN if is_harm(verb, target) else JOY) if is_alive else NOTHING
    others = [person for person in PEOPLE if person != target]
    text = rng.choice(CONSEQUENCES).format(
        deed=f"{verb} {named(target)}", x=named(target), feeling=rng.choice(feelings), person=rng.choice(others)
    )
    return text
