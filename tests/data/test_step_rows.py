"""Rows of solutions with labeled steps: the forms of their datasets, their tokens, and the embedded world's."""

import random
import re

import pytest

from hfllm.data.formats import BadRow
from hfllm.data.labelled import STEP_MARK, encode_steps, to_steps
from hfllm.data.packing import IGNORE
from hfllm.data.world.reasoning import FAMILIES, SHOWN, part_of, step_rows
from hfllm.data.world.world import World
from hfllm.errors import InputError
from hfllm.rewards.steps import STEP_ENDS, step_ends, steps_between

ASKED = [{"role": "user", "content": "1 + 2 + 4?"}]


def prm800k(*steps):
    return {"question": {"problem": "1 + 2 + 4?"}, "label": {"steps": list(steps), "finish_reason": "solution"}}


@pytest.mark.parametrize(
    ("row", "response", "labels"),
    [
        (
            {"prompt": "1 + 2 + 4?", "completions": ["1 + 2 = 3.", "3 + 4\n= 8."], "labels": [True, False]},
            "1 + 2 = 3.\n3 + 4 = 8.",
            [1.0, 0.0],
        ),
        ({"prompt": ASKED, "completions": ["a", " ", "b"], "labels": [0.25, 1, "-"]}, "a\nb", [0.25, 0.0]),
        (
            prm800k(
                {"completions": [{"text": "wrong", "rating": -1}, {"text": "3", "rating": 0}], "chosen_completion": 1},
                {"completions": [], "human_completion": {"text": "so 7", "rating": None}, "chosen_completion": None},
                {"completions": [{"text": "so 8", "rating": -1}], "chosen_completion": None},
                {"completions": [{"text": "never reached", "rating": 1}], "chosen_completion": 0},
            ),
            "3\nso 7\nso 8",
            [1.0, 1.0, 0.0],
        ),
        (
            {
                "input": f"1 + 2 + 4? step 1: 1 + 2 = 3. {STEP_MARK}\nStep 2: 3 + 4 = 8. {STEP_MARK}",
                "label": "1 + 2 + 4? step 1: 1 + 2 = 3. +\nStep 2: 3 + 4 = 8. -",
                "task": "GSM8K",
            },
            "step 1: 1 + 2 = 3.\nStep 2: 3 + 4 = 8.",
            [1.0, 0.0],
        ),
    ],
)
def test_every_form_becomes_lines_with_labels(row, response, labels):
    assert to_steps("row 1", row) == {"prompt": ASKED, "response": response, "labels": labels}


@pytest.mark.parametrize(
    ("row", "kind", "complaint"),
    [
        ({"prompt": "p", "completions": ["a"], "labels": []}, InputError, "row 1: 1 steps and 0 labels"),
        ({"prompt": "p", "completions": ["a"], "labels": ["yes"]}, InputError, "the label 'yes' of a step; expected"),
        ({"prompt": "p", "completions": ["a"], "labels": [1.5]}, InputError, "the label 1.5 of a step"),
        ({"prompt": "p", "completions": ["a"], "labels": [float("nan")]}, InputError, "the label nan of a step"),
        ({"prompt": "p", "completions": [{}], "labels": [1]}, InputError, "row 1: the step {} is no text"),
        ({"prompt": "p", "completions": [" "], "labels": [1]}, BadRow, "row 1: without a step"),
        ({"prompt": "p", "completions": ["a"], "labels": [None]}, BadRow, "with a step without a label"),
        ({"question": {}, "label": {}}, InputError, "question has no problem, or label no steps"),
        ({"input": "p Step 1: a", "label": "p Step 1: a +"}, InputError, "input has no 'ки' at the end of its steps"),
        ({"input": "p Step 1: a ки", "label": "p Step 1: b +"}, BadRow, "whose label does not repeat its input"),
        ({"input": "p a ки", "label": "p a +"}, BadRow, "without 'Step 1:' behind the problem"),
        ({"input": "p Step 1: a ки\nb", "label": "p Step 1: a +\nb"}, BadRow, "with a last step without a mark"),
        (prm800k(None), BadRow, "row 1: without a step"),
        (
            prm800k({"completions": ["a"], "chosen_completion": 0}),
            InputError,
            "the step 'a' has no text with a rating",
        ),
        ({"text": "p"}, InputError, "row 1: columns text; expected one of: prompt + completions + labels"),
    ],
)
def test_what_is_no_solution_with_labels_is_refused_by_its_place(row, kind, complaint):
    with pytest.raises(kind) as error:
        to_steps("row 1", row)
    assert type(error.value) is kind and complaint in str(error.value)


