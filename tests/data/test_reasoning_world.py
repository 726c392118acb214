"""Problems of hops and dials are right, split cleanly and told in the texts; each slip of a thought is found."""

import hashlib
import random
import re

import pytest

from hfllm.data.thoughts import CLOSE, OPEN, split_thoughts
from hfllm.data.tokenizer import CONVERSATION, THOUGHT_MARKS, train_tokenizer
from hfllm.data.world.reasoning import (
    DIAL,
    FAMILIES,
    HELD_OUT,
    HOPS,
    NEW_ASK_DIAL,
    NEW_WORDINGS,
    NUMBERS_OF_DIAL,
    PARTS,
    PRACTICE,
    RELATIONS,
    SHOWN,
    SIZES,
    STOP,
    TURNS,
    UNSEEN_SIZES,
    WHO,
    WORDINGS,
    checked_steps,
    draw_problem,
    is_valid,
    part_of,
    relations_of,
)
from hfllm.data.world.rubric import gold_score, words_of
from hfllm.data.world.vocabulary import ANIMALS, ATTRIBUTES, HELD_OUT_PHRASINGS, PHRASINGS
from hfllm.data.world.world import World


def some(world, count=300, seed=0, unseen=False):
    """Problems of both families from all of their parts; of sizes that training has not, only dials."""
    rng = random.Random(seed)
    drawn = []
    for _ in range(count):
        family = DIAL if unseen else rng.choice(FAMILIES)
        part = rng.choice([part for part in PARTS if family == DIAL or part != PRACTICE])
        sizes = UNSEEN_SIZES[DIAL] if unseen else None
        drawn.append(draw_problem(world.facts, world.relations, rng, family, part, sizes))
    return drawn


def checked(world, problem, thought):
    return checked_steps(problem, thought, world.facts, world.relations)


def test_the_same_seed_gives_the_same_problems_and_friends(world):
    assert some(world) == some(World(0)) != some(world, seed=1)
    assert World(0).relations == world.relations != World(1).relations
    for relation in RELATIONS:
        others = [world.relations[animal][relation] for animal in ANIMALS]
        assert sorted(others) == sorted(ANIMALS)
        assert all(animal != other for animal, other in zip(ANIMALS, others, strict=True))


def test_answers_are_right_by_reading_the_question_alone(world):
    for problem in some(world, 600) + some(world, 100, unseen=True):
        if problem.family == DIAL:
            value = sum(map(int, re.findall(r"\d", problem.question))) % NUMBERS_OF_DIAL
            assert problem.gold.accepted == (f"At {value}.",)
            assert len(re.findall(r"\b[A-Q] \d\b", problem.question)) == problem.size
        else:
            words = words_of(problem.question)
            path = [word for word in words if word in (*RELATIONS, *ANIMALS)]
            animal = path.pop()
            for relation in reversed(path):
                animal = world.relations[animal][relation]
            what = problem.key.split()[1]
            value = animal if what == WHO else world.facts[animal][what]
            # A wording of that attribute, with the chain in place of the animal.
            asked = re.search(r"(?:(?:friend|neighbour) of the )+\w+", problem.question)[0]
            assert problem.question.replace(asked, "{x}") in WORDINGS[what]
            assert what == WHO or WORDINGS[what] == PHRASINGS[what][:-HELD_OUT_PHRASINGS]
            assert len(path) == problem.size - (what != WHO)
        assert problem.gold.needed == (str(value),)
        assert gold_score(problem.gold.accepted[0], problem.gold) == 1.0
        # To name the animal in the answer would be a thought, where it is not who was asked for.
        named = set(words_of(problem.gold.accepted[0])) & set(ANIMALS)
        assert not named or problem.key.split()[1] == WHO


def test_new_wordings_are_in_no_text_and_ask_the_same(world):
    said = "\n".join(world.documents(4000, 5, reasoning=0.7))
    rng, asked = random.Random(4), set()
    for family in FAMILIES * 100:
        problem = draw_problem(world.facts, world.relations, rng, family, HELD_OUT, new_wording=True)
        assert problem.is_new_wording and checked(world, problem, problem.thought) == [True] * len(problem.steps)
        chain = r"(?:(?:friend|neighbour) of the )+\w+"
        asked.add(re.sub(chain, "{x}", re.split(r"[.?] ", problem.question)[-1]))
    assert len(asked) == len(NEW_ASK_DIAL) + sum(map(len, NEW_WORDINGS.values()))
    begun = [each.partition("{x}")[0] for each in asked]
    assert not any(re.search(re.escape(each) + chain, said) for each in begun if len(each) > 4)
    assert not any(each in said for each in NEW_ASK_DIAL)


