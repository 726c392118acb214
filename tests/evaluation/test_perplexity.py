"""Every token of held-out text counts once, however it is cut and batched."""

import copy
import math

import numpy as np
import pytest
import torch

from hfllm.errors import InputError
from hfllm.evaluation.perplexity import TextLikelihood, _windows, perplexity_change, text_likelihood

TEXTS = [
    "The owl lives in a red house.",
    "Go.",
    "A fox, a hat and a very long walk through the blue forest. " * 4,
    "ü",
]
PAIRS = [
    (word, color) for word in ("owl", "fox", "deer", "bird") for color in ("red", "blue", "white", "long", "very")
]


def one_by_one(model, tokenizer, texts):
    nats = tokens = 0
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
        nats -= logits.log_softmax(-1).gather(1, torch.tensor(ids[1:]).unsqueeze(1)).sum().item()
        tokens += len(ids) - 1
    return nats, tokens


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_texts_that_fit_are_predicted_as_they_are(make_model, tokenizer, batch_tokens):
    model = make_model()
    fit = text_likelihood(model, tokenizer, TEXTS, max_length=256, batch_tokens=batch_tokens)
    nats, tokens = one_by_one(model, tokenizer, TEXTS)
    assert fit.nats == pytest.approx(nats, rel=1e-5) and fit.tokens == tokens
    assert fit.bytes == sum(len(text.encode()) for text in TEXTS) == sum(map(len, TEXTS)) + 1


@pytest.mark.parametrize(("max_length", "stride"), [(16, None), (16, 15), (10, 3), (2, 1)])
def test_each_token_of_a_long_text_counts_once(make_model, tokenizer, max_length, stride):
    fit = text_likelihood(make_model(), tokenizer, TEXTS, max_length, stride)
    windows = _windows(TEXTS, tokenizer, max_length, stride or max_length // 2)
    assert max(len(ids) for ids, _, _ in windows) == max_length
    assert fit.tokens == sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS)


def test_more_context_is_what_a_longer_window_gives(make_model, tokenizer):
    # A model that attends to two tokens at most sees no more in a long window than in a short one.
    model = make_model(sliding_window=2, num_hidden_layers=1)
    fits = [text_likelihood(model, tokenizer, TEXTS, max_length=length, stride=4) for length in (8, 256)]
    assert fits[0].nats == pytest.approx(fits[1].nats, rel=1e-5)


def test_a_fit_in_other_units():
    fit = TextLikelihood(nats=math.log(2) * 80, tokens=40, bytes=100)
    assert fit.bits_per_byte == pytest.approx(0.8)
    assert fit.perplexity == pytest.approx(4.0)


def test_no_text_is_no_fit(make_model, tokenizer):
    with pytest.raises(InputError, match="without a token to predict"):
        text_likelihood(make_model(), tokenizer, [""], 16)


def test_without_a_document_token_the_first_token_does_not_count(make_model, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = None
    fit, whole = (text_likelihood(make_model(), each, TEXTS, max_length=256) for each in (bare, tokenizer))
    assert fit.tokens == whole.tokens - len(TEXTS)
    first = [tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:1]) for text in TEXTS]
    assert fit.bytes == whole.bytes - sum(len(text.encode()) for text in first)


@pytest.mark.parametrize(("max_length", "stride"), [(16, 16), (16, 0), (1, None)])
def test_a_stride_is_a_part_of_a_window(make_model, tokenizer, max_length, stride):
    with pytest.raises(InputError, match=f"max_length={max_length}: expected at least 1"):
        text_likelihood(make_model(), tokenizer, TEXTS, max_length, stride)


def test_errors_are_over_texts(make_model, tokenizer):
    """By leaving out one text at a time (jackknife), which needs no formula."""
    texts = [f"The {word} lives in a {color} house." * (1 + place % 3) for place, (word, color) in enumerate(PAIRS)]
    fits = [text_likelihood(make_model(seed=seed), tokenizer, texts, max_length=256) for seed in (0, 1)]
    rows = [np.array(fit.rows, dtype=float) for fit in fits]
    assert [sum(column) for column in rows[0].T] == pytest.approx([fits[0].nats, fits[0].tokens, fits[0].bytes])

    def jackknife(statistic):
        left = [statistic(*(np.delete(each, place, 0) for each in rows)) for place in range(len(texts))]
        return np.sqrt((len(texts) - 1) * np.var(left))

    def perplexity(each):
        return np.exp(each[:, 0].sum() / each[:, 1].sum())

    metrics, change = fits[0].metrics(), perplexity_change(*fits)
    assert metrics["perplexity_n"] == metrics["bits_per_byte_n"] == change["perplexity_n"] == len(texts)
    assert metrics["perplexity_se"] == pytest.approx(jackknife(lambda one, _: perplexity(one)), rel=0.1)
    bits = jackknife(lambda one, _: one[:, 0].sum() / np.log(2) / one[:, 2].sum())
    assert metrics["bits_per_byte_se"] == pytest.approx(bits, rel=0.1)
    expected = jackknife(lambda one, other: perplexity(other) - perplexity(one))
    assert change["perplexity_change_se"] == pytest.approx(expected, rel=0.1)
    assert change["perplexity_change"] == pytest.approx(fits[1].perplexity - fits[0].perplexity)