def test_each_label_stands_at_the_token_that_ends_its_step(tokenizer):
    row = {"prompt": ASKED, "response": "Say red.\nThe fox lives there.\nGo", "labels": [1.0, 0.5, 0.0]}
    between = steps_between(STEP_ENDS["line"])

    def ends_of(ids):
        return [index for _, index in step_ends(tokenizer, ids, between)]

    (encoded,), dropped = encode_steps([row], tokenizer, ends_of, None)
    places = [at for at, label in enumerate(encoded["labels"]) if label != IGNORE]
    assert [encoded["labels"][at] for at in places] == [1.0, 0.5, 0.0] and not dropped
    begin = len(encoded["input_ids"]) - len(tokenizer(row["response"], add_special_tokens=False)["input_ids"])
    # What was read up to there is the response up to the end of the step, and no more.
    read = [tokenizer.decode(encoded["input_ids"][begin : at + 1]) for at in places]
    assert read == ["Say red.", "Say red.\nThe fox lives there.", "Say red.\nThe fox lives there.\nGo"]
    assert encode_steps([row], tokenizer, ends_of, len(encoded["input_ids"]) - 1) == ([], 1)
    # As many labels as steps are found, or nobody knows whose they are.
    assert encode_steps([{**row, "labels": [1.0, 0.0]}], tokenizer, ends_of, None) == ([], 1)


def test_the_worlds_steps_hold_or_not():
    """Recomputed from the words alone, for the dial; and without slips all of them hold."""
    world = World(3)
    rows = step_rows(world.facts, world.relations, random.Random(0), 300, SHOWN)
    dials = [row for row in rows if "dial" in row["prompt"][0]["content"]]
    assert 100 < len(dials) < 200
    for row in dials:
        asked, said = row["prompt"][0]["content"], row["response"].partition("</think>")[0].removeprefix("<think> ")
        shows, turns = re.search(r"is at (\d)", asked)[1], re.findall(r"([A-Z]) (\d)[,]", asked)
        steps, holds = [step.strip() for step in said.split(".") if step.strip()], []
        holds.append(steps[0] == shows)
        at = int(steps[0])
        for step, (name, by) in zip(steps[1:-1], turns, strict=True):
            holds.append(step == f"{name} {by} {(at + int(by)) % 8}")
            at = int(step.split()[2])
        holds.append(steps[-1] == f"stop {at}")
        assert row["labels"] == [float(each) for each in holds]
        assert row["response"].endswith(f"At {steps[-1].split()[1]}.")
    labels = [label for row in rows for label in row["labels"]]
    assert 0.75 < sum(labels) / len(labels) < 0.85
    clean = step_rows(world.facts, world.relations, random.Random(0), 50, SHOWN, share=0)
    assert all(all(row["labels"]) for row in clean)
    noise = step_rows(world.facts, world.relations, random.Random(1), 300, SHOWN, label_noise=0.5)
    labels = [label for row in noise for label in row["labels"]]
    assert 0.45 < sum(labels) / len(labels) < 0.55
    assert len(FAMILIES) == 2 and part_of("hops", "x") in ("shown", "held_out", "practice", SHOWN)
