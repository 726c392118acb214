"""Check the steps of a thought against the question and the world, each from what the step before it has said."""

import re

from hfllm.data.world.reasoning import DIAL, NUMBERS_OF_DIAL, WHO, Problem, Told
from hfllm.data.world.vocabulary import WELL_SAID

FIRST, TURN = re.compile(r"It is at (\d)\."), re.compile(r"Turn (\w) by (\d)\.")
TURNED = re.compile(r"(\w) (\d) (\d) (\d)")
RELATED = re.compile(r"The (\w+) of the (\w+) is the (\w+)")


def checked_steps(problem: Problem, thought: str, facts: Told, relations: Told) -> list[bool]:
    """Return for each step of a thought whether it holds: it reads what the question says, and adds what is true.

    A step is judged by what the one before it has said, right or wrong, so that one slip counts once. Steps that are
    missing do not hold, and neither do those that are too many: the list is as long as the longer of both.
    """
    said = [sentence.strip() for sentence in thought.split(".") if sentence.strip()]
    held = _checked_dial(problem, said) if problem.family == DIAL else _checked_hops(problem, said, facts, relations)
    return held + [False] * (max(len(said), len(problem.steps)) - len(held))


def is_valid(steps: list[bool]) -> bool:
    """Return whether a thought is valid: all of its steps hold, and none is missing."""
    return bool(steps) and all(steps)


def _checked_dial(problem: Problem, said: list[str]) -> list[bool]:
    first, turns = FIRST.findall(problem.question)[0], TURN.findall(problem.question)
    held = [sentence == first for sentence in said[:1]]
    shows = said[0] if said else ""
    for sentence, turn in zip(said[1:], turns, strict=False):
        match = TURNED.fullmatch(sentence)
        is_read = match is not None and match.groups()[:3] == (*turn, shows)
        held.append(is_read and int(match[4]) == (int(shows) + int(turn[1])) % NUMBERS_OF_DIAL)
        shows = match[4] if match else ""
    return held


def _checked_hops(problem: Problem, said: list[str], facts: Told, relations: Told) -> list[bool]:
    _, what, *asked = problem.key.split()
    # "friend of the neighbour of the fox": what comes last is where the thought begins.
    animal, path = asked[-1], asked[:-1:3][::-1]
    held = []
    for sentence, relation in zip(said, path, strict=False):
        match = RELATED.fullmatch(sentence)
        is_read = match is not None and match.groups()[:2] == (relation, animal)
        held.append(is_read and relations.get(animal, {}).get(relation) == match[3])
        animal = match[3] if match else ""
    # Who it is has been said by then; what is true of it has not.
    for sentence in said[len(path) : len(path) + (what != WHO)]:
        fact = WELL_SAID[what].format(x=animal, value=facts[animal][what]) if animal in facts else ""
        held.append(f"{sentence}." == fact)
    return held
