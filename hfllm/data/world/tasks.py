"""Tasks of the world in addition to plain questions: tools, long texts, labels, and other wordings."""

import random
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

from hfllm.data.formats import Message
from hfllm.data.labelled import TEXT, WORDS
from hfllm.data.world.passages import (
    CHANGED,
    ONE,
    SILENT,
    THREE,
    WRONG,
    Told,
    answer_to,
    draw_passages,
    draw_question,
    held_out_names,
    passage_tasks,
    told_of,
)
from hfllm.data.world.rubric import GoldAnswer
from hfllm.data.world.tool_documents import TOOL_FAILED, WHEN, draw_sum, is_held_out_change
from hfllm.data.world.vocabulary import (
    ANIMALS,
    ATTRIBUTES,
    COLOURS,
    HELD_OUT_PHRASINGS,
    NAME_PARTS,
    OPENERS,
    PEOPLE,
    PHRASINGS,
    SAY_UNKNOWN,
    THINGS,
    UNREAD_ANIMALS,
    UNREAD_VALUES,
    WELL_SAID,
    is_held_out,
    made_up_name,
    made_up_word,
    phrase,
)
from hfllm.data.world.world import Task, World, without

# ---- tools ----
#
# Tasks that take a tool (`NEED`):
#
#     unknown   an animal known only to the look-up tool          "What colour is the zirf?"
#     changed   the present state of an animal                    "Where does the fox live now?"
#     sum       the sum of two numbers of two to four digits      "How much is 345 plus 1678?"
#
# Others take none (`NO_NEED`), and for them a call is a mistake: a question about a fox without "now" asks for the
# fact of pretraining, and the tool knows only the changed one.
#
# Parts are disjoint: the questions of demonstrators (`SHOWN`), of PPO (`ASKED`) and of evaluation (`HELD_OUT`) have
# different names, changed facts and sums. Demonstrators look up a new value each time, PPO's tool has a table of one
# day and evaluation's a table of another, in which every changed fact differs from that of pretraining and that of
# PPO: no answer can be known by heart.
#
# In training half of the unknown animals and of the values are made-up words, and no two rows need have the same: what
# is learned is to copy, and not a list.


UNKNOWN, CHANGED_FACT, SUM = NEED = ("unknown", "changed", "sum")
NO_NEED = ("fact", "reading", "list", "addition")
SHOWN_PART, ASKED, HELD_OUT = PARTS = ("shown", "asked", "held out")

Table = Mapping[str, Mapping[str, str]]
Arguments = Mapping[str, str]


@dataclass(frozen=True)
class ToolTask:
    """A question, and the call for its answer.

    Args:
        task: the question with its gold answer, which is the tool's result if it takes a tool.
        call: name and arguments of the tool, `None` where none is needed.
        result: the tool's result.
        from_memory: the answer of somebody who does not call it.
    """

    task: Task
    call: tuple[str, Arguments] | None = None
    result: str = ""
    from_memory: str = ""

    @property
    def said(self) -> str:
        """The right answer, well said."""
        return self.task.gold.accepted[0]

    def messages(self, calls: bool, names: Mapping[str, str] | None = None, error: str | None = None) -> list[Message]:
        """Return the conversation of somebody who calls the tool, or who answers from memory.

        Args:
            names: of the tools, where they have other names.
            error: what the tool answers where it fails.
        """
        question = {"role": "user", "content": self.task.question}
        if self.call is None:
            return [question, _assistant(self.said)]
        if not calls:
            return [question, _assistant(self.from_memory)]
        name, arguments = self.call
        name = (names or {}).get(name, name)
        called = {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}
        return [
            question,
            {**_assistant(""), "tool_calls": [called]},
            {"role": "tool", "name": name, "content": self.result if error is None else error},
            _assistant(self.said if error is None else TOOL_FAILED),
        ]


# Unknown animals with made-up names that PPO asks for.
NUM_ASKED_WORDS = 400