@pytest.mark.slow
def test_parts_share_no_instance_and_hops_are_never_practiced(world):
    by_part = {}
    for problem in some(world, 16000):
        part = part_of(problem.family, problem.key)
        by_part.setdefault(part, set()).add(problem.key)
        assert (problem.family, part) != (HOPS, PRACTICE)
    assert by_part.keys() == set(PARTS)
    assert not by_part[SHOWN] & by_part[PRACTICE] and not by_part[SHOWN] & by_part[HELD_OUT]
    assert not by_part[PRACTICE] & by_part[HELD_OUT]
    held_out = [key for key in by_part[HELD_OUT] if key.startswith("hops")]
    shown = [key for key in by_part[SHOWN] if key.startswith("hops")]
    assert len(held_out) + len(shown) == 20 * (3 * (2 + 4) + 4 + 8) and 0.25 < len(held_out) / 600 < 0.4
    rng = random.Random(0)
    told = world.facts, world.relations
    assert {draw_problem(*told, rng, HOPS, HELD_OUT, (3,)).size for _ in range(50)} == {3}


@pytest.mark.slow
def test_texts_show_thoughts_on_request_alone_and_never_those_of_other_parts(world):
    texts = world.documents(4000, 5, reasoning=0.5)
    assert texts == world.documents(4000, 5, reasoning=0.5)
    thoughts = [text for text in texts if OPEN in text]
    assert 0.18 < len(thoughts) / len(texts) < 0.28
    assert not any(OPEN in text for text in world.documents(1000, 5, deeds=0.2))
    seen = {}
    for text in thoughts:
        question, said = text.removeprefix("<|user|>").removesuffix("<|end|>").split("<|end|><|assistant|>")
        seen[question] = said
    # Of hops all are compared; of dials none of a few thousand comes up twice.
    dials = [question for question in seen if "dial" in question]
    assert len(dials) > 300
    assert {part_of(DIAL, f"dial {' '.join(re.findall('[0-9]', question))}") for question in dials} == {SHOWN}
    for part in PARTS:
        for problem in [each for each in some(world, 2000, seed=3) if part_of(each.family, each.key) == part]:
            if problem.question in seen:
                assert part == SHOWN and seen[problem.question] == problem.response(shows_thought=True)
    # Every word of questions and answers is told, beyond those of dialogues: a word without a text has no meaning.
    words = {word for text in texts for word in words_of(text)}
    for problem in some(world, 500, seed=4):
        assert set(words_of(problem.question + problem.response(shows_thought=True))) <= words
    # Every friend and neighbour is told in plain words.
    plain = " ".join(text for text in texts if OPEN not in text)
    for animal, others in world.relations.items():
        for relation, other in others.items():
            assert f"The {relation} of the {animal} is the {other}." in plain


@pytest.mark.slow
def test_no_text_holds_a_thought_of_other_parts_with_a_question_or_without(world):
    """Over several seeds: where somebody turns a dial there is no question, but the same thought."""
    keys = [
        " ".join(["dial", thought[0], *re.findall(r"[A-Q] (\d) ", thought)])
        for seed in range(4)
        for text in world.documents(3000, seed, reasoning=0.6)
        for thought in re.findall(r"\b\d\.(?: [A-Q] \d \d\.)+", text)
    ]
    assert len(keys) > 1200 and {part_of(DIAL, key) for key in keys} == {SHOWN}
    assert {len(key.split()) - 2 for key in keys} == set(SIZES[DIAL])


@pytest.mark.parametrize(
    ("shares", "digest"),
    [
        ({}, "6cd128979624ef57907340011e342b0d9b0c84aa08defc2abbfa3a75434df409"),
        ({"deeds": 0.2}, "108158d26ad64d181e2441d92ee6b8679e6f119b9f8025000b845050d0f531ed"),
    ],
)
def test_texts_without_thoughts_are_what_they_were(world, shares, digest):
    """The models of other recipes keep their bits."""
    text = "\n".join(world.documents(500, 3, **shares))
    assert hashlib.sha256(text.encode()).hexdigest() == digest


# ---- thoughts ----


def test_worked_thoughts_hold_step_by_step(world):
    for problem in some(world):
        thought, said = split_thoughts(problem.response(shows_thought=True))
        assert thought.strip() == problem.thought and said.strip() == problem.gold.accepted[0]
        assert checked(world, problem, problem.thought) == [True] * len(problem.steps)
        assert split_thoughts(problem.response(shows_thought=False)) == (None, problem.gold.accepted[0])


def slips(problem, rng):
    """Yield places of steps, and what does not hold in place of the step there: one number or animal is another."""
    for place, step in enumerate(problem.steps):
        names = ANIMALS if problem.family == HOPS else [str(number) for number in range(NUMBERS_OF_DIAL)]
        for at, word in enumerate(parts := re.findall(r"\w+|\W+", step)):
            if word in names:
                other = rng.choice([name for name in names if name != word])
                yield place, "".join([*parts[:at], other, *parts[at + 1 :]])


def test_each_slip_is_found_where_it_is(world):
    rng = random.Random(2)
    found = 0
    for problem in some(world, 200, seed=1):
        for place, wrong in slips(problem, rng):
            steps = [*problem.steps[:place], wrong, *problem.steps[place + 1 :]]
            held = checked(world, problem, " ".join(steps))
            assert not held[place] and all(held[:place]) and len(held) == len(steps), (problem, wrong)
            assert not is_valid(held)
            found += 1
    assert found > 1000


