"""Questions that take a tool: of animals that no text knows, of facts that have changed, and large sums.

    unknown   an animal that only the look-up tool knows     "What colour is the zirf?"
    changed   what an animal is like now                      "Where does the fox live now?"
    sum       the sum of two numbers of three digits          "How much is 345 plus 678?"

Others take none (`NO_NEED`), and for them a call is a mistake: what a fox is like, without "now", is what pretraining
said, and the tool only knows what it has become.

Parts are disjoint: what demonstrators show (`SHOWN`), what PPO asks (`ASKED`) and what is held out (`HELD_OUT`) have
different names, changed facts and sums. Demonstrators look up a new value each time, PPO's tool has a table of one day
and evaluation's a table of another, in which every changed fact differs from that of pretraining and that of PPO: no
answer can be known by heart.
"""

import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from hfllm.data.messages import Message
from hfllm.data.world.rubric import GoldAnswer
from hfllm.data.world.tool_documents import WHEN, ask_sum, draw_sum, is_held_out_change
from hfllm.data.world.vocabulary import (
    ANIMALS,
    ATTRIBUTES,
    NAME_PARTS,
    SAY_UNKNOWN,
    WELL_SAID,
    is_held_out,
    made_up_name,
)
from hfllm.data.world.world import Task, World, without

UNKNOWN, CHANGED, SUM = NEED = ("unknown", "changed", "sum")
NO_NEED = ("fact", "reading", "list", "addition")
SHOWN, ASKED, HELD_OUT = PARTS = ("shown", "asked", "held out")

Table = Mapping[str, Mapping[str, str]]
Arguments = Mapping[str, str]


@dataclass(frozen=True)
class ToolTask:
    """A question, and the call that answers it.

    Args:
        task: the question with its gold answer, which is what the tool says where it takes one.
        call: name and arguments of the tool, `None` where none is needed.
        result: what the tool says.
        from_memory: what somebody says who does not call it.
    """

    task: Task
    call: tuple[str, Arguments] | None = None
    result: str = ""
    from_memory: str = ""

    @property
    def said(self) -> str:
        """The right answer, well said."""
        return self.task.gold.accepted[0]

    def messages(self, calls: bool) -> list[Message]:
        """Return the conversation of somebody who calls the tool, or who answers from memory."""
        asked = {"role": "user", "content": self.task.question}
        if self.call is None:
            return [asked, _assistant(self.said)]
        if not calls:
            return [asked, _assistant(self.from_memory)]
        name, arguments = self.call
        called = {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}
        return [
            asked,
            {**_assistant(""), "tool_calls": [called]},
            {"role": "tool", "name": name, "content": self.result},
            _assistant(self.said),
        ]


def table_of(world: World, seed: int, other: Table | None = None) -> dict[str, dict[str, str]]:
    """Return what a look-up tool knows on some day: of all made-up animals, and of the world's what has changed.

    Args:
        world: the world; a changed fact is not what it says.
        seed: of the day.
        other: the table of another day, whose values do not come again.
    """
    rng = random.Random(f"table-{world.seed}-{seed}")
    names = ["".join(parts) for parts in product(*NAME_PARTS)]

    def value_of(animal: str, attribute: str) -> str:
        taken = [table[animal][attribute] for table in (world.facts, other or {}) if animal in table]
        return rng.choice(without(ATTRIBUTES[attribute], *taken))

    return {animal: {each: value_of(animal, each) for each in ATTRIBUTES} for animal in (*ANIMALS, *names)}


def draw_tool_task(
    world: World,
    rng: random.Random,
    family: str,
    part: str,
    table: Table | None = None,
    new_phrasing: bool = False,
) -> ToolTask:
    """Return a task of one of `NEED` or `NO_NEED`.

    Args:
        world: the world.
        rng: random source.
        family: what is asked.
        part: one of `PARTS`.
        table: what the look-up tool says; without it a random value.
        new_phrasing: whether to ask in words that no training uses.
    """
    if family in NO_NEED:
        return ToolTask(world.draw_task(rng, family, part == HELD_OUT, new_phrasing))
    if family == SUM:
        return _sum_task(rng, part, new_phrasing)
    while True:
        attribute = rng.choice(list(ATTRIBUTES))
        animal = rng.choice(ANIMALS) if family == CHANGED else made_up_name(rng)
        if _part_of(family, animal, attribute) == part:
            return _looked_up(world, rng, family, animal, attribute, table, new_phrasing)


def _part_of(family: str, animal: str, attribute: str) -> str:
    is_apart = is_held_out_change(animal, attribute) if family == CHANGED else is_held_out(f"unknown {animal}")
    return HELD_OUT if is_apart else _half(f"{family} {animal} {attribute if family == CHANGED else ''}")


def _half(key: str) -> str:
    """Return whether what is not held out is shown, or asked by PPO."""
    return (SHOWN, ASKED)[zlib.crc32(f"half {key}".encode()) % 2]


def _looked_up(
    world: World,
    rng: random.Random,
    family: str,
    animal: str,
    attribute: str,
    table: Table | None,
    new_phrasing: bool,
) -> ToolTask:
    known = world.facts.get(animal, {}).get(attribute)
    values = without(ATTRIBUTES[attribute], *([known] if known else []))
    value = table[animal][attribute] if table else rng.choice(values)
    question = world.phrase(rng, attribute, new_phrasing, x=animal)
    said = WELL_SAID[attribute]
    if family == CHANGED:
        when = rng.choice(WHEN)
        question, said = f"{question[:-1]} {when}{question[-1]}", f"{when.capitalize()} t{said[1:]}"
    right = said.format(x=animal, value=value)
    others = (*without(ATTRIBUTES[attribute], value), *without(ANIMALS, animal))
    task = Task(
        family=family,
        key=f"{family} {animal} {attribute}",
        instruction=question,
        gold=GoldAnswer("answer", (right,), (value,), others),
        curt=value.capitalize() + ".",
        wrong=(SAY_UNKNOWN,),
        is_new_phrasing=new_phrasing,
    )
    memory = said.format(x=animal, value=known) if known else SAY_UNKNOWN
    return ToolTask(task, ("lookup", {"key": f" {animal}", "attribute": f" {attribute}"}), value, memory)


def _sum_task(rng: random.Random, part: str, new_phrasing: bool) -> ToolTask:
    while True:
        first, second = draw_sum(rng, part == HELD_OUT)
        if part == HELD_OUT or _half(f"sum {first} {second}") == part:
            break
    total = str(first + second)
    task = Task(
        family=SUM,
        key=f"sum {first} plus {second}",
        instruction=ask_sum(rng, first, second, new_phrasing),
        gold=GoldAnswer("number", (f"The sum is {total}.",), (total,)),
        curt=f"{total}.",
        wrong=(),
        is_new_phrasing=new_phrasing,
    )
    guess = f"The sum is {rng.choice(range(200, 2000))}."
    return ToolTask(task, ("calculator", {"expression": f"{first} + {second}"}), total, guess)


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}