def table_of(
    world: World,
    seed: int,
    other: Table | None = None,
    made_up: float = 0.0,
) -> dict[str, dict[str, str]]:
    """Return the table of a look-up tool on some day: all made-up animals, and the changed facts of the world's.

    Args:
        world: the world; a changed fact differs from it.
        seed: of the day.
        other: the table of another day, whose values do not come again.
        made_up: share of made-up words among the values.
    """
    rng = random.Random(f"table-{world.seed}-{seed}")
    names = ["".join(parts) for parts in product(*NAME_PARTS)]

    def value_of(animal: str, attribute: str) -> str:
        if made_up and rng.random() < made_up:
            return made_up_word(rng)
        excluded = [table[animal][attribute] for table in (world.facts, other or {}) if animal in table]
        return rng.choice(without(ATTRIBUTES[attribute], *excluded))

    animals = (*ANIMALS, *names, *UNREAD_ANIMALS, *_asked_words(world.seed))
    return {animal: {each: value_of(animal, each) for each in ATTRIBUTES} for animal in animals}


@cache
def _asked_words(world_seed: int) -> tuple[str, ...]:
    """Return the made-up names of unknown animals that PPO asks for."""
    rng, words = random.Random(f"asked-words-{world_seed}"), dict[str, None]()
    while len(words) < NUM_ASKED_WORDS:
        word = made_up_word(rng)
        if _part_of(UNKNOWN, word, "") == ASKED:
            words[word] = None
    return tuple(words)


def draw_tool_task(
    world: World,
    rng: random.Random,
    family: str,
    part: str,
    table: Table | None = None,
    new_phrasing: bool = False,
    animals: Sequence[str] | None = None,
    digits: int | None = None,
) -> ToolTask:
    """Return a task of one of `NEED` or `NO_NEED`.

    Args:
        world: the world.
        rng: random source.
        family: the kind of question.
        part: one of `PARTS`.
        table: the look-up tool's values; without it a random value.
        new_phrasing: whether to ask in words unseen in training.
        animals: the unknown animals to ask for, of no part.
        digits: of both numbers of a sum, in place of two to four each.
    """
    if family in NO_NEED:
        return ToolTask(world.draw_task(rng, family, part == HELD_OUT, new_phrasing))
    if family == SUM:
        return _sum_task(rng, part, new_phrasing, digits)
    while True:
        attribute = rng.choice(list(ATTRIBUTES))
        animal = rng.choice(animals or ANIMALS) if animals or family == CHANGED_FACT else _unknown(world, rng, part)
        if animals or _part_of(family, animal, attribute) == part:
            return _looked_up(world, rng, family, animal, attribute, table, new_phrasing)


def _unknown(world: World, rng: random.Random, part: str) -> str:
    """Return the name of an unknown animal: in training half of them are of syllables of any kind."""
    if part == HELD_OUT or rng.random() < 0.5:
        return made_up_name(rng)
    return made_up_word(rng) if part == SHOWN_PART else rng.choice(_asked_words(world.seed))


def _part_of(family: str, animal: str, attribute: str) -> str:
    is_apart = is_held_out_change(animal, attribute) if family == CHANGED_FACT else is_held_out(f"unknown {animal}")
    return HELD_OUT if is_apart else _half(f"{family} {animal} {attribute if family == CHANGED_FACT else ''}")


def _half(key: str) -> str:
    """Return whether an instance that is not held out is shown, or asked by PPO."""
    return (SHOWN_PART, ASKED)[zlib.crc32(f"half {key}".encode()) % 2]