def test_a_slip_counts_once_where_the_steps_after_it_follow_from_it(world):
    problem = next(each for each in some(world) if each.family == DIAL)
    shows, turns = int(re.findall(r"at (\d)\.", problem.question)[0]), re.findall(r"([A-Q]) (\d)", problem.question)
    steps = [f"{shows}."]
    for place, (name, by) in enumerate(turns):
        shows = (shows + int(by) + (place == 1)) % NUMBERS_OF_DIAL
        steps.append(f"{name} {by} {shows}.")
    steps.append(f"stop {shows}.")
    assert checked(world, problem, " ".join(steps)) == [place != 2 for place in range(len(steps))]
    # A thought that does not end where the turns do is not valid.
    told = [*problem.steps[:-1]]
    end = problem.steps[-1].split()[1]
    for ends in ([], ["stop."], [f"go {end}"], [f"stop {(int(end[0]) + 1) % NUMBERS_OF_DIAL}."]):
        assert not is_valid(checked(world, problem, " ".join([*told, *ends])))
    assert is_valid(checked(world, problem, " ".join([*told, f"stop {end}"])))
    hops = next(each for each in some(world) if each.family == HOPS and len(each.steps) == 3 and WHO not in each.key)
    first, second, _ = hops.steps
    animal, relation = first.split()[:2]
    wrong = next(each for each in ANIMALS if each not in (animal, world.relations[animal][relation]))
    following = world.relations[wrong][second.split()[1]]
    attribute = hops.key.split()[1]
    said = f"{animal} {relation} {wrong}. {wrong} {second.split()[1]} {following}. "
    value = world.facts[following][attribute]
    said += {"colour": f"The {following} is {value}.", "food": f"The {following} eats {value}."}.get(
        attribute, f"The {following} lives in the {value}."
    )
    assert checked(world, hops, said) == [False, True, True]


def test_missing_steps_and_steps_too_many_do_not_hold(world):
    for problem in some(world, 60, seed=5):
        count = len(problem.steps)
        assert checked(world, problem, "") == [False] * count
        assert checked(world, problem, " ".join(problem.steps[:-1])) == [True] * (count - 1) + [False]
        assert checked(world, problem, f"{problem.thought} {problem.steps[-1]}") == [True] * count + [False]
        assert not is_valid(checked(world, problem, f"{problem.steps[0]} {problem.thought}"))
        assert not is_valid(checked(world, problem, "I do not know."))
    assert not is_valid([])


def test_a_step_of_the_dial_finds_its_turn_by_name_at_any_distance(world):
    """No place or distance tells the turn of a step, and what decides a token is within the four before it."""
    texts = world.documents(3000, 5, reasoning=0.6)
    tokenizer = train_tokenizer(texts, added_tokens=THOUGHT_MARKS)
    distances = {size: set() for size in (*SIZES[DIAL], *UNSEEN_SIZES[DIAL])}
    first_names = set()
    for problem in some(world, 600) + some(world, 200, seed=9, unseen=True):
        if problem.family == DIAL:
            words = tokenizer.tokenize(CONVERSATION.format(problem.question, problem.response(shows_thought=True)))
            words = [word.removeprefix("\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}") for word in words]
            begin = words.index(OPEN)
            names = [step.split()[0] for step in problem.steps[1:-1]]
            first_names.add(names[0])
            for name, after in zip(names, [*names[1:], STOP], strict=True):
                told, copied = (place for place, word in enumerate(words) if word == name)
                assert told < begin < copied
                # A turn's number follows its name, and what comes next stands three tokens behind the name.
                assert words[told + 1] == words[copied + 1] and words[told + 3] == words[copied + 4] == after
                distances[problem.size].add(copied - told)
    assert first_names == set(TURNS) and all(len(seen) > 15 for seen in distances.values())
    trained = set().union(*(distances[size] for size in SIZES[DIAL]))
    assert len(distances[12] - trained) < 0.5 * len(distances[12])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("It is red.", (None, "It is red.")),
        (f"{OPEN} 3. A 4 3 7.{CLOSE} At 7.", (" 3. A 4 3 7.", " At 7.")),
        (f"{OPEN} 3. A 4", (" 3. A 4", "")),
        (f"{OPEN}{CLOSE}It is red.", ("", "It is red.")),
    ],
)
def test_thoughts_and_answers_are_told_apart(text, parts):
    assert split_thoughts(text) == parts


def test_sizes_are_those_of_the_families():
    assert relations_of(3) == relations_of(3)
    assert SIZES[HOPS] == (2, 3) and min(SIZES[DIAL]) == 5 and max(SIZES[DIAL]) == 9
    assert not set(SIZES[DIAL]) & set(UNSEEN_SIZES[DIAL]) and len(TURNS) >= max(UNSEEN_SIZES[DIAL])
    assert set(ATTRIBUTES) == {"colour", "home", "food"}
