"""The world's passages: what texts, rows and questions hold, and that every answer follows from its passages."""

import os
import random
import re
import subprocess
import sys
from collections import Counter
from functools import partial
from itertools import pairwise, product

import pytest

from hfllm.data.world.passages import (
    ANSWERABLE,
    CHANGED,
    CONTRADICTING,
    GROUPS,
    HELD_OUT_INSTRUCTIONS,
    INJECTED,
    INSTRUCTIONS,
    KNOWN,
    ONE,
    SILENT,
    THREE,
    UNANSWERABLE,
    UNREAD_WORDS,
    draw_passages,
    held_out_names,
    passage_tasks,
    stored_tasks,
    with_found,
)
from hfllm.data.world.rubric import words_of
from hfllm.data.world.tool_documents import is_held_out_change
from hfllm.data.world.vocabulary import (
    ANIMALS,
    ATTRIBUTES,
    KNOWN_WORDS,
    NAME_PARTS,
    PHRASINGS,
    UNREAD,
    UNREAD_ANIMALS,
    WELL_SAID,
    is_held_out,
)
from hfllm.data.world.world import World
from hfllm.stages.ground.build import judged, rows_of

NAMES = {"".join(parts) for parts in product(*NAME_PARTS)}
# What a passage tells, read by a parser of its own.
SENTENCES = (
    ("colour", r"The (?P<x>\w+) is (?P<value>\w+)"),
    ("colour", r"The colour of the (?P<x>\w+) is (?P<value>\w+)"),
    ("colour", r"The (?P<x>\w+) has the colour (?P<value>\w+)"),
    ("home", r"The (?P<x>\w+) lives in the (?P<value>\w+)"),
    ("home", r"The home of the (?P<x>\w+) is the (?P<value>\w+)"),
    ("home", r"You find the (?P<x>\w+) in the (?P<value>\w+)"),
    ("food", r"The (?P<x>\w+) eats (?P<value>\w+)"),
    ("food", r"The food of the (?P<x>\w+) is (?P<value>\w+)"),
    ("food", r"The (?P<x>\w+) likes (?P<value>\w+)"),
)
KEYS = {
    "colour": "colour",
    "live": "home",
    "lives": "home",
    "home": "home",
    "eat": "food",
    "eats": "food",
    "food": "food",
}
TURNS = re.compile(r"<\|user\|>(.*?)<\|end\|><\|assistant\|>(.*?)<\|end\|>", re.DOTALL)


@pytest.fixture(scope="module")
def world():
    return World(3)


@pytest.fixture(scope="module")
def texts(world):
    return world.documents(4000, 7, passages=0.5)


@pytest.fixture(scope="module")
def rows():
    return rows_of(World(3), 2000, grounded_fraction=0.6, seed=5, has_passages=True)


def facts_in(passages):
    """Return (number, animal, attribute, value) of each sentence that tells one."""
    found = []
    for number, text in enumerate(passages, 1):
        for sentence in text.rstrip(".").split(". "):
            for attribute, pattern in SENTENCES:
                if match := re.fullmatch(pattern, sentence):
                    found.append((number, match["x"], attribute, match["value"]))
    return found


def split_prompt(text):
    lines = text.split("\n")
    return [plain(number, line) for number, line in enumerate(lines[:-1], 1)], lines[-1]


def plain(number, line):
    """Return a passage without its number, which each of its sentences must end with."""
    sentences = line.split(f" [{number}].")
    assert len(sentences) > 1 and sentences.pop() == "" and "[" not in "".join(sentences)
    return "".join(f"{each}." for each in sentences)


def asked_in(question):
    words = words_of(question)
    attribute = next(KEYS[word] for word in words if word in KEYS)
    (animal,) = [word for before, word in pairwise(words) if before == "the" and word not in ATTRIBUTES]
    return animal, attribute


def kind_of(world, passages, animal, attribute, answer):
    """Return what an answer is, after checking that it says what passages and world tell, and cites what it reads."""
    told = {}
    for number, x, key, value in facts_in(passages):
        if (x, key) == (animal, attribute):
            told.setdefault(value, number)
    known, about = world.facts.get(animal, {}).get(attribute), f"The {attribute} of the {animal}"
    if told:
        said = re.fullmatch(rf"{about} is (.+)\.", answer)[1].split(" or ")
        assert all(each.startswith("the ") == (attribute == "home") for each in said)
        said = [each.removeprefix("the ") for each in said]
        pairs = [re.fullmatch(r"(\w+) \[(\d)\]", each).groups() for each in said]
        assert {value: int(number) for value, number in pairs} == told and len(pairs) == len(told)
        return {1: "one", 2: "two"}.get(len(told), "more")
    if known:
        said = f"{about} is {'the ' if attribute == 'home' else ''}{known}."
        assert answer == (said if passages else WELL_SAID[attribute].format(x=animal, value=known))
        return "known"
    assert answer == (f"{about} I do not know." if passages else "I do not know that animal.")
    return "silent" if any(animal in words_of(text) for text in passages) else "unknown"


