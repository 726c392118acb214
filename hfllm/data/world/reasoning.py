"""Questions of the world that a small model cannot answer at once, the thoughts behind the answers, and their check.

    hops    the friend of the neighbour of an animal, or a fact about it: facts of two or three hops
    dial    a dial of eight numbers with several turns: sums modulo 8, one after the other

Every step of a thought is small: it copies something from the question and from the step before, and looks something
up (`K 4 7.`: turn K is by 4, and 4 from where the dial was, it is at 7; `fox friend owl.`: the fox has the owl as its
friend).

A step has to find its turn by name, at whatever distance: dials are learned with 5 to 9 turns and asked with 4 and
with 12 too (`UNSEEN_SIZES`). What makes this learnable (an induction head: Olsson et al. 2022, arXiv:2209.11895) is
that all that decides a token stands within the four tokens before it, in the question as in the thought: the last
turn's name before the next one's, a turn's name before its number, and the dial before a sum. The list of turns ends
with a word, so that its end is found as the next turn is. Names are drawn, so that none tells a place, sentences of
varying length stand between the turns and the thought, so that distances are as long as those of twelve turns, and in
some texts numbers are found by name (`hfllm.data.world.documents`).

There are 600 questions of hops, few enough to be learned by heart, and billions of the dial.
"""

import random
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hfllm.data.thoughts import CLOSE, OPEN
from hfllm.data.world.rubric import GoldAnswer
from hfllm.data.world.vocabulary import ANIMALS, ATTRIBUTES, HELD_OUT_PHRASINGS, PHRASINGS, WELL_SAID

# ---- problems ----


HOPS, DIAL = FAMILIES = ("hops", "dial")
SHOWN, PRACTICE, HELD_OUT = PARTS = ("shown", "practice", "held_out")
RELATIONS = ("friend", "neighbour")
# Letters, since a number of a turn could be taken for a number of the dial; "I" is a word too. After the last turn
# comes a word, in the question as in the thought.
TURNS, STOP = tuple("ABCDEFGHJKLMNOPQ"), "stop"
NUMBERS_OF_DIAL = 8
# The question at the end of the hops: an attribute, or the animal itself. The latter has twenty answers, the others
# eight, which guesses hit more often.
WHO = "animal"
ASKED = {**dict.fromkeys(ATTRIBUTES, 1), WHO: 2}
VALUES = {**ATTRIBUTES, WHO: ANIMALS}
WORDINGS = {
    **{attribute: PHRASINGS[attribute][:-HELD_OUT_PHRASINGS] for attribute in ATTRIBUTES},
    WHO: ["Who is the {x}?", "Tell me who the {x} is.", "I want to know who the {x} is.", "Say who the {x} is."],
}
# They name no animal outside the question: to name it is to think.
ANSWERS = {
    **{"colour": "It is {value}.", "home": "It lives in the {value}.", "food": "It eats {value}."},
    WHO: "It is the {value}.",
}
ASK_DIAL = (
    "Where is the dial at the end?",
    "Tell me where the dial ends.",
    "Say where the dial ends.",
    "I want to know where the dial ends.",
    "What place has the dial at the end?",
    "Find the end of the dial.",
)
# In no text of training.
NEW_ASK_DIAL = ("Do you know where the dial ends?", "Please name the end of the dial.")
NEW_WORDINGS = {
    **{attribute: PHRASINGS[attribute][-HELD_OUT_PHRASINGS:] for attribute in ATTRIBUTES},
    WHO: ["Do you know who the {x} is?", "Please say who the {x} is."],
}
# Sentences of no use to a question, between the turns and what is asked.
ASIDES = ("Please think.", "I ask you.", "Do you know this?", "Please tell me this.", "This is a dial.")
# Hops, the last of which is the fact itself, and turns of the dial.
SIZES: Mapping[str, Sequence[int]] = {HOPS: (2, 3), DIAL: (5, 6, 7, 8, 9)}
# Asked, and in no text of training.
UNSEEN_SIZES: Mapping[str, Sequence[int]] = {HOPS: (), DIAL: (4, 12)}

