"""Passages of text as a model's source for answers: their form in a prompt, and their citations in answers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

# The end of a sentence, with closing quotes: what follows does not begin with a small letter.
_POINT = re.compile(
    r"""[.!?\u2026]+["'\u201d\u2019\u00bb)\]*_]*(?=\s+[^\w\s]*[^\Wa-z_]|\s*$)|[\u3002\uff01\uff1f]+[\u300d\u300f]*"""
)
# Words behind which a point ends no sentence, as behind one letter, or two of which the first is large ("Dr.").
_ABBREVIATIONS = re.compile(r"(?:^|\W)(?:[^\W\d_]|[A-Z][a-z]|Mrs|Prof|Gen|Sen|Rev|Fig|Vol)$")
# Spaces are looked at from their first one on, so that a long run of them takes no longer than other text.
_CITATION = re.compile(r"(?<!\s)\s*\[(\d{1,9}(?:, ?\d{1,9})*)\]")
_WORD = re.compile(r"\w")
_FORGED = re.compile(r"\[(?=\d)")


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
    """Return a question after the passages to answer it from, a line each: `The fox is red [1]. It eats figs [1].`

    Each sentence ends with its passage's number, as a sentence of an answer ends with the number that it cites. So to
    cite is to copy, which small models learn early; a number at the beginning of a line they do not learn to find.
    Numbers in brackets that a passage has itself get a space, `[ 1]`, and cite nothing.

    Without passages it is only the question.
    """
    lines = (cited(_FORGED.sub("[ ", text), number) for number, text in enumerate(passages, 1))
    return "\n".join([*lines, question])


def cited(text: str, number: int) -> str:
    """Return a text on one line, each of its sentences with a number before its final point.

    Where a sentence ends is judged by words. The text's end has the number in any case.
    """
    line, mark, pieces, begin = " ".join(text.split()), f" [{number}]", [], 0
    for point in _POINT.finditer(line):
        end = point.start()
        is_short = line[end] == "." and _ABBREVIATIONS.search(line[max(begin, end - 9) : end])
        if _WORD.search(line, begin, end) and not is_short:
            pieces += line[begin:end], mark
            begin = end
    is_done = pieces and not _WORD.search(line, begin)
    return "".join([*pieces, line[begin:], "" if is_done else mark])


def citations_of(answer: str) -> list[int]:
    """Return the numbers of an answer's cited passages, each once: 1 and 3 for `It is red [1] or blue [3].`

    `[1, 3]` cites both too. Numbers of more than nine digits are no citations.
    """
    return list(dict.fromkeys(int(number) for cited in _CITATION.findall(answer) for number in cited.split(",")))


def renumbered(answer: str, numbers: Sequence[int]) -> str:
    """Return an answer from one passage with other numbers in place of [1], and without citations of any other."""
    mark = f" [{', '.join(map(str, numbers))}]"
    return _CITATION.sub(lambda found: mark if 1 in citations_of(found[0]) else "", answer)


def without_citations(answer: str) -> str:
    """Return an answer without the passages' numbers."""
    return _CITATION.sub("", answer).strip()