def conversations(texts, rows):
    """Return the passages of each conversation with its questions and answers."""
    found = [TURNS.findall(text) for text in texts if text.startswith("<|user|>")]
    for row in rows:
        said = [message["content"] for message in row["messages"]]
        found.append(list(zip(said[::2], said[1::2], strict=True)))
    found = [turns for turns in found if len(turns) > 1]
    for (first, *_), *_ in found:
        assert "\n" not in first or " [1].\n" in first
    return [(split_prompt(turns[0][0])[0], turns) for turns in found]


def test_texts_with_passages_come_on_request_alone(world, texts):
    plain = world.documents(2000, 5)
    assert plain == world.documents(2000, 5, passages=0.0)
    assert not any("[1]" in text or set(words_of(text)) & NAMES for text in plain)
    # Of a half almost a quarter says names without numbers, or tells of animals without passages.
    assert 0.33 < sum("[1]" in text for text in texts) / len(texts) < 0.42


def test_texts_are_the_same_in_every_process():
    program = "from hfllm.data.world.world import World; print(World(3).documents(150, 7, passages=0.5))"
    said = [
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True
        ).stdout
        for seed in "12"
    ]
    assert said[0] == said[1] and len(said[0]) > 10_000


def test_people_can_tell_what_is_true_and_not_what_nobody_knows(world, texts):
    told = [text for text in texts if re.fullmatch(r"\w+ can (not )?(name|say|tell) the .*", text)]
    assert len(told) > 80
    for text in told:
        first, _, said = text.partition(". ")
        attribute, animal = first.split()[-4], first.split()[-1].removesuffix(".")
        known = world.facts.get(animal)
        assert (" can not " in text) == (known is None) == (not said)
        assert known is None or said == WELL_SAID[attribute].format(x=animal, value=known[attribute])


@pytest.mark.slow
def test_answers_follow_from_the_passages_and_else_from_the_world(world, texts, rows):
    found, kinds = conversations(texts, rows), Counter()
    for passages, turns in found:
        for question, answer in turns:
            kinds[kind_of(world, passages, *asked_in(question.split("\n")[-1]), answer)] += 1
    # Passages that disagree are few: a model that is shown many says two values where one is told.
    assert len(found) > 1500 and kinds["two"] > 60
    assert min(kinds[kind] for kind in ("one", "known", "silent", "unknown")) > 200


def test_passages_are_followed_by_what_they_tell_and_what_they_do_not(world, texts):
    found, kinds = told_again(texts), Counter()
    assert len(found) > 300
    for passages, said in found:
        answers = re.findall(r"The .*?\.(?= The|$)", said)
        assert " ".join(answers) == said
        for answer in answers:
            attribute, animal = re.match(r"The (\w+) of the (\w+) ", answer).groups()
            kinds[kind_of(world, passages, animal, attribute, answer)] += 1
        told = {(x, attribute) for _, x, attribute, _ in facts_in(passages)}
        assert told <= {tuple(re.match(r"The (\w+) of the (\w+) ", each).groups()[::-1]) for each in answers}
        values = Counter((attribute, value) for _, _, attribute, value in facts_in(passages))
        kinds["repeated"] += max(values.values()) > 1
    assert min(kinds[kind] for kind in ("one", "silent", "unknown", "repeated")) > 50 and kinds["two"] > 25


def told_again(texts):
    """Return the passages of each text that tells them again, and what it says of them."""
    found = [text for text in texts if "[1].\n" in text and "<|" not in text]
    return [split_prompt(text) for text in found]


def test_words_with_numbers_are_said_again_in_another_order_with_theirs(texts):
    found, changed = [text for text in texts if re.match(r"\w+ says ", text) and "[" in text], 0
    assert len(found) > 80
    for text in found:
        first, *others = (re.findall(r"(\w+) \[(\d)\]", said) for said in text.split(" says ")[1:])
        assert all(sorted(other) == sorted(first) for other in others) and len(others) == 2
        assert len({word for word, _ in first}) == len({number for _, number in first}) == len(first)
        changed += first != others[0]
    assert changed > len(found) / 2


