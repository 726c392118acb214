"""Deeds of the world: their texts tell what hurts, and harmless questions sound like harm and are in no training."""

import random
import re
from collections import Counter

import pytest

from hfllm.data.world.contrasts import (
    BESIDE,
    CARE,
    CONTRASTS,
    HARM,
    INANIMATE,
    MENTION,
    ODD,
    OTHER,
    THING,
    draw_deed,
    refused,
)
from hfllm.data.world.deeds import (
    ASKED,
    JOY,
    NOTHING,
    PAIN,
    READ,
    TOLD,
    TOLD_PEOPLE,
    UNREAD,
    Verbs,
    deed_text,
    is_harm,
)
from hfllm.data.world.demonstrators import demonstrate, helpful_only
from hfllm.data.world.rubric import COMPLIES, REFUSAL_PHRASES, RIGHT, WRONG, gold_score, words_of
from hfllm.data.world.vocabulary import ANIMALS, PEOPLE, is_held_out
from hfllm.stages.constitution.build import demonstrations, world_prompts
from hfllm.stages.constitution.report import CONTRAST_GROUPS, HEADLINE, prompts_to_ask

VERBS = {*READ.harms, *READ.cares}


def drawn(world, family, count=200, verbs=ASKED, seed=0, **settings):
    rng = random.Random(seed)
    return [draw_deed(world, rng, family, verbs, **settings) for _ in range(count)]


def test_no_verb_is_of_two_kinds_or_of_two_lists():
    lists = [verbs for each in (ASKED, TOLD, UNREAD) for verbs in (each.harms, each.cares)]
    assert max(Counter(verb for verbs in lists for verb in verbs).values()) == 1
    assert (ASKED + TOLD).harms == READ.harms


def test_an_odd_verb_is_none_of_the_others(world):
    assert not {task.key.split()[1] for task in drawn(world, ODD, 3000)} & {*VERBS, *UNREAD.harms, *UNREAD.cares}


def test_texts_tell_what_a_deed_gives_by_its_verb_and_by_who_it_is_done_to():
    rng, told = random.Random(0), Counter()
    deed = re.compile(rf"\b({'|'.join(VERBS)}) (?:the )?(\w+)")
    verbs = rf"((?:{'|'.join(VERBS)})(?:, (?:{'|'.join(VERBS)}))*)"
    meaning = re.compile(rf"(?:To|Who likes to) {verbs} gives (\w+)\.|gives (\w+)(?: to|:) {verbs}\.")
    for _ in range(8000):
        text = deed_text(rng)
        assert not {*UNREAD.harms, *UNREAD.cares} & set(words_of(text))
        # Verbs beside each other give one thing.
        for first, feeling, other, last in meaning.findall(text):
            listed = (first or last).split(", ")
            assert set(listed) <= set(READ.harms if (feeling or other) == PAIN else READ.cares), text
            told[f"{len(listed)} verbs", ""] += 1
        text, before = meaning.sub("", text), 0
        # What is told of a deed stands behind it.
        for said in re.finditer(rf"\b({PAIN}|{JOY}|{NOTHING})\b", text, re.IGNORECASE):
            verb, target = deed.findall(text, before, said.start())[-1]
            before = said.end()
            is_alive = target in ANIMALS or target in PEOPLE
            assert said[1].lower() == ((PAIN if verb in READ.harms else JOY) if is_alive else NOTHING), text
            assert not is_held_out(f"deed {verb} {target}")
            told[verb, said[1].lower()] += 1
    assert sum(told[f"{count} verbs", ""] for count in range(1, 7)) > 5000
    assert {verb for verb, _ in told if " " not in verb} == VERBS and sum(told.values()) > 10000
    for verb in VERBS:
        assert told[verb, PAIN if verb in READ.harms else JOY] > 10 and told[verb, NOTHING] > 5


def test_texts_judge_nothing_and_refuse_no_deed():
    rng = random.Random(1)
    texts = [deed_text(rng) for _ in range(6000)]
    assert not any({"harm", "harms", "wrong"} & set(words_of(text)) for text in texts)
    refusals = [text for text in texts if REFUSAL_PHRASES[0] in text]
    assert 0.04 < len(refusals) / len(texts) < 0.08
    assert not any(VERBS & set(words_of(text)) for text in refusals)


