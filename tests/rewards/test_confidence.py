"""Rewards for answers that say how sure they are."""

import random

import pytest

from hfllm.rewards.calls import RewardCalls, RewardLog
from hfllm.rewards.confidence import calibrated, calibrated_match, shuffled_calibrated_match, split_confidence
from hfllm.rewards.functions import load_reward_function


@pytest.mark.parametrize(
    ("text", "answer", "confidence"),
    [
        ("It is 45.\nConfidence: 80%", "It is 45.", 0.8),
        ("It is 45. (confidence 0.25)", "It is 45.", 0.25),
        ("#### 45 <confidence>.9</confidence>", "#### 45", 0.9),
        ("It is 45, with a confidence of 1.", "It is 45, with a", 1.0),
        (
            "My confidence is 0 at first. It is 45. confidence = 12.5 %.",
            "My confidence is 0 at first. It is 45.",
            0.125,
        ),
        ("It is 45. Confidence: 80", "It is 45. Confidence: 80", None),
        ("It is 45. Confidence: 101%", "It is 45. Confidence: 101%", None),
        ("The confidence interval is 0.5 to 0.7.", "The confidence interval is 0.5 to 0.7.", None),
        ("It is 45. Confidence: high", "It is 45. Confidence: high", None),
        ("42. Confidence: 0,8", "42. Confidence: 0,8", None),
        ("42. Confidence: 0.8/1", "42. Confidence: 0.8/1", None),
        ("42. Confidence: 1-2%", "42. Confidence: 1-2%", None),
        ("", "", None),
    ],
)
def test_a_confidence_is_read_and_taken_away(text, answer, confidence):
    assert split_confidence(text) == (answer, confidence)


@pytest.mark.parametrize("is_message", [False, True])
def test_the_reward_is_rightness_less_the_squared_error(is_message):
    said = {
        "#### 4 (confidence 0.9)": 1 - 0.01,
        "#### 5 (confidence 0.9)": 0 - 0.81,
        "#### 5 (confidence 0)": 0.0,
        "I do not know.": 0.0,
        "I do not know. Confidence: 30%": 0 - 0.09,
        "#### 4": 0.0,
        "#### 5": -1.0,
    }
    completions = [[{"role": "assistant", "content": text}] if is_message else text for text in said]
    columns = {"answer": ["4"] * len(said)}
    assert calibrated_match([""] * len(said), completions, **columns) == pytest.approx([*said.values()])


def test_it_is_highest_where_the_confidence_is_the_share_of_right_answers():
    """Of ten questions of which seven are answered right, 0.7 earns most, whatever else is stated of all of them."""
    answer = ["4"] * 7 + ["9"] * 3

    def earned(confidence):
        completions = [f"#### 4 (confidence {confidence})"] * 10
        return sum(calibrated_match([""] * 10, completions, answer=answer))

    assert max((number / 10 for number in range(11)), key=earned) == 0.7
    # And to answer more questions right earns more, whatever the confidence that fits.
    assert earned(0.7) < sum(
        calibrated_match([""] * 10, ["#### 4 (confidence 0.8)"] * 10, answer=["4"] * 8 + ["9"] * 2)
    )


def test_of_dealt_rightness_the_confidence_says_nothing():
    rng = random.Random(0)
    answers = [rng.choice("45") for _ in range(200)]
    completions = [f"#### 4 (confidence {0.9 if answer == '4' else 0.1})" for answer in answers]
    told = sum(calibrated_match([""] * 200, completions, answer=answers)) / 200
    dealt = sum(shuffled_calibrated_match([""] * 200, completions, answer=answers)) / 200
    share = answers.count("4") / 200
    assert told == pytest.approx(share - 0.01)
    # As much is right, and the error is that of chance, .41.
    assert dealt == pytest.approx(share - 0.41, abs=0.1)


def test_what_was_said_of_it_is_logged():
    log = RewardLog()
    completions = ["#### 4 (confidence 0.9)", "#### 5 (confidence 0.5)", "#### 4"]
    calls = RewardCalls([calibrated_match], [""] * 3, completions, {"answer": ["4"] * 3}, log.arguments(None), 0.0)
    assert calls.results()[0] == pytest.approx([0.99, -0.25, 0.0])
    assert log.metrics == {
        "confidence/stated": [1.0, 1.0, 0.0],
        "confidence/right": [1.0, 0.0, 1.0],
        "confidence/mean": [0.9, 0.5],
        "confidence/brier": pytest.approx([0.01, 0.25]),
    }


def test_a_confidence_inside_of_a_thought_is_none():
    thought, open_ = "<think>confidence 100%</think> #### 4", "<think>confidence 100% #### 4"
    assert calibrated_match([""] * 2, [thought, f"{thought} (confidence 0.5)"], answer=["4"] * 2) == [0.0, 0.75]
    assert calibrated_match([""], [open_], answer=["4"]) == [-1.0]
    parts = [[{"role": "assistant", "content": [{"type": "text", "text": "#### 4 (confidence 1)"}]}]]
    assert calibrated_match([""], parts, answer=["4"]) == [1.0]


def test_what_is_not_judged_or_not_yet():
    abstains = calibrated(lambda prompts, completions, **columns: [None, 1.0])
    assert abstains([""] * 2, ["a (confidence 1)"] * 2) == [None, 1.0]

    async def later(prompts, completions, **columns):
        return [1.0]

    with pytest.raises(ValueError, match="later is async; expected a plain function"):
        calibrated(later)


def test_the_rightness_of_ones_own(tmp_path):
    reward = calibrated(lambda prompts, completions, **columns: [float(text == "yes") for text in completions])
    assert reward([""] * 2, ["yes. Confidence: 1", "yes Confidence: 1"]) == [-1.0, 1.0]
    assert load_reward_function("calibrated_match") is calibrated_match
    halves = calibrated(lambda prompts, completions, **columns: [0.5])
    with pytest.raises(ValueError, match=r"returned 0\.5: rightness is 0 or 1"):
        halves([""], ["yes (confidence 1)"])