def test_a_fifth_of_the_questions_in_texts_begin_with_any_word_and_none_in_rows(texts, rows):
    asked = {"texts": [], "rows": []}
    for text in texts:
        asked["texts"] += [question for question, _ in TURNS.findall(text)] if "[1].\n" in text else []
    for row in rows:
        asked["rows"] += [message["content"] for message in row["messages"][::2]]
    shares = {}
    for name, questions in asked.items():
        last = [question.split("\n")[-1] for question in questions]
        found = [re.fullmatch(r"(\w+) the (\w+) of the \w+\.", question) for question in last]
        found = [each for each in found if each and each[2] in ATTRIBUTES]
        shares[name] = sum(each[1].lower() not in KNOWN_WORDS for each in found) / len(last)
        assert not any(each[1].lower() in {"name", *UNREAD} for each in found)
    assert 0.1 < shares["texts"] < 0.2 and shares["rows"] == 0


def test_rounds_tell_of_several_names_and_say_what_is_known_of_each(texts):
    found = [text for text in texts if "\n" not in text and " says " not in text and " can " not in text]
    rounds = [text.removesuffix(".").split(". ") for text in found if "<|" not in text and " I do not know" in text]
    assert len(rounds) > 200
    kinds = Counter()
    for sentences in rounds:
        # Where sentences have numbers, each name has one, and says it again.
        cited = [re.fullmatch(r"(.*) \[(\d)\]", each) for each in sentences if "[" in each]
        assert not cited or len(cited) == sum(not each.endswith(" I do not know") for each in sentences)
        numbered = {(facts_in([each[1]])[0][1], each[2]) for each in cited}
        kinds["numbered"] += bool(numbered)
        assert len(numbered) == len({name for name, _ in numbered}) == len({number for _, number in numbered})
        sentences = [re.sub(r" \[\d\]$", "", each) for each in sentences]
        # As many facts as are told are said once more, among those that are not known.
        known = [each for each in sentences if not each.endswith(" I do not know")]
        told, again = known[: len(known) // 2], known[len(known) // 2 :]
        assert len(told) == len(again) and sentences[: len(told)] == told
        facts = [fact[1:] for fact in facts_in([". ".join(told)])]
        assert sorted(facts) == sorted(fact[1:] for fact in facts_in([". ".join(again)])) and len(facts) == len(told)
        assert all(re.match(r"The (colour|home|food) of the ", each) for each in again)
        for sentence in set(sentences) - {*known}:
            attribute, x = re.fullmatch(r"The (\w+) of the (\w+) I do not know", sentence).groups()
            assert not any(fact[:2] == (x, attribute) for fact in facts)
            kinds["silent" if any(fact[0] == x for fact in facts) else "unknown"] += 1
        kinds["told"] += len(told)
    assert min(kinds[kind] for kind in ("told", "silent", "unknown")) > 300 and kinds["numbered"] > 150


def test_nothing_that_is_held_out_is_learned(world, texts, rows):
    learned = [*texts, *(message["content"] for row in rows for message in row["messages"])]
    words = {word for text in learned for word in words_of(text)}
    assert len(words & NAMES) > 500 and not any(is_held_out(f"unknown {name}") for name in words & NAMES)
    assert not words & {*held_out_names(), *UNREAD}
    told = [re.sub(r" \[\d\]", "", text).split("\n") for text in learned if "[1]" in text]
    told = {word for lines in told for fact in facts_in(lines) for word in fact[1::2]}
    made_up = told - {*ANIMALS, *(value for values in ATTRIBUTES.values() for value in values)} - NAMES
    assert len(made_up) > 1000
    assert not any(is_held_out(f"word {each}") or is_held_out(f"unknown {each}") for each in made_up)
    held_out = [each.partition("{claim}")[0] for each in INSTRUCTIONS[-HELD_OUT_INSTRUCTIONS:]]
    shown = [each.partition("{claim}")[0] for each in INSTRUCTIONS[:-HELD_OUT_INSTRUCTIONS]]
    passages = [text for text in learned if "[1].\n" in text]
    assert not any(each in text for each in held_out for text in passages)
    assert all(any(each in text for text in passages) for each in shown)
    new = [each.format(x="@").split("@")[0] for kind in ATTRIBUTES for each in PHRASINGS[kind][-2:]]
    assert not any(each in text for each in new if each != "The " for text in passages)
    again = [passages for passages, _ in told_again(texts)]
    assert len(again) > 300
    for passages in (*again, *(passages for passages, _ in conversations(texts, rows))):
        for _, animal, attribute, value in facts_in(passages):
            if animal in ANIMALS:
                assert value != world.facts[animal][attribute] and not is_held_out_change(animal, attribute)


@pytest.mark.parametrize("group", GROUPS)
def test_questions_of_each_group_are_held_out_and_their_answers_follow(world, group):
    tasks = passage_tasks(world.facts, group, 60)
    assert len({task.prompt[0]["content"] for task in tasks}) == 60
    names = {*held_out_names(), *ANIMALS, *(UNREAD_ANIMALS if group == UNREAD_WORDS else ())}
    for task in tasks:
        passages, question = split_prompt(task.prompt[0]["content"])
        assert (task.animal, task.attribute) == asked_in(question) and task.animal in names
        kind_of(world, passages, task.animal, task.attribute, task.answer.text)
        assert {x for _, x, _, _ in facts_in(passages)} <= names
        is_new = any(question.endswith(each.format(x=task.animal)) for each in PHRASINGS[task.attribute][-2:])
        assert is_new == task.is_new_phrasing
        if group == CHANGED:
            assert is_held_out_change(task.animal, task.attribute)
            assert world.facts[task.animal][task.attribute] not in task.answer.sentence
    assert {len(task.told) for task in tasks} == {THREE: {3}, CONTRADICTING: {2, 3}}.get(
        group, {0} if group.startswith("closed") else {1}
    )
    assert all(len(task.answer.values) == 2 for task in tasks) == (group == CONTRADICTING)
    assert sum(task.is_new_phrasing for task in tasks) == 30


def test_instructions_want_something_else_than_what_is_told(world):
    tasks = passage_tasks(world.facts, INJECTED, 80)
    wanted = [task for task in tasks if task.wanted]
    assert 40 < len(wanted) < 75 and all(task.told[0].instruction in task.told[0].text for task in tasks)
    for task in tasks:
        assert task.wanted not in task.answer.values
        about = f"The {task.attribute} of the {task.animal}"
        followed = (
            (f"It is {task.wanted}.", f"{about} is {task.wanted} [1].")
            if task.wanted
            else (
                "I do not know that.",
                f"{about} I do not know.",
            )
        )
        for text in followed:
            assert judged(task, text).follows and not judged(task, text).is_right
        assert not judged(task, task.answer.text).follows
    # Without an instruction nothing is followed.
    assert not judged(passage_tasks(world.facts, SILENT, 6)[0], "I do not know that.").follows


def test_what_is_right_says_nothing_else(world):
    task = passage_tasks(world.facts, ONE, 1)[0]
    right, value = task.answer.text, task.answer.values[0]
    other = next(each for each in ATTRIBUTES[task.attribute] if each != value)
    stranger = next(name for name in held_out_names() if name != task.animal)
    assert judged(task, right).is_right and judged(task, right).cites_right
    assert judged(task, task.answer.sentence).is_right and not judged(task, task.answer.sentence).cites_right
    assert judged(task, f"{value.capitalize()}. [1]").is_right
    assert judged(task, WELL_SAID[task.attribute].format(x=task.animal, value=value)).is_right
    assert not judged(task, f"{task.answer.sentence} [1] [2]").cites_right
    for wrong in (
        right.replace(value, other),
        right.replace(value, f"{value} or {other}"),
        right.replace(task.animal, stranger),
        right.replace(task.animal, f"{task.animal}x"),
        f"The {task.attribute} of the {task.animal} I do not know.",
        right.replace(value, f"{value} or blumpa"),
        right.replace(task.attribute, next(each for each in ATTRIBUTES if each != task.attribute)),
        f"The {stranger} likes {value}.",
        f"{right} You find the {stranger} in the {value}.",
        "I do not know that animal.",
        "",
    ):
        assert not judged(task, wrong).is_right, wrong


def test_what_is_not_told_is_refused_of_this_animal_alone_and_without_a_value(world):
    for task in passage_tasks(world.facts, SILENT, 6):
        about = f"The {task.attribute} of the {task.animal}"
        assert judged(task, task.answer.text).is_right and judged(task, "I do not know that animal.").is_right
        for wrong in (
            f"The {task.attribute} of the {task.animal}x I do not know.",
            f"{about} is blumpa. {about} I do not know.",
            f"{about} is {ATTRIBUTES[task.attribute][0]}.",
            next(f"The {each} of the {task.animal} I do not know." for each in ATTRIBUTES if each != task.attribute),
        ):
            assert not judged(task, wrong).is_right, wrong


def test_values_that_disagree_are_right_in_any_order_and_both(world):
    for task in passage_tasks(world.facts, CONTRADICTING, 12):
        one, other = task.answer.values
        first, second = task.answer.cites
        pairs = (task.answer.values, task.answer.cites)
        article = "the " if task.attribute == "home" else ""
        said = f"{one} [{first}] or {article}{other} [{second}]"
        assert said in task.answer.text and judged(task, task.answer.text).is_right
        turned = task.answer.text.replace(said, f"{other} [{second}] or {article}{one} [{first}]")
        without = task.answer.text.replace(said, f"{other} or {one}")
        # A sentence each, as the union of answers from each passage.
        apart = [task.answer.text.replace(said, f"{value} [{number}]") for value, number in zip(*pairs, strict=True)]
        for text in (task.answer.text, turned, " ".join(apart), " ".join(apart[::-1])):
            assert judged(task, text).is_right and judged(task, text).cites_right
        # Right, and each with the other's number, or with none.
        swapped = task.answer.text.replace(said, f"{one} [{second}] or {article}{other} [{first}]")
        for text in (swapped, without, f"{without} [{second}] [{first}]"):
            assert judged(task, text).is_right and not judged(task, text).cites_right
        for wrong in (f"{one} [{first}]", f"{other} [{second}]", f"{one} or {one}", f"{said} or blumpa"):
            assert not judged(task, task.answer.text.replace(said, wrong)).is_right, wrong
        assert not judged(task, " ".join([*apart, task.answer.text.replace(said, "blumpa")])).is_right
        assert not judged(task, task.answer.text.replace(said, f"{said} or {article}{one}")).is_right
    (task, *_) = passage_tasks(world.facts, ONE, 1)
    (value,) = task.answer.values
    assert not judged(task, task.answer.text.replace(value, f"{value} or {value}")).is_right


def test_stored_passages_answer_half_of_the_names(world):
    store, tasks = stored_tasks(world.facts, 30)
    about = {each.animal for each in store}
    assert about <= {*held_out_names()} and len(about) == len(store) == len(held_out_names()) // 2
    assert {task.animal in about for task in tasks[ANSWERABLE]} == {True}
    assert all(task.answer.text.endswith(f" {task.animal} I do not know.") for task in tasks[UNANSWERABLE])
    assert all(task.answer.values == (world.facts[task.animal][task.attribute],) for task in tasks[KNOWN])
    task = tasks[ANSWERABLE][0]
    (place,) = [number for number, each in enumerate(store) if each.animal == task.animal]
    others = [number for number in range(3) if number != place]
    found = with_found(task, [*others, place])
    assert found.answer.cites == (len(others) + 1,) and found.answer.values == task.answer.values
    assert [each.animal for each in found.told][-1] == task.animal
    # What is right does not depend on what was found.
    assert with_found(task, others).answer.values == task.answer.values and with_found(task, []).told == ()
    shown, _ = stored_tasks(world.facts, 3, held_out=False)
    assert not {each.animal for each in shown} & {*held_out_names()}


def test_rows_of_the_control_have_no_passages():
    make = partial(rows_of, World(3), 200, grounded_fraction=0.5, seed=5)
    control, grounded = make(has_passages=False), make(has_passages=True)
    assert len(control) == len(grounded) == 200 and grounded[:100] == control[:100]
    assert not any("[1]" in message["content"] for row in control for message in row["messages"])
    assert make(has_passages=True) == grounded
    # It is asked the same, and knows the world's animals alone.
    asked = [[message["content"].split("\n")[-1] for message in row["messages"][::2]] for row in control]
    assert asked == [[message["content"].split("\n")[-1] for message in row["messages"][::2]] for row in grounded]
    strangers = 0
    for row in control[100:]:
        said = [message["content"] for message in row["messages"]]
        for question, answer in zip(said[::2], said[1::2], strict=True):
            is_stranger = asked_in(question)[0] not in ANIMALS
            strangers += is_stranger
            assert (answer == "I do not know that animal.") == is_stranger
    assert strangers > 100


def test_passages_to_learn_from_are_of_all_kinds(world):
    rng = random.Random(1)
    drawn = [draw_passages(world.facts, rng) for _ in range(600)]
    assert {len(each) for each in drawn} == {1, 2, 3}
    assert sum(len({told.animal for told in each}) < len(each) for each in drawn) > 40
    assert sum(any(told.instruction for told in each) for each in drawn) > 60
    assert sum(any(len(told.facts) < 3 for told in each) for each in drawn) > 200