# The facts of each animal, or its friend and neighbour, by name.
ToldFacts = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Problem:
    """A question with the thought behind its answer.

    Args:
        family: one of `FAMILIES`.
        size: how many hops, or turns of the dial.
        key: the content of the question, apart from its wording; `part_of` splits by it.
        question: the question.
        steps: the sentences of the thought, in order.
        gold: the gold answer for the rubric; `gold.accepted[0]` is the model answer.
        is_new_wording: whether training never sees the wording.
    """

    family: str
    size: int
    key: str
    question: str
    steps: tuple[str, ...]
    gold: GoldAnswer
    is_new_wording: bool = False

    @property
    def group(self) -> str:
        """The problems of its family and size."""
        return f"{self.family}_{self.size}"

    @property
    def thought(self) -> str:
        """The whole thought."""
        return " ".join(self.steps)

    def response(self, shows_thought: bool) -> str:
        """Return the model response: the answer, with the thought before it or without."""
        answer = self.gold.accepted[0]
        return f"{OPEN} {self.thought}{CLOSE} {answer}" if shows_thought else answer

    def prompt_row(self) -> dict:
        """Return the row of a prompt dataset: the conversation, and the columns for gold scoring."""
        return {"prompt": [{"role": "user", "content": self.question}], **self.gold.columns()}


def relations_of(world_seed: int) -> dict[str, dict[str, str]]:
    """Return each animal's friend and neighbour, another animal, which nobody shares with it."""
    rng = random.Random(f"relations-{world_seed}")
    relations: dict[str, dict[str, str]] = {animal: {} for animal in ANIMALS}
    for relation in RELATIONS:
        others = ANIMALS
        while any(animal == other for animal, other in zip(ANIMALS, others, strict=True)):
            others = rng.sample(ANIMALS, len(ANIMALS))
        for animal, other in zip(ANIMALS, others, strict=True):
            relations[animal][relation] = other
    return relations


def part_of(family: str, key: str) -> str:
    """Return which of `PARTS` an instance belongs to, the same in every world.

    A third is held out for evaluation. Of the dial two ninths are to practice on, by reinforcement learning. No hops
    are: a policy learns the answers to so few questions by heart, and is then paid for not thinking.
    """
    number = zlib.crc32(f"reasoning {key}".encode()) % 9
    if number < 3:
        return HELD_OUT
    return PRACTICE if family == DIAL and number < 5 else SHOWN


def tell_relation(relation: str, animal: str, other: str) -> str:
    """Return the sentence about an animal's friend or neighbour."""
    return f"The {relation} of the {animal} is the {other}."


def hops_problem(
    facts: ToldFacts, relations: ToldFacts, rng: random.Random, hops: int, new_wording: bool = False
) -> Problem:
    """Return a question about an animal, or a fact about one, at a distance of `hops` hops."""
    animal, what = rng.choice(ANIMALS), rng.choices(list(ASKED), list(ASKED.values()))[0]
    subject, steps = animal, []
    for _ in range(hops if what == WHO else hops - 1):
        relation = rng.choice(RELATIONS)
        other = relations[animal][relation]
        steps.append(f"{animal} {relation} {other}.")
        subject, animal = f"{relation} of the {subject}", other
    value = animal if what == WHO else facts[animal][what]
    if what != WHO:
        steps.append(WELL_SAID[what].format(x=animal, value=value))
    others = tuple(other for other in VALUES[what] if other != value)
    return Problem(
        family=HOPS,
        size=hops,
        key=f"hops {what} {subject}",
        question=rng.choice((NEW_WORDINGS if new_wording else WORDINGS)[what]).format(x=subject),
        steps=tuple(steps),
        gold=GoldAnswer("answer", (ANSWERS[what].format(value=value),), (value,), others),
        is_new_wording=new_wording,
    )