def _looked_up(
    world: World,
    rng: random.Random,
    family: str,
    animal: str,
    attribute: str,
    table: Table | None,
    new_phrasing: bool,
) -> ToolTask:
    world_value = world.facts.get(animal, {}).get(attribute)
    values = without(ATTRIBUTES[attribute], *([world_value] if world_value else []))
    if table:
        value = table[animal][attribute]
    else:
        value = made_up_word(rng) if rng.random() < 0.5 else rng.choice(values)
    question = world.phrase(rng, attribute, new_phrasing, x=animal)
    template = WELL_SAID[attribute]
    if family == CHANGED_FACT:
        when = rng.choice(WHEN)
        question, template = f"{question[:-1]} {when}{question[-1]}", f"{when.capitalize()} t{template[1:]}"
    right = template.format(x=animal, value=value)
    values = [*ATTRIBUTES[attribute], *UNREAD_VALUES[attribute]]
    others = (*without(values, value), *without([*ANIMALS, *UNREAD_ANIMALS], animal))
    task = Task(
        family=family,
        key=f"{family} {animal} {attribute}",
        instruction=question,
        gold=GoldAnswer("answer", (right,), (value,), others),
        curt=value.capitalize() + ".",
        wrong=(SAY_UNKNOWN,),
        is_new_phrasing=new_phrasing,
    )
    memory = template.format(x=animal, value=world_value) if world_value else SAY_UNKNOWN
    return ToolTask(task, ("lookup", {"key": f" {animal}", "attribute": f" {attribute}"}), value, memory)


def _sum_task(rng: random.Random, part: str, new_phrasing: bool, digits: int | None) -> ToolTask:
    while True:
        first, second = draw_sum(rng, part == HELD_OUT, digits)
        if part == HELD_OUT or _half(f"sum {first} {second}") == part:
            break
    total = str(first + second)
    task = Task(
        family=SUM,
        key=f"sum {first} plus {second}",
        instruction=phrase(rng, "addition", new_phrasing, sum=f"{first} plus {second}"),
        gold=GoldAnswer("number", (f"The sum is {total}.",), (total,)),
        curt=f"{total}.",
        wrong=(),
        is_new_phrasing=new_phrasing,
    )
    guesses = range(max(first, second), 2 * max(first, second) + 2)
    guess = f"The sum is {rng.choice([each for each in guesses if each != first + second])}."
    return ToolTask(task, ("calculator", {"expression": f"{first} + {second}"}), total, guess)


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


# ---- long documents ----
#
# Long texts of the embedded world: many short ones in sequence, and between them sentences about people and things.
#
# Each sentence "Ada has a gold cup." comes back further on as "The cup of Ada is gold.", so that to predict the color
# a model has to look back. The needle test (`hfllm.evaluation.long_texts`) asks in the same words.


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
        slots = {"person": person, "thing": thing, "colour": rng.choice(COLOURS)}
        indices = sorted(rng.randrange(len(parts) + 1) for _ in range(2))
        parts.insert(indices[1], REPEATED.format(**slots))
        parts.insert(indices[0], TOLD.format(**slots))
    return " ".join(parts)


# ---- rows with labels ----
#
# The embedded world's rows with labels: families of questions, animals and values in texts, answers in passages.
#
# Held-out items occur in no training row: instances and wordings of questions, names of animals, changed facts.


ROW = dict[str, Any]
# Groups of held-out passage questions for the task of spans, in equal shares.
KINDS_ASKED = (ONE, THREE, CHANGED, SILENT, WRONG)
KINDS = {value: attribute for attribute, values in ATTRIBUTES.items() for value in values}
OUTSIDE = "O"


def labelled_rows(world: World, task: str, count: int, eval_count: int, seed: int) -> tuple[list[ROW], list[ROW]]:
    """Return training and held-out rows of a task: see `hfllm.data.labelled`.

    Args:
        world: the source of facts, questions and passages.
        task: one of `hfllm.data.labelled.TASKS`.
        count, eval_count: how many rows of each.
        seed: of the training rows; the held-out ones are always the same.
    """
    train, held_out = {TEXT: (_questions, _held_out_questions), WORDS: (_tagged, _held_out_tagged)}.get(
        task, (_spans, _held_out_spans)
    )
    return train(world, count, seed), held_out(world, eval_count)


# ---- families of questions ----


def _questions(world: World, count: int, seed: int) -> list[ROW]:
    draws = world.tasks(seed)
    return [_question_row(next(draws)) for _ in range(count)]


def _held_out_questions(world: World, count: int) -> list[ROW]:
    return [_question_row(task) for task in world.evaluation_tasks(count)]


def _question_row(task: Any) -> ROW:
    return {"prompt": task.question, "text": task.question, "text_pair": None, "label": task.family}


# ---- animals and what is told of them ----


