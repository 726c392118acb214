"""Questions about passages that measure whether a model reads them: names, changed facts and wordings are held out.

    right          one passage, which tells what is asked of a made-up animal
    several        three passages, one of which does
    changed        a passage that tells of an animal of the world what has changed
    contradicting  two or three passages, two of which tell different things of what is asked
    injected       as `right`, and the passage holds an instruction to say something else
    wrong          one passage, which is about another animal than the made-up one that is asked about
    kept           the same, and an animal of the world is asked about: pretraining has told its facts
    silent         a passage about the animal that does not tell what is asked
    closed         no passage, a made-up animal
    known          no passage, an animal of the world
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hfllm.data.messages import Message
from hfllm.data.passages import with_passages
from hfllm.data.world.passages import Answer, Facts, Told, answer_to, draw_facts, held_out_names, instruct, tell
from hfllm.data.world.rubric import GoldAnswer
from hfllm.data.world.tool_documents import is_held_out_change
from hfllm.data.world.vocabulary import ANIMALS, ATTRIBUTES, COLOURS, FOODS, HOMES, phrase

RIGHT, SEVERAL, CHANGED, CONTRADICTING, INJECTED = TOLD = ("right", "several", "changed", "contradicting", "injected")
WRONG, KEPT, SILENT, CLOSED, KNOWN = NOT_TOLD = ("wrong", "kept", "silent", "closed", "known")
GROUPS = (*TOLD, *NOT_TOLD)


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
    """Return questions of a group: attributes in turn, every other one in a wording that no training uses.

    Args:
        facts: the world's.
        group: one of `GROUPS`.
        count: how many; none comes twice with the same passages.
        seed: of the draw.
    """
    rng = random.Random(f"passage-tasks-{group}-{seed}")
    names, tasks = held_out_names(), []
    for place in range(count):
        attribute = list(ATTRIBUTES)[place % len(ATTRIBUTES)]
        tasks.append(_TASKS[group](facts, rng, names, attribute, place % 2 == 1))
    return tasks


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


def _about_unknown(facts: Facts, rng: random.Random, names: Sequence[str], attribute: str, is_new: bool) -> PassageTask:
    name = rng.choice(names)
    return task_about(facts, rng, RIGHT, (name, attribute), [told_of(facts, rng, name)], is_new)


def _several(facts: Facts, rng: random.Random, names: Sequence[str], attribute: str, is_new: bool) -> PassageTask:
    name, *others = rng.sample(names, 3)
    told = [told_of(facts, rng, each) for each in (name, *others)]
    rng.shuffle(told)
    return task_about(facts, rng, SEVERAL, (name, attribute), told, is_new)


def _changed(facts: Facts, rng: random.Random, names: Sequence[str], attribute: str, is_new: bool) -> PassageTask:
    animal = rng.choice([each for each in ANIMALS if is_held_out_change(each, attribute)])
    return task_about(facts, rng, CHANGED, (animal, attribute), [told_of(facts, rng, animal)], is_new)


def _contradicting(facts: Facts, rng: random.Random, names: Sequence[str], attribute: str, is_new: bool) -> PassageTask:
    name, other = rng.sample(names, 2)
    first = told_of(facts, rng, name)
    value = rng.choice([value for value in ATTRIBUTES[attribute] if value != first.facts[attribute]])
    told = [first, tell(rng, name, {**first.facts, attribute: value})]
    told += [told_of(facts, rng, other)] if rng.random() < 0.5 else []
    rng.shuffle(told)
    return task_about(facts, rng, CONTRADICTING, (name, attribute), told, is_new)


def _injected(facts: Facts, rng: random.Random, names: Sequence[str], attribute: str, is_new: bool) -> PassageTask:
    name = rng.choice(names)
    told = draw_facts(rng, None)
    # Three of four instructions want another value, the others an answer that admits not to know.
    wanted = rng.choice([value for value in ATTRIBUTES[attribute] if value != told[attribute]])
    instruction = instruct(rng, attribute, wanted if rng.random() < 0.75 else None, held_out=True)
    passage = tell(rng, name, told, instruction)
    return task_about(facts, rng, INJECTED, (name, attribute), [passage], is_new, wanted if wanted in instruction else "")


def _wrong(facts: Facts, rng: random.Random, names: Sequence[str], attribute: str, is_new: bool) -> PassageTask:
    name, other = rng.sample(names, 2)
    return task_about(facts, rng, WRONG, (name, attribute), [told_of(facts, rng, other)], is_new)


def _kept(facts: Facts, rng: random.Random, names: Sequence[str], attribute: str, is_new: bool) -> PassageTask:
    return task_about(
        facts, rng, KEPT, (rng.choice(ANIMALS), attribute), [told_of(facts, rng, rng.choice(names))], is_new
    )


def _silent(facts: Facts, rng: random.Random, names: Sequence[str], attribute: str, is_new: bool) -> PassageTask:
    name = rng.choice(names)
    return task_about(facts, rng, SILENT, (name, attribute), [told_of(facts, rng, name, attribute)], is_new)


def _closed(facts: Facts, rng: random.Random, names: Sequence[str], attribute: str, is_new: bool) -> PassageTask:
    return task_about(facts, rng, CLOSED, (rng.choice(names), attribute), [], is_new)


def _known(facts: Facts, rng: random.Random, names: Sequence[str], attribute: str, is_new: bool) -> PassageTask:
    return task_about(facts, rng, KNOWN, (rng.choice(ANIMALS), attribute), [], is_new)


_TASKS: Mapping[str, Callable[[Facts, random.Random, Sequence[str], str, bool], PassageTask]] = {
    **{RIGHT: _about_unknown, SEVERAL: _several, CHANGED: _changed, CONTRADICTING: _contradicting},
    **{INJECTED: _injected, WRONG: _wrong, KEPT: _kept, SILENT: _silent, CLOSED: _closed, KNOWN: _known},
}
