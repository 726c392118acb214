"""Fill-in-the-middle and masking: what they promise of every document and of many."""

import re

import pytest
import torch

from hfllm.data.formats import infilling_prompt
from hfllm.data.packing import (
    INFILLING_TOKENS,
    check_infilling_tokens,
    fill_in_the_middle,
    masked_tokens,
    seeded_generator,
)
from hfllm.data.tokenizer import train_tokenizer
from hfllm.errors import InputError

PSM = re.compile(r"<PRE> (?!<SUF>)(?P<prefix>.*) <SUF>(?P<suffix>.*) <MID>(?P<middle>.*) <EOT>", re.DOTALL)
SPM = re.compile(r"<PRE> <SUF>(?P<suffix>.*) <MID> (?P<rest>.*) <EOT>", re.DOTALL)
TEXT = "def f(x):\n    # naïve 🦉\n    return x + 1\n"


def test_no_character_is_lost_in_either_order():
    orders = set()
    for index in range(300):
        written = fill_in_the_middle(TEXT, index, rate=1.0)
        if match := SPM.fullmatch(written):
            assert match["rest"] + match["suffix"] == TEXT
        else:
            match = PSM.fullmatch(written)
            assert match["prefix"] + match["middle"] + match["suffix"] == TEXT
            # What the model is asked at inference is what it was trained on, up to the middle.
            assert written == infilling_prompt(match["prefix"], match["suffix"]) + match["middle"] + " <EOT>"
        orders.add(match.re)
    assert orders == {PSM, SPM}


def test_the_suffix_first_form_is_the_prompts_too():
    for index in range(50):
        written = fill_in_the_middle(TEXT, index, rate=1.0, spm_rate=1.0)
        match = SPM.fullmatch(written)
        prompts = [
            infilling_prompt(match["rest"][:cut], match["suffix"], suffix_first=True)
            for cut in range(len(match["rest"]) + 1)
        ]
        assert all(written.startswith(prompt) for prompt in prompts)


def test_rates_and_cuts_are_as_asked():
    text = "abcdefghij" * 10
    written = [fill_in_the_middle(text, index, seed=5) for index in range(4000)]
    changed = [each for each in written if each != text]
    assert len(changed) / 4000 == pytest.approx(0.9, abs=0.02)
    assert sum(bool(SPM.fullmatch(each)) for each in changed) / len(changed) == pytest.approx(0.5, abs=0.03)
    middles = [len(PSM.fullmatch(each)["middle"]) for each in changed if PSM.fullmatch(each)]
    # Two uniform points of [0, 100] are a third of it apart on average, and (1/18) ** 0.5 of it around that.
    assert sum(middles) / len(middles) == pytest.approx(100 / 3, abs=2)
    assert not any(fill_in_the_middle(text, index, rate=0.0) != text for index in range(100))


def test_the_form_depends_on_seed_and_index_alone():
    first = [fill_in_the_middle(TEXT, index) for index in range(20)]
    assert [fill_in_the_middle(TEXT, index) for index in reversed(range(20))] == first[::-1]
    assert [fill_in_the_middle(TEXT, index, seed=1) for index in range(20)] != first


@pytest.mark.parametrize("text", ["", "a <MID> b"])
def test_what_could_not_be_read_back_stays(text):
    assert fill_in_the_middle(text, 0, rate=1.0) == text


@pytest.mark.parametrize("rates", [{"rate": 1.5}, {"spm_rate": -0.1}])
def test_a_rate_is_a_probability(rates):
    with pytest.raises(InputError, match="expected a probability"):
        fill_in_the_middle(TEXT, 0, **rates)


def test_a_tokenizer_without_the_tokens_is_refused_with_the_remedy():
    tokenizer = train_tokenizer([TEXT], vocab_size=300)
    with pytest.raises(InputError, match="no token for <PRE>, <SUF>, <MID>, <EOT>"):
        check_infilling_tokens(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": list(INFILLING_TOKENS)}, replace_extra_special_tokens=False)
    check_infilling_tokens(tokenizer)
    written = fill_in_the_middle(TEXT, 0, rate=1.0)
    ids = tokenizer(written)["input_ids"]
    assert [ids.count(tokenizer.convert_tokens_to_ids(token)) for token in INFILLING_TOKENS] == [1] * 4
    assert tokenizer.decode(ids) == written


VOCABULARY, PAD, MASK = 50, 0, 1


def batch(rows=64, length=128):
    ids = torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    ids[:, length // 2 :] = PAD
    return ids


def test_masking_has_berts_shares_and_spares_special_tokens():
    ids = torch.cat([batch() for _ in range(20)])
    masked, labels = masked_tokens(ids, {PAD}, MASK, VOCABULARY, seeded_generator(0, 0))
    chosen = labels != -100
    ordinary = ids != PAD
    assert not (chosen & ~ordinary).any() and torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(masked[~chosen], ids[~chosen])
    assert chosen.sum() / ordinary.sum() == pytest.approx(0.15, abs=0.005)
    assert (masked[chosen] == MASK).float().mean() == pytest.approx(0.8, abs=0.02)
    # One random token in 48 is the one that was there.
    assert (masked[chosen] == ids[chosen]).float().mean() == pytest.approx(0.1 + 0.1 / 48, abs=0.015)
    assert not (masked[chosen] == PAD).any()


def test_masking_depends_on_seed_and_index_alone():
    ids = batch()
    before = ids.clone()
    first, again, other = (
        masked_tokens(ids, {PAD}, MASK, VOCABULARY, seeded_generator(7, index))[0] for index in (3, 3, 4)
    )
    assert torch.equal(ids, before)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_every_row_with_an_ordinary_token_has_something_to_predict():
    ids = torch.tensor([[PAD, 5, PAD], [PAD, PAD, PAD], [7, 8, MASK]])
    for index in range(50):
        _, labels = masked_tokens(ids, {PAD}, MASK, VOCABULARY, seeded_generator(0, index))
        assert labels[0].tolist() == [-100, 5, -100]
        assert (labels[1] == -100).all() and (labels[2, :2] != -100).any() and labels[2, 2] == -100


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"probability": 2.0}, "expected a probability"),
        ({"vocab_size": 10}, "vocab_size=10"),
        ({"mask_token_id": 99}, "vocab_size=50"),
        ({"special_ids": range(50)}, "nothing is left"),
    ],
)
def test_masking_refuses_what_makes_no_sense(change, complaint):
    values = {"special_ids": {PAD}, "mask_token_id": MASK, "vocab_size": VOCABULARY}
    with pytest.raises(InputError, match=complaint):
        masked_tokens(batch(2, 8), **{**values, **change}, generator=seeded_generator(0, 0))
