"""A search gives the passages that BM25 ranks first."""

import builtins
import math
import random
import sys
from collections import Counter

import pytest

from hfllm.environments.tools import ToolBox, retrieval_over
from hfllm.errors import InputError

PASSAGES = [
    "The owl is gray.",
    "The fox is red, and the fox eats fish.",
    "A blue hat",
    "The owl eats\n mice, the owl",
]


def test_it_gives_the_passages_of_the_query_alone():
    pytest.importorskip("bm25s")
    search = retrieval_over(PASSAGES, top_k=2)
    assert search("What does the OWL eat?") == "The owl eats mice, the owl\nThe owl is gray."
    assert search("hat") == "A blue hat"
    for query in ("zebra", "", "?!"):
        with pytest.raises(LookupError, match="no passage has a word of"):
            search(query)
    tools = ToolBox([search])
    message, has_failed = tools.call({"function": {"name": "search", "arguments": {"query": "blue"}}})
    assert (message["content"], has_failed) == ("A blue hat", False)


def bm25(passages, query, k1=1.5, b=0.75):
    """Scores by the formula, of passages and a query that are lists of words."""
    mean = sum(map(len, passages)) / len(passages)
    scores = []
    for passage in passages:
        score, counts = 0.0, Counter(passage)
        for word in query:
            having = sum(word in other for other in passages)
            rarity = math.log(1 + (len(passages) - having + 0.5) / (having + 0.5))
            score += rarity * counts[word] / (counts[word] + k1 * (1 - b + b * len(passage) / mean))
        scores.append(score)
    return scores


def test_its_order_is_that_of_the_formula():
    pytest.importorskip("bm25s")
    rng = random.Random(1)
    passages = [[rng.choice("abcdefghij") for _ in range(rng.randint(1, 12))] for _ in range(40)]
    search = retrieval_over([" ".join(passage) for passage in passages], top_k=5)
    for _ in range(30):
        query = [rng.choice("abcdefghijz") for _ in range(rng.randint(1, 4))] + ["a"]
        scores = dict(zip(range(40), bm25(passages, query), strict=True))
        best = sorted((-round(score, 5), place) for place, score in scores.items() if score > 0)[:5]
        found = search(" ".join(query)).splitlines()
        assert found == [" ".join(passages[place]) for _, place in best]


def test_what_cannot_be_searched_is_refused(monkeypatch):
    pytest.importorskip("bm25s")
    for passages in ([], ["", " ?"]):
        with pytest.raises(InputError, match=f"none of {len(passages)} passages has a word"):
            retrieval_over(passages)
    with pytest.raises(InputError, match="expected a list of passages, got the text 'owl'"):
        retrieval_over("owl")
    with pytest.raises(InputError, match="top_k must be at least 1, got 0"):
        retrieval_over(PASSAGES, 0)


def test_without_bm25s_it_says_how_to_install_it(monkeypatch):
    plain = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "bm25s":
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "bm25s", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InputError, match=r"retrieval_over needs bm25s: pip install 'hfllm\[tools\]'"):
        retrieval_over(PASSAGES)
