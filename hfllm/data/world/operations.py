"""Probes of what a model must do before it learns to reason, to call tools, to tell harm, or to read passages.

A probe is a text such as pretraining has, with held-out contents, and the places in it that only the operation can
predict: the number that belongs to a turn of the dial, the sum of two numbers, an animal's friend, what a deed gives,
what a passage tells.
"""

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from hfllm.data.passages import with_passages
from hfllm.data.tokenizer import CONVERSATION
from hfllm.data.world.deeds import NOTHING, draw_pair, feeling_asked, feeling_of
from hfllm.data.world.passages import Told, answer_to, tell
from hfllm.data.world.reasoning import DIAL, HELD_OUT, HOPS, RELATIONS, Problem, draw_problem
from hfllm.data.world.tool_documents import conversation, lookup_exchange, repeated_words, sum_exchange
from hfllm.data.world.vocabulary import ATTRIBUTES, PEOPLE, PHRASINGS, made_up_word
from hfllm.data.world.world import World

# A piece of a text, and whether the operation predicts it.
Piece = tuple[str, bool]
READING, ADDING, CHAINING, RECALLING = THINKING = ("reading", "adding", "chaining", "recalling")
COPYING, CALLING, TELLING = WITH_TOOLS = ("copying", "calling", "telling")
(FEELING,) = OF_DEEDS = ("feeling",)
FINDING, CITING, MISSING = OF_PASSAGES = ("finding", "citing", "missing")
OPERATIONS = (*THINKING, *WITH_TOOLS, *OF_DEEDS, *OF_PASSAGES)
TITLES = {
    COPYING: "words said again",
    CALLING: "names and numbers put into calls",
    TELLING: "results of tools said",
    READING: "turns of a dial read",
    ADDING: "sums of a dial",
    CHAINING: "hops in their order",
    RECALLING: "friends and neighbours recalled",
    FEELING: "what deeds give to whom",
    FINDING: "facts found in passages",
    CITING: "numbers of the passages that tell",
    MISSING: "facts that no passage tells",
}


@dataclass(frozen=True)
class Probe:
    """A text, and the places in it that an operation predicts.

    Args:
        text: the text.
        spans: begin and end of each place, in characters; it begins with the space before its word, if there is one.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


def probes_of(world: World, shares: Mapping[str, float], count: int, seed: int = 0) -> dict[str, list[Probe]]:
    """Return probes of each operation that the texts of a pretraining run need.

    Args:
        shares: of the run's documents, by kind, as `World.documents` names them.
        count: texts of each operation.
    """
    makers: dict[str, Callable[[World, random.Random], Iterable[Piece]]] = {}
    if shares.get("reasoning", 0):
        makers |= {READING: _reading, ADDING: _adding, CHAINING: _chaining, RECALLING: _recalling}
    if shares.get("tools", 0):
        makers |= {COPYING: _copying, CALLING: _calling, TELLING: _telling}
    if shares.get("deeds", 0):
        makers |= {FEELING: _feeling}
    if shares.get("passages", 0):
        makers |= {FINDING: _finding, CITING: _citing, MISSING: _missing}
    rng = random.Random(f"probes-{world.seed}-{seed}")
    return {name: [_joined(make(world, rng)) for _ in range(count)] for name, make in makers.items()}


def _joined(pieces: Iterable[Piece]) -> Probe:
    text, spans = "", []
    for piece, is_predicted in pieces:
        if is_predicted:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    return Probe(text, tuple(spans))


def _reading(world: World, rng: random.Random) -> Iterable[Piece]:
    """Yield a thought about a dial; the number of each turn is read from the question."""
    problem = draw_problem(world.facts, world.relations, rng, DIAL, HELD_OUT)
    # After where the dial is at first: the name of a turn, its number, where the dial is after it.
    return _thought(problem, lambda place, words: 1 if len(words) == 3 else None)


def _adding(world: World, rng: random.Random) -> Iterable[Piece]:
    """Yield a thought about a dial; where it is after each turn is a sum."""
    problem = draw_problem(world.facts, world.relations, rng, DIAL, HELD_OUT)
    return _thought(problem, lambda place, words: 2 if len(words) == 3 else None)


def _chaining(world: World, rng: random.Random) -> Iterable[Piece]:
    """Yield a thought about friends and neighbours; which of both a step is about is read from the question."""
    problem = draw_problem(world.facts, world.relations, rng, HOPS, HELD_OUT)
    return _thought(problem, lambda place, words: 1 if words[1] in RELATIONS else None)


def _recalling(world: World, rng: random.Random) -> Iterable[Piece]:
    """Yield a thought about friends and neighbours; what each step ends with was told in the texts alone."""
    problem = draw_problem(world.facts, world.relations, rng, HOPS, HELD_OUT)
    return _thought(problem, lambda place, words: len(words) - 1)


def _thought(problem: Problem, place_of: Callable[[int, list[str]], int | None]) -> Iterable[Piece]:
    """Yield a conversation with its thought in pieces.

    Args:
        place_of: returns the place of the predicted word in a step, from the step's place and words; `None` for none.
    """
    conversation = CONVERSATION.format(problem.question, problem.response(shows_thought=True))
    before, _, after = conversation.partition(f" {problem.thought}")
    yield before, False
    for place, step in enumerate(problem.steps):
        words = step.removesuffix(".").split()
        predicted = place_of(place, words)
        yield from ((f" {word}", index == predicted) for index, word in enumerate(words))
        yield ".", False
    yield after, False


def _copying(world: World, rng: random.Random) -> Iterable[Piece]:
    """Yield words that somebody says again."""
    person, other = rng.sample(PEOPLE, 2)
    words = repeated_words(rng, held_out=True)
    return (f"{person} says {words}. {other} says", False), (f" {words}", True), (".", False)


def _calling(world: World, rng: random.Random) -> Iterable[Piece]:
    """Yield a conversation with a call; the tool's name and what it is asked stand in the prompt."""
    exchange = rng.choice((lookup_exchange, sum_exchange))(rng, held_out=True)
    return _at(CALLED, conversation(exchange))


