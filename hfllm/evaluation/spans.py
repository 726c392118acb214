"""Answers that are spans of a text, scored as SQuAD's are.

Exact match and F1 compare lower-cased words without punctuation and without the articles a, an and the, with the gold
answer that fits best (Rajpurkar et al. 2016, arXiv:1606.05250, section 6). Of a question without an answer both are 1
where nothing is said (Rajpurkar et al. 2018, arXiv:1806.03822).
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> list[str]:
    """Return the words that SQuAD's script compares."""
    without_marks = text.lower().translate(_PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", without_marks).split()


def exact_and_f1(said: str, golds: Sequence[str]) -> tuple[float, float]:
    """Return exact match and F1 of an answer against the gold one that fits best; none stands for no answer."""
    pairs = [_exact_and_f1(normalized(said), normalized(gold)) for gold in golds or [""]]
    return max(exact for exact, _ in pairs), max(f1 for _, f1 in pairs)


def _exact_and_f1(said: list[str], gold: list[str]) -> tuple[float, float]:
    exact = float(said == gold)
    if not said or not gold:
        return exact, exact
    same = (Counter(said) & Counter(gold)).total()
    return exact, 2 * same / (len(said) + len(gold))
