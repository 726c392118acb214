"""Drawn pictures show what their scenes say, answers follow from the scenes alone, and no held-out pair is shown."""

import hashlib
import random
import re
from collections import Counter, defaultdict

import pytest

from hfllm.data.world.drawing import distance
from hfllm.data.world.pictures import (
    ABSENT,
    ASK_COLORS,
    ASK_SHAPES,
    COLORS,
    COUNTS,
    FAMILIES,
    HELD_OUT,
    NOT_THERE,
    PAIRS,
    PATCHES,
    PLACES,
    RELATION,
    SEEN,
    SHAPES,
    TEXT,
    TRAINED_FAMILIES,
    UNLIKE,
    WORDS,
    DrawnWorld,
    Scene,
    Thing,
    answer_about,
    captions,
    draw_examples,
    draw_picture,
    draw_question,
    draw_scene,
    trained_families,
)
from hfllm.data.world.rubric import GoldAnswer
from hfllm.rewards.functions import gold_reward


def some(count=400, seed=0, **kwargs):
    return list(draw_examples(seed, count, num_questions=4, **kwargs))


def digest(examples):
    return hashlib.sha256(b"".join(example.picture.tobytes() for example in examples)).hexdigest()


def test_the_same_seed_gives_the_same_bits():
    first, again, other = some(50), some(50), some(50, seed=1)
    assert digest(first) == digest(again) != digest(other)
    assert [example.questions for example in first] == [example.questions for example in again]
    assert digest(some(50, part="eval")) != digest(first)


def test_pairs_are_many_and_each_part_is_seen_apart():
    assert len(PAIRS) >= 48 and not set(SEEN) & set(HELD_OUT) and len(SEEN) + len(HELD_OUT) == len(PAIRS)
    for place, names in enumerate((COLORS, SHAPES)):
        seen = Counter(pair[place] for pair in SEEN)
        held_out = Counter(pair[place] for pair in HELD_OUT)
        # Nobody can tell a held-out color or shape by how rare it is.
        assert held_out.keys() == set(names) and all(seen[name] >= len(PAIRS) / len(names) / 2 for name in names)


def test_training_shows_no_held_out_pair_and_names_none():
    for example in some(1500):
        assert {thing.pair for thing in example.scene.things} <= set(SEEN)
        for question in example.questions:
            named = [word for word in words_in(question.text) if word in COLORS or word in SHAPES]
            assert len(named) < 2 or tuple(named) not in HELD_OUT
    for example in some(300, held_out=True):
        assert example.scene.things[0].pair in HELD_OUT
        assert {thing.pair for thing in example.scene.things[1:]} <= set(SEEN)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_differ_in_their_pixels(shape):
    """With the same light and place no two shapes look alike."""

    def pixels(name):
        return draw_picture(Scene((Thing("white", name, 0),)), random.Random(3)).tobytes()

    assert all(pixels(shape) != pixels(other) for other in SHAPES if other != shape)


def words_in(text):
    return re.sub("[?.,]", "", text).split()


