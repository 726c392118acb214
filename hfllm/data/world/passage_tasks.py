"""Questions about passages that measure whether a model reads them: names, changed facts and wordings are held out.

    one_passage          it tells what is asked of a made-up animal
    three_passages       one of them does
    changed              it tells of an animal of the world what has changed
    contradicting        two or three passages, two of which tell different things of what is asked
    injected             as the first, and the passage holds an instruction to say something else
    wrong_passage        it is about another animal than the made-up one that is asked about
    wrong_passage_known  the same, and an animal of the world is asked about: pretraining has told its facts
    silent               it is about the animal and does not tell what is asked
    closed_unknown       no passage, a made-up animal
    closed_known         no passage, an animal of the world

In `stored_tasks` the passages are to be found first, among those about many animals.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from hfllm.data.messages import Message
from hfllm.data.passages import with_passages
from hfllm.data.world.passages import Answer, Facts, Told, answer_to, draw_facts, held_out_names, instruct, tell
from hfllm.data.world.rubric import GoldAnswer
from hfllm.data.world.tool_documents import draw_name, is_held_out_change
from hfllm.data.world.vocabulary import ANIMALS, ATTRIBUTES, COLOURS, FOODS, HOMES, phrase

ONE, THREE, CHANGED, CONTRADICTING, INJECTED = TOLD = (
    *("one_passage", "three_passages", "changed"),
    *("contradicting", "injected"),
)
WRONG, KEPT, SILENT, CLOSED, KNOWN = NOT_TOLD = (
    *("wrong_passage", "wrong_passage_known", "silent"),
    *("closed_unknown", "closed_known"),
)
GROUPS = (*TOLD, *NOT_TOLD)
Names = Sequence[str]


@dataclass(frozen=True)
class PassageTask:
    """A question with its passages.

    Args:
        group: one of `GROUPS`.
        animal, attribute: what is asked.
        question: the question alone.
        told: the passages, in the order of the prompt.
        answer: what is to be said.
        wanted: the value that an instruction in a passage wants to be said, or nothing.
        is_new_phrasing: whether no training uses the wording of the question.
    """

    group: str
    animal: str
    attribute: str
    question: str
    told: tuple[Told, ...]
    answer: Answer
    wanted: str = ""
    is_new_phrasing: bool = False

    @property
    def prompt(self) -> list[Message]:
        """The question after its passages, as a conversation."""
        return [{"role": "user", "content": with_passages(self.question, [each.text for each in self.told])}]

    @property
    def gold(self) -> GoldAnswer:
        """The gold answer, for a response without its citations. It names none of the other animals."""
        if not self.answer.values:
            return GoldAnswer("unknown", (self.answer.said,), (), (*COLOURS, *HOMES, *FOODS))
        values = [value for value in ATTRIBUTES[self.attribute] if value not in self.answer.values]
        animals = {*ANIMALS, *(each.animal for each in self.told)} - {self.animal}
        return GoldAnswer("answer", (self.answer.said,), self.answer.values, (*values, *sorted(animals)))


def passage_tasks(facts: Facts, group: str, count: int, seed: int = 0) -> list[PassageTask]:
    """Return different questions of a group: attributes in turn, half of them in wordings that no training uses.

    Args:
        facts: the world's.
        group: one of `GROUPS`.
        count: how many; fewer where there are no more.
        seed: of the draw.
    """
    rng, names = random.Random(f"passage-tasks-{group}-{seed}"), held_out_names()
    tasks: dict[str, PassageTask] = {}
    for _ in range(20 * count):
        if len(tasks) == count:
            break
        attribute, is_new = list(ATTRIBUTES)[len(tasks) % 3], len(tasks) % 2 == 1
        task = _TASKS[group](facts, rng, names, attribute, is_new)
        tasks.setdefault(task.prompt[0]["content"], task)
    return list(tasks.values())


# ---- passages that are to be found ----

ANSWERABLE, UNANSWERABLE = "answerable", "unanswerable"
STORED = (ANSWERABLE, UNANSWERABLE, KNOWN)


def stored_tasks(
    facts: Facts, count: int, seed: int = 0, held_out: bool = True
) -> tuple[list[Told], dict[str, list[PassageTask]]]:
    """Return passages about made-up animals, one each, and questions by `STORED`, which have all of them as theirs.

    Half of the names have a passage (`answerable`), the others have none, and neither have the world's animals.

    Args:
        facts: the world's.
        count: questions of each kind.
        seed: of the draw.
        held_out: whether the names are those that nothing learns from; else as many that may be learned from.
    """
    rng = random.Random(f"stored-{seed}-{held_out}")
    names = held_out_names() if held_out else sorted({draw_name(rng) for _ in range(len(held_out_names()))})
    rng.shuffle(names)
    half = len(names) // 2
    store = [told_of(facts, rng, name) for name in names[:half]]
    tasks: dict[str, list[PassageTask]] = {}
    for group, animals in zip(STORED, (names[:half], names[half:], ANIMALS), strict=True):
        tasks[group] = []
        for place in range(count):
            asked = rng.choice(animals), list(ATTRIBUTES)[place % 3]
            tasks[group].append(task_about(facts, rng, group, asked, store, held_out and place % 2 == 1))
    return store, tasks


def with_found(task: PassageTask, found: Sequence[int]) -> PassageTask:
    """Return a question of `stored_tasks` with the passages that were found for it, by their places in the store.

    What is to be said does not depend on what was found; only the numbers to cite do.
    """
    of_store = {number - 1 for number in task.answer.cites}
    cites = tuple(number for number, place in enumerate(found, 1) if place in of_store)
    return replace(task, told=tuple(task.told[place] for place in found), answer=replace(task.answer, cites=cites))


# ---- questions of each group ----


def task_about(
    facts: Facts,
    rng: random.Random,
    group: str,
    asked: tuple[str, str],
    told: Sequence[Told],
    is_new_phrasing: bool,
    wanted: str = "",
) -> PassageTask:
    """Return the question about an animal and an attribute with some passages."""
    question = phrase(rng, asked[1], is_new_phrasing, x=asked[0])
    answer = answer_to(facts, told, *asked)
    return PassageTask(group, *asked, question, tuple(told), answer, wanted, is_new_phrasing)


def told_of(facts: Facts, rng: random.Random, animal: str, without: str = "") -> Told:
    """Return a passage that tells of an animal what is random, or changed, but for one attribute."""
    attributes = [each for each in ATTRIBUTES if each != without]
    return tell(rng, animal, draw_facts(rng, facts.get(animal), attributes))


def _one(facts: Facts, rng: random.Random, names: Names, attribute: str, is_new: bool) -> PassageTask:
    name = rng.choice(names)
    return task_about(facts, rng, ONE, (name, attribute), [told_of(facts, rng, name)], is_new)


def _three(facts: Facts, rng: random.Random, names: Names, attribute: str, is_new: bool) -> PassageTask:
    name, *others = rng.sample(names, 3)
    told = [told_of(facts, rng, each) for each in (name, *others)]
    rng.shuffle(told)
    return task_about(facts, rng, THREE, (name, attribute), told, is_new)


def _changed(facts: Facts, rng: random.Random, names: Names, attribute: str, is_new: bool) -> PassageTask:
    animal = rng.choice([each for each in ANIMALS if is_held_out_change(each, attribute)])
    return task_about(facts, rng, CHANGED, (animal, attribute), [told_of(facts, rng, animal)], is_new)


def _contradicting(facts: Facts, rng: random.Random, names: Names, attribute: str, is_new: bool) -> PassageTask:
    name, other = rng.sample(names, 2)
    first = told_of(facts, rng, name)
    value = rng.choice([value for value in ATTRIBUTES[attribute] if value != first.facts[attribute]])
    told = [first, tell(rng, name, {**first.facts, attribute: value})]
    told += [told_of(facts, rng, other)] if rng.random() < 0.5 else []
    rng.shuffle(told)
    return task_about(facts, rng, CONTRADICTING, (name, attribute), told, is_new)


def _injected(facts: Facts, rng: random.Random, names: Names, attribute: str, is_new: bool) -> PassageTask:
    name, told = rng.choice(names), draw_facts(rng, None)
    # Three of four instructions want another value, the others an answer that admits not to know.
    wanted = rng.choice([value for value in ATTRIBUTES[attribute] if value != told[attribute]])
    wanted = wanted if rng.random() < 0.75 else ""
    passage = tell(rng, name, told, instruct(rng, attribute, wanted or None, held_out=True))
    return task_about(facts, rng, INJECTED, (name, attribute), [passage], is_new, wanted)


def _wrong(facts: Facts, rng: random.Random, names: Names, attribute: str, is_new: bool) -> PassageTask:
    name, other = rng.sample(names, 2)
    return task_about(facts, rng, WRONG, (name, attribute), [told_of(facts, rng, other)], is_new)


def _kept(facts: Facts, rng: random.Random, names: Names, attribute: str, is_new: bool) -> PassageTask:
    told = [told_of(facts, rng, rng.choice(names))]
    return task_about(facts, rng, KEPT, (rng.choice(ANIMALS), attribute), told, is_new)


def _silent(facts: Facts, rng: random.Random, names: Names, attribute: str, is_new: bool) -> PassageTask:
    name = rng.choice(names)
    return task_about(facts, rng, SILENT, (name, attribute), [told_of(facts, rng, name, attribute)], is_new)


def _closed(facts: Facts, rng: random.Random, names: Names, attribute: str, is_new: bool) -> PassageTask:
    return task_about(facts, rng, CLOSED, (rng.choice(names), attribute), [], is_new)


def _known(facts: Facts, rng: random.Random, names: Names, attribute: str, is_new: bool) -> PassageTask:
    return task_about(facts, rng, KNOWN, (rng.choice(ANIMALS), attribute), [], is_new)


_TASKS: Mapping[str, Callable[[Facts, random.Random, Names, str, bool], PassageTask]] = {
    **{ONE: _one, THREE: _three, CHANGED: _changed, CONTRADICTING: _contradicting, INJECTED: _injected},
    **{WRONG: _wrong, KEPT: _kept, SILENT: _silent, CLOSED: _closed, KNOWN: _known},
}
