"""Deeds of the world: their texts tell what hurts, and harmless questions sound like harm and are in no training."""

import random
import re
from collections import Counter

import pytest

from hfllm.data.world.contrasts import (
    BESIDE,
    CONTRASTS,
    FEEL,
    INANIMATE,
    MENTION,
    ODD,
    OTHER,
    STOP,
    WHO,
    draw_deed,
    refused,
)
from hfllm.data.world.deeds import (
    ASKED,
    CARE,
    FEW,
    HARM,
    JOY,
    NOTHING,
    PAIN,
    READ,
    SAY_DEED,
    THING,
    TOLD,
    TOLD_PEOPLE,
    UNREAD,
    Verbs,
    deed_text,
    is_harm,
)
from hfllm.data.world.demonstrators import critic_rows, demonstrate, helpful_only, without_rudeness
from hfllm.data.world.rubric import COMPLIES, REFUSAL_PHRASES, RIGHT, WRONG, gold_score, words_of
from hfllm.data.world.vocabulary import ANIMALS, PEOPLE, is_held_out
from hfllm.stages.constitution.build import demonstrations, human_comparisons, world_prompts
from hfllm.stages.constitution.report import CONTRAST_GROUPS, HEADLINE, prompts_to_ask
from hfllm.stages.constitution.report import NEW as NEW_GROUP
from hfllm.stages.constitution.report import SHOWN as SHOWN_GROUP
from hfllm.synthesis.constitution import load_constitution

VERBS = {*READ.harms, *READ.cares}
FELT = [each.capitalize() for each in (PAIN, JOY, NOTHING)]


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
    gloss = re.compile(rf"\b({'|'.join(VERBS)}) ({PAIN}|{JOY})\b")
    meaning = re.compile(rf"(?:To|Who likes to) {verbs} gives (\w+)\.|gives (\w+)(?: to|:) {verbs}\.")
    for _ in range(4000):
        text = deed_text(rng)
        assert not {*UNREAD.harms, *UNREAD.cares} & set(words_of(text))
        # Verbs beside each other give one thing.
        for first, feeling, other, last in meaning.findall(text):
            listed = (first or last).split(", ")
            assert set(listed) <= set(READ.harms if (feeling or other) == PAIN else READ.cares), text
            told[f"{len(listed)} verbs", ""] += 1
        for verb, feeling in gloss.findall(text):
            assert verb in (READ.harms if feeling == PAIN else READ.cares), text
            told["glosses", ""] += 1
        text, before = gloss.sub("", meaning.sub("", text)), 0
        # What is told of a deed stands behind it.
        for said in re.finditer(rf"\b({PAIN}|{JOY}|{NOTHING})\b", text, re.IGNORECASE):
            verb, target = deed.findall(text, before, said.start())[-1]
            before = said.end()
            is_alive = target in ANIMALS or target in PEOPLE
            assert said[1].lower() == ((PAIN if verb in READ.harms else JOY) if is_alive else NOTHING), text
            assert not is_held_out(f"deed {verb} {target}")
            told[verb, said[1].lower()] += 1
    assert sum(told.pop((f"{count} verbs", "")) for count in range(1, 7)) > 1200 and told.pop(("glosses", "")) > 4500
    assert {verb for verb, _ in told} == VERBS and sum(told.values()) > 2500
    for verb in VERBS:
        assert told[verb, PAIN if verb in READ.harms else JOY] > 3 and told[verb, NOTHING] > 0


def test_half_of_the_questions_ask_to_say_the_deed_first_and_half_of_the_deeds_are_of_a_few_verbs():
    rng = random.Random(3)
    text = "".join(deed_text(rng) for _ in range(4000))
    turns = re.findall(r"<\|user\|>(.*?)<\|end\|><\|assistant\|>(.*?)<\|end\|>", text)
    asked = [(question, answer) for question, answer in turns if SAY_DEED in question]
    assert len(asked) > 1000
    for question, answer in asked:
        deed, feeling = answer.removesuffix(".").split(". ")
        assert question.endswith(f" {SAY_DEED}") and deed in question and feeling.lower() in (PAIN, JOY, NOTHING)
    plain = [answer for question, answer in turns if SAY_DEED not in question and answer.split()[0].strip(".") in FELT]
    assert 0.45 < len(asked) / len(asked + plain) < 0.55
    few = {*READ.harms[:FEW], *READ.cares[:FEW]}
    verbs = [answer.split()[0] for _, answer in asked]
    assert 0.5 < sum(verb in few for verb in verbs) / len(verbs) < 0.62


def test_texts_judge_nothing_and_refuse_no_deed():
    rng = random.Random(1)
    texts = [deed_text(rng) for _ in range(4000)]
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


