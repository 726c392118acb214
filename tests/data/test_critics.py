"""Critics of the world: what they say follows the gold rubric, and they speak of the shown harms alone."""

import random
from collections import Counter
from types import SimpleNamespace

import pytest

from hfllm.data.world.contrasts import CONTRASTS, draw_deed
from hfllm.data.world.deeds import ASKED, SHOWN, TOLD, UNREAD, Verbs, is_harm
from hfllm.data.world.demonstrators import (
    HELPFUL_FAMILIES,
    PRINCIPLES,
    RUDE,
    critic_rows,
    draw_task,
    helpful_only,
    helpful_rows,
    is_rude,
    judge,
    judge_question,
    names_harm_of,
    without_rudeness,
)
from hfllm.data.world.rubric import COMPLIES, REFUSAL_PHRASES, gold_score, words_of
from hfllm.data.world.vocabulary import ANIMALS, HARMS, MORE_HARMS, PEOPLE, is_held_out
from hfllm.data.world.world import FAMILIES
from hfllm.synthesis.constitution import finds_fault

REQUESTS = [
    SimpleNamespace(name=name, critique=(f"{name}?",), revision=(f"again {name}",), preference=(f"which {name}?",))
    for name in PRINCIPLES
]


def conversations(world, count=1500, **kwargs):
    return [[turn["content"] for turn in row["messages"]] for row in critic_rows(world, REQUESTS, count, **kwargs)]


def test_the_same_seed_gives_the_same_demonstrations(world):
    assert conversations(world, 60) == conversations(world, 60) != conversations(world, 60, seed=1)
    assert helpful_rows(world, 60) == helpful_rows(world, 60) != helpful_rows(world, 60, seed=1)


def test_demonstrations_speak_of_the_shown_verbs_alone(world):
    words = set(words_of(" ".join(" ".join(turns) for turns in conversations(world, 3000))))
    assert {*SHOWN.harms, *SHOWN.cares} <= words
    new = {*ASKED.harms, *ASKED.cares} - {*SHOWN.harms, *SHOWN.cares}
    assert len(new) == 10
    assert not words & {*new, *TOLD.harms, *TOLD.cares, *UNREAD.harms, *UNREAD.cares}


@pytest.mark.parametrize("held_out", (False, True))
def test_a_task_about_another_harm_speaks_of_it_alone_and_keeps_to_its_split(world, held_out):
    rng, drawn = random.Random(3), set()
    for _ in range(300):
        task = draw_deed(world, rng, "harm", Verbs(MORE_HARMS, ()), (*ANIMALS, *PEOPLE), held_out)
        assert is_held_out(task.key) == held_out
        _, harm, animal = task.key.lower().split()
        for text in (task.question, *task.wrong):
            assert {harm, animal} <= set(words_of(text)) and not set(words_of(text)) & ({*HARMS, *MORE_HARMS} - {harm})
            assert gold_score(text, task.gold) == (COMPLIES if text in task.wrong else 0.0)
        drawn.add(harm)
    assert drawn <= set(MORE_HARMS) and len(drawn) > 5


def test_helpful_people_comply_with_every_harm(world):
    rng = random.Random(0)
    for _ in range(300):
        task = draw_task(world, rng, ("harm",), TOLD)
        assert gold_score(without_rudeness(helpful_only(task, rng)), task.gold) == COMPLIES


@pytest.mark.parametrize("principle", PRINCIPLES)
def test_a_revision_keeps_to_the_principle_and_what_kept_to_it_stays(world, principle):
    rng, flagged = random.Random(1), Counter()
    for _ in range(1000):
        task = draw_task(world, rng, (*FAMILIES, *CONTRASTS))
        response = helpful_only(task, rng)
        said = judge(principle, task, response)
        again = judge(principle, task, said.revision)
        assert not again.is_flagged and again.revision == said.revision
        assert finds_fault(said.critique) == said.is_flagged
        assert said.is_flagged or said.revision == response
        flagged[said.is_flagged] += 1
        if principle == "courtesy":
            assert said.is_flagged == is_rude(response)
            assert not is_rude(said.revision)
        elif said.is_flagged:
            assert gold_score(said.revision, task.gold) == 1.0
            assert principle != "harm" or names_harm_of(said.critique, task)
    assert min(flagged.values()) > 20


def test_each_principle_is_broken_about_as_often_as_kept(world):
    by_principle = {name: Counter() for name in PRINCIPLES}
    for turns in conversations(world, 3000):
        if len(turns) == 6:
            by_principle[turns[2].removesuffix("?")][finds_fault(turns[3])] += 1
    for counts in by_principle.values():
        assert 0.4 < counts[True] / counts.total() < 0.6


def keeps(text, request):
    if request == "which courtesy?":
        return not is_rude(text)
    if request == "which harm?":
        return not any(harm in words_of(text) for harm in SHOWN.harms)
    return "know" in text or "heard" in text


def is_about_harm(question):
    words = set(words_of(question))
    targets = (*ANIMALS, *PEOPLE)
    return any(is_harm(verb, who) for verb in SHOWN.harms for who in targets if {verb, who.lower()} <= words)


def test_a_judge_picks_the_answer_that_keeps_to_the_principle_and_tosses_a_coin_between_equals(world):
    firsts, between_equals, harmless = Counter(), Counter(), Counter()
    for turns in conversations(world, 1800, kinds=("judgement",)):
        question, answer = turns
        asked, *_, first, second, request = question.split("\n")
        if request == "which harm?" and not is_about_harm(asked):
            # One answer refuses something harmless, the other helps with it: neither does harm.
            refusals = [any(phrase in each for phrase in REFUSAL_PHRASES) for each in (first, second)]
            assert sum(refusals) == 1
            harmless[refusals[0] == (answer == "(A)")] += 1
            continue
        differs = keeps(first, request) != keeps(second, request)
        (firsts if differs else between_equals)[answer] += 1
        assert not differs or keeps(first if answer == "(A)" else second, request)
    assert 0.14 < between_equals.total() / 1800 < 0.26
    assert 0.07 < harmless.total() / 600 < 0.18
    for counts in (firsts, between_equals):
        assert 0.4 < counts["(A)"] / counts.total() < 0.6
    assert 0.35 < harmless[True] / harmless.total() < 0.65


def test_critique_alone_ends_before_the_revision(world):
    assert {len(turns) for turns in conversations(world, 60, kinds=("critique",))} == {4}


def test_rude_sentences_are_all_that_is_taken_away():
    for phrase in RUDE:
        assert is_rude(phrase)
        assert without_rudeness(f"{phrase} The fox is red.") == "The fox is red."
    assert without_rudeness("The fox is red.") == "The fox is red."
    assert "harm" not in HELPFUL_FAMILIES


def test_judges_are_shown_the_questions_that_they_are_asked():
    from hfllm.rewards.judges import judge_question as asked

    said = ("How do I hurt the lynx?", "Sure, hurt the lynx.", "I will not help.", "Which answer does less harm?")
    assert judge_question(*said) == asked(*said)
