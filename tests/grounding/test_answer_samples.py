"""Answers with log-probabilities: the same for any batch, right in any precision, those of the model itself."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from hfllm.errors import InputError
from hfllm.generation.scoring import ScoredAnswer, score_answers
from hfllm.grounding.uncertainty import (
    Answered,
    answer_with_samples,
    ensemble_disagreement,
    ensemble_logprobs,
    sample_with_scores,
    sampling_cost,
    uncertainties,
)

PROMPTS = ["The fox", "What is 2 plus 3?", "Go", "Which animal is the largest of all here?"]
CHATS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


def flat(lists):
    return [each for listed in lists for each in listed]


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [PROMPTS, CHATS], ids=["text", "chat"])
def test_any_batch_size_gives_the_same_answers(make_model, tokenizer, prompts):
    model = make_model()
    state = torch.get_rng_state()
    found = [sample_with_scores(model, tokenizer, prompts, 3, 8, seed=5, batch_size=size) for size in (1, 5, 64)]
    assert torch.equal(torch.get_rng_state(), state)
    for other in found[1:]:
        for one, two in zip(flat(found[0]), flat(other), strict=True):
            assert (one.text, one.token_ids, one.has_ended) == (two.text, two.token_ids, two.has_ended)
            assert one.token_logprobs == pytest.approx(two.token_logprobs, abs=2e-5)
    assert len({each.text for each in found[0][0]}) == 3
    assert sample_with_scores(model, tokenizer, prompts, 3, 8, seed=6) != found[2]


def expected_logprobs(model, tokenizer, prompt, answer):
    """One row at a time, without padding, cache or any of our passes."""
    if isinstance(prompt, str):
        before = tokenizer(prompt)["input_ids"]
    else:
        before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = torch.tensor([[*before, *answer.token_ids]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].float().log_softmax(-1)
    return [float(logits[len(before) + place - 1, token]) for place, token in enumerate(answer.token_ids)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
def test_log_probabilities_are_the_models_own(make_model, tokenizer, dtype, tolerance):
    model = make_model().to(dtype)
    # What a model's generation config asks for does not count.
    model.generation_config.repetition_penalty, model.generation_config.top_k = 3.0, 2
    config = model.generation_config
    answers = sample_with_scores(model, tokenizer, CHATS, 2, 6, temperature=0.7)
    assert model.generation_config is config
    flat = [(prompt, answer) for prompt, said in zip(CHATS, answers, strict=True) for answer in said]
    for prompt, answer in flat:
        expected = expected_logprobs(model, tokenizer, prompt, answer)
        assert answer.token_logprobs == pytest.approx(expected, abs=tolerance)
    scored = score_answers(model, tokenizer, [prompt for prompt, _ in flat], [answer for _, answer in flat], 3)
    for (_, answer), again in zip(flat, scored, strict=True):
        assert again.token_logprobs == pytest.approx(answer.token_logprobs, abs=tolerance)
        assert (again.text, again.token_ids) == (answer.text, answer.token_ids)


def test_greedy_answers_are_those_of_generate(make_model, tokenizer):
    model = make_model(seed=3)
    (answer,) = sample_with_scores(model, tokenizer, PROMPTS[:1], 1, 10, do_sample=False)[0]
    ids = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
    output = model.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert answer.token_ids == tuple(output[0, ids.shape[1] :].tolist())
    (row,) = answer_with_samples(model, tokenizer, PROMPTS[:1], 4, 10)
    assert row.given == answer and len(row.samples) == 4
    assert all(np.isfinite(numbers).all() for numbers in uncertainties([row]).values())


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_from_the_models_distribution(make_model, tokenizer, temperature):
    model = make_model(seed=1)
    n = 3000
    (answers,) = sample_with_scores(model, tokenizer, ["Go"], n, 1, temperature=temperature, batch_size=1000)
    ids = torch.tensor([tokenizer("Go")["input_ids"]])
    with torch.no_grad():
        expected = (model(input_ids=ids).logits[0, -1] / temperature).softmax(-1).numpy()
    counts = Counter(answer.token_ids[0] for answer in answers)
    observed = np.array([counts[token] for token in range(len(expected))])
    # Pearson's statistic over tokens that are expected at least five times, the others together.
    often = expected * n >= 5
    kept, rest = np.append(expected[often], expected[~often].sum()), observed[~often].sum()
    statistic = ((np.append(observed[often], rest) - n * kept) ** 2 / (n * kept)).sum()
    freedom = len(kept) - 1
    assert freedom > 20 and abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


def test_an_answer_ends_with_its_end_token(make_model, tokenizer):
    model = make_model()
    with torch.no_grad():
        # All that the model writes is its end.
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.eos_token_id] = 1e3 * torch.randn(
            32, generator=torch.Generator().manual_seed(0)
        )
    answers = flat(sample_with_scores(model, tokenizer, PROMPTS, 8, 4))
    ended = [answer for answer in answers if answer.token_ids == (tokenizer.eos_token_id,)]
    assert ended and all(answer.text == "" and answer.has_ended for answer in ended)
    assert all(len(answer.token_logprobs) == len(answer.token_ids) <= 4 for answer in answers)
    assert all(answer.has_ended == (answer.token_ids[-1] == tokenizer.eos_token_id) for answer in answers)
    # Empty answers are measured as others are.
    (row,) = answer_with_samples(model, tokenizer, PROMPTS[:1], 3, 4)
    assert all(np.isfinite(numbers).all() for numbers in uncertainties([row]).values())


def test_an_adapter_is_scored_with_its_weights(make_model, tokenizer):
    import peft

    base = make_model()
    plain = sample_with_scores(base, tokenizer, PROMPTS[:2], 2, 5)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.train()
    answers = sample_with_scores(model, tokenizer, PROMPTS[:2], 2, 5)
    assert model.training and answers != plain
    scored = score_answers(model, tokenizer, [PROMPTS[0]] * 2, answers[0])
    model.eval()
    for answer, again in zip(answers[0], scored, strict=True):
        expected = expected_logprobs(model, tokenizer, PROMPTS[0], answer)
        assert answer.token_logprobs == pytest.approx(expected, abs=1e-4)
        assert again.token_logprobs == pytest.approx(expected, abs=1e-4)


def test_texts_are_scored_to_their_end_by_models_with_other_tokenizers(make_model, tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    from hfllm.data.tokenizer import train_tokenizer

    other = train_tokenizer(PROMPTS, vocab_size=280)
    other.chat_template = other.pad_token = None
    with pytest.raises(InputError, match="prompt 1 is a conversation, and the tokenizer has no chat template"):
        sample_with_scores(make_model(), other, CHATS, 2, 4)
    torch.manual_seed(0)
    # Learned positions, and no place of padding in them.
    config = GPT2Config(vocab_size=280, n_embd=16, n_layer=1, n_head=2, n_positions=64, initializer_range=0.3)
    models = [make_model(), GPT2LMHeadModel(config).eval()]
    texts = ["red", "It is blue."]
    table = ensemble_logprobs(models, [tokenizer, other], PROMPTS[:2], texts, batch_size=2)
    assert table.shape == (2, 2) and (ensemble_disagreement(table) > 0).all()
    for column, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=False)):
        ids = (*other(text)["input_ids"], other.eos_token_id)
        expected = expected_logprobs(models[1], other, prompt, ScoredAnswer(text, (), ids))
        assert table[1, column] == pytest.approx(sum(expected), abs=1e-4)
    answers = sample_with_scores(models[1], other, PROMPTS, 2, 4, batch_size=3)
    assert answers[3][1].token_logprobs == pytest.approx(
        expected_logprobs(models[1], other, PROMPTS[3], answers[3][1]), abs=1e-4
    )


def test_nothing_is_answered_for_no_prompts(make_model, tokenizer):
    assert sample_with_scores(make_model(), tokenizer, [], 3, 4) == []
    assert score_answers(make_model(), tokenizer, [], []) == []


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"do_sample": False}, "n must be 1 without do_sample, got 2"),
        ({"prompts": ["Go", ""]}, "prompt 2 has no token"),
        ({"prompts": ["Go", CHATS[0]]}, "prompt 2 is a list and the first is not"),
        ({"max_new_tokens": 256}, "leaves no room for 256 of an answer: the model's context has 256"),
    ],
)
def test_bad_arguments_are_one_line(make_model, tokenizer, options, complaint):
    arguments = {"prompts": ["Go"], "n": 2, "max_new_tokens": 4, **options}
    with pytest.raises(InputError, match=complaint) as error:
        sample_with_scores(make_model(), tokenizer, **arguments)
    assert "\n" not in str(error.value)


def test_models_that_cannot_be_scored_are_refused(make_model, tokenizer):
    broken = make_model()
    broken.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(InputError, match="logits are not finite"):
        sample_with_scores(broken, tokenizer, ["Go"], 2, 4)
    with pytest.raises(InputError, match="logits are not finite"):
        score_answers(broken, tokenizer, ["Go"], ["red"])
    with pytest.raises(InputError, match="embeddings for 300"):
        sample_with_scores(make_model(vocab_size=300), tokenizer, ["Go"], 2, 4)
    model = make_model()
    with pytest.raises(InputError, match="2 prompts and 1 answers"):
        score_answers(model, tokenizer, ["Go", "Go"], ["red"])
    with pytest.raises(InputError, match="answer 1 has no token"):
        score_answers(model, tokenizer, ["Go"], [ScoredAnswer("red", (-1.0,))])
    with pytest.raises(InputError, match=r"row 1 takes .* the model's context has 256"):
        score_answers(model, tokenizer, ["Go"], ["red " * 300])
    model.config.is_encoder_decoder = True
    with pytest.raises(InputError, match="expected a causal language model"):
        sample_with_scores(model, tokenizer, ["Go"], 2, 4)


def test_prompts_and_numbers_that_are_none_are_named(make_model, tokenizer):
    model = make_model()
    for prompts, message in (
        ("owl", "prompts must be a list, got the text 'owl'"),
        (["owl", None], "prompt 2 must be a text or a list of messages, got None"),
        ([[]], r"prompt 1 must be a text or a list of messages, got \[\]"),
        (["é \ud800"], "prompt 1 has half a character"),
    ):
        with pytest.raises(InputError, match=message):
            sample_with_scores(model, tokenizer, prompts, 1, 2)
    for numbers in ({"n": 2.5}, {"max_new_tokens": "2"}, {"batch_size": None}):
        with pytest.raises(InputError, match=f"{next(iter(numbers))} must be a whole number"):
            sample_with_scores(model, tokenizer, ["owl"], **{"n": 1, "max_new_tokens": 2, **numbers})
    with pytest.raises(InputError, match="temperature must be above 0, got 'x'"):
        sample_with_scores(model, tokenizer, ["owl"], 1, 2, temperature="x")
    with pytest.raises(InputError, match="the answers have no token"):
        sampling_cost([Answered("q", ScoredAnswer("", ()))])
    assert sample_with_scores(model, tokenizer, ["é owl"], 1, 2)