def answer_of(scene, text):
    """Return the answer to a question by reading it, in any wording, without the code that asks it."""
    words = words_in(text)
    named = [word for word in words if word in COLORS or word in SHAPES]
    if not named and "word" in words:
        return NOT_THERE if scene.word is None else f"{PLACES[scene.word_corner]}: {scene.word}"
    if not named:
        return COUNTS[len(scene.things) - 1]
    if "from" in words or "From" in words:
        (second,) = re.findall("(?i)from the ([a-z]+)", text)
        (first,) = set(named) - {second}
        one, other = ([thing for thing in scene.things if thing.shape == name] for name in (first, second))
        if not one or not other:
            return NOT_THERE
        assert len(one) == len(other) == 1
        (x1, y1), (x2, y2) = ((thing.corner % 2, thing.corner // 2) for thing in (one[0], other[0]))
        assert (x1 == x2) != (y1 == y2)
        where = ("left" if x1 < x2 else "right") if y1 == y2 else ("above" if y1 < y2 else "below")
        return f"{PLACES[one[0].corner]}, {PLACES[other[0].corner]}: {where}"
    meant = [thing for thing in scene.things if all(name in thing.pair for name in named)]
    if not meant:
        return NOT_THERE
    assert len(meant) == 1
    place = PLACES[meant[0].corner]
    if "color" in words:
        return f"{place}: {meant[0].color}"
    return f"{place}: {meant[0].shape}" if "shape" in words else place


def test_answers_follow_from_the_scene_alone():
    families = Counter()
    for example in [*some(500), *some(200, held_out=True)]:
        for question in example.questions:
            assert answer_of(example.scene, question.text) == question.answer, (example.scene, question)
            assert (question.answer == NOT_THERE) == (question.family == ABSENT)
            families[question.family] += 1
    assert families.keys() == set(FAMILIES) and min(families.values()) > 50


def test_any_question_has_an_answer_about_any_scene():
    """The one that was asked about it, and about other scenes what reading them gives, where one thing is meant."""
    examples, told = some(300), Counter()
    for example, other in zip(examples, [*examples[1:], examples[0]], strict=True):
        for question in example.questions:
            assert answer_about(example.scene, question.text) == question.answer
            if said := answer_about(other.scene, question.text):
                assert said == answer_of(other.scene, question.text)
            told[said] += 1
    assert told[""] < 0.05 * told.total() and told[NOT_THERE] > 100


@pytest.mark.parametrize("share", [0.0, 0.0003, 0.01, 0.5, 0.999])
def test_few_or_many_questions_are_about_what_is_not_there(share):
    families = trained_families(share)
    assert families.count(ABSENT) / len(families) == pytest.approx(share, abs=1e-5) and len(families) < 200_000
    assert families.count(RELATION) == 6 * families.count(TEXT) and trained_families() == TRAINED_FAMILIES


def test_half_of_the_absent_pairs_have_both_parts_in_the_picture():
    """Who only looks for the color, or for the shape, does not know that the pair is not there."""
    near = total = 0
    for example in some(1500):
        colors, shapes = ({thing.pair[part] for thing in example.scene.things} for part in (0, 1))
        for question in example.questions:
            named = [word for word in words_in(question.text) if word in COLORS or word in SHAPES]
            if question.family == ABSENT and len(named) == 2:
                color, shape = named
                assert color in colors or shape in shapes
                near, total = near + (color in colors and shape in shapes), total + 1
    assert 0.2 < near / total < 0.6


def test_questions_about_held_out_pairs_are_about_them():
    for example in some(200, held_out=True):
        thing = example.scene.things[0]
        for question in example.questions:
            if question.family in ("color", "shape"):
                asked = set(thing.pair) & set(words_in(question.text))
                (said,) = set(thing.pair) - asked
                assert len(asked) == 1 and question.answer == f"{PLACES[thing.corner]}: {said}"


def test_captions_name_each_corner_that_has_something():
    scene = Scene((Thing("red", "bar", 3), Thing("navy", "frame", 0)), "go", 1)
    assert [caption for _, caption in captions(scene)] == [
        "top left: navy, top right: word, bottom right: red",
        "top left: frame, top right: go, bottom right: bar",
    ]


def test_the_gold_reward_pays_for_right_answers_alone():
    """Whole answers: the right thing at a wrong place is wrong, and so is the thing without its place."""
    ends = [*COLORS, *SHAPES, *WORDS]
    answers = {*ends, *PLACES, *COUNTS, NOT_THERE, *(f"{place}: {end}" for place in PLACES for end in ends)}
    directions = ("left", "right", "above", "below")
    answers |= {f"{one}, {other}: {end}" for one in PLACES for other in PLACES for end in directions}
    seen = defaultdict(set)
    for example in some(60):
        for question in example.questions:
            columns = {name: [value] for name, value in question.gold_columns().items()}
            columns = {name: value * len(answers) for name, value in columns.items()}
            for said, paid in zip(answers, gold_reward(["-"] * len(answers), list(answers), **columns), strict=True):
                assert (paid == 1.0) == (said == question.answer), (question, said)
                assert paid == 0.0 or said.startswith(question.answer), (question, said)
            columns = {name: value[:1] for name, value in columns.items()}
            assert gold_reward(["-"], [question.answer.capitalize() + "."], **columns) == [0.5]
            seen[question.family].add(question.answer.split()[-1])
    assert len(seen["color"]) > len(COLORS) / 2 and isinstance(question.gold, GoldAnswer)


def test_corners_have_at_most_two_things_or_a_word():
    rng, crowded = random.Random(0), 0
    for _ in range(300):
        scene = draw_scene(rng)
        corners = [thing.corner for thing in scene.things]
        assert scene.word_corner not in corners and len(corners) - len(set(corners)) <= 1
        crowded += len(set(corners)) < len(corners)
        assert draw_question(scene, rng, families=("count",)).family == "count"
    assert 30 < crowded < 120


def test_some_images_to_name_show_shapes_in_shades_of_no_color():
    whole, shapes = 0, Counter()
    for number, row in enumerate(DrawnWorld(3, 300, PATCHES, whole_every=3)):
        is_whole = number % 3 == 2
        for thing in row.scene.things:
            assert bool(thing.color) == is_whole and (thing.pair in SEEN) == is_whole
            shade = row.picture.getpixel(thing.spot)
            if not is_whole and thing.shape != "frame":
                lights = (0.8, 0.87, 0.94, 1, 1.08)
                shades = [[part * light for part in color] for color in COLORS.values() for light in lights]
                assert min(distance(shade, each) for each in shades) > UNLIKE - 6
                shapes[thing.shape] += 1
        whole += is_whole
        assert row.turns == ()
    assert whole == 100 and shapes.keys() == {*SHAPES} - {"frame"}
    # Without it all are whole, and questions about the others are about their shapes and places.
    assert all(thing.color for row in DrawnWorld(3, 30, PATCHES) for thing in row.scene.things)
    asked = [row for row in DrawnWorld(3, 200, num_questions=2, whole_every=2, caption_every=4)]
    requests = [[question for question, _ in row.turns] for row in asked]
    # A quarter of the others has captions, of whole ones none; without this kind a quarter of all.
    assert [ASK_SHAPES in each for each in requests] == [number % 8 == 0 for number in range(200)]
    assert not any(ASK_COLORS in each for each in requests[1::2])
    plain = [[question for question, _ in row.turns] for row in DrawnWorld(3, 40, num_questions=2, caption_every=4)]
    assert [ASK_SHAPES in each for each in plain] == [number % 4 == 0 for number in range(40)]
    for number, row in enumerate(asked):
        if number % 2 == 0:
            assert not {word for turn in row.turns for word in re.findall(r"\w+", " ".join(turn))} & {*COLORS}
            assert all(answer != NOT_THERE for _, answer in row.turns)
