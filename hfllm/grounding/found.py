"""What a retriever is and gives, and what all of them refuse."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Protocol

from hfllm.data.passages import Passage
from hfllm.errors import InputError
from hfllm.grounding.passages import Passages


@dataclass(frozen=True)
class Found:
    """A passage that was found.

    Args:
        place: its place among the passages.
        passage: the passage.
        score: how well it fits; the scale is the retriever's.
    """

    place: int
    passage: Passage
    score: float


class Retriever(Protocol):
    """What finds passages.

    Attributes:
        passages: where it searches.
    """

    passages: Passages

    def retrieve(self, queries: Sequence[str], top_k: int = 3) -> list[list[Found]]:
        """Return the `top_k` best passages of each query, the best first; of equal ones the earlier comes first.

        Fewer, or none, where no more fit or are there.

        Raises:
            InputError: for a `top_k` below 1, or queries that are no list of texts.
        """
        ...


def found_of(passages: Passages, rankings: Sequence[Sequence[tuple[int, float]]]) -> list[list[Found]]:
    """Return the passages of places and scores, for each query."""
    texts = passages.at(place for ranked in rankings for place, _ in ranked)
    return [[Found(place, texts[place], score) for place, score in ranked] for ranked in rankings]


def check_queries(queries: Sequence[str], top_k: int) -> None:
    """Refuse what no retriever can answer.

    Raises:
        InputError: for a `top_k` below 1, or queries that are no list of texts.
    """
    if not isinstance(top_k, Integral):
        raise InputError(f"top_k must be a whole number, got {top_k!r:.40}")
    if top_k < 1:
        raise InputError(f"top_k must be at least 1, got {top_k}")
    if isinstance(queries, str):
        raise InputError(f"queries must be a list of texts, got the text {queries!r:.60}")
    # What can be read once only would be empty after this.
    if not hasattr(queries, "__len__"):
        raise InputError(f"queries must be a list of texts, got {queries!r:.60}")
    if not all(isinstance(query, str) for query in queries):
        wrong = next(query for query in queries if not isinstance(query, str))
        raise InputError(f"queries must be texts, got {wrong!r:.60}")


def refuse_empty(passages: Passages, what: str) -> None:
    """Refuse to index nothing.

    Raises:
        InputError: when there is no passage.
    """
    if not len(passages):
        raise InputError(f"{what}: there are no passages to search")