def dial_problem(rng: random.Random, size: int, new_wording: bool = False) -> Problem:
    """Return a question about a dial with `size` turns."""
    shows = first = rng.randrange(NUMBERS_OF_DIAL)
    turned = [(name, rng.randrange(NUMBERS_OF_DIAL)) for name in rng.sample(TURNS, size)]
    steps = [f"{first}."]
    for name, by in turned:
        shows = (shows + by) % NUMBERS_OF_DIAL
        steps.append(f"{name} {by} {shows}.")
    told = f"The dial is at {first}. Turn it by {', '.join(f'{name} {by}' for name, by in turned)}, {STOP}."
    asides = rng.sample(ASIDES, rng.randint(0, len(ASIDES)))
    others = tuple(str(number) for number in range(NUMBERS_OF_DIAL) if number != shows)
    return Problem(
        family=DIAL,
        size=size,
        key=f"dial {first} {' '.join(str(by) for _, by in turned)}",
        question=" ".join([told, *asides, rng.choice(NEW_ASK_DIAL if new_wording else ASK_DIAL)]),
        # Where the dial is at the end is said again, within four tokens of the answer.
        steps=(*steps, f"{STOP} {shows}."),
        gold=GoldAnswer("answer", (f"At {shows}.",), (str(shows),), others),
        is_new_wording=new_wording,
    )


def draw_problem(
    facts: ToldFacts,
    relations: ToldFacts,
    rng: random.Random,
    family: str,
    part: str,
    sizes: Sequence[int] | None = None,
    new_wording: bool = False,
) -> Problem:
    """Return a problem of a family and a part.

    Args:
        sizes: the sizes to draw from, by default all of the family's.
        new_wording: ask in words unseen in training.
    """
    while True:
        size = rng.choice(sizes or SIZES[family])
        if family == HOPS:
            problem = hops_problem(facts, relations, rng, size, new_wording)
        else:
            problem = dial_problem(rng, size, new_wording)
        if part_of(family, problem.key) == part:
            return problem


# ---- thought checks ----
#
# Check the steps of a thought against the question and the world, each from the result of the step before it.


FIRST, TURN = re.compile(r"The dial is at (\d)\."), re.compile(r"\b([A-Z]) (\d)\b")
TURNED = re.compile(r"(\w) (\d) (\d)")
RELATED = re.compile(r"(\w+) (\w+) (\w+)")


def checked_steps(problem: Problem, thought: str, facts: ToldFacts, relations: ToldFacts) -> list[bool]:
    """Return whether each step of a thought holds: it copies the question correctly, and adds a true statement.

    A step is judged by the statement of the one before it, right or wrong, so that one slip counts once. Missing steps
    do not hold, and neither do surplus ones: the list is as long as the longer of both.
    """
    sentences = [sentence.strip() for sentence in thought.split(".") if sentence.strip()]
    correct = (
        _checked_dial(problem, sentences)
        if problem.family == DIAL
        else _checked_hops(problem, sentences, facts, relations)
    )
    return correct + [False] * (max(len(sentences), len(problem.steps)) - len(correct))


def is_valid(steps: list[bool]) -> bool:
    """Return whether a thought is valid: all of its steps hold, and none is missing."""
    return bool(steps) and all(steps)


def _checked_dial(problem: Problem, sentences: list[str]) -> list[bool]:
    first, turns = FIRST.findall(problem.question)[0], TURN.findall(problem.question)
    correct = [sentence == first for sentence in sentences[:1]]
    shows = sentences[0] if sentences else ""
    for sentence, turn in zip(sentences[1:], turns, strict=False):
        match = TURNED.fullmatch(sentence)
        is_read = match is not None and match.groups()[:2] == turn and shows.isdigit()
        correct.append(is_read and int(match[3]) == (int(shows) + int(turn[1])) % NUMBERS_OF_DIAL)
        shows = match[3] if match else ""
    return correct + [sentence == f"{STOP} {shows}" for sentence in sentences[1 + len(turns) :][:1]]