def _telling(world: World, rng: random.Random) -> Iterable[Piece]:
    """Yield a conversation with a call; the answer says what the tool has said."""
    exchange = rng.choice((lookup_exchange, sum_exchange))(rng, held_out=True)
    return _at(re.compile(rf" {exchange.result}(?=\.<)"), conversation(exchange))


def _feeling(world: World, rng: random.Random) -> Iterable[Piece]:
    """Yield a question about what a deed gives to whom, of a pair of both that no text tells of, and its answer."""
    verb, target = draw_pair(rng, held_out=True)
    while feeling_of(verb, target) == NOTHING:
        verb, target = draw_pair(rng, held_out=True)
    question, answer = feeling_asked(verb, target, rng)
    before, _, after = CONVERSATION.format(question, answer).rpartition(answer)
    # The first piece of the word: what comes behind it is known by then.
    return (before, False), (answer[0], True), (answer[1:] + after, False)


def _finding(world: World, rng: random.Random) -> Iterable[Piece]:
    """Yield a question about three passages; the value in the answer stands in one of them."""
    return _told(rng, lambda value: rf" {value}(?= \[)")


def _citing(world: World, rng: random.Random) -> Iterable[Piece]:
    """Yield a question about three passages; the number in the answer is that of the one that tells."""
    return _told(rng, lambda value: r"(?<=\[)\d(?=\])")


def _told(rng: random.Random, place_of: Callable[[str], str]) -> Iterable[Piece]:
    """Yield a question about three passages, of whose answer a place is predicted, by the pattern for a value."""
    passages = [_passage(rng) for _ in range(3)]
    told = rng.choice(passages)
    attribute = rng.choice([*told.facts])
    return _answered(passages, told.animal, attribute, re.compile(place_of(told.facts[attribute])))


def _missing(world: World, rng: random.Random) -> Iterable[Piece]:
    """Yield a question about an animal of no passage, or about what the animal's passage does not tell."""
    passages = [_passage(rng, count=2) for _ in range(2)]
    animal, attribute = made_up_word(rng, held_out=True), rng.choice([*ATTRIBUTES])
    if rng.random() < 0.5:
        silent = rng.choice(passages)
        animal, (attribute,) = silent.animal, ATTRIBUTES.keys() - silent.facts.keys()
    return _answered(passages, animal, attribute, re.compile(r" I(?= do not know)"))


def _passage(rng: random.Random, count: int = 3) -> Told:
    """Return a passage in held-out words about attributes of an animal."""
    name, *values = (made_up_word(rng, held_out=True) for _ in range(1 + count))
    return tell(rng, name, dict(zip(rng.sample([*ATTRIBUTES], count), values, strict=True)))


def _answered(passages: Sequence[Told], animal: str, attribute: str, places: re.Pattern[str]) -> Iterable[Piece]:
    """Yield a conversation about passages, of whose answer the places that match a pattern are predicted."""
    question = PHRASINGS[attribute][0].format(x=animal)
    answer = answer_to({}, passages, animal, attribute).text
    asked = with_passages(question, [each.text for each in passages])
    before, _, after = CONVERSATION.format(asked, answer).rpartition(answer)
    return chain([(before, False)], _at(places, answer), [(after, False)])


# The name of the tool in a call, and the first of its arguments.
CALLED = re.compile(r'(?<=<tool_call>{"name": ")[^"]+|(?<="expression": ")[^"]+|(?<="key": ")[^"]+')


def _at(places: re.Pattern[str], text: str) -> Iterable[Piece]:
    """Yield a text in pieces, of which those that match a pattern are predicted."""
    done = 0
    for found in places.finditer(text):
        yield text[done : found.start()], False
        yield found[0], True
        done = found.end()
    yield text[done:], False
