"""Augmented rows: how many, what stays, and which part of an answer is learned."""

import random
from dataclasses import replace
from itertools import islice

import pytest

from hfllm.data.augmentation import (
    PREFILL,
    WORLD_TRAINING,
    augmented_demonstrations,
    augmented_prompts,
    begun_comparisons,
    begun_prompts,
)
from hfllm.data.conversations import Conversations
from hfllm.data.formats import OriginRow, origin_of
from hfllm.data.packing import IGNORE
from hfllm.data.tokenizer import train_tokenizer
from hfllm.data.world.documents import in_form
from hfllm.data.world.world import World
from hfllm.evaluation.suites.refusals import refuses
from hfllm.stages.rlhf.build import prompt_data
from hfllm.stages.rlhf.flags import RlhfArguments
from hfllm.stages.sft.build import augmented, without_prefill
from hfllm.stages.sft.flags import SftArguments
from hfllm.synthesis import answers
from hfllm.synthesis.answers import ComparisonSettings, augmented_tasks, compare_samples

REFUSAL = "I can not help with that, but I can help you care for the fox."


def rows(count: int, said: str = REFUSAL) -> list[OriginRow]:
    asked = [f"Please help me. How do I hurt fox {number}?\nA text. {number}" for number in range(count)]
    return [
        OriginRow(
            {
                "prompt": [{"role": "user", "content": text}],
                "completion": [{"role": "assistant", "content": said}],
                "kept": 1,
            },
            f"row {number}",
        )
        for number, text in enumerate(asked)
    ]


def question(row) -> str:
    return row["prompt"][-1]["content"]


def test_about_the_share_is_asked_otherwise_and_the_rest_stays():
    before = rows(400)
    after = augmented_prompts(before, 0.3, 7, WORLD_TRAINING)
    differs = [one for one, other in zip(before, after, strict=True) if question(one) != question(other)]
    assert 80 < len(differs) < 150
    assert [question(row).partition("\n")[2] for row in after] == [question(row).partition("\n")[2] for row in before]
    assert [origin_of(row, "") for row in after] == [origin_of(row, "") for row in before]
    assert all(row["completion"] == rows(1)[0]["completion"] and row["kept"] == 1 for row in after)
    assert (
        after == augmented_prompts(before, 0.3, 7, WORLD_TRAINING) != augmented_prompts(before, 0.3, 8, WORLD_TRAINING)
    )


def test_refusals_alone_are_prefilled():
    refused = augmented_demonstrations(rows(100), 1.0, 0, WORLD_TRAINING, refuses)
    assert len(refused) == 100
    assert all(row["completion"][0]["content"] == f"{row[PREFILL]} {REFUSAL}" for row in refused)
    assert all(any(each.startswith(row[PREFILL]) for each in WORLD_TRAINING.prefills) for row in refused)
    assert len({row[PREFILL] for row in refused}) > 20
    answered = augmented_demonstrations(rows(100, "The fox is red."), 1.0, 0, WORLD_TRAINING, refuses)
    assert not any(PREFILL in row for row in answered)


@pytest.mark.parametrize(("kind", "expected"), [(None, 0.2), ("harm", 0.6), ("answer", 0.0)])
def test_answers_to_harm_are_begun_and_of_unknown_prompts_a_share(kind, expected):
    before = [OriginRow({**row, **({"gold_kind": kind} if kind else {})}, row.origin) for row in rows(400)]
    after = begun_prompts(before, 0.2, 7, WORLD_TRAINING)
    begun = [row["prompt"] for row in after if row["prompt"][-1]["role"] == "assistant"]
    assert abs(len(begun) / 400 - expected) < 0.08 * (expected > 0) + 1e-9
    assert all(any(text.startswith(prompt[-1]["content"]) for text in WORLD_TRAINING.prefills) for prompt in begun)
    assert [row["prompt"][0] for row in after] == [row["prompt"][0] for row in before]
    assert [origin_of(row, "") for row in after] == [origin_of(row, "") for row in before]
    # Texts and what the assistant has said already stay.
    others = [{"prompt": "Say it."}, {"prompt": [*rows(1)[0]["prompt"], *rows(1)[0]["completion"]]}]
    assert begun_prompts(others, 1.0, 7, WORLD_TRAINING) == others


COMPLIES = "Sure, first find it."


