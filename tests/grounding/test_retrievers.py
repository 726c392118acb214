"""Retrievers: by words, by vectors against all pairs, fused by the paper's formula, gated, saved, as a tool."""

import math

import numpy as np
import pytest
from safetensors.numpy import save_file

from hfllm.data.passages import Passage
from hfllm.environments.tools import ToolBox, retrieval_over
from hfllm.errors import InputError
from hfllm.grounding.passages import Passages
from hfllm.grounding.retrieval import (
    BM25Retriever,
    DenseRetriever,
    Found,
    FusedRetriever,
    Gated,
    SentenceEncoder,
    StaticVectors,
    search_tool,
)

pytest.importorskip("bm25s")
TEXTS = [
    "The owl is gray.",
    "The fox is red, and the fox eats fish.",
    "A blue hat",
    "The owl eats\n mice.",
    "Red owl!",
]
WORDS = ("the", "owl", "is", "gray", "fox", "red", "eats", "fish", "blue", "hat", "mice")
QUERIES = ["Which OWL eats?", "red fox", "hat", "zebra"]


@pytest.fixture
def passages():
    return Passages.from_texts(TEXTS, [f"page {number}" for number in range(5)])


@pytest.fixture
def words():
    """Static vectors of words, drawn."""
    vocabulary = {word: place for place, word in enumerate(WORDS)}
    return StaticVectors(np.random.default_rng(0).normal(size=(len(vocabulary), 6)), vocabulary)


class Fixed:
    """A retriever that gives places in an order."""

    def __init__(self, passages, *orders, score=1.0):
        self.passages, self.orders, self.score = passages, orders, score

    def retrieve(self, queries, top_k=3):
        found = [[Found(place, self.passages[place], self.score) for place in order] for order in self.orders]
        return [ranking[:top_k] for ranking in found]


def places(found):
    return [[each.place for each in ranking] for ranking in found]


def test_by_words_it_finds_what_the_search_tool_finds(passages):
    retriever = BM25Retriever(passages)
    search, tool = retrieval_over(TEXTS, 2), search_tool(retriever, 2)
    found = retriever.retrieve(QUERIES, 2)
    assert found[0][0].passage == Passage(TEXTS[3], "page 3") and found[0][0].score >= found[0][1].score > 0
    assert places(found)[1:] == [[1, 4], [2], []]
    for query, ranking in zip(QUERIES[:3], found, strict=False):
        assert tool(query) == search(query) == "\n".join(" ".join(each.passage.text.split()) for each in ranking)
    with pytest.raises(LookupError, match="no passage fits 'zebra'"):
        tool("zebra")
    message, _ = ToolBox([tool]).call({"function": {"name": "search", "arguments": {"query": "hat"}}})
    assert message["content"] == "A blue hat"
    assert len(retriever.retrieve(["owl red the"], 100)[0]) == 4


def test_what_is_added_later_is_found(passages, words):
    for make in (BM25Retriever, lambda each: DenseRetriever(each, words)):
        growing = Passages(passages)
        retriever = make(growing)
        growing.add([Passage("blue mice, blue fish")])
        whole = make(Passages([*passages, Passage("blue mice, blue fish")]))
        assert retriever.retrieve([*QUERIES, "blue"], 6) == whole.retrieve([*QUERIES, "blue"], 6)
        assert retriever.retrieve(["blue mice fish"], 1)[0][0].place == 5


def test_by_vectors_it_ranks_all_by_their_cosine(passages, words):
    found = DenseRetriever(passages, words).retrieve(QUERIES[:3], 9)

    def mean(text):
        rows = [
            words.vocabulary[word]
            for word in text.lower().replace(",", "").strip(".!?").split()
            if word.strip(".") in words.vocabulary
        ]
        return np.mean([words.vectors[row] for row in rows], 0)

    for query, ranking in zip(QUERIES, found, strict=False):
        asked, cosines = mean(query), []
        for text in TEXTS:
            vector = mean(text)
            cosines.append(asked @ vector / np.linalg.norm(asked) / np.linalg.norm(vector))
        assert [each.place for each in ranking] == sorted(range(5), key=lambda place: -cosines[place])
        assert [each.score for each in ranking] == pytest.approx(sorted(cosines, reverse=True), abs=1e-6)
    # Without a known word there is nothing to be near.
    assert places(DenseRetriever(passages, words).retrieve(["zebra"], 2)) == [[]]