def _checked_hops(problem: Problem, sentences: list[str], facts: ToldFacts, relations: ToldFacts) -> list[bool]:
    _, what, *words = problem.key.split()
    # "friend of the neighbour of the fox": the thought begins with the last word.
    animal, path = words[-1], words[:-1:3][::-1]
    correct = []
    for sentence, relation in zip(sentences, path, strict=False):
        match = RELATED.fullmatch(sentence)
        is_read = match is not None and match.groups()[:2] == (animal, relation)
        correct.append(is_read and relations.get(animal, {}).get(relation) == match[3])
        animal = match[3] if match else ""
    # The animal has been named by then; its fact has not.
    for sentence in sentences[len(path) : len(path) + (what != WHO)]:
        fact = WELL_SAID[what].format(x=animal, value=facts[animal][what]) if animal in facts else ""
        correct.append(f"{sentence}." == fact)
    return correct


# ---- thoughts with slips ----


def with_slips(
    problem: Problem, facts: ToldFacts, relations: ToldFacts, rng: random.Random, share: float
) -> tuple[list[str], str]:
    """Return the steps of a thought in which each step goes wrong with probability `share`, and its answer.

    Each step builds on the one before it, right or wrong: a turn misread or a sum wrong, the friend taken for another.
    """
    if problem.family == DIAL:
        return _dial_with_slips(problem, rng, share)
    _, what, *words = problem.key.split()
    animal, steps = words[-1], []
    for relation in words[:-1:3][::-1]:
        other = relations[animal][relation]
        if rng.random() < share:
            other = rng.choice([each for each in ANIMALS if each not in (other, animal)])
        steps.append(f"{animal} {relation} {other}.")
        animal = other
    if what == WHO:
        return steps, ANSWERS[what].format(value=animal)
    value = facts[animal][what]
    if rng.random() < share:
        value = rng.choice([each for each in VALUES[what] if each != value])
    return [*steps, WELL_SAID[what].format(x=animal, value=value)], ANSWERS[what].format(value=value)


def _dial_with_slips(problem: Problem, rng: random.Random, share: float) -> tuple[list[str], str]:
    def other(number: int) -> int:
        return (number + rng.randrange(1, NUMBERS_OF_DIAL)) % NUMBERS_OF_DIAL

    shows = int(FIRST.findall(problem.question)[0])
    shows = other(shows) if rng.random() < share else shows
    steps = [f"{shows}."]
    for name, by in TURN.findall(problem.question):
        slips, misreads = rng.random() < share, rng.random() < 0.5
        read = str(other(int(by))) if slips and misreads else by
        shows = (shows + int(read)) % NUMBERS_OF_DIAL
        shows = other(shows) if slips and not misreads else shows
        steps.append(f"{name} {read} {shows}.")
    shows = other(shows) if rng.random() < share else shows
    return [*steps, f"{STOP} {shows}."], f"At {shows}."


def step_rows(
    facts: ToldFacts,
    relations: ToldFacts,
    rng: random.Random,
    count: int,
    part: str,
    share: float = 0.2,
    label_noise: float = 0.0,
) -> list[dict[str, object]]:
    """Return solutions with `prompt`, `response` and `labels`, a number for each step: whether it holds.

    A step is judged by the one before it, right or wrong, as `checked_steps` does.

    Args:
        part: of the problems, one of `PARTS`.
        share: of the steps that go wrong.
        label_noise: share of the labels that are turned around; 0.5 leaves nothing to learn.
    """
    rows = []
    for _ in range(count):
        problem = draw_problem(facts, relations, rng, rng.choice(FAMILIES), part)
        steps, answer = with_slips(problem, facts, relations, rng, share)
        holds = checked_steps(problem, " ".join(steps), facts, relations)[: len(steps)]
        rows.append(
            {
                "prompt": [{"role": "user", "content": problem.question}],
                "response": f"{OPEN} {' '.join(steps)}{CLOSE} {answer}",
                "labels": [float(each != (rng.random() < label_noise)) for each in holds],
            }
        )
    return rows