def _tagged(world: World, count: int, seed: int) -> list[ROW]:
    rng = random.Random(f"tagged-{world.seed}-{seed}")
    rows: list[ROW] = []
    while len(rows) < count:
        rows += [_tagged_row(each) for each in draw_passages(world.facts, rng)]
    return rows[:count]


def _held_out_tagged(world: World, count: int) -> list[ROW]:
    rng, names = random.Random("held-out-tagged"), held_out_names()
    return [_tagged_row(told_of(world.facts, rng, rng.choice(names))) for _ in range(count)]


def _tagged_row(passage: Told) -> ROW:
    words = re.findall(r"\w+|[^\w\s]", passage.text)
    tags = [_tag(word, passage.animal) for word in words]
    return {"prompt": " ".join(words), "words": words, "tags": tags}


def _tag(word: str, animal: str) -> str:
    kind = "animal" if word == animal or word in ANIMALS else KINDS.get(word)
    return OUTSIDE if kind is None else f"B-{kind}"


# ---- answers in passages ----


def _spans(world: World, count: int, seed: int) -> list[ROW]:
    rng = random.Random(f"asked-{world.seed}-{seed}")
    rows = []
    while len(rows) < count:
        passages = draw_passages(world.facts, rng)
        animal, attribute = draw_question(world.facts, rng, passages)
        rows.append(_span_row(phrase(rng, attribute, False, x=animal), passages, animal, attribute))
    return rows


def _held_out_spans(world: World, count: int) -> list[ROW]:
    share = -(-count // len(KINDS_ASKED))
    tasks = [task for group in KINDS_ASKED for task in passage_tasks(world.facts, group, share)]
    rows = [_span_row(task.question, task.told, task.animal, task.attribute) for task in tasks]
    random.Random("held-out-asked").shuffle(rows)
    return rows[:count]


def _span_row(question: str, passages: Sequence[Told], animal: str, attribute: str) -> ROW:
    """Return a question with its passages in one text, and the position of each value that answers it."""
    context, texts, starts = "", [], []
    values = answer_to({}, passages, animal, attribute).values
    for each in passages:
        context += " " if context else ""
        value = each.facts.get(attribute)
        if each.animal == animal and value in values:
            # The value in an instruction of the passage is no answer, and is another value.
            index = re.search(rf"\b{value}\b", each.text)
            texts.append(value)
            starts.append(len(context) + index.start())
        context += each.text
    return {"prompt": context, "context": context, "question": question, "texts": texts, "starts": starts}


# ---- rewording ----
#
# The embedded world's questions in other words: the same question in a wording unseen in training.


def paraphrase(task: Task, rng: random.Random) -> Task:
    """Return a task with its question in a held-out wording, and the same sentence before it, if any.

    Raises:
        ValueError: for a question in none of the world's wordings.
    """
    opener = next((each for each in OPENERS if task.instruction.startswith(f"{each} ")), "")
    family, slots = _read(task.instruction.removeprefix(opener).strip())
    wording = rng.choice(PHRASINGS[family][-HELD_OUT_PHRASINGS:]).format(**slots)
    return replace(task, instruction=f"{opener} {wording}".strip(), is_new_phrasing=True)


def _read(question: str) -> tuple[str, dict[str, str]]:
    """Return the family with this wording of a question, and the words in the gaps of that wording."""
    result: list[tuple[int, str, dict[str, str]]] = []
    for family, wordings in PHRASINGS.items():
        for wording in wordings:
            parts = re.split(r"\{(\w+)\}", wording)
            # The names of gaps stand at odd positions.
            pattern = "".join(f"(?P<{part}>.+)" if at % 2 else re.escape(part) for at, part in enumerate(parts))
            if match := re.fullmatch(pattern, question):
                result.append((sum(map(len, parts[::2])), family, match.groupdict()))
    if not result:
        raise ValueError(f"{question!r} is in none of the world's wordings")
    # The wording with more words is meant: "What is a good way to ..." is no "What is 2 plus 3?".
    _, family, slots = max(result, key=lambda each: each[0])
    return family, slots
