"""New tokens: ordinary or special, with rows that say what the model knew of their text."""

import copy

import pytest
import torch

from hfllm.models.loading.saved import add_tokens, check_vocabulary

NEW = ["<think>", "</think>", "<|tool|>"]


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_begin_as_the_mean_of_those_that_wrote_them(make_model, tokenizer, tied):
    tokenizer, model = copy.deepcopy(tokenizer), make_model(tie_word_embeddings=tied)
    rows, size = [table.weight.detach().clone() for table in tables(model)], len(tokenizer)
    pieces = [tokenizer(token)["input_ids"] for token in NEW]
    text = "The fox <b>is</b> red."
    before = tokenizer(text)["input_ids"]
    assert add_tokens(model, tokenizer, [*NEW, "<|end|>", NEW[0]]) == NEW
    assert len(tokenizer) == size + 3 == model.config.vocab_size
    check_vocabulary(model, tokenizer)
    for old, table in zip(rows, tables(model), strict=True):
        assert torch.equal(table.weight[:size], old)
        expected = torch.stack([old[parts].mean(0) for parts in pieces])
        torch.testing.assert_close(table.weight[size:], expected)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    # What rewards read: ordinary tokens stay, special ones vanish.
    ids = tokenizer("<think>a</think><|tool|>b")["input_ids"]
    assert len(ids) == 5 and tokenizer.decode(ids, skip_special_tokens=True) == "<think>a</think>b"
    assert tokenizer(text)["input_ids"] == before
    assert add_tokens(model, tokenizer, NEW) == [] and len(tokenizer) == size + 3


def tables(model):
    return model.get_input_embeddings(), model.get_output_embeddings()


def test_rows_that_are_there_already_are_used(make_model, tokenizer):
    tokenizer, model = copy.deepcopy(tokenizer), make_model(vocab_size=len(tokenizer) + 8)
    add_tokens(model, tokenizer, NEW[:1])
    assert model.config.vocab_size == len(tokenizer) + 7
    assert torch.isfinite(model(torch.tensor([tokenizer("<think>a")["input_ids"]])).logits).all()
