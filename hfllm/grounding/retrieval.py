"""Find the passages that a question is to be answered from: by words, by vectors, by both, and only if good enough."""

import math
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Self

from hfllm.data.word_index import FILE, WordIndex, import_bm25s
from hfllm.errors import InputError
from hfllm.grounding.dense import DenseRetriever
from hfllm.grounding.found import Found, Retriever, check_queries, found_of, refuse_empty
from hfllm.grounding.passages import Passages, loaded_passages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "BM25Retriever",
    "DenseRetriever",
    "Found",
    "FusedRetriever",
    "Gated",
    "Retriever",
    "scoring_enough",
    "search_tool",
]


class BM25Retriever:
    """Finds passages by the words that they share with a query: see `WordIndex`. Those that share none are not found.

    Args:
        passages: where to search. What is added to them later is indexed by the next query.

    Raises:
        InputError: when there are none, none has a word, or bm25s is not installed.
    """

    def __init__(self, passages: Passages):
        import_bm25s("BM25Retriever")
        refuse_empty(passages, "BM25Retriever")
        self.passages, self._index = passages, WordIndex()
        if not self._current().num_words:
            raise InputError(f"BM25Retriever: none of {len(passages):,} passages has a word")

    def retrieve(self, queries: Sequence[str], top_k: int = 3) -> list[list[Found]]:
        """Return the passages of each query: see `Retriever`; scores are above 0 and have no upper bound."""
        check_queries(queries, top_k)
        index = self._current()
        return found_of(self.passages, [index.search(query, top_k) for query in queries])

    def save(self, folder: str | Path) -> None:
        """Write passages and index to a folder, beside which a `DenseRetriever` of these passages may be saved."""
        index = self._current()
        self.passages.save(folder)
        index.save(Path(folder, FILE), self.passages.digest)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        passages: Passages | None = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
    ) -> Self:
        """Return the retriever that `save` has written.

        Args:
            folder: where it is.
            passages: its passages, where they are loaded already.
            tokenizer: that of the model which reads them, to be compared with the one that cut them.

        Raises:
            InputError: when a file is missing or damaged, the index is of other passages, or another tokenizer cut
                them.
        """
        import_bm25s("BM25Retriever")
        retriever = cls.__new__(cls)
        retriever.passages = loaded_passages(folder, passages, tokenizer)
        refuse_empty(retriever.passages, f"BM25Retriever of {folder}")
        retriever._index = WordIndex.load(Path(folder, FILE), retriever.passages.digest)
        retriever._index.finish()
        return retriever

    def _current(self) -> WordIndex:
        """Return the index of all passages."""
        if len(self._index) < len(self.passages):
            self._index.add(self.passages.texts(len(self._index)))
            if self._index.num_words:
                self._index.finish()
        return self._index


class FusedRetriever:
    """Joins the rankings of several retrievers: reciprocal rank fusion (Cormack, Clarke and Büttcher 2009).

    A passage scores the sum over the retrievers that find it of 1 / (k + its rank), ranks from 1: what they score does
    not count, so that their scales may differ.

    Args:
        retrievers: at least two, of the same passages.
        k: how little the first ranks stand out; 60 in the paper.
        depth: how many passages of each are joined, or `top_k` if that is more.

    Raises:
        InputError: for fewer retrievers, other passages, or numbers that make no sense.
    """

    def __init__(self, retrievers: Sequence[Retriever], k: float = 60, depth: int = 100):
        if len(retrievers) < 2:
            raise InputError(f"FusedRetriever: {len(retrievers)} retriever(s); at least 2 are needed")
        if not 0 <= k < math.inf or depth < 1:
            raise InputError(f"FusedRetriever: k={k}, depth={depth}; expected a number of at least 0, and at least 1")
        self.retrievers, self.k, self.depth, self.passages = list(retrievers), k, depth, retrievers[0].passages
        for number, other in enumerate(retrievers[1:], 2):
            if other.passages is not self.passages and other.passages.digest != self.passages.digest:
                raise InputError(f"FusedRetriever: retriever {number} searches other passages than the first")

    def retrieve(self, queries: Sequence[str], top_k: int = 3) -> list[list[Found]]:
        """Return the passages of each query: see `Retriever`; scores are at most the retrievers' number / (k + 1)."""
        check_queries(queries, top_k)
        rankings = [retriever.retrieve(queries, max(top_k, self.depth)) for retriever in self.retrievers]
        return found_of(self.passages, [self._joined(each)[:top_k] for each in zip(*rankings, strict=True)])

    def _joined(self, rankings: Sequence[list[Found]]) -> list[tuple[int, float]]:
        """Return place and score of all passages that are in a ranking, the best first."""
        scores: dict[int, float] = {}
        for ranking in rankings:
            for rank, found in enumerate(ranking, 1):
                scores[found.place] = scores.get(found.place, 0.0) + 1 / (self.k + rank)
        return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))


class Gated:
    """Gives the passages of a retriever that score enough; for a query without any, none: a model is then to say so.

    Args:
        retriever: finds the passages.
        min_score: the least score, on the retriever's scale.

    Raises:
        InputError: for a `min_score` that is no number.
    """

    def __init__(self, retriever: Retriever, min_score: float):
        scoring_enough([], min_score)
        self.retriever, self.min_score, self.passages = retriever, min_score, retriever.passages

    def retrieve(self, queries: Sequence[str], top_k: int = 3) -> list[list[Found]]:
        """Return the passages of each query: see `Retriever`.

        Raises:
            InputError: when a score is NaN, of which no gate can say whether it is enough.
        """
        return scoring_enough(self.retriever.retrieve(queries, top_k), self.min_score)


def scoring_enough(found: Sequence[Sequence[Found]], min_score: float) -> list[list[Found]]:
    """Return of each query the passages that score at least `min_score`.

    Raises:
        InputError: when that or a score is NaN.
    """
    if isinstance(min_score, bool) or not isinstance(min_score, Real) or math.isnan(min_score):
        raise InputError(f"min_score is {min_score!r:.40}; expected a number on the scale of the retriever's scores")
    for number, ranking in enumerate(found, 1):
        for each in ranking:
            if math.isnan(each.score):
                raise InputError(f"query {number}: the score of passage {each.place} is nan")
    return [[each for each in ranking if each.score >= min_score] for ranking in found]


def search_tool(retriever: Retriever, top_k: int = 3) -> Callable[[str], str]:
    """Return a tool `search(query)` for environments, which gives the passages that fit best, a line each.

    Args:
        retriever: finds them.
        top_k: the most passages that a search gives.

    Raises:
        InputError: for a `top_k` below 1 or above the number of passages.
    """
    check_queries([], top_k)
    if top_k > len(retriever.passages):
        raise InputError(f"search_tool: top_k={top_k}, and there are {len(retriever.passages)} passages")

    def search(query: str) -> str:
        """Search for passages.

        Args:
            query: words to find.
        """
        (found,) = retriever.retrieve([str(query)], top_k)
        if not found:
            raise LookupError(f"no passage fits {str(query)[:80]!r}")
        return "\n".join(" ".join(each.passage.text.split()) for each in found)

    return search