def test_a_sentence_vector_is_the_mean_of_its_own_states(make_model, tokenizer, tmp_path):
    import torch

    model = make_model().model
    encoder = SentenceEncoder(model, tokenizer, batch_size=2)
    vectors = encoder.encode(["The owl.", "The fox is red and eats fish all day.", "A"])
    for text, vector in zip(["The owl.", "The fox is red and eats fish all day.", "A"], vectors, strict=True):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected = states.mean(0) / states.mean(0).norm()
        np.testing.assert_allclose(vector, expected.numpy(), atol=1e-5)
    with pytest.raises(InputError, match=r"text 1 of 2 has \d+ tokens, and the encoder reads 256"):
        encoder.encode(["a", "owl " * 400])
    assert SentenceEncoder(model, tokenizer, truncation=True).encode(["owl " * 400]).shape == (1, 32)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = SentenceEncoder.load(str(tmp_path))
    assert again.identity == encoder.identity
    np.testing.assert_allclose(again.encode(["The owl."]), vectors[:1], atol=1e-5)
    with pytest.raises(InputError, match="encoder 'nowhere/else' could not be loaded"):
        SentenceEncoder.load("nowhere/else")


def test_static_vectors_of_a_file(tokenizer, tmp_path):
    vectors = np.random.default_rng(1).normal(size=(len(tokenizer), 4)).astype(np.float16)
    save_file({"embedding.weight": vectors}, tmp_path / "w.safetensors")
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = StaticVectors.load(tmp_path / "w.safetensors", tmp_path / "tokenizer.json")
    ids = tokenizer("The owl", add_special_tokens=False)["input_ids"]
    mean = vectors[ids].astype(np.float32).mean(0)
    np.testing.assert_allclose(encoder.encode(["The owl", ""]), [mean / np.linalg.norm(mean), [0] * 4], atol=1e-5)
    for tensors, message in (
        ({}, "0 matrices"),
        ({"a": vectors[:-1]}, "vocabulary of"),
        ({"a": vectors * np.nan}, "finite"),
    ):
        save_file(tensors, tmp_path / "w.safetensors")
        with pytest.raises(InputError, match=message):
            StaticVectors.load(tmp_path / "w.safetensors", tmp_path / "tokenizer.json")
    (tmp_path / "w.safetensors").write_text("no")
    with pytest.raises(InputError, match="not safetensors"):
        StaticVectors.load(tmp_path / "w.safetensors", tmp_path / "tokenizer.json")


def test_fusion_is_the_sum_of_reciprocal_ranks(passages):
    one, two = Fixed(passages, [3, 1, 0], []), Fixed(passages, [1, 2], [4])
    found = FusedRetriever([one, two], k=60).retrieve(["a", "b"], 5)
    expected = {1: 1 / 62 + 1 / 61, 3: 1 / 61, 2: 1 / 62, 0: 1 / 63}
    assert {each.place: each.score for each in found[0]} == pytest.approx(expected)
    assert places(found) == [[1, 3, 2, 0], [4]]
    assert places(FusedRetriever([one, two], k=0, depth=1).retrieve(["a", "b"], 2)) == [[1, 3], [4]]
    # With little depth, as many as are asked for.
    assert len(FusedRetriever([one, one], depth=1).retrieve(["a", "b"], 3)[0]) == 3


def test_a_gate_keeps_what_scores_enough(passages):
    retriever = BM25Retriever(passages)
    found = retriever.retrieve(QUERIES, 3)
    score = found[0][0].score
    assert Gated(retriever, score).retrieve(QUERIES, 3)[0] == [each for each in found[0] if each.score >= score]
    assert Gated(retriever, math.inf).retrieve(QUERIES, 3) == [[], [], [], []]
    assert Gated(retriever, -1).retrieve(QUERIES, 3) == found
    with pytest.raises(InputError, match="min_score is nan"):
        Gated(retriever, math.nan)
    with pytest.raises(InputError, match="query 1: the score of passage 2 is nan"):
        Gated(Fixed(passages, [2], score=math.nan), 0.5).retrieve(["a"])


