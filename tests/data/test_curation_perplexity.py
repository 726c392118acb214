"""The byte n-gram model against plain counting, and a threshold that drops what it says."""

import json
import math
import random
from collections import Counter, defaultdict

import pytest

pytest.importorskip("datatrove", reason="needs the extra 'data'")

from datatrove.data import Document

from hfllm.data.curation.options import CurationOptions
from hfllm.data.curation.perplexity import (
    ORDER,
    ByteNgramModel,
    CausalJudge,
    CorpusJudge,
    FitPerplexity,
    PerplexityFilter,
    Sample,
    _half,
)
from hfllm.data.sources import pydoc_documents


@pytest.fixture(scope="module")
def texts():
    found = [text for _, text in zip(range(2500), (text for _, text in pydoc_documents()), strict=False)]
    return [text for text in found if len(text) > 200][:400]


def bits_by_counting(corpus, text):
    """Interpolated Witten-Bell with dictionaries."""
    counts, followers = Counter(), defaultdict(set)
    for order in range(1, ORDER + 1):
        for end in range(order, len(corpus) + 1):
            gram = corpus[end - order : end]
            counts[gram] += 1
            followers[order, gram[:-1]].add(gram[-1])
    totals = Counter()
    for gram, count in counts.items():
        totals[len(gram), gram[:-1]] += count
    bits = 0.0
    for end in range(1, len(text) + 1):
        chance = 1 / 256
        for order in range(1, min(ORDER, end) + 1):
            gram = text[end - order : end]
            key = order, gram[:-1]
            if totals[key]:
                kinds = len(followers[key])
                chance = (counts[gram] + kinds * chance) / (totals[key] + kinds)
        bits -= math.log2(chance)
    return bits / len(text)


@pytest.mark.slow
def test_bits_equal_those_of_plain_counting():
    corpus = "the cat sat on the mat and the dog sat on the log; ünïcode too"
    model = ByteNgramModel([corpus])
    for text in (corpus, "the dog sat on a cat", "zzz", "ü"):
        assert model.bits_per_byte(text) == pytest.approx(bits_by_counting(corpus.encode(), text.encode()), rel=1e-5)
    assert model.bits_per_byte("") == 0
    assert ByteNgramModel().bits_per_byte("anything") == pytest.approx(8)


@pytest.mark.slow
def test_ordinary_text_surprises_less(texts):
    model, rng = ByteNgramModel(texts[::2]), random.Random(0)
    scrambled = ["".join(rng.sample(text, len(text))) for text in texts[1::2]]
    plain = [model.bits_per_byte(text) for text in texts[1::2]]
    assert max(plain) < 6 < min(map(model.bits_per_byte, scrambled)) + 2
    assert sum(plain) / len(plain) < 3.5


@pytest.mark.slow
def test_a_document_is_judged_by_the_half_that_it_is_not_in(texts):
    judge = CorpusJudge(texts)
    text = texts[0]
    other_half = ByteNgramModel([other for other in texts if _half(other) != _half(text)])
    assert judge(text) == other_half.bits_per_byte(text[:1000])


def fitted(tmp_path, texts, **options):
    """The filter after the sample and the fit, and the documents."""
    documents = [Document(text, f"id {index}") for index, text in enumerate(texts)]
    assert list(Sample(str(tmp_path)).run(iter(documents))) == documents
    options = CurationOptions(**options)
    list(FitPerplexity(str(tmp_path), str(tmp_path / "none"), options).run())
    return PerplexityFilter(str(tmp_path), options.perplexity_model), documents


@pytest.mark.slow
def test_the_threshold_is_the_quantile(tmp_path, texts):
    step, documents = fitted(tmp_path, [*texts, "qzj xkv " * 100], max_perplexity_quantile=0.9)
    kept = list(step.run(iter(documents)))
    assert len(kept) == pytest.approx(0.9 * len(documents), abs=2)
    assert documents[-1] not in kept


@pytest.mark.slow
def test_a_corpus_too_small_for_a_quantile_is_left_alone(tmp_path, texts):
    step, documents = fitted(tmp_path, texts[:50], max_perplexity_quantile=0.5)
    assert list(step.run(iter(documents))) == documents


def test_the_sample_is_bounded_and_does_not_depend_on_the_order(tmp_path):
    documents = [Document(f"text {index}", str(index)) for index in range(5000)]
    found = []
    for order in (documents, documents[::-1]):
        list(Sample(str(tmp_path), seed=1).run(iter(order), 0, 8))
        found.append({text for _, text in json.loads((tmp_path / "00000.json").read_text())})
    assert found[0] == found[1]
    assert len(found[0]) == 256


def test_a_causal_model_judges_in_bits_a_byte(make_model, tokenizer, tmp_path):
    import torch

    model = make_model()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    # Some characters take two bytes.
    text = "the fox is red and the house is blue, füchsüä ößöä"
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        chances = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    scored = tokenizer.decode(ids[0, 1:])
    assert len(scored.encode()) > len(scored)
    expected = -chances.sum().item() / math.log(2) / len(scored.encode())
    assert CausalJudge(str(tmp_path))(text) == pytest.approx(expected, rel=1e-4)
