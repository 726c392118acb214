"""Rewards of answers, steps and thoughts."""

import pytest

from hfllm.errors import InputError
from hfllm.rewards.functions import (
    checked_by,
    checked_rewards,
    exact_match,
    gold_reward,
    load_reward_function,
    thinks,
    thought_length_penalty,
    transcript,
)
from hfllm.rewards.steps import step_rewards


def message(content, thoughts=None):
    return [{"role": "assistant", "content": content} | ({"reasoning_content": thoughts} if thoughts else {})]


GOLD = ["48/2 = <<48/2=24>>24 in May.\n#### 1,072", "7", "#### 3", "", "fox"]


def test_the_final_answer_must_match():
    said = ["So 24 and then 1072.", "<think>7</think>8", "<think>4</think>#### 3", "", "Fox."]
    assert exact_match(["q"] * 5, said, answer=GOLD) == [1, 0, 1, 0, 1]
    apart = [message("So 1072."), message("8", "7"), message("#### 3", "4"), message(""), message("Fox.")]
    assert exact_match([[]] * 5, apart, answer=GOLD) == [1, 0, 1, 0, 1]
    # What is only thought is not said.
    assert exact_match(["q"], ["<think>#### 3"], answer=["3"]) == [0]


def test_they_are_named_on_the_command_line():
    assert load_reward_function("exact_match") is exact_match and load_reward_function("thinks") is thinks
    with pytest.raises(InputError, match="columns given: question"):
        checked_rewards(load_reward_function("exact_match"), ["q"], ["7"], question=["q"])


def test_calls_are_shown_to_readers_whatever_json_they_are():
    deep: list = []
    for _ in range(3000):
        deep = [deep]
    for arguments, shown in (({"key": "\ud800"}, '{"key": "?"}'), (deep, "(nested too deeply to be shown)")):
        turn = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "act", "arguments": arguments}}],
        }
        assert transcript([turn]) == f"assistant calls act: {shown}"


def test_who_thinks_and_answers():
    said = ["<think>a</think>b", "<think>a", "b", message("b", "a"), message("", "a"), message("b")]
    assert thinks(["q"] * 6, said) == [1, 0, 0, 1, 0, 0]


def test_a_checker_sees_an_answer_and_its_row():
    def is_within(answer, most, **columns):
        return int(answer) <= most

    reward = checked_by(is_within)
    assert reward.__name__ == "is_within"
    said = ["<think>9</think>3", message("5", "1")]
    assert checked_rewards(reward, ["q", "q"], said, most=[4, 4], completion_ids=[[1], [2]]) == [1, 0]


def test_long_thoughts_cost():
    said = ["<think>one two three</think>" + "word " * 50, message("x", "one two"), "no thoughts at all"]
    assert thought_length_penalty(0.5, free=1)(["q"] * 3, said) == [-1.0, -0.5, 0]


def test_long_thoughts_cost_by_the_token(tokenizer):
    said = ["<think>Zyxwvut</think>x", "x"]
    length = len(tokenizer("Zyxwvut")["input_ids"])
    assert length > 1
    assert thought_length_penalty(1.0, tokenizer=tokenizer)(["q"] * 2, said) == [-length, 0]


STEPS = "<think>1 + 2 is 3. 3 + 4 is 8.\n8 + 1 is 9</think>It is 9.<|end|>"


def is_right(step, earlier, **columns):
    left, _, right = step.rstrip(".").partition(" is ")
    return 1.0 if eval(left) == int(right) else -1.0


def test_each_step_is_paid_at_its_last_token(tokenizer):
    ids = tokenizer(STEPS)["input_ids"]
    seen = []

    def check(step, earlier, **columns):
        seen.append((step, earlier, columns["level"]))
        return is_right(step, earlier)

    (numbers,) = step_rewards(check, tokenizer)(["q"], [STEPS], completion_ids=[ids], level=[3])
    steps = ["1 + 2 is 3.", "3 + 4 is 8.", "8 + 1 is 9"]
    assert seen == [(step, steps[:at], 3) for at, step in enumerate(steps)]
    paid = {place: number for place, number in enumerate(numbers) if number}
    assert list(paid.values()) == [1.0, -1.0, 1.0] and len(numbers) == len(ids)
    for place, step in zip(paid, steps, strict=True):
        # With this token the step is complete, and not before it.
        assert step in tokenizer.decode(ids[: place + 1]) and step not in tokenizer.decode(ids[:place])


def test_without_marks_all_that_is_said_is_steps(tokenizer):
    text = "1 + 1 is 2\n2 + 2 is 4<|end|>"
    ids = tokenizer(text)["input_ids"]
    reward = step_rewards(is_right, tokenizer)
    (numbers,) = reward(["q"], [text], completion_ids=[ids])
    assert sum(numbers) == 2 and numbers[-2] == 1
    # As a reward per token.
    assert checked_rewards(reward, ["q"], [text], completion_ids=[ids]) == [numbers]
    with pytest.raises(InputError, match="matches an empty text"):
        step_rewards(is_right, tokenizer, step_end=r"\s*")


def test_all_thoughts_have_steps_and_what_tools_say_has_none(tokenizer):
    turns = [
        "<think>1 + 1 is 2.</think>Wait.",
        "<think>9 + 9 is 1. 5 + 5 is 1.</think>",
        "<think>2 + 2 is 5</think>So 5.",
    ]
    parts = [tokenizer(text)["input_ids"] for text in turns]
    ids = [token for part in parts for token in part]
    mask = [int(place != 1) for place, part in enumerate(parts) for _ in part]
    seen = []

    def check(step, earlier, **columns):
        seen.append((step, earlier))
        return is_right(step, earlier)

    reward = step_rewards(check, tokenizer)
    (numbers,) = reward(["q"], ["c"], completion_ids=[ids], action_mask=[mask])
    assert seen == [("1 + 1 is 2.", []), ("2 + 2 is 5", ["1 + 1 is 2."])]
    assert [number for number in numbers if number] == [1.0, -1.0] and len(numbers) == len(ids)
    assert all(mask[place] for place, number in enumerate(numbers) if number)
    # Without tools a turn may think twice.
    (numbers,) = reward(["q"], ["c"], completion_ids=[[*parts[0], *parts[2]]])
    assert [number for number in numbers if number] == [1.0, -1.0]


def test_a_row_without_an_answer_earns_nothing():
    assert exact_match(["q"] * 2, ["None", "42"], answer=[None, "42"]) == [0, 1]


def test_a_formula_is_accepted_in_a_box_or_outside():
    golds = [r"\left( 3, \frac{\pi}{2} \right)", r"So \boxed{( 3, \frac{\pi}{2} )}"]
    assert exact_match(["q"] * 2, [r"It is $\boxed{(3,\frac{\pi}{2})}$."] * 2, answer=golds) == [1, 1]
    assert exact_match(["q"] * 2, [r"It is $\boxed{(4,\frac{\pi}{2})}$."] * 2, answer=golds) == [0, 0]


def test_thoughts_count_for_no_gold_reward_and_are_shown_to_readers():
    columns = {"gold_kind": ["answer"], "gold_accepted": [["It is red."]], "gold_needed": [["red"]]}
    columns["gold_forbidden"] = [["blue"]]
    for said in ("<think>blue or red</think>It is red.", message("It is red.", "blue or red")):
        assert gold_reward(["q"], [said], **columns) == [1.0]
        assert transcript(said) == "<think>blue or red</think>It is red."
    assert gold_reward(["q"], ["<think>It is red.</think>It is blue."], **columns) == [0.0]