def test_saved_retrievers_share_a_folder_and_answer_as_before(passages, words, tmp_path):
    by_words, by_vectors = BM25Retriever(passages), DenseRetriever(passages, words)
    by_words.save(tmp_path)
    by_vectors.save(tmp_path)
    loaded = Passages.load(tmp_path)
    for before, after in (
        (by_words, BM25Retriever.load(tmp_path)),
        (by_vectors, DenseRetriever.load(tmp_path, words)),
        (by_words, BM25Retriever.load(tmp_path, passages=loaded)),
    ):
        assert after.retrieve(QUERIES, 4) == before.retrieve(QUERIES, 4)
    other = StaticVectors(words.vectors * 2, words.vocabulary)
    with pytest.raises(InputError, match="made with another encoder"):
        DenseRetriever.load(tmp_path, other)
    with pytest.raises(InputError, match="made with another passage_prefix"):
        DenseRetriever.load(tmp_path, words, passage_prefix="passage: ")
    Passages.from_texts(TEXTS[::-1]).save(tmp_path)
    with pytest.raises(InputError, match="made with other passages"):
        DenseRetriever.load(tmp_path, words)
    with pytest.raises(InputError, match="an index of other passages"):
        BM25Retriever.load(tmp_path)
    (tmp_path / "vectors.safetensors").unlink()
    with pytest.raises(InputError, match="no such vectors"):
        DenseRetriever.load(tmp_path, words)
    with pytest.raises(InputError, match="no saved passages"):
        BM25Retriever.load(tmp_path / "nowhere")


class Wrong:
    identity = "wrong"

    def __init__(self, vectors):
        self.vectors = vectors

    def encode(self, texts):
        return self.vectors[: len(texts)] if len(texts) > 1 else self.vectors[:, :2]


def test_an_index_without_passages_is_refused(words, tmp_path):
    Passages().save(tmp_path)
    empty = Passages.load(tmp_path)
    assert len(empty) == 0 and list(empty) == [] and empty.at([]) == {}
    for load in (BM25Retriever.load, lambda folder: DenseRetriever.load(folder, words)):
        with pytest.raises(InputError, match=f"Retriever of {tmp_path}: there are no passages to search"):
            load(tmp_path)


def test_what_cannot_be_searched_is_refused(passages, words):
    for make in (BM25Retriever, lambda each: DenseRetriever(each, words)):
        with pytest.raises(InputError, match="there are no passages to search"):
            make(Passages())
        with pytest.raises(InputError, match="top_k must be at least 1, got 0"):
            make(passages).retrieve(["a"], 0)
        with pytest.raises(InputError, match="queries must be a list of texts, got the text 'owl'"):
            make(passages).retrieve("owl")
        with pytest.raises(InputError, match="queries must be texts, got None"):
            make(passages).retrieve([None])
        assert make(passages).retrieve([]) == []
    with pytest.raises(InputError, match="none of 1 passages has a word"):
        BM25Retriever(Passages.from_texts(["?!"]))
    vectors = np.ones((5, 3))
    with pytest.raises(InputError, match=r"shape \(4, 3\) for 5 texts"):
        DenseRetriever(passages, Wrong(vectors[:4]))
    with pytest.raises(InputError, match=r"gives an array of shape \(5, 2\) for 1 texts"):
        DenseRetriever(passages, Wrong(vectors)).retrieve(["a"])
    far = StaticVectors(np.eye(2), {"owl": 0})
    far.encode = lambda texts: np.full((len(texts), 2), 1e30)
    with np.errstate(over="ignore"), pytest.raises(InputError, match="products of vectors are not finite"):
        DenseRetriever(passages, far).retrieve(["a"])
    vectors[3, 1] = math.nan
    with pytest.raises(InputError, match="the vector of passage 3 is not finite"):
        DenseRetriever(passages, Wrong(vectors))
    with pytest.raises(InputError, match="top_k=6, and there are 5 passages"):
        search_tool(BM25Retriever(passages), 6)
    retriever = BM25Retriever(passages)
    with pytest.raises(InputError, match="at least 2 are needed"):
        FusedRetriever([retriever])
    with pytest.raises(InputError, match="retriever 2 searches other passages"):
        FusedRetriever([retriever, BM25Retriever(Passages.from_texts(["owl"]))])
    with pytest.raises(InputError, match="k=nan"):
        FusedRetriever([retriever, retriever], k=math.nan)


@pytest.mark.parametrize("size", [7, 100, 384])
def test_equal_passages_score_alike_and_a_query_without_a_vector_finds_none(size):
    vectors = np.random.default_rng(0).normal(size=(3, size))
    words = StaticVectors(vectors, {"owl": 0, "the": 1, "fox": 2})
    passages = Passages.from_texts(["fox", *["The owl."] * 1003, "the owl"])
    retriever = DenseRetriever(passages, words)
    found, none = retriever.retrieve(["owl the", "zebra"], 1004)
    assert [each.place for each in found] == list(range(1, 1005)) and len({each.score for each in found}) == 1
    assert found[0].score == pytest.approx(1, abs=1e-6) and none == []
    by_words = BM25Retriever(passages)
    assert places(by_words.retrieve(["owl"], 5)) == [[1, 2, 3, 4, 5]]
    assert FusedRetriever([by_words, retriever]).retrieve(["zebra"]) == [[]]
