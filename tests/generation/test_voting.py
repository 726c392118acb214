"""The answer that is kept of several."""

import pytest

from hfllm.errors import InputError
from hfllm.generation import responses as responses_module
from hfllm.generation.responses import best_answers, majority, majority_answers


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["1", "2", "2"], ("2", 2 / 3)),
        (["1", "2"], ("1", 1 / 2)),
        (["", "", "3"], ("3", 1 / 3)),
        (["", ""], ("", 0.0)),
    ],
)
def test_the_most_frequent_answer_wins(answers, expected):
    assert majority(answers) == expected


SAID = ["<think>6*7=41</think>It is 41.", "<think>40+2</think>So 42.", "<think>7*6</think>#### 42.0"]


@pytest.fixture
def sampled(monkeypatch):
    asked = {}

    def sample(model, tokenizer, prompts, max_new_tokens, num_return_sequences, **sampling):
        asked.update(sampling, n=num_return_sequences, longest=max_new_tokens)
        return [SAID for _ in prompts]

    monkeypatch.setattr(responses_module, "sample_responses", sample)
    return asked


def test_thoughts_differ_and_answers_agree(sampled):
    (kept,) = majority_answers(None, None, ["6 times 7?"], 3, 50, temperature=0.7)
    assert (kept.answer, kept.response, kept.share, kept.score) == ("42", SAID[1], 2 / 3, None)
    assert sampled == {"n": 3, "longest": 50, "temperature": 0.7}


@pytest.mark.parametrize("is_chat", [False, True])
def test_the_best_by_a_reward_is_kept(sampled, is_chat):
    seen = []

    def reward(prompts, completions):
        seen.append((prompts, completions))
        return [0.1, 0.2, 0.9]

    prompt = [{"role": "user", "content": "6 times 7?"}] if is_chat else "6 times 7?"
    (kept,) = best_answers(None, None, [prompt], 3, 50, reward)
    assert (kept.answer, kept.response, kept.share, kept.score) == ("42", SAID[2], 2 / 3, 0.9)
    assert seen == [([prompt] * 3, [[{"role": "assistant", "content": text}] for text in SAID] if is_chat else SAID)]


def test_a_reward_gives_each_response_a_score(sampled):
    with pytest.raises(InputError, match="the reward gave 2 scores for 3 responses; expected one for each"):
        best_answers(None, None, ["6 times 7?"], 3, 50, lambda prompts, completions: [1.0, 2.0])


def test_without_responses_there_is_no_answer():
    with pytest.raises(InputError, match="n must be at least 1, got 0"):
        majority_answers(None, None, ["6 times 7?"], 0, 50)


def test_a_model_answers(make_model, tokenizer):
    (kept,) = majority_answers(make_model(), tokenizer, ["The fox"], 4, 8, seed=3)
    (again,) = majority_answers(make_model(), tokenizer, ["The fox"], 4, 8, seed=3)
    assert kept == again and 0 <= kept.share <= 1
