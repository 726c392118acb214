"""An index of words: scores by the formula, whatever the blocks; a file that is checked."""

import math
import random
from collections import Counter

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hfllm.data import word_index
from hfllm.data.word_index import FORMAT, WordIndex, best_indices, words_of
from hfllm.errors import InputError

bm25s = pytest.importorskip("bm25s")


def drawn(count, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices("abcdefghijkl", weights=range(1, 13), k=rng.randint(1, 15))) for _ in range(count)]


def by_formula(texts, query, k1=1.5, b=0.75):
    """BM25 in the variant of Lucene, of lists of words, text by text."""
    mean, scores = sum(map(len, texts)) / len(texts), []
    for text in texts:
        score = 0.0
        for word in query:
            having = sum(word in other for other in texts)
            rarity = math.log(1 + (len(texts) - having + 0.5) / (having + 0.5))
            count = Counter(text)[word]
            score += rarity * count / (count + k1 * (1 - b + b * len(text) / mean))
        scores.append(score)
    return scores


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(word_index, "BLOCK", 40)


def test_scores_are_those_of_the_formula_over_many_blocks(small_blocks):
    texts = drawn(60)
    index = WordIndex()
    index.add(iter(texts))
    for query in ("a b", "L l c", "k zebra", "a A a"):
        expected = by_formula(list(map(words_of, texts)), [word for word in words_of(query) if word != "zebra"])
        best = sorted(((-score, place) for place, score in enumerate(expected) if score > 0))
        found = index.search(query, 60)
        assert [score for _, score in found] == pytest.approx([-score for score, _ in best], rel=1e-5)
        assert sorted(place for place, _ in found) == sorted(place for _, place in best)
        assert found[:7] == index.search(query, 7)


def test_scores_are_those_of_an_index_that_bm25s_makes(small_blocks):
    texts = drawn(50, 1)
    index, other = WordIndex(), bm25s.BM25()
    index.add(texts)
    other.index([words_of(text) for text in texts], show_progress=False)
    for query in drawn(20, 2):
        scores = np.zeros(50)
        for place, score in index.search(query, 50):
            scores[place] = score
        np.testing.assert_allclose(scores, other.get_scores(words_of(query)), rtol=1e-5)


def test_an_index_that_grows_is_one_made_at_once(small_blocks):
    texts = drawn(70, 3)
    whole, growing = WordIndex(), WordIndex()
    whole.add(texts)
    for first in range(0, 70, 10):
        growing.add(texts[first : first + 10])
        assert len(growing) == first + 10
        growing.search("a", 3)
    for query in drawn(10, 4):
        assert growing.search(query, 70) == whole.search(query, 70)


def test_equal_scores_keep_the_order_and_words_that_are_not_there_find_nothing():
    index = WordIndex()
    index.add(["red fox", "", "blue owl", "fox red", "owl blue"])
    assert [place for place, _ in index.search("owl", 5)] == [2, 4]
    assert [place for place, _ in index.search("OWL fox", 3)] == [0, 2, 3]
    assert index.search("zebra", 5) == index.search("", 5) == WordIndex().search("owl", 5) == []
    assert best_indices(np.array([1.0, 3, 2, 3, 0]), 2).tolist() == [1, 3]
    assert best_indices(np.array([1.0, 3, 2, 3, 0]), 9).tolist() == [1, 3, 2, 0, 4]


@pytest.mark.parametrize("top_k", [1, 3, 20, 300])
def test_the_best_indices_are_those_of_a_sort(top_k):
    rng = np.random.default_rng(top_k)
    for count, kinds in ((1, 1), (7, 3), (200, 2), (1000, 30), (999, 10**6), (500, 1)):
        scores = rng.integers(kinds, size=count).astype(np.float32)
        order = np.argsort(-scores, kind="stable")
        assert best_indices(scores, top_k).tolist() == order[:top_k].tolist()
        assert best_indices(scores, top_k, above=0.0).tolist() == order[scores[order] > 0][:top_k].tolist()


def test_a_saved_index_answers_as_before_and_grows(tmp_path):
    texts, file = drawn(30, 5), tmp_path / "words.safetensors"
    index = WordIndex()
    index.add(texts[:20])
    index.save(file, "of these")
    loaded = WordIndex.load(file, "of these")
    assert loaded.search("a b c", 20) == index.search("a b c", 20)
    for each in (index, loaded):
        each.add(texts[20:])
    assert loaded.search("a b c", 30) == index.search("a b c", 30)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_files_that_are_no_index_of_these_texts_are_refused(tmp_path):
    file = tmp_path / "words.safetensors"
    with pytest.raises(InputError, match="no such index of words"):
        WordIndex.load(file, "x")
    index = WordIndex()
    index.add(drawn(10))
    index.save(file, "of these")
    with pytest.raises(InputError, match="an index of other passages"):
        WordIndex.load(file, "of those")
    good = load_file(file)
    edits = {
        "words": np.array([255], np.uint8),
        "texts_of_word": good["texts_of_word"][:-1],
        "places": good["places"] + 9,
        "counts": good["counts"] + 1,
        "lengths": good["lengths"].astype(np.float32),
    }
    for name, value in edits.items():
        save_file({**good, name: value}, file, {"format": FORMAT, "passages": "x"})
        with pytest.raises(InputError, match="damaged"):
            WordIndex.load(file, "x")
    save_file(good, file, {"format": "another"})
    with pytest.raises(InputError, match="format 'another'; expected"):
        WordIndex.load(file, "x")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(InputError, match="no index of words, or damaged"):
        WordIndex.load(file, "x")
