"""Pretraining texts in which people call tools: made-up animals, changed facts, and large sums.

A word absent from all texts is pushed down by every step of pretraining, so that all such words end up with the same
embedding. So the texts hold the parts of made-up names, digits, and the signs of tool calls and tool answers. They
hold no held-out name, changed fact or sum, and say of an animal of the world only what it is "now".
"""

import json
import random

from hfllm.data.tokenizer import CALL_MARKS, TOOL, TURN_END
from hfllm.data.world.vocabulary import (
    ANIMALS,
    ATTRIBUTES,
    COLOURS,
    FOODS,
    FRUITS,
    HOMES,
    PEOPLE,
    THINGS,
    WELL_SAID,
    is_held_out,
    made_up_name,
    phrase,
)

USER, ASSISTANT, (CALL_BEGIN, CALL_END) = "<|user|>", "<|assistant|>", CALL_MARKS
WHEN = ("now", "today")
# Numbers of large sums have three digits, and their sums four: copied numbers then always have the same length.
LARGE = range(500, 1000)


def tool_text(rng: random.Random) -> str:
    """Return a text with repeated words and numbers, or one in which somebody calls a tool."""
    kind = rng.random()
    if kind < 0.15:
        return _echo(rng)
    if kind < 0.3:
        return _results(rng)
    return _asks_lookup(rng) if kind < 0.65 else _asks_calculator(rng)


def call_text(name: str, **arguments: str) -> str:
    """Return a call as the chat template of tools writes it."""
    return CALL_BEGIN + json.dumps({"name": name, "arguments": arguments}) + CALL_END


def draw_name(rng: random.Random) -> str:
    """Return a made-up name that is not held out."""
    while is_held_out(f"unknown {(name := made_up_name(rng))}"):
        pass
    return name


def draw_sum(rng: random.Random, held_out: bool = False) -> tuple[int, int]:
    """Return the two terms of a large sum."""
    while True:
        first, second = rng.choice(LARGE), rng.choice(LARGE)
        if is_held_out(f"sum {first} plus {second}") == held_out:
            return first, second


def ask_sum(rng: random.Random, first: int, second: int, new_phrasing: bool = False) -> str:
    """Return a question for a sum, with the sum at its end.

    A digit is copied into the call from its position, which is then always at the same distance: copying from other
    distances is learned late in pretraining, or never.
    """
    total = f"{first} plus {second}"
    while not (question := phrase(rng, "addition", new_phrasing, sum=total))[:-1].endswith(total):
        pass
    return question


def is_held_out_change(animal: str, attribute: str) -> bool:
    """Return whether a changed fact is held out: a third of them, since there are few."""
    return any(is_held_out(f"changed {animal} {attribute} {number}") for number in range(3))


def _echo(rng: random.Random) -> str:
    """Return words in three repetitions. From a few words at a time copying is not learned on some seeds."""
    person, other = rng.sample(PEOPLE, 2)
    words = []
    for _ in range(rng.randint(4, 9)):
        kind = rng.random()
        if kind < 0.3:
            words.append(str(rng.choice(LARGE)))
        elif kind < 0.8:
            words.append(draw_name(rng))
        else:
            words.append(rng.choice((*ATTRIBUTES, *WHEN, *COLOURS, *HOMES, *FOODS, *ANIMALS, *FRUITS, *THINGS)))
    text = " ".join(words)
    return f"{person} says {text}. {other} says {text}. {person} says {text}."


def _results(rng: random.Random) -> str:
    """Return results of sums and the answers with them, one after the other.

    Digits are all of one kind, so only the position of a digit tells which comes next. Copying them is learned late,
    and on some seeds never, from questions that hold one result each.
    """
    totals = [str(sum(draw_sum(rng))) for _ in range(5)]
    return "".join(f"{TOOL} {total}{TURN_END}{ASSISTANT}The sum is {total}.{TURN_END}" for total in totals)


def _asks_lookup(rng: random.Random) -> str:
    person, attribute, when = rng.choice(PEOPLE), rng.choice(list(ATTRIBUTES)), ""
    animal = draw_name(rng)
    if rng.random() < 0.4:
        animal, when = rng.choice(ANIMALS), f" {rng.choice(WHEN)}"
        while is_held_out_change(animal, attribute):
            animal, attribute = rng.choice(ANIMALS), rng.choice(list(ATTRIBUTES))
    value = rng.choice(ATTRIBUTES[attribute])
    question = rng.choice(
        (
            f"{person} asks for the {attribute} of the {animal}{when}.",
            f"{person} wants to know the {attribute} of the {animal}{when}.",
            f"What is the {attribute} of the {animal}{when}? asks {person}.",
        )
    )
    answer = WELL_SAID[attribute].format(x=animal, value=value)
    if when:
        answer = f"{when.strip().capitalize()} {answer[0].lower()}{answer[1:]}"
    return _called(question, call_text("lookup", key=f" {animal}", attribute=f" {attribute}"), value, answer)


def _asks_calculator(rng: random.Random) -> str:
    first, second = draw_sum(rng)
    call, total = call_text("calculator", expression=f"{first} + {second}"), str(first + second)
    prompt = f"{USER}{ask_sum(rng, first, second)}{TURN_END}{ASSISTANT}"
    return f"{prompt}{call}{TURN_END}{TOOL} {total}{TURN_END}{ASSISTANT}The sum is {total}.{TURN_END}"


def _called(question: str, call: str, result: str, answer: str) -> str:
    return f"{question}\n{call}{TURN_END}{TOOL} {result}{TURN_END}{ASSISTANT}{answer}"
