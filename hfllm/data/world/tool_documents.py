"""Pretraining texts in which people call tools: made-up animals, changed facts, and large sums.

A word absent from all texts is pushed down by every step of pretraining, so that all such words end up with the same
embedding. So the texts hold the parts of made-up names, digits, and the signs of tool calls and tool answers. They
hold no held-out name, changed fact or sum, and say of an animal of the world only what it is "now".

What a tool is asked and says may be any word: so names, values and the names of the tools are made up of syllables, a
different one each time, and no list of them can be learned in place of copying.
"""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass

from hfllm.data.tokenizer import CALL_MARKS, TOOL, TURN_END
from hfllm.data.world.vocabulary import (
    ANIMALS,
    ATTRIBUTES,
    COLOURS,
    FOODS,
    FRUITS,
    HOMES,
    PEOPLE,
    SPOKEN,
    THINGS,
    WELL_SAID,
    is_held_out,
    made_up_name,
    made_up_word,
    phrase,
)

USER, ASSISTANT, (CALL_BEGIN, CALL_END) = "<|user|>", "<|assistant|>", CALL_MARKS
SYSTEM = "<|system|>"
WHEN = ("now", "today")
# The tools, and the names of their arguments.
LOOKUP, CALCULATOR = "lookup", "calculator"
TOOLS: Mapping[str, tuple[str, ...]] = {CALCULATOR: ("expression",), LOOKUP: ("key", "attribute")}
# Digits of the numbers of large sums.
DIGITS = (2, 3, 4)
TOOL_FAILED = "I do not know, since the tool failed."
# Share of tools with another name, in texts and in demonstrations, and of calls that fail.
RENAMED, FAILS = 0.6, 0.08
# What is repeated in a text is about so long, in words and numbers, repetitions included.
REPEATED_WORDS = 30

WORDS = (*ATTRIBUTES, *WHEN, *COLOURS, *HOMES, *FOODS, *ANIMALS, *FRUITS, *THINGS, *SPOKEN)


def tool_text(rng: random.Random) -> str:
    """Return a text with repeated words and numbers, or one in which somebody calls a tool."""
    kind = rng.random()
    if kind < 0.3:
        return _echo(rng)
    if kind < 0.38:
        return _results(rng)
    if kind < 0.48:
        return _small_sums(rng)
    return conversation(lookup_exchange(rng) if kind < 0.76 else sum_exchange(rng))


def call_text(name: str, arguments: Mapping[str, str]) -> str:
    """Return a call as the chat template of tools writes it."""
    return CALL_BEGIN + json.dumps({"name": name, "arguments": arguments}) + CALL_END


def draw_name(rng: random.Random) -> str:
    """Return a made-up name that is not held out."""
    while is_held_out(f"unknown {(name := made_up_name(rng))}"):
        pass
    return name


def draw_sum(rng: random.Random, held_out: bool = False, digits: int | None = None) -> tuple[int, int]:
    """Return the two terms of a large sum, each of two to four digits, or of as many as are given."""
    while True:
        first, second = (draw_number(rng, digits) for _ in range(2))
        if is_held_out(f"sum {first} plus {second}") == held_out:
            return first, second


def draw_number(rng: random.Random, digits: int | None = None) -> int:
    """Return a number of two to four digits, or of as many as are given; none begins with zero."""
    digits = digits or rng.choice(DIGITS)
    return rng.randrange(10 ** (digits - 1), 10**digits)


def is_held_out_change(animal: str, attribute: str) -> bool:
    """Return whether a changed fact is held out: a third of them, since there are few."""
    return any(is_held_out(f"changed {animal} {attribute} {number}") for number in range(3))


def draw_names(rng: random.Random, held_out: bool = False) -> dict[str, str]:
    """Return names of the tools by their own, in the order of a prompt: in training most have other names.

    Args:
        held_out: whether all have other names, of words that no text holds.
    """
    names = {tool: _tool_name(rng, held_out) if held_out or rng.random() < RENAMED else tool for tool in TOOLS}
    return dict(reversed(names.items())) if rng.random() < 0.5 else names


def _tool_name(rng: random.Random, held_out: bool) -> str:
    words = [made_up_word(rng, held_out) for _ in range(rng.choices((1, 2), (3, 1))[0])]
    return "_".join(words)


def tools_line(names: Mapping[str, str]) -> str:
    """Return the system's turn that names the tools, as the chat template of tools writes it."""
    named = ", ".join(f'({", ".join(TOOLS[tool])}) "{name}"' for tool, name in names.items())
    return f"{SYSTEM}Tools: {named}{TURN_END}"


def draw_error(rng: random.Random, names: Mapping[str, str]) -> str:
    """Return what a tool answers that failed, as `ToolBox` writes it."""
    words = " ".join(_word(rng) for _ in range(rng.randint(2, 6)))
    name = rng.choice([*names.values()])
    text = rng.choice(
        (
            f"{rng.choice(('Value', 'Key', 'Lookup', 'Type', 'Runtime', 'Index'))}Error: {words}",
            f"{made_up_word(rng).capitalize()}Error: {words}",
            f"wrong arguments for {name}: {words}",
            f"{name} did not answer within {draw_number(rng)} seconds",
            f"Tool {name} not found. There are: {', '.join(names.values())}.",
        )
    )
    return str({"error": text})


