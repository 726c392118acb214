"""Packing loses nothing, wastes next to nothing, and changes no document's loss."""

import random

import pytest
import torch
from datasets import Dataset
from families import FAMILIES

from hfllm.data.packing import IGNORE, batch_of, pack, pieces_of, token_ids
from hfllm.errors import InputError

LENGTH = 64


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(0)
    words = ["red", "owl", "the", "fox", "lives", "here", "and", "there", "blue", "hat"]
    return [" ".join(rng.choices(words, k=rng.choice((1, 3, 8, 20, 60, 150)))) for _ in range(300)]


@pytest.fixture
def rows(texts, tokenizer):
    return pack(texts, tokenizer, LENGTH)


def pieces_in(rows):
    for row in rows:
        start = 0
        for length in row["seq_lengths"]:
            yield tuple(row["input_ids"][start : start + length])
            start += length
        assert start == len(row["input_ids"]) <= LENGTH


def test_every_token_is_in_one_row_once(texts, tokenizer, rows):
    documents = token_ids(texts, tokenizer)
    expected = [tuple(ids[at : at + LENGTH]) for ids in documents for at in range(0, len(ids), LENGTH)]
    assert sorted(pieces_in(rows)) == sorted(expected)


def test_rows_are_full(rows):
    filled = sum(len(row["input_ids"]) for row in rows)
    assert filled / (len(rows) * LENGTH) > 0.98


def test_windows_do_not_change_what_is_packed(texts, tokenizer, rows, monkeypatch):
    monkeypatch.setattr("hfllm.data.packing.MOST_DOCUMENTS", 50)
    assert sorted(pieces_in(pack(iter(texts), tokenizer, LENGTH))) == sorted(pieces_in(rows))


def test_a_window_is_packed_as_a_whole(tokenizer):
    # A thousand halves of a row and then their other halves: full rows only if both are seen together.
    long, short = ["the " * 40] * 1000, ["a"] * 1000
    lengths = [len(ids) for ids in token_ids([long[0], short[0]], tokenizer)]
    rows = pack([*long, *short], tokenizer, sum(lengths))
    assert len(rows) == 1000 and {tuple(row) for row in rows["seq_lengths"]} == {tuple(lengths)}


def test_positions_and_labels_restart_with_each_piece():
    row = {"input_ids": [5, 6, 7, 8, 9], "seq_lengths": [3, 2]}
    batch = batch_of([row], 8, pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7, IGNORE, 9, IGNORE, IGNORE, IGNORE]]
    cut = batch_of([row], 8, pad_token_id=0, cut=2)
    assert cut["input_ids"].tolist() == [[5, 6, 7, 8], [9, 0, 0, 0]]
    assert cut["position_ids"].tolist() == [[0, 1, 2, 0], [0, 0, 1, 2]]
    assert cut["labels"].tolist() == [[IGNORE, 6, 7, IGNORE], [IGNORE] * 4]
    long = batch_of([{"input_ids": list(range(1, 9)), "seq_lengths": [8]}], 8, pad_token_id=0, cut=2)
    assert long["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "palm"])
def test_the_loss_is_that_of_the_documents_one_by_one(make_model, tokenizer, texts, attention, family):
    model = make_model(attn_implementation=attention, **FAMILIES[family])
    short = [text for text in texts if len(text) < 100][:40]
    rows = pack(short, tokenizer, LENGTH)
    batch = batch_of(list(rows), LENGTH, tokenizer.pad_token_id)
    with torch.no_grad():
        packed = model(**batch, use_cache=False, num_items_in_batch=1).loss
        total, count = 0.0, 0
        for ids in token_ids(short, tokenizer):
            if len(ids) > 1:
                one = torch.tensor([ids])
                total += model(input_ids=one, labels=one, num_items_in_batch=1).loss
                count += len(ids) - 1
    targets = (batch["labels"][:, 1:] != IGNORE).sum()
    assert targets == count
    torch.testing.assert_close(packed / count, total / count, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cut", [1, 2])
@pytest.mark.parametrize("most_tokens", [1, 100, 10_000])
def test_pieces_side_by_side_are_the_packed_batch(make_model, tokenizer, texts, rows, most_tokens, cut):
    # Best fit comes to the short pieces last: the first rows are one piece each.
    batch = batch_of(list(rows)[-20:], LENGTH, tokenizer.pad_token_id, cut)
    model = make_model()
    groups = list(pieces_of(batch, most_tokens, most_padding=8))
    with torch.no_grad():
        packed = model(**batch, use_cache=False, num_items_in_batch=1).loss
        apart = sum(model(**group, use_cache=False, num_items_in_batch=1).loss for group in groups)
    torch.testing.assert_close(apart, packed, rtol=1e-5, atol=0)
    targets = sorted(batch["labels"][:, 1:][batch["labels"][:, 1:] != IGNORE].tolist())
    together = torch.cat([group["labels"][:, 1:].flatten() for group in groups])
    assert sorted(together[together != IGNORE].tolist()) == targets
    for group in groups:
        lengths = (group["labels"] != IGNORE).sum(1)
        assert lengths.max() - lengths.min() < 8
        assert group["input_ids"].numel() <= most_tokens or len(group["input_ids"]) == 1


@pytest.mark.parametrize("most_tokens", [1, 90, 10_000])
@pytest.mark.parametrize("most_padding", [1, 2, 8, 64])
def test_a_group_is_as_large_as_tokens_and_padding_allow(most_padding, most_tokens):
    lengths = [2, 33, 40, 8, 64, 39, 16, 8, 32, 7, 63, 32, 9, 2, 56]
    tokens = iter(range(1, 1 + sum(lengths)))
    pieces = [[next(tokens) for _ in range(length)] for length in lengths]
    row = {"input_ids": [token for piece in pieces for token in piece], "seq_lengths": lengths}
    batch = batch_of([row], sum(lengths) + 5, pad_token_id=0)
    expected = []
    for length in sorted(lengths, reverse=True):
        longest, size = (expected[-1][0], len(expected[-1]) + 1) if expected else (0, 0)
        if expected and longest - length < most_padding and size * longest <= most_tokens:
            expected[-1].append(length)
        else:
            expected.append([length])
    groups = list(pieces_of(batch, most_tokens, most_padding))
    assert [((group["labels"] != IGNORE).sum(1) + 1).tolist() for group in groups] == expected
    found = [
        ids[: length + 1].tolist()
        for group in groups
        for ids, length in zip(group["input_ids"], (group["labels"] != IGNORE).sum(1).tolist(), strict=True)
    ]
    assert sorted(found) == sorted(pieces)


def test_native_models_take_packed_rows_too(tokenizer, texts):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.1, **settings)).eval()
    short = [text for text in texts if len(text) < 100][:20]
    batch = batch_of(list(pack(short, tokenizer, LENGTH)), LENGTH, tokenizer.pad_token_id)
    with torch.no_grad():
        packed = model(**batch, use_cache=False, num_items_in_batch=1).loss
        alone = sum(
            model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids]), num_items_in_batch=1).loss
            for ids in token_ids(short, tokenizer)
            if len(ids) > 1
        )
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=0)


def test_documents_of_one_token_are_no_help(tokenizer):
    with pytest.raises(InputError, match="no document has two tokens"):
        pack(["", ""], tokenizer, LENGTH)
    assert isinstance(pack(["", "a red hat"], tokenizer, LENGTH), Dataset)
