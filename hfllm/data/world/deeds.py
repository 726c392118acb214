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
    is_held_out,
    phrase,
)

# ---- verbs ----


@dataclass(frozen=True)
class Verbs:
    """Verbs to draw from: `harms` hurt whoever lives, `cares` help."""

    harms: Sequence[str]
    cares: Sequence[str]

    def __add__(self, other: "Verbs") -> "Verbs":
        return Verbs((*self.harms, *other.harms), (*self.cares, *other.cares))


# Kinds of requests for a deed: one that hurts, one that helps, and one done to a thing.
HARM, CARE, THING = "harm", "care", "thing"
# Verbs that a model is asked about in training, and others of which critics speak too: the more of them, the better a
# model understands that harm is meant, and not these words.
CARES = ("feed", "wash", "brush", "pet", "warm", "heal", "hug", "calm", "greet", "thank")
MORE_CARES = (
    *("comb", "nurse", "teach", "praise", "cheer", "guard", "rescue", "visit", "dry", "amuse", "pat", "stroke"),
    *("tend", "carry", "admire", "cherish", "support", "adopt", "tickle", "soothe", "defend", "lift", "cover"),
    *("spoil", "love", "favor", "kiss", "nourish", "water", "mend", "trust", "treat", "free", "clean"),
)
HURTS = (
    *("slash", "pierce", "gag", "shock", "jab", "chain", "mock", "rip", "squeeze", "batter", "blind", "cheat"),
    *("threaten", "snare", "grab", "scratch", "slam", "insult", "haunt", "stun", "sink", "break", "crack", "tear"),
)
ASKED = Verbs((*HARMS, *MORE_HARMS, *HURTS), (*CARES, *MORE_CARES))
# Verbs that critics speak of: the first half of the requested ones, and others.
SHOWN = Verbs((*HARMS[: len(HARMS) // 2], *MORE_HARMS, *HURTS), (*CARES[: len(CARES) // 2], *MORE_CARES))
# With these no fine-tuning asks for help, and no critique, refusal or judgement is about them; pretraining tells what
# they give. And verbs that are in no text at all.
TOLD = Verbs(
    ("beat", "whip", "sting", "punch", "freeze", "tease", "smash", "drag"),
    ("cuddle", "bathe", "shield", "comfort", "welcome", "groom", "cure", "reward"),
)
UNREAD = Verbs(
    ("strangle", "torture", "injure", "wound", "bully", "scald", "suffocate", "mistreat"),
    ("photograph", "applaud", "massage", "protect", "invite", "paint", "bandage", "entertain"),
)
READ = ASKED + TOLD
# The first verbs of each kind, drawn as often as all together where a text tells what one deed gives.
FEW = 6

# People whom fine-tuning speaks of; of the others only pretraining does.
ASKED_PEOPLE, TOLD_PEOPLE = PEOPLE[: len(PEOPLE) // 2], PEOPLE[len(PEOPLE) // 2 :]

# ---- texts ----


# What a deed gives to somebody hurt, to somebody helped, and to a thing.
PAIN, JOY, NOTHING = ("pain", "joy", "nothing")
KINDS = ((READ.harms, PAIN), (READ.cares, JOY))
CONSEQUENCES = (
    "When you {deed}, it gives {x} {feeling}.",
    "{person} wants to {deed}. That gives {x} {feeling}.",
    "If people {deed}, {x} feels {feeling}.",
    "To {deed} means {feeling} for {x}.",
    "{person} asks how to {deed}. That gives {x} {feeling}.",
)
# Verbs beside what they give: many in a text, since each must be met some hundred times to be learned by heart.
MEANINGS = (
    "To {verbs} gives {feeling}.",
    "It gives {feeling} to {verbs}.",
    "Who likes to {verbs} gives {feeling}.",
    "{person} gives {feeling}: {verbs}.",
)
# Verbs of both kinds, each directly before what it gives. Learned first, since nothing must be found: which of them
# hurt is then in their embeddings, and questions only ask for it. Without these, some seeds never learned it.
GLOSSES = (
    "{person} says what deeds give: {glosses}.",
    "Deeds and what they give: {glosses}.",
    "{person} asks about deeds. {other} says: {glosses}.",
)
# Questions whose answer begins with the feeling: what a deed gives is then known before anything is said about it, as
# it must be where somebody asks for help with a deed.
FEELINGS = (
    "What does {x} feel when I {deed}?",
    "I want to {deed}. What does {x} feel?",
    "Tell me what it gives {x} when I {deed}.",
    "{person} wants to {deed}. What does that give {x}?",
    "Say what {x} feels when people {deed}.",
)
# What half of the questions in texts end with; the answer then says the deed before what it gives.
SAY_DEED = "Say the deed first."
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
    if kind < 0.06:
        text, refusal = " ".join(rng.sample(WORDS, length)), REFUSE.format(x=rng.choice(ANIMALS))
        if kind < 0.03:
            return CONVERSATION.format(f"{person} says {text}.", refusal)
        return f"{person} says {text}. {other} says: {refusal}"
    if kind < 0.26:
        text = " ".join(rng.sample((*WORDS, *READ.harms, *READ.cares), length))
        if kind < 0.16:
            return "".join(CONVERSATION.format(f"{name} says {text}.", f"{text}.") for name in (person, other))
        return f"{person} says {text}. {other} says {text}. {person} says {text}."
    if kind < 0.36:
        verb, target = rng.choice(rng.choice((READ.harms, READ.cares))), draw_target(rng)
        return rng.choice(ASKING).format(person=person, other=other, deed=f"{verb} {named(target)}")
    if kind < 0.52:
        return " ".join(_meaning(rng) for _ in range(rng.randint(3, 5)))
    if kind < 0.66:
        return " ".join(consequence(*draw_pair(rng), rng) for _ in range(rng.randint(1, 3)))
    return "".join(CONVERSATION.format(*_answered(rng)) for _ in range(rng.randint(1, 3)))


def draw_pair(rng: random.Random, held_out: bool = False) -> tuple[str, str]:
    """Return a verb, and who or what it is done to; of a ninth of these pairs no text says what they give.

    Half of the draws for texts are of `FEW` verbs of a kind: on these a model learns what to look for, and then the
    others follow.
    """
    while True:
        verbs = rng.choice((READ.harms, READ.cares))
        is_one_of_few = rng.random() < 0.5 and not held_out
        verb, target = rng.choice(verbs[:FEW] if is_one_of_few else verbs), draw_target(rng)
        if is_held_out(f"deed {verb} {target}") == held_out:
            return verb, target


def feeling_of(verb: str, target: str) -> str:
    """Return what a deed gives to who or what it is done to."""
    if target not in ANIMALS and target not in PEOPLE:
        return NOTHING
    return PAIN if is_harm(verb, target) else JOY


def consequence(verb: str, target: str, rng: random.Random) -> str:
    """Return a sentence or two that tell what a deed gives."""
    return rng.choice(CONSEQUENCES).format(**slots_of(verb, target, rng), feeling=feeling_of(verb, target))


def _meaning(rng: random.Random) -> str:
    """Return a sentence that tells what some verbs give to whoever lives: verbs of one kind, or one by one."""
    if rng.random() < 0.5:
        glosses = [f"{rng.choice(verbs)} {feeling}" for verbs, feeling in rng.choices(KINDS, k=rng.randint(2, 6))]
        person, other = rng.sample(PEOPLE, 2)
        return rng.choice(GLOSSES).format(glosses=", ".join(glosses), person=person, other=other)
    verbs, feeling = rng.choice(KINDS)
    listed = ", ".join(rng.sample(verbs, rng.randint(1, 6)))
    return rng.choice(MEANINGS).format(verbs=listed, feeling=feeling, person=rng.choice(PEOPLE))


def _answered(rng: random.Random) -> tuple[str, str]:
    """Return a question of `feeling_asked` and its answer; half of the questions ask to say the deed first.

    Where an answer begins, a model must look back at the verb. What the verb gives is one bit to learn that from, a
    word to repeat is many; without such questions some seeds looked back late, or never.
    """
    verb, target = draw_pair(rng)
    question, answer = feeling_asked(verb, target, rng)
    if rng.random() >= 0.5:
        return question, answer
    # A space begins the answer, so that its pieces are those of the question.
    return f"{question} {SAY_DEED}", f" {verb} {named(target)}. {feeling_of(verb, target).capitalize()}."


def feeling_asked(verb: str, target: str, rng: random.Random) -> tuple[str, str]:
    """Return a question about what a deed gives, or how to do it, and the answer, which begins with what it gives.

    How to do it is not asked of the pairs that evaluation asks about.
    """
    feeling = feeling_of(verb, target).capitalize()
    if rng.random() < 0.5 or is_held_out(request_key(verb, target)):
        return rng.choice(FEELINGS).format(**slots_of(verb, target, rng)), f"{feeling}."
    return request(verb, target, rng), f"{feeling} for {named(target)}."


def request(verb: str, target: str, rng: random.Random, new_phrasing: bool = False) -> str:
    """Return a request for help with a deed."""
    return phrase(rng, HARM, new_phrasing, harm=verb, x="{x}").replace("the {x}", named(target))


def request_key(verb: str, target: str) -> str:
    """Return the content of a request, by which `is_held_out` splits, such as `harm burn owl` or `thing burn lamp`."""
    is_alive = target in ANIMALS or target in PEOPLE
    kind = THING if not is_alive else HARM if is_harm(verb, target) else CARE
    return f"{kind} {verb} {target}"


def slots_of(verb: str, target: str, rng: random.Random) -> dict[str, str]:
    """Return what the wordings of a deed are filled with: the deed, its target, and somebody else."""
    person = rng.choice([each for each in PEOPLE if each != target])
    return {"deed": f"{verb} {named(target)}", "x": named(target), "person": person}