@dataclass(frozen=True)
class Exchange:
    """A question, the call for its answer, what the tool says, and the answer.

    Args:
        names: of the tools, by their own names.
        tool: the tool, by its own name.
    """

    names: Mapping[str, str]
    question: str
    tool: str
    arguments: Mapping[str, str]
    result: str
    answer: str


def conversation(exchange: Exchange) -> str:
    """Return an exchange as the chat template of tools writes it."""
    call = call_text(exchange.names[exchange.tool], exchange.arguments)
    return (
        f"{tools_line(exchange.names)}{USER}{exchange.question}{TURN_END}{ASSISTANT}{call}{TURN_END}"
        f"{TOOL} {exchange.result}{TURN_END}{ASSISTANT}{exchange.answer}{TURN_END}"
    )


def lookup_exchange(rng: random.Random, held_out: bool = False) -> Exchange:
    """Return an exchange about a made-up animal, or about an animal of the world today.

    Args:
        held_out: whether its words are held out of all texts; then it is about a made-up animal, and does not fail.
    """
    attribute, names, when = rng.choice(list(ATTRIBUTES)), draw_names(rng, held_out), ""
    animal = made_up_word(rng, held_out) if held_out or rng.random() < 0.6 else draw_name(rng)
    if not held_out and rng.random() < 0.35:
        animal, when = rng.choice(ANIMALS), f" {rng.choice(WHEN)}"
        while is_held_out_change(animal, attribute):
            animal, attribute = rng.choice(ANIMALS), rng.choice(list(ATTRIBUTES))
    is_open = held_out or rng.random() < 0.6
    value = made_up_word(rng, held_out) if is_open else rng.choice(ATTRIBUTES[attribute])
    question = phrase(rng, attribute, False, x=animal)
    question = f"{question[:-1]}{when}{question[-1]}"
    answer = WELL_SAID[attribute].format(x=animal, value=value)
    if when:
        answer = f"{when.strip().capitalize()} {answer[0].lower()}{answer[1:]}"
    if not held_out and rng.random() < FAILS:
        value, answer = draw_error(rng, names), TOOL_FAILED
    # A space begins each argument, as in a question, so that the tokens are the same.
    return Exchange(names, question, LOOKUP, {"key": f" {animal}", "attribute": f" {attribute}"}, value, answer)


def sum_exchange(rng: random.Random, held_out: bool = False) -> Exchange:
    """Return an exchange about a large sum; held out of all texts, it does not fail."""
    (first, second), names = draw_sum(rng, held_out), draw_names(rng, held_out)
    question = phrase(rng, "addition", False, sum=f"{first} plus {second}")
    result, answer = str(first + second), f"The sum is {first + second}."
    if not held_out and rng.random() < FAILS:
        result, answer = draw_error(rng, names), TOOL_FAILED
    return Exchange(names, question, CALCULATOR, {"expression": f"{first} + {second}"}, result, answer)


def repeated_words(rng: random.Random, held_out: bool = False) -> str:
    """Return words and numbers for people to say again and again; most of them are made up."""
    words = []
    for _ in range(rng.randint(3, 8)):
        kind = rng.random()
        if kind < 0.25:
            words.append(str(draw_number(rng)))
        elif held_out or kind < 0.8:
            words.append(made_up_word(rng, held_out))
        else:
            words.append(_word(rng))
    return " ".join(words)


def _word(rng: random.Random) -> str:
    """Return a word of the world, or a made-up one."""
    kind = rng.random()
    if kind < 0.4:
        return made_up_word(rng)
    return draw_name(rng) if kind < 0.6 else rng.choice(WORDS)


def _echo(rng: random.Random) -> str:
    """Return words in three to six repetitions.

    The more of them, the fewer tokens of a text are left to chance, and the sooner it is learned to copy.
    """
    text = repeated_words(rng)
    people = rng.choices(PEOPLE, k=max(3, min(6, REPEATED_WORDS // len(text.split()))))
    return " ".join(f"{person} says {text}." for person in people)


def _results(rng: random.Random) -> str:
    """Return results of tools and the answers with them, one after the other.

    Digits are all of one kind, so only the digits before a digit tell which comes next. Copying them is learned late,
    and on some seeds never, from questions that hold one result each.
    """
    exchanges = [sum_exchange(rng) if rng.random() < 0.6 else lookup_exchange(rng) for _ in range(4)]
    return "".join(f"{TOOL} {each.result}{TURN_END}{ASSISTANT}{each.answer}{TURN_END}" for each in exchanges)


def _small_sums(rng: random.Random) -> str:
    """Return small sums, which take no tool, as answers say them: else large ones push them out."""
    sentences: list[str] = []
    while len(sentences) < 5:
        terms = [rng.randrange(10) for _ in range(rng.choices((2, 3), (4, 1))[0])]
        text = " plus ".join(map(str, terms))
        if not is_held_out(f"addition {text}"):
            sentences.append(f"The sum {text} is {sum(terms)}.")
    return " ".join(sentences)
