"""Sampling and judging responses."""

import pytest
import torch

from hfllm.data.tokenizer import tokenize_prompts
from hfllm.evaluation.responses import gold_by_group, judge_tasks, mean_gold, right_share
from hfllm.generation.responses import sample_responses


def test_batches_and_padding_do_not_matter_to_greedy_responses(make_model, tokenizer):
    model = make_model()
    prompts = ["Say red.", "What is 1 plus 2? Please tell me.", "Go"]
    together = sample_responses(model, tokenizer, prompts, 6, do_sample=False)
    alone = [sample_responses(model, tokenizer, [prompt], 6, do_sample=False)[0] for prompt in prompts]
    assert together == alone


def test_fast_responses_are_those_of_generate_in_the_order_of_the_prompts(make_model, tokenizer):
    model = make_model()
    prompts = ["What is 1 plus 2? Please tell me.", "Go", "Say red.", "Is the fox red or blue?"]
    plain = sample_responses(model, tokenizer, prompts, 6, do_sample=False)
    assert sample_responses(model, tokenizer, prompts, 6, do_sample=False, fast=True, batch_size=2) == plain
    assert len({responses[0] for responses in plain}) > 1
    sampled = sample_responses(model, tokenizer, prompts, 6, num_return_sequences=3, seed=1, fast=True)
    assert sampled == sample_responses(model, tokenizer, prompts, 6, num_return_sequences=3, seed=1, fast=True)
    assert [len(responses) for responses in sampled] == [3] * 4
    assert sample_responses(model, tokenizer, [], 6, fast=True) == []
    # Options that the fast way does not know are the model's own: it is asked the plain way.
    model.generation_config.repetition_penalty = 5.0
    bent = sample_responses(model, tokenizer, prompts, 6, do_sample=False)
    assert sample_responses(model, tokenizer, prompts, 6, do_sample=False, fast=True) == bent != plain


def test_sampling_is_seeded_and_leaves_the_random_state(make_model, tokenizer):
    model = make_model()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = sample_responses(model, tokenizer, ["Go"] * 4, 8, num_return_sequences=2, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert first == sample_responses(model, tokenizer, ["Go"] * 4, 8, num_return_sequences=2, seed=3)
    assert first != sample_responses(model, tokenizer, ["Go"] * 4, 8, num_return_sequences=2, seed=4)
    assert [len(responses) for responses in first] == [2] * 4


@pytest.mark.parametrize("fast", [False, True])
def test_a_low_temperature_is_greedy_in_the_limit_and_a_high_one_is_not(make_model, tokenizer, fast):
    model, prompts = make_model(), ["Go", "Say red.", "Is the fox red or blue?"]
    greedy = sample_responses(model, tokenizer, prompts, 6, do_sample=False)
    assert sample_responses(model, tokenizer, prompts, 6, temperature=1e-4, fast=fast) == greedy
    assert sample_responses(model, tokenizer, prompts, 6, temperature=2.0, fast=fast) != greedy


def test_what_was_cut_off_may_be_left_out(make_model, tokenizer):
    model = make_model()
    prompt = torch.tensor(tokenize_prompts(["Go"], tokenizer))
    said = model.generate(prompt, do_sample=False, max_new_tokens=6)[0, prompt.shape[1] :].tolist()
    model.generation_config.eos_token_id = [said[-1]]
    length = said.index(said[-1]) + 1
    settings = {"do_sample": False, "only_ended": True}
    expected = tokenizer.decode(said[:length], skip_special_tokens=True)
    assert sample_responses(model, tokenizer, ["Go"], length, **settings) == [[expected]]
    assert sample_responses(model, tokenizer, ["Go"], length - 1, **settings) == [[]]
    assert sample_responses(model, tokenizer, ["Go"], length - 1, do_sample=False) != [[]]


def test_judging_gives_each_task_its_gold(make_model, tokenizer, world):
    tasks = world.evaluation_tasks(24)
    rows = judge_tasks(make_model(), tokenizer, tasks, 4, do_sample=True)
    assert [row["prompt"] for row in rows] == [task.question for task in tasks]
    groups = gold_by_group(rows)
    assert groups["all"] == mean_gold(rows)
    assert set(groups) >= {"held-out instances", "held-out phrasings", "fact", "harm"}


def test_shares():
    rows = [{"gold": value} for value in (1.0, 0.5, 0.0, -1.0)]
    assert right_share(rows) == 0.5
    assert mean_gold(rows) == 0.125
    assert mean_gold([]) == right_share([]) == 0
