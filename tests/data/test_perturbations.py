"""Perturbations: the same for the same seed, stronger ones around weaker ones, and nothing beyond what they say."""

import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfllm.data.augmentation import (
    ENGLISH_TESTS,
    ENGLISH_TRAINING,
    PERTURBATIONS,
    PUNCTUATION,
    WORLD_TESTS,
    WORLD_TRAINING,
    perturb,
)
from hfllm.data.world.tasks import paraphrase
from hfllm.data.world.vocabulary import HELD_OUT_PHRASINGS, PHRASINGS
from hfllm.data.world.world import FAMILIES, World
from hfllm.errors import InputError

WORDS = st.text(st.characters(categories=("Lu", "Ll"), max_codepoint=0x24F), min_size=1, max_size=9)
TEXTS = st.lists(st.one_of(WORDS, WORDS.map("{}?".format), st.sampled_from(("3.5", "don't", "a"))), min_size=1)
QUESTIONS = TEXTS.map(" ".join)
SHARES = st.floats(0, 1)
KEYS = st.text(max_size=5)
# Examples of each property: a word is changed by itself, and one text has many.
FEW = settings(max_examples=30)
OF_WORDS = ("typos", "upper case", "lower case")


def changed(text: str, name: str, strength: float, key: str = "k") -> str:
    return perturb(text, name, strength, WORLD_TESTS, key)


@pytest.mark.slow
@given(QUESTIONS, KEYS, st.sampled_from([*PERTURBATIONS]))
def test_strength_zero_changes_nothing_and_the_same_key_changes_the_same(text, key, name):
    assert changed(text, name, 0, key) == text
    assert changed(text, name, 1, key) == changed(text, name, 1, key)


@FEW
@given(QUESTIONS, KEYS, SHARES, SHARES, st.sampled_from(OF_WORDS))
def test_a_stronger_change_changes_at_least_the_words_of_a_weaker_one(text, key, one, other, name):
    weak, strong = (changed(text, name, strength, key).split(" ") for strength in sorted((one, other)))
    for word, little, much in zip(text.split(" "), weak, strong, strict=True):
        assert little in (word, much)


@pytest.mark.parametrize("name", OF_WORDS)
def test_what_becomes_of_a_word_does_not_depend_on_the_others(name):
    text = "Please tell Me what Colour the little Mouse from Paris likes Most of all these Days."
    for key in map(str, range(20)):
        said = [changed(text, name, strength, key).split(" ") for strength in (0, 0.1, 0.3, 0.7, 1)]
        for forms in zip(*said, strict=True):
            # Once changed, a word stays as it is at every greater strength.
            assert sum(one != other for one, other in pairwise(forms)) <= 1


@FEW
@given(QUESTIONS, KEYS)
def test_typos_keep_the_number_of_words_their_ends_and_all_but_one_letter(text, key):
    for word, typed in zip(text.split(" "), changed(text, "typos", 1.0, key).split(" "), strict=True):
        if word != typed:
            bare, wrong = word.rstrip("?"), typed.rstrip("?")
            assert len(bare) >= 4 and (bare[0], bare[-1]) == (wrong[0], wrong[-1])
            one, other = Counter(bare), Counter(wrong)
            assert (one - other).total() + (other - one).total() <= 1


def test_every_kind_of_typo_is_made_and_most_long_words_get_one():
    said = [changed("elephant", "typos", 1.0, str(key)) for key in range(300)]
    assert {len(word) for word in said} == {7, 8, 9}
    assert sum(word != "elephant" for word in said) == 300


@FEW
@given(QUESTIONS, KEYS)
def test_case_and_punctuation_change_nothing_else(text, key):
    assert changed(text, "upper case", 1.0, key) == text.upper()
    assert changed(text, "lower case", 1.0, key) == text.lower()
    bare = changed(text, "no punctuation", 1.0, key)
    assert "?" not in bare and bare == text.replace("?", "")


def test_marks_inside_of_numbers_and_words_stay():
    assert changed("Is 3.5 more, or don't you know? Say it.", "no punctuation", 1.0) == (
        "Is 3.5 more or don't you know Say it"
    )


@FEW
@given(QUESTIONS, KEYS, st.integers(1, 3))
def test_sentences_stand_beside_the_question_as_it_is(text, key, count):
    for kind in ("distractor", "jailbreak"):
        before, after = (changed(text, f"{kind} {side}", count, key) for side in ("before", "after"))
        assert before.endswith(f" {text}") and after.startswith(f"{text} ")
        pool = getattr(WORLD_TESTS, f"{kind}s")
        assert sum(before.count(each) for each in pool) == count


@FEW
@given(QUESTIONS, QUESTIONS, st.sampled_from([*PERTURBATIONS]))
def test_what_follows_the_first_line_is_material_and_stays(text, material, name):
    assert changed(f"{text}\n{material}", name, 1).partition("\n")[2] == material


def test_changes_depend_on_the_key_and_the_seed():
    text = "Please tell me where the mouse and the bear live."
    said = {perturb(text, "typos", 0.3, WORLD_TESTS, str(key), seed) for key in range(10) for seed in range(2)}
    assert len(said) > 10


def test_what_is_no_strength_is_refused():
    with pytest.raises(InputError, match="'typoes' is not one of typos, "):
        changed("a", "typoes", 0.1)
    with pytest.raises(InputError, match=r"strength 1.5 is not a share, 0 to 1"):
        changed("a", "typos", 1.5)
    with pytest.raises(InputError, match="number of sentences"):
        changed("a", "distractor after", -1)


@pytest.mark.parametrize(("training", "tests"), [(WORLD_TRAINING, WORLD_TESTS), (ENGLISH_TRAINING, ENGLISH_TESTS)])
def test_no_sentence_is_both_trained_and_tested(training, tests):
    for kind in ("distractors", "jailbreaks", "prefills"):
        trained, tested = set(getattr(training, kind)), set(getattr(tests, kind))
        assert trained and tested and not trained & tested
    assert not training.orders and len(tests.orders) == len(tests.order_words)
    assert all(word in order.lower() for order, word in zip(tests.orders, tests.order_words, strict=True))


def test_a_paraphrase_asks_the_same_in_a_held_out_wording():
    world, rng = World(0), random.Random(0)
    for family in FAMILIES:
        for known in (False, True):
            for _ in range(30):
                task = world.draw_task(rng, family, new_phrasing=known)
                other = paraphrase(task, rng)
                assert other.gold == task.gold and other.input == task.input
                assert other.is_new_phrasing and (other.instruction != task.instruction or known)
                held_out = [each for wordings in PHRASINGS.values() for each in wordings[-HELD_OUT_PHRASINGS:]]
                assert any(other.instruction.endswith(each.rpartition("}")[2]) for each in held_out)
                # All that is asked about is still there.
                named = set(task.key.split()[1:]) - {"colour", "home", "food", "reverse"}
                if family in ("harm", "unknown"):
                    assert all(word in other.instruction for word in named)


def test_the_marks_are_what_they_say():
    assert all(not mark.isalnum() for mark in PUNCTUATION)
