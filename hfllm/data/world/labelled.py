"""The embedded world's rows with labels: families of questions, animals and values in texts, answers in passages.

What is held out comes in no training row: instances and wordings of questions, names of animals, changed facts.
"""

import random
import re
from collections.abc import Sequence
from typing import Any

from hfllm.data.labelled import TEXT, WORDS
from hfllm.data.world.passage_tasks import CHANGED, ONE, SILENT, THREE, WRONG, passage_tasks, told_of
from hfllm.data.world.passages import Told, answer_to, draw_passages, draw_question, held_out_names
from hfllm.data.world.vocabulary import ANIMALS, ATTRIBUTES, phrase
from hfllm.data.world.world import World

ROW = dict[str, Any]
# Groups of held-out questions about passages that are asked of a span, in equal shares.
ASKED = (ONE, THREE, CHANGED, SILENT, WRONG)
KINDS = {value: attribute for attribute, values in ATTRIBUTES.items() for value in values}
OUTSIDE = "O"


def labelled_rows(world: World, task: str, count: int, eval_count: int, seed: int) -> tuple[list[ROW], list[ROW]]:
    """Return training and held-out rows of a task: see `hfllm.data.labelled`.

    Args:
        world: whose facts, questions and passages they are of.
        task: one of `hfllm.data.labelled.TASKS`.
        count, eval_count: how many rows of each.
        seed: of the training rows; the held-out ones are always the same.
    """
    train, held_out = {TEXT: (_questions, _held_out_questions), WORDS: (_tagged, _held_out_tagged)}.get(
        task, (_asked, _held_out_asked)
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


def _tagged_row(told: Told) -> ROW:
    words = re.findall(r"\w+|[^\w\s]", told.text)
    tags = [_tag(word, told.animal) for word in words]
    return {"prompt": " ".join(words), "words": words, "tags": tags}


def _tag(word: str, animal: str) -> str:
    kind = "animal" if word == animal or word in ANIMALS else KINDS.get(word)
    return OUTSIDE if kind is None else f"B-{kind}"


# ---- answers in passages ----


def _asked(world: World, count: int, seed: int) -> list[ROW]:
    rng = random.Random(f"asked-{world.seed}-{seed}")
    rows = []
    while len(rows) < count:
        told = draw_passages(world.facts, rng)
        animal, attribute = draw_question(world.facts, rng, told)
        rows.append(_span_row(phrase(rng, attribute, False, x=animal), told, animal, attribute))
    return rows


def _held_out_asked(world: World, count: int) -> list[ROW]:
    share = -(-count // len(ASKED))
    tasks = [task for group in ASKED for task in passage_tasks(world.facts, group, share)]
    rows = [_span_row(task.question, task.told, task.animal, task.attribute) for task in tasks]
    random.Random("held-out-asked").shuffle(rows)
    return rows[:count]


def _span_row(question: str, told: Sequence[Told], animal: str, attribute: str) -> ROW:
    """Return a question with its passages in one text, and where each value is told that answers it."""
    context, texts, starts = "", [], []
    values = answer_to({}, told, animal, attribute).values
    for each in told:
        context += " " if context else ""
        value = each.facts.get(attribute)
        if each.animal == animal and value in values:
            # What an instruction in the passage says is no answer, and is another value.
            place = re.search(rf"\b{value}\b", each.text)
            texts.append(value)
            starts.append(len(context) + place.start())
        context += each.text
    return {"prompt": context, "context": context, "question": question, "texts": texts, "starts": starts}
