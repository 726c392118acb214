"""Loss by position and needles: against plain computations, and models that find everything or nothing."""

import math
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from hfllm.data.packing import long_rows
from hfllm.data.world.tasks import REPEATED, TOLD, filler_documents, long_documents
from hfllm.data.world.vocabulary import COLOURS, PEOPLE, THINGS
from hfllm.errors import InputError
from hfllm.evaluation.long_texts import find_needles, first_tokens
from hfllm.generation.scoring import bits_by_range, edges_of, nats_by_position


def test_each_token_is_predicted_once_from_what_a_window_holds(make_model):
    model = make_model()
    rows = torch.randint(3, 60, (3, 50)).tolist()
    whole, cut = nats_by_position(model, rows), nats_by_position(model, rows, window=16)
    for place in (1, 15, 16, 17, 23, 24, 40, 49):
        begin = 0 if place < 16 else min(8 * ((place - 16) // 8 + 1), 50 - 16)
        for first, found in ((0, whole), (begin, cut)):
            with torch.no_grad():
                logits = model(torch.tensor(rows)[:, first:place], use_cache=False).logits[:, -1]
            expected = torch.nn.functional.cross_entropy(logits, torch.tensor(rows)[:, place], reduction="none")
            torch.testing.assert_close(found[:, place - 1], expected, atol=1e-4, rtol=1e-4)


def test_bits_per_byte_of_a_range(tokenizer):
    rows = [tokenizer("the fox is red and the owl is grey", add_special_tokens=False)["input_ids"]]
    nats = torch.full((1, len(rows[0]) - 1), math.log(2))
    size = len(tokenizer.decode(rows[0][2:6]).encode())
    assert bits_by_range(nats, rows, tokenizer, 2, 6) == [pytest.approx(4 / size)]
    assert edges_of(64, 256) == [1, 16, 32, 64, 128, 256]
    assert edges_of(100, 300) == [1, 25, 50, 100, 200, 300]


class Reader:
    """A model that answers with the color that follows a phrase, or that of the last `reach` tokens."""

    device, training = torch.device("cpu"), False

    def __init__(self, tokenizer, reach):
        self.tokenizer, self.reach = tokenizer, reach
        self.shared, self.tokens = first_tokens(tokenizer)

    def eval(self):
        return self

    def train(self, mode):
        return self

    def __call__(self, input_ids, use_cache, logits_to_keep):
        logits = torch.zeros(len(input_ids), 1, len(self.tokenizer))
        for row, ids in enumerate(input_ids):
            ids = ids[: len(ids) - len(self.shared)]
            text = self.tokenizer.decode(ids[-self.reach :], skip_special_tokens=True)
            *_, thing, _, person, _ = text.split()
            said = [colour for colour in self.tokens if TOLD.format(person=person, colour=colour, thing=thing) in text]
            logits[row, 0, self.tokens[said[0] if said else next(iter(self.tokens))]] = 1.0
        return SimpleNamespace(logits=logits)


def test_needles_are_found_by_those_who_reach_them(tokenizer, world):
    filler, _ = long_rows(filler_documents(world, 400, 1), tokenizer, 300, 4, 0)
    all_seen = find_needles(Reader(tokenizer, 1000), tokenizer, filler, [60, 300], cases=6)
    assert all_seen.share() == [1.0] * 60 and all_seen.chance == 1 / len(first_tokens(tokenizer)[1])
    near = find_needles(Reader(tokenizer, 80), tokenizer, filler, [60, 300], cases=6)
    assert sum(near.share(60)) == 30
    shares = list(near.rows()[1].values())
    assert shares[0] == 300 and shares[-1] == 1.0 and sum(shares[1:5]) < 2.4
    assert near.heatmap("t").values[1][-1] == 1.0
    with pytest.raises(InputError, match="needs more than"):
        find_needles(Reader(tokenizer, 80), tokenizer, filler, [8], cases=1)


@pytest.fixture
def by_bytes():
    """A tokenizer of single bytes, without a token that begins texts."""
    model = models.BPE(vocab={letter: place for place, letter in enumerate(ByteLevel.alphabet())}, merges=[])
    plain = Tokenizer(model)
    plain.pre_tokenizer, plain.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>")


def test_needles_by_bytes(by_bytes, world):
    filler, _ = long_rows(filler_documents(world, 400, 1), by_bytes, 300, 4, 0)
    # Colors begin with a space, and blue, black and brown with the same letter.
    shared, tokens = first_tokens(by_bytes)
    assert by_bytes.decode(shared) == " " and list(tokens) == ["red", "blue", "green", "white"]
    assert all(len(row) == 300 for row in filler)
    assert find_needles(Reader(by_bytes, 1000), by_bytes, filler, [64, 300], cases=4).share() == [1.0] * 40


def test_windows_begin_as_the_text_does(make_model):
    model, rows = make_model(), torch.randint(3, 60, (2, 50))
    found = nats_by_position(model, rows.tolist(), window=16, kept=1)
    for place, begin in ((15, 0), (17, 8), (49, 34)):
        seen = torch.cat([rows[:, :1], rows[:, begin + 1 : place]], dim=1)
        with torch.no_grad():
            logits = model(seen, use_cache=False).logits[:, -1]
        expected = torch.nn.functional.cross_entropy(logits, rows[:, place], reduction="none")
        torch.testing.assert_close(found[:, place - 1], expected, atol=1e-4, rtol=1e-4)


def test_rows_are_as_long_as_asked(tokenizer):
    long, short = "the fox is red " * 60, "the owl is grey"
    count = len(tokenizer(long, add_special_tokens=False)["input_ids"])
    rows, are_joined = long_rows([long, short], tokenizer, 50, 3, 0)
    assert not are_joined and len(rows) == 3
    # As documents begin in pretraining.
    assert all(len(row) == 50 and row[0] == tokenizer.bos_token_id != row[1] for row in rows)
    rows, are_joined = long_rows([short] * 40, tokenizer, 50, 2, 0)
    assert are_joined and len(rows) == 2 and rows[0].count(tokenizer.eos_token_id) > 3
    with pytest.raises(InputError, match=f"2 texts have .* tokens together.* needs {count * 2}"):
        long_rows([long, short], tokenizer, count * 2, 1, 0)


def test_what_is_told_comes_back(world):
    texts = list(long_documents(world, 5, 200, 3))
    assert texts == list(long_documents(world, 5, 200, 3)) and len(set(texts)) == 5
    for text in texts:
        assert 150 < len(text.split()) < 300
        pairs = [
            (person, thing, colour)
            for person in PEOPLE
            for thing in THINGS
            for colour in COLOURS
            if TOLD.format(person=person, thing=thing, colour=colour) in text
        ]
        assert len(pairs) == 5
        for person, thing, colour in pairs:
            said = {"person": person, "thing": thing, "colour": colour}
            assert text.index(TOLD.format(**said)) < text.index(REPEATED.format(**said))
    assert not any(" has a " in text for text in filler_documents(world, 200, 0))
