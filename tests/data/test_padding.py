"""Documents that are padded rather than packed: none is lost, and a batch has little to pad."""

import random

from hfllm.data.padding import length_grouped, pieces_of


def test_long_documents_are_cut_and_nothing_is_lost(tokenizer):
    texts = ["the old fox walks by the river " * 9, "", "a red hat"]
    documents = [[tokenizer.bos_token_id, *ids] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    pieces = pieces_of(texts, tokenizer, max_length=16)
    assert [token for piece in pieces for token in piece] == [token for ids in documents for token in ids]
    assert [len(piece) for piece in pieces] == [
        min(16, len(ids) - at) for ids in documents for at in range(0, len(ids), 16)
    ]
    assert max(map(len, pieces)) == 16 > len(documents[2])


def test_batches_hold_pieces_of_like_length_in_an_order_of_the_seed():
    rng = random.Random(0)
    pieces = [[number] * rng.randint(1, 100) for number in range(320)]
    ordered = length_grouped(pieces, batch_size=8, seed=3, window=10)
    assert sorted(ordered) == sorted(pieces)
    assert ordered == length_grouped(pieces, 8, 3, 10) != length_grouped(pieces, 8, 4, 10)
    batches = [[len(piece) for piece in ordered[at : at + 8]] for at in range(0, 320, 8)]
    # The batches of each of the four windows lie one behind the other between 1 and 100.
    assert sum(max(lengths) - min(lengths) for lengths in batches) <= 4 * 99
    assert batches != sorted(batches) != batches[::-1]
