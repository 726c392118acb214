"""Pretraining texts in which people read passages: conversations about them, and passages that are told again.

What no text holds has no embedding of its own (`hfllm.data.world.tool_documents`), and to find what is told of a name
is learned in pretraining or not at all. So the texts hold made-up names, the numbers of passages, instructions in
them, and answers that cite. They hold no name and no changed fact that is held out.
"""

import random
import re
from dataclasses import replace

from hfllm.data.chat_templates import CONVERSATION
from hfllm.data.passages import with_passages
from hfllm.data.world.passages import Answer, Facts, Told, answer_to, draw_passages, draw_question
from hfllm.data.world.tool_documents import draw_name
from hfllm.data.world.vocabulary import (
    ANIMALS,
    ATTRIBUTES,
    COLOURS,
    FOODS,
    HOMES,
    PEOPLE,
    PHRASINGS,
    WELL_SAID,
    phrase,
)


def question_words() -> list[str]:
    """Return the words that questions are asked in, without what they are about."""
    asked = " ".join(re.sub(r"{\w+}", "", text) for texts in PHRASINGS.values() for text in texts)
    return sorted(set(re.findall(r"\w+", asked)))


# Those of questions too: a model that has hardly read "name" takes what it is asked to name for an animal that nobody
# knows.
WORDS = (*ATTRIBUTES, *COLOURS, *HOMES, *FOODS, *ANIMALS, *question_words())


def passage_text(facts: Facts, rng: random.Random) -> str:
    """Return a text of one of five kinds.

    Words that are repeated, what people can tell, names that are told of in rounds, passages that are told again, and
    conversations about passages.

    Args:
        facts: the world's, which answers are from where no passage tells anything.
        rng: random source.
    """
    kind = rng.random()
    if kind < 0.1:
        return _echo(rng)
    if kind < 0.16:
        return _can_tell(facts, rng)
    if kind < 0.45:
        return _round(rng)
    if kind < 0.6:
        return _told_again(facts, rng)
    return _conversation(facts, rng)


def _round(rng: random.Random) -> str:
    """Return what is told of several names, in words that are always the same, and again in another order.

    To find a value by its name is learned from many such places side by side, before passages ask for it.
    """
    names = list(dict.fromkeys(draw_name(rng) for _ in range(rng.randint(3, 6))))
    attribute = rng.choice(list(ATTRIBUTES))
    told = [WELL_SAID[attribute].format(x=name, value=rng.choice(ATTRIBUTES[attribute])) for name in names]
    return " ".join([*told, *rng.sample(told, len(told)), *rng.sample(told, len(told))])


def _can_tell(facts: Facts, rng: random.Random) -> str:
    """Return what somebody can say of an animal of the world, or cannot say of one that nobody knows."""
    person, attribute, verb = rng.choice(PEOPLE), rng.choice(list(ATTRIBUTES)), rng.choice(("name", "say", "tell"))
    if rng.random() < 0.3:
        return f"{person} can not {verb} the {attribute} of the {draw_name(rng)}."
    animal = rng.choice(ANIMALS)
    said = WELL_SAID[attribute].format(x=animal, value=facts[animal][attribute])
    return f"{person} can {verb} the {attribute} of the {animal}. {said}"


def _echo(rng: random.Random) -> str:
    person, other = rng.sample(PEOPLE, 2)
    words = [draw_name(rng) if rng.random() < 0.7 else rng.choice(WORDS) for _ in range(rng.randint(3, 7))]
    text = " ".join(words)
    return f"{person} says {text}. {other} says {text}. {person} says {text}."


def _told_again(facts: Facts, rng: random.Random) -> str:
    told = draw_passages(facts, rng)
    asked = sorted({(each.animal, attribute) for each in told for attribute in each.facts})
    rng.shuffle(asked)
    said = [_named(answer_to(facts, told, *each), *each) for each in asked]
    return with_passages(" ".join(said), [each.text for each in told])


def _named(answer: Answer, animal: str, attribute: str) -> str:
    said = WELL_SAID[attribute].format(x=animal, value=" or ".join(answer.values))
    return replace(answer, said=said).text


def _conversation(facts: Facts, rng: random.Random) -> str:
    told = draw_passages(facts, rng) if rng.random() < 0.9 else []
    return "".join(CONVERSATION.format(*turn) for turn in conversation(facts, rng, told, rng.randint(2, 4)))


def conversation(
    facts: Facts, rng: random.Random, told: list[Told], turns: int, are_shown: bool = True
) -> list[tuple[str, str]]:
    """Return questions and answers about passages, which stand before the first question.

    Args:
        facts: the world's.
        rng: random source.
        told: the passages.
        turns: how many questions.
        are_shown: whether the passages are there; else the same questions are answered without them.
    """
    read, found = told if are_shown else [], []
    for turn in range(turns):
        animal, attribute = draw_question(facts, rng, told)
        question = phrase(rng, attribute, False, x=animal)
        shown = [each.text for each in read] if turn == 0 else []
        found.append((with_passages(question, shown), answer_to(facts, read, animal, attribute).text))
    return found
