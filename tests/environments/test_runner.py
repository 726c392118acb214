"""A model answers with its tools after training, by the episodes of training."""

import re

import pytest
import torch
from test_stateful import ROWS, Counter

from hfllm.environments.runner import ToolRunner
from hfllm.environments.tools import calculator
from hfllm.errors import InputError

SUMS = [[{"role": "user", "content": f"What is {number} times {number}?"}] for number in range(3, 10)]


def call(name, arguments):
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call><|end|>'


@pytest.fixture
def make_runner(make_model, tool_tokenizer):
    """A runner whose model writes what a function makes of the text so far."""
    model = make_model(vocab_size=len(tool_tokenizer), max_position_embeddings=256)

    def make(say, tools=(calculator,), **options):
        def generate(input_ids, attention_mask, max_new_tokens, eos_token_id, **settings):
            texts = tool_tokenizer.batch_decode(
                [row[own.bool()] for row, own in zip(input_ids, attention_mask, strict=True)]
            )
            new = [tool_tokenizer(say(text))["input_ids"][:max_new_tokens] for text in texts]
            # Behind the end of a row stands anything.
            longest = max(map(len, new))
            rows = [row + [eos_token_id[0]] * bool(longest - len(row)) + [7] * (longest - len(row) - 1) for row in new]
            return torch.cat([input_ids, torch.tensor(rows)], dim=1)

        runner = ToolRunner(model, tool_tokenizer, tools, **{"response_length": 100, **options})
        if say is not None:
            runner.model = type("Writing", (), {"generate": staticmethod(generate), "device": model.device})()
            runner.model.config, runner.model.training = model.config, False
            runner.model.eval = runner.model.train = lambda *mode: runner.model
        return runner

    return make


def squaring(text):
    if "<|tool|>" in text:
        return f"It is {text.split('<|tool|>')[1].split('<|end|>')[0]}.<|end|>"
    return call("calculator", f'{{"expression": "{re.findall("[0-9]+", text)[-1]}**2"}}')


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_it_calls_reads_and_answers_in_the_order_of_the_prompts(make_runner, batch_size, monkeypatch):
    monkeypatch.setattr("hfllm.environments.runner.fast_option", lambda *arguments: {})
    episodes = make_runner(squaring, batch_size=batch_size)(SUMS)
    assert [episode.messages[-1]["content"] for episode in episodes] == [f"It is {n**2}." for n in range(3, 10)]
    assert all(
        [each["role"] for each in episode.messages] == ["assistant", "tool", "assistant"] for episode in episodes
    )
    assert all(episode.is_ended and episode.calls == 1 and not episode.failures for episode in episodes)


def test_environments_keep_their_rows(make_runner, monkeypatch):
    monkeypatch.setattr("hfllm.environments.runner.fast_option", lambda *arguments: {})

    def counting(text):
        if "<|tool|>" in text:
            return f"{text.split('<|tool|>')[1].split('<|end|>')[0]}<|end|>"
        return call("add", '{"number": 1}')

    # The second row's prompt is the shortest, and comes first where prompts are sorted.
    episodes = make_runner(counting, tools=(), environment_factory=Counter, batch_size=2)(ROWS)
    assert [episode.messages[-1]["content"] for episode in episodes] == ["11", "21", "31"]


def test_without_calls_it_says_what_generate_says(make_runner, tool_tokenizer):
    runner = make_runner(None, batch_size=3, response_length=12)
    prompts = [tool_tokenizer(f"Say {number} times.")["input_ids"] for number in range(7)]
    for episode, prompt in zip(runner.run(prompts), prompts, strict=True):
        (wanted,) = runner.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)[:, len(prompt) :]
        assert episode.response_ids == wanted.tolist()[: len(episode.response_ids)]
        assert len(episode.response_ids) == 12 or episode.is_ended


def test_samples_are_of_the_seed_and_leave_the_random_state(make_runner, tool_tokenizer):
    prompts = [tool_tokenizer("Say 12.")["input_ids"]] * 4
    runners = [make_runner(None, do_sample=True, seed=seed, response_length=9) for seed in (1, 1, 2)]
    before = torch.get_rng_state()
    one, other, third = (runner.run(prompts) for runner in runners)
    assert torch.equal(before, torch.get_rng_state())
    assert [each.response_ids for each in one] == [each.response_ids for each in other]
    assert [each.response_ids for each in one] != [each.response_ids for each in third]


def test_samples_of_equal_prompts_differ_in_other_batches_too(make_runner):
    runner = make_runner(None, do_sample=True, seed=1, response_length=9, batch_size=1)
    assert len({tuple(episode.response_ids) for episode in runner(SUMS[:1] * 4)}) == 4


def test_a_penalty_of_the_models_own_is_kept(make_runner, recwarn):
    runner = make_runner(None, response_length=6)
    runner.model.generation_config.repetition_penalty = 1.3
    (episode,) = runner(SUMS[:1])
    (prompt,) = runner.environment.prompt_ids([{"prompt": SUMS[0]}])
    (wanted,) = runner.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6)[:, len(prompt) :]
    assert episode.response_ids == wanted.tolist()[: len(episode.response_ids)]
    assert any("repetition_penalty=1.3" in str(each.message) for each in recwarn)


@pytest.mark.parametrize("prompts", [SUMS[0], ["What is 2?"], [[]], [{"text": "x"}], [["x"]]])
def test_a_prompt_that_is_no_conversation_is_named(make_runner, prompts):
    with pytest.raises(InputError, match=r"prompt 0 is .*; expected a list of messages"):
        make_runner(None)(prompts)


def test_what_cannot_be_is_refused(make_runner):
    with pytest.raises(InputError, match="no tools, and no environment_factory"):
        make_runner(None, tools=())
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        make_runner(None, batch_size=0)
    with pytest.raises(InputError, match="context of 256 has no room"):
        make_runner(None, response_length=250)(SUMS)
