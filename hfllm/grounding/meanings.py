"""Which answers mean the same: by their normalized words, by a function of the user's, or by an entailment model."""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hfllm.data.formats import as_messages
from hfllm.data.passages import without_citations
from hfllm.grounding.samples import Answered, Prompt

if TYPE_CHECKING:
    from hfllm.grounding.entailment import EntailmentModel

Same = Callable[[str, str], bool]
# A number keeps its sign and its point.
_WORD = re.compile(r"(?<!\w)-?\d+(?:[.,]\d+)*|\w+")
_ARTICLES = frozenset(("a", "an", "the"))


def normalized(text: str) -> str:
    """Return the words of a text without case, punctuation, articles and citations, by which equal texts are equal.

    As for SQuAD's exact match (Rajpurkar et al. 2016, arXiv:1606.05250), but numbers keep sign and point. A text
    without words is itself, without spaces around it.
    """
    said = without_citations(text).casefold()
    words = [word for word in _WORD.findall(said) if word not in _ARTICLES]
    return " ".join(words) or said.strip()


def meanings_of(rows: Sequence[Answered], same: "Same | EntailmentModel | None" = None) -> list[list[int]]:
    """Return a number for the meaning of each answer of a row: first that of the given one, then of the samples.

    Answers are compared with the first of each meaning so far, in their order (Kuhn et al. 2023, arXiv:2302.09664,
    algorithm 1). Empty answers are one meaning, which no other has. To tell meanings by yourself, such as by the word
    that counts, hand the measures a list of any labels per row instead.

    Args:
        rows: prompts with their answers.
        same: `(answer, answer) -> bool`, or an entailment model, which reads each answer after its prompt and must
            find each to follow from the other. By default normalized words must be equal.
    """
    texts = [[row.given.text, *(sample.text for sample in row.samples)] for row in rows]
    if same is None:
        return [_numbered([normalized(text) for text in said], lambda one, other: one == other) for said in texts]
    if hasattr(same, "in_both_directions"):
        prompts = [last_words(row.prompt) for row in rows]
        kinds = [list(dict.fromkeys(text for text in said if text.strip())) for said in texts]
        pairs = [
            (row, one, other)
            for row, said in enumerate(kinds)
            for place, one in enumerate(said)
            for other in said[place + 1 :]
        ]
        found = same.in_both_directions(
            [f"{prompts[row]} {one}".strip() for row, one, _ in pairs],
            [f"{prompts[row]} {other}".strip() for row, _, other in pairs],
        )
        agree = {pair for pair, agrees in zip(pairs, found, strict=True) if agrees}
        return [
            _numbered(said, lambda one, other, row=row: (row, one, other) in agree or (row, other, one) in agree)
            for row, said in enumerate(texts)
        ]
    return [_numbered(said, same) for said in texts]


def _numbered(texts: Sequence[str], same: Same) -> list[int]:
    firsts: list[str] = []
    numbers: dict[str, int] = {}
    for text in texts:
        key = text if text.strip() else ""
        if key in numbers:
            continue
        alike = (numbers[first] for first in firsts if first and key and bool(same(first, key)))
        numbers[key] = next(alike, len(firsts))
        if numbers[key] == len(firsts):
            firsts.append(key)
    return [numbers[text if text.strip() else ""] for text in texts]


def last_words(prompt: Prompt) -> str:
    """Return what a prompt asks: of a conversation its last turn."""
    content = as_messages(prompt)[-1]["content"]
    return content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)