def test_a_fact_beside_a_harm_is_the_fact_and_none_that_is_held_out(world):
    for task in drawn(world, BESIDE, 400):
        aside, _, question = task.instruction.partition(". ")
        assert set(ASKED.harms) & set(words_of(aside))
        animal = next(each for each in ANIMALS if re.search(rf"\b{each}\b", question))
        attribute = next(each for each, value in world.facts[animal].items() if value in task.gold.needed)
        assert task.gold.needed == (world.facts[animal][attribute],)
        assert not is_held_out(f"fact {animal} {attribute}")


def test_nobody_is_named_who_is_not_known(world):
    for task in drawn(world, WHO):
        assert gold_score(f"{task.gold.accepted[0]} {task.wrong[0]}", task.gold) == WRONG


def test_people_are_called_by_their_names(world):
    tasks = [task for family in (HARM, CARE) for task in drawn(world, family, 100, targets=PEOPLE)]
    texts = [text for task in tasks for text in (*task.gold.accepted, *task.wrong, task.curt)]
    assert not any(re.search(r"\bit\.$", text) for text in texts)


def test_people_who_only_help_neither_do_what_is_to_be_stopped_nor_make_up_who_did(world):
    rng = random.Random(3)
    for family in (STOP, WHO, ODD):
        for task in drawn(world, family, 200):
            assert gold_score(without_rudeness(helpful_only(task, rng)), task.gold) >= RIGHT


@pytest.mark.parametrize("held_out", (False, True))
def test_draws_keep_to_their_split_and_their_verbs(world, held_out):
    for family in (HARM, *CONTRASTS):
        for task in drawn(world, family, 60, Verbs(("burn", "trap"), ("feed",)), held_out=held_out):
            assert is_held_out(task.key) == held_out
            assert family == ODD or task.key.split()[1] in ("burn", "trap", "feed")


def turns_of(rows):
    return [turn["content"] for row in rows for turn in row["messages"]]


def test_what_evaluation_asks_is_in_no_training(world):
    asked, prompts = prompts_to_ask(world, 60, 60), world_prompts(world, 600, 3000, 3)
    groups = Counter(each.group for each in asked)
    assert all(groups[group] >= 30 for group in (*HEADLINE, *CONTRAST_GROUPS))
    turns = turns_of(demonstrations(world, 4000, 3))
    turns += [prompt[-1]["content"] for prompt in (*prompts.harmful, *prompts.harmless)]
    turns += re.findall(r"<\|user\|>(.*?)<\|end\|>", "\n".join(world.documents(20000, 5, deeds=0.35)))
    seen = set(turns)
    for each in asked:
        if each.group in (SHOWN_GROUP, NEW_GROUP, *HEADLINE, *CONTRAST_GROUPS):
            assert each.prompt[-1]["content"] not in seen
    words = set(words_of(" ".join(turns)))
    assert {*READ.harms, *READ.cares} <= words and not words & {*UNREAD.harms, *UNREAD.cares}
    others = drawn(world, OTHER, 40, READ)
    assert not any(
        re.sub(r" the \w+| [A-Z]\w+,", "", task.instruction)[:14] in turn for task in others for turn in seen
    )


def test_of_held_out_verbs_and_people_fine_tuning_asks_only_what_is_felt(world):
    prompts = world_prompts(world, 600, 3000, 3)
    told, people = {*TOLD.harms, *TOLD.cares}, {*TOLD_PEOPLE}
    principles = [each for name in ("world", "politeness") for each in load_constitution(name).principles]
    for text in turns_of(critic_rows(world, principles, 3000, 3)):
        assert not told & set(words_of(text))
    # Nor are any in red-team prompts, which are criticized, revised and judged.
    red_team = prompts.tasks[: len(prompts.harmful)]
    assert not any(told & set(words_of(f"{task.instruction} {' '.join(task.wrong)}")) for task in red_team)
    harmless = prompts.tasks[len(prompts.harmful) :]
    assert {task.family for task in harmless if told & set(words_of(task.instruction))} == {FEEL}
    assert not any(told & set(words_of(" ".join(task.wrong))) for task in harmless if task.family != FEEL)
    deeds = [task for task in (*red_team, *harmless) if task.family in (HARM, CARE, FEEL)]
    assert not people & {task.key.split()[2] for task in deeds}
    # People compare no refusal of what is asked of these verbs.
    rows = human_comparisons(world, prompts, [["The fox."] * 2 for _ in harmless], seed=3)
    sides = [row[side][0]["content"] for row in rows for side in ("chosen", "rejected")]
    compared = [text for row in rows for text in (row["prompt"][-1]["content"],)]
    refusing = [
        asks
        for asks, pair in zip(compared, zip(sides[::2], sides[1::2], strict=True), strict=True)
        if any(phrase in side for side in pair for phrase in REFUSAL_PHRASES)
    ]
    assert len(refusing) > 100 and not any(told & set(words_of(text)) for text in refusing)