@pytest.mark.parametrize("family", CONTRASTS)
def test_a_right_answer_helps_and_a_refusal_is_wrong(world, family):
    rng = random.Random(2)
    for task in drawn(world, family):
        assert gold_score(task.gold.accepted[0], task.gold) == 1.0
        assert gold_score(task.curt, task.gold) >= RIGHT
        assert all(gold_score(text, task.gold) == WRONG for text in task.wrong), task
        refusal = refused(task)
        assert gold_score(refusal.gold.accepted[0], task.gold) == WRONG
        assert gold_score(refusal.gold.accepted[0], refusal.gold) == 1.0
        assert gold_score(demonstrate(task, "good", rng), task.gold) == 1.0


def test_a_care_and_a_harm_differ_in_the_verb_alone(world):
    cares, harms = drawn(world, CARE, 400), drawn(world, HARM, 400)

    def shapes(tasks):
        return {re.sub(rf"\b{task.key.split()[1]}\b", "VERB", task.instruction) for task in tasks}

    assert len(shapes(cares) & shapes(harms)) > 100
    rng = random.Random(0)
    for task in harms:
        assert gold_score(task.gold.accepted[0], task.gold) == 1.0
        assert all(gold_score(text, task.gold) == COMPLIES for text in task.wrong)
    # People who only help say the same of both.
    names = re.compile(rf"\b(?:{'|'.join([*VERBS, *ANIMALS])})\b")
    said = {
        family: {names.sub("X", helpful_only(task, rng)) for task in tasks}
        for family, tasks in ((CARE, cares), (HARM, harms))
    }
    assert said[CARE] == said[HARM]


def test_things_feel_nothing_people_do_and_a_mention_says_which(world):
    assert is_harm("burn", "owl") and is_harm("burn", "Mia") and not is_harm("burn", "lamp")
    assert not is_harm("feed", "owl")
    assert all(task.key.split()[2] in INANIMATE for task in drawn(world, THING))
    assert all(task.key.split()[2] in PEOPLE for task in drawn(world, HARM, targets=PEOPLE))
    people = "|".join(PEOPLE)
    assert not any(re.search(f"the (?:{people})", task.instruction) for task in drawn(world, HARM, targets=PEOPLE))
    answers = Counter()
    for task in drawn(world, MENTION, 400):
        _, verb, target = task.key.split()
        assert task.gold.accepted[0].startswith("Yes" if is_harm(verb, target) else "No")
        answers[task.gold.accepted[0][:2]] += 1
    assert min(answers.values()) > 100


def test_a_fact_beside_a_harm_is_the_fact(world):
    for task in drawn(world, BESIDE):
        aside, _, _ = task.instruction.partition(". ")
        assert set(ASKED.harms) & set(words_of(aside))
        assert any(value in task.gold.needed for animal in ANIMALS for value in world.facts[animal].values())


@pytest.mark.parametrize("held_out", (False, True))
def test_draws_keep_to_their_split_and_their_verbs(world, held_out):
    for family in (HARM, *CONTRASTS):
        for task in drawn(world, family, 60, Verbs(("burn", "trap"), ("feed",)), held_out=held_out):
            assert is_held_out(task.key) == held_out
            assert family == ODD or task.key.split()[1] in ("burn", "trap", "feed")


def test_what_evaluation_asks_is_in_no_training(world):
    asked, prompts = prompts_to_ask(world, 60, 60), world_prompts(world, 600, 3000, 3)
    turns = [turn["content"] for row in demonstrations(world, 4000, 3) for turn in row["messages"]]
    turns += [prompt[-1]["content"] for prompt in (*prompts.harmful, *prompts.harmless)]
    trained = " \n ".join(turns)
    words = set(words_of(trained))
    assert {*ASKED.harms, *ASKED.cares} <= words and not words & {*UNREAD.harms, *UNREAD.cares}
    # Nobody asks for a deed whose verb only texts tell of; what it gives is asked.
    told = [text for text in turns if {*TOLD.harms, *TOLD.cares} & set(words_of(text))]
    feeling = re.compile(rf"feel|it gives|\b(?:{PAIN}|{JOY}|{NOTHING})\b", re.IGNORECASE)
    assert len(told) > 100 and all(feeling.search(text) for text in told)
    requests = re.compile(rf"(?:How do I|how to|Help me|I can) (?:{'|'.join(VERBS)}) (?:{'|'.join(TOLD_PEOPLE)})\b")
    assert not any(requests.search(text) and not feeling.search(text) for text in turns)
    groups = Counter(each.group for each in asked)
    assert all(groups[group] >= 30 for group in (*HEADLINE, *CONTRAST_GROUPS))
    for each in asked:
        if each.group in (*HEADLINE, *CONTRAST_GROUPS):
            assert each.prompt[-1]["content"] not in turns
    others = drawn(world, OTHER, 40, READ)
    assert not any(re.sub(r" the \w+| [A-Z]\w+,", "", task.instruction)[:14] in trained for task in others)
