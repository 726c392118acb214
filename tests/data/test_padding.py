"""Documents that are padded rather than packed: none is lost, and a batch has little to pad."""

import logging
import random

import pytest

from hfllm.data.packing import length_grouped, token_pieces
from hfllm.stages.pretrain.build import bytes_per_token, infilled
from hfllm.stages.pretrain.tokenizer import compression_by_size


def test_long_documents_are_cut_and_nothing_is_lost(tokenizer):
    texts = ["the old fox walks by the river " * 9, "", "a red hat"]
    documents = [[tokenizer.bos_token_id, *ids] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    pieces = token_pieces(texts, tokenizer, max_length=16)
    assert [token for piece in pieces for token in piece] == [token for ids in documents for token in ids]
    assert [len(piece) for piece in pieces] == [
        min(16, len(ids) - at) for ids in documents for at in range(0, len(ids), 16)
    ]
    assert max(map(len, pieces)) == 16 > len(documents[2])


def test_long_documents_are_cut_without_a_warning(tokenizer, caplog, monkeypatch):
    texts = ["the old fox walks by the river " * 99]
    # Texts too long for a row need no such tokens.
    monkeypatch.setattr("hfllm.stages.pretrain.build.check_infilling_tokens", lambda tokenizer: None)
    # transformers warns once per tokenizer, and its loggers do not propagate.
    monkeypatch.setattr(tokenizer, "deprecation_warnings", {})
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level("WARNING", "transformers")
    token_pieces(texts, tokenizer, max_length=16)
    list(infilled(texts, tokenizer, 16, seed=0))
    bytes_per_token(texts, tokenizer)
    compression_by_size(tokenizer, texts)
    assert caplog.text == ""
    tokenizer(texts)
    assert "longer than the specified maximum" in caplog.text


@pytest.mark.parametrize("as_text", [False, True])
def test_batches_hold_like_lengths_and_nothing_is_lost(as_text):
    rng = random.Random(0)
    sizes = [rng.choice((5, 6, 7, 30, 31, 60)) for _ in range(400)]
    pieces = [{"text": f"{number:03}" + "x" * size} for number, size in enumerate(sizes)]
    measure = {"length": lambda piece: len(piece["text"])} if as_text else {}
    pieces = pieces if as_text else [list(piece["text"]) for piece in pieces]

    def padded(order):
        length = measure.get("length", len)
        return sum(8 * max(map(length, order[at : at + 8])) for at in range(0, len(order), 8))

    order = length_grouped(pieces, 8, seed=1, **measure)
    assert sorted(map(str, order)) == sorted(map(str, pieces))
    assert order == length_grouped(pieces, 8, seed=1, **measure) != length_grouped(pieces, 8, seed=2, **measure)
    content = sum(map(measure.get("length", len), pieces))
    # Nearly no padding, where batches at random are padded to more than twice their content.
    assert padded(order) < 1.1 * content < 2 * content < padded(pieces)
    # Short and long batches alternate: no half of the order holds all that is long.
    firsts = [measure.get("length", len)(order[at]) for at in range(0, len(order), 8)]
    assert min(firsts[:25]) < 12 and max(firsts[:25]) > 60 and min(firsts[25:]) < 12 and max(firsts[25:]) > 60
