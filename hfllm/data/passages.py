"""Passages of text as a model's source for answers: their form in a prompt, and their citations in answers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

# Spaces are looked at from their first one on, so that a long run of them takes no longer than other text.
_CITATION = re.compile(r"(?<!\s)\s*\[(\d{1,9}(?:, ?\d{1,9})*)\]")


@dataclass(frozen=True)
class Passage:
    """A piece of a text.

    Args:
        text: the text for the model.
        source: its origin, such as a file, a row or a module; it is shown next to citations.
        start: where it begins in the source's text, in characters.
    """

    text: str
    source: str = ""
    start: int = 0


def with_passages(question: str, passages: Sequence[str]) -> str:
    """Return a question after the passages to answer it from, a line each: `[1] The fox is red.`

    Without passages it is only the question.
    """
    lines = [f"[{number}] {' '.join(text.split())}" for number, text in enumerate(passages, 1)]
    return "\n".join([*lines, question])


def citations_of(answer: str) -> list[int]:
    """Return the numbers of an answer's cited passages, each once: 1 and 3 for `It is red. [1] [3]`.

    `[1, 3]` cites both too. Numbers of more than nine digits are no citations.
    """
    return list(dict.fromkeys(int(number) for cited in _CITATION.findall(answer) for number in cited.split(",")))


def without_citations(answer: str) -> str:
    """Return an answer without the passages' numbers."""
    return _CITATION.sub("", answer).strip()