def compared(count: int, chosen: str = REFUSAL, rejected: str = COMPLIES) -> list[OriginRow]:
    said = {
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
    return [OriginRow({"prompt": row["prompt"], **said}, row.origin) for row in rows(count)]


@pytest.mark.parametrize("is_wrong", [False, True])
def test_refusals_are_compared_behind_words_that_both_responses_share(is_wrong):
    """As many of those with the wrong label, so that the share of these stays what it is."""
    before = compared(400, *((COMPLIES, REFUSAL) if is_wrong else (REFUSAL, COMPLIES)))
    after = begun_comparisons(before, 0.2, 7, WORLD_TRAINING, refuses)
    assert [origin_of(row, "") for row in after] == [origin_of(row, "") for row in before]
    changed = [row for row, other in zip(after, before, strict=True) if row != other]
    assert abs(len(changed) / 400 - 0.6) < 0.08
    refusing, other = ("rejected", "chosen") if is_wrong else ("chosen", "rejected")
    pairs = [(row[refusing][0]["content"], row[other][0]["content"]) for row in changed]
    promises = [refusal.removesuffix(f" {REFUSAL}") for refusal, _ in pairs]
    assert all(any(text.startswith(promise) for text in WORLD_TRAINING.prefills) for promise in promises)
    whole = [said == f"{promise} {COMPLIES}" for promise, (_, said) in zip(promises, pairs, strict=True)]
    alone = [said == f"{promise}." for promise, (_, said) in zip(promises, pairs, strict=True)]
    assert all(one != other for one, other in zip(whole, alone, strict=True))
    assert abs(sum(alone) / len(changed) - 0.25) < 0.1


def test_other_comparisons_are_not_begun():
    for said in (("The fox is red.", COMPLIES), (REFUSAL, REFUSAL)):
        before = compared(50, *said)
        assert begun_comparisons(before, 1.0, 7, WORLD_TRAINING, refuses) == before
    several = [{**row, "chosen": row["chosen"] * 2} for row in compared(50)]
    assert begun_comparisons(several, 1.0, 7, WORLD_TRAINING, refuses) == several


@pytest.mark.parametrize("prefill", WORLD_TRAINING.prefills)
def test_what_is_learned_of_a_prefilled_answer_is_what_follows(prefill):
    tokenizer = train_tokenizer([f"{prefill} {REFUSAL} How do I hurt the fox?"] * 3, 400)
    row = {
        "prompt": [{"role": "user", "content": "How do I hurt the fox?"}],
        "completion": [{"role": "assistant", "content": f"{prefill} {REFUSAL}"}],
    }
    ((labeled,),) = Conversations(tokenizer).label([row])
    labels = without_prefill(labeled, prefill, tokenizer)
    learned = [label for label in labels if label != IGNORE]
    assert tokenizer.decode(learned).strip() == f"{REFUSAL}{tokenizer.eos_token}"
    assert len(labels) == len(labeled.input_ids)


def test_without_the_flag_rows_are_the_same_object():
    before = rows(3)
    assert augmented(before, 0.0, 0, "world") is before
    with pytest.raises(ValueError, match=r"augment must lie in \[0, 1\], got 1.5"):
        SftArguments(augment=1.5)


def test_a_share_of_the_texts_is_in_another_form_and_the_others_are_as_without():
    world = World(0)
    plain, formed = world.documents(600, 3), world.documents(600, 3, forms=0.2)
    differs = [(one, other) for one, other in zip(plain, formed, strict=True) if one != other]
    assert 80 < len(differs) < 160
    # The same words in the same order, once or twice.
    for one, other in differs:
        words = [word.strip(".,?!:").lower() for word in one.split()]
        said = [word.strip(".,?!:").lower() for word in other.split()]
        assert said in (words, words * 2)
    assert any(one.upper() in other for one, other in differs)
    assert in_form("", random.Random(0)).strip() == ""


def test_prompts_of_ppo_are_asked_otherwise_and_scored_as_before():
    plain, formed = (prompt_data(RlhfArguments(num_prompts=200, augment=share), 5, []) for share in (0.0, 0.5))
    differs = [(one, other) for one, other in zip(plain[0], formed[0], strict=True) if one != other]
    assert 60 < len(differs) < 130
    for one, other in differs:
        assert {**one, "prompt": 0} == {**other, "prompt": 0}
        assert one["prompt"][0]["content"].partition("\n")[2] == other["prompt"][0]["content"].partition("\n")[2]
    assert plain[1] == formed[1]


def test_comparisons_are_about_questions_in_other_forms():
    tasks = list(islice(World(0).tasks(3), 200))
    formed = augmented_tasks(tasks, 0.5, 1, WORLD_TRAINING)
    differs = [(one, other) for one, other in zip(tasks, formed, strict=True) if one != other]
    assert 60 < len(differs) < 130
    assert all(replace(one, instruction="") == replace(other, instruction="") for one, other in differs)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.0), (0.2, 0.6)])
def test_the_worlds_samples_go_on_from_promises_where_harm_is_asked_for_in_training(share, expected, monkeypatch):
    asked = []

    def sampled(model, tokenizer, prompts, length, **options):
        asked.append(prompts)
        return [[f" {REFUSAL}", " find it."] for _ in prompts]

    monkeypatch.setattr(answers, "sample_responses", sampled)
    settings = ComparisonSettings(
        num_pairs=600,
        num_eval_prompts=60,
        on_policy_fraction=1.0,
        num_samples=2,
        label_noise=0.0,
        response_length=8,
        seed=3,
        augment=share,
    )
    rows, held_out = compare_samples(World(0), None, None, settings)
    begun = [prompt for prompt in asked[0] if prompt[-1]["role"] == "assistant"]
    harmful = sum(task.family == "harm" for task in islice(World(0).tasks(1_000_003), 600))
    assert abs(len(begun) / harmful - expected) < 0.13 * bool(expected) + 1e-9
    assert all(prompt[-1]["role"] == "user" for prompt in asked[1])
    promises = {prompt[0]["content"]: prompt[-1]["content"] for prompt in begun}
    compared = [row for row in rows if row["prompt"][0]["content"] in promises]
    for row in compared:
        promise = promises[row["prompt"][0]["content"]]
        assert all(row[side][0]["content"].startswith(promise) for side in ("chosen", "rejected"))
    assert bool(compared) == bool(share) and held_out
