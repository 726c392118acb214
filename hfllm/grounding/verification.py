"""Are an answer's claims in the passages? Each is checked; what no passage supports is revised or dropped.

A check is a function of two lists, `(claims, passages) -> scores`, which says for each pair in [0, 1] how well the
passage supports the claim; above 1/2 it does. `contains`, `has_words`, an `EntailmentModel`
(`hfllm.grounding.entailment`), an `AskedModel` (`hfllm.grounding.asking`) and any function of yours are checks.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hfllm.data.passages import without_citations
from hfllm.errors import InputError
from hfllm.grounding.abstention import UNKNOWN
from hfllm.grounding.meanings import normalized

Check = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
Splitter = Callable[[str], Sequence[str]]
# `(question, answer, unsupported claims, passages) -> answer`
Reviser = Callable[[str, str, Sequence[str], Sequence[str]], str]
SUPPORTED = 0.5
KEPT, REVISED, ABSTAINED = "kept", "revised", "abstained"

# After a point, also in quotes or brackets, and after the points of Chinese and Japanese.
_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"'\u2019\u201d)\]])\s+|(?<=[\u3002\uff01\uff1f])|\n+")
# Each begins where a run of like characters does: tried from each of them, a long run would take its square.
_LIST_MARK = re.compile(r"^[^\S\n]*(?:\d+[.)]|[-*\u2022])\s+", re.MULTILINE)
_POINTS = r"[.!?\u3002\uff01\uff1f]"
_CITED_POINT = re.compile(rf"(?<!{_POINTS})({_POINTS}+)((?:\s*\[\d+(?:, ?\d+)*\])+)")
_ADMITS = re.compile(
    r"\bI (do not|don['\u2019]t|cannot|can['\u2019]t|can not) (know|say|tell|answer)\b|\bnever heard of\b", re.I
)


@dataclass(frozen=True)
class Claim:
    """A claim and how well the passages support it.

    Args:
        text: a sentence of the answer.
        score: the highest of all passages', in [0, 1]; 0 without passages.
        passage: which passage has it, from 0; `None` where none supports the claim.
    """

    text: str
    score: float
    passage: int | None

    @property
    def is_supported(self) -> bool:
        return self.passage is not None


@dataclass(frozen=True)
class Revision:
    """An answer after verification.

    Args:
        answer: the text to show.
        action: `kept`, `revised` or `abstained`.
        unsupported: the claims of the first answer that no passage supports.
    """

    answer: str
    action: str
    unsupported: tuple[str, ...] = ()


def claims_of(answer: str) -> list[str]:
    """Return the sentences of an answer, without citations and list marks; a line break ends one too.

    Abbreviations such as `Dr.` end a sentence here: hand the functions a splitter of your own for such texts.
    """
    parts = _SENTENCE.split(_LIST_MARK.sub("", _citations_before_points(answer)))
    return [part for part in (without_citations(part).strip() for part in parts) if re.search(r"\w", part)]


def admits_unknown(text: str) -> bool:
    """Return whether a text says `I do not know` or the like: that is no claim which a passage must support."""
    return bool(_ADMITS.search(text))


def contains(claims: Sequence[str], passages: Sequence[str]) -> list[float]:
    """Return 1 where a passage has the claim's normalized words in this order and without others between them.

    It never takes a paraphrase for support, and takes a claim that the passage denies ("it is not true that ...").
    """
    return [
        float(bool(said := normalized(claim)) and f" {said} " in f" {normalized(passage)} ")
        for claim, passage in zip(claims, passages, strict=True)
    ]


def has_words(claims: Sequence[str], passages: Sequence[str]) -> list[float]:
    """Return the share of the claim's different normalized words that a passage has, in [0, 1].

    It takes no order into account: "the fox eats the owl" is supported by "the owl eats the fox". As a check call it
    with a threshold near 1.
    """
    shares = []
    for claim, passage in zip(claims, passages, strict=True):
        words, known = set(normalized(claim).split()), set(normalized(passage).split())
        shares.append(len(words & known) / len(words) if words else 0.0)
    return shares


def verify(
    answers: Sequence[str],
    passages: Sequence[Sequence[str]],
    check: Check,
    splitter: Splitter = claims_of,
    threshold: float = SUPPORTED,
) -> list[list[Claim]]:
    """Return the claims of each answer with their support, all answers in one call of the check.

    Args:
        answers: texts. Sentences that say `I do not know` are no claims.
        passages: for each answer the texts that it is checked against.
        check: see above.
        splitter: `answer -> claims`.
        threshold: lowest score of a supported claim.

    Raises:
        InputError: for other numbers of answers and lists of passages, passages that are one text, and a check that
            does not return a number in [0, 1] for each pair.
    """
    if len(answers) != len(passages):
        raise InputError(f"there are {len(answers)} answers and {len(passages)} lists of passages")
    if not 0 < threshold <= 1:
        raise InputError(f"threshold must be above 0 and at most 1, got {threshold}")
    for number, (answer, texts) in enumerate(zip(answers, passages, strict=True), 1):
        if not isinstance(answer, str):
            raise InputError(f"answer {number} must be a text, got {answer!r:.60}")
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"the passages of answer {number} must be a list of texts, got {str(texts)[:60]!r}")
    claims = [[claim for claim in splitter(answer) if not admits_unknown(claim)] for answer in answers]
    pairs = [
        (row, place, number)
        for row, said in enumerate(claims)
        for place in range(len(said))
        for number in range(len(passages[row]))
    ]
    scores = _scores(check, [claims[row][place] for row, place, _ in pairs], [passages[row][n] for row, _, n in pairs])
    best: dict[tuple[int, int], tuple[float, int]] = {}
    for (row, place, number), score in zip(pairs, scores, strict=True):
        # Of equally good passages the first.
        if (row, place) not in best or score > best[row, place][0]:
            best[row, place] = score, number
    found = []
    for row, said in enumerate(claims):
        tops = [best.get((row, place), (0.0, 0)) for place in range(len(said))]
        found.append(
            [
                Claim(text, score, number if score >= threshold else None)
                for text, (score, number) in zip(said, tops, strict=True)
            ]
        )
    return found


def supported(
    answer: str,
    passages: Sequence[str],
    check: Check,
    splitter: Splitter = claims_of,
    threshold: float = SUPPORTED,
) -> bool:
    """Return whether an answer claims something, and passages support all of it; each claim may have its own passage.

    Raises:
        InputError: as `verify`.
    """
    return all_supported(verify([answer], [passages], check, splitter, threshold)[0])


def all_supported(claims: Sequence[Claim]) -> bool:
    """Return whether there are claims, and all are supported."""
    return bool(claims) and all(claim.is_supported for claim in claims)


def revise_or_abstain(
    questions: Sequence[str],
    answers: Sequence[str],
    passages: Sequence[Sequence[str]],
    check: Check,
    revise: Reviser | None = None,
    splitter: Splitter = claims_of,
    threshold: float = SUPPORTED,
) -> list[Revision]:
    """Return each answer as it is where passages support it, else what is left of it, else "I do not know.".

    Args:
        questions, answers, passages: a row each.
        check, splitter, threshold: see `verify`.
        revise: `(question, answer, unsupported claims, passages) -> answer`, such as a model that is asked again; what
            it returns is checked too, and is not shown if it is not supported. By default the claims that are
            supported stay, and the others are dropped.

    Raises:
        InputError: as `verify`, and for another number of questions.
    """
    if len(questions) != len(answers):
        raise InputError(f"there are {len(questions)} questions and {len(answers)} answers")
    found = verify(answers, passages, check, splitter, threshold)
    revisions = [_dropped(answer, claims) for answer, claims in zip(answers, found, strict=True)]
    if revise is None:
        return revisions
    rows = [
        row for row, (claims, each) in enumerate(zip(found, revisions, strict=True)) if claims and each.action != KEPT
    ]
    again = [revise(questions[row], answers[row], revisions[row].unsupported, passages[row]) for row in rows]
    checked = verify(again, [passages[row] for row in rows], check, splitter, threshold)
    for row, text, claims in zip(rows, again, checked, strict=True):
        if all_supported(claims):
            revisions[row] = replace(revisions[row], answer=text, action=REVISED)
        else:
            revisions[row] = replace(revisions[row], answer=UNKNOWN, action=ABSTAINED)
    return revisions


def _dropped(answer: str, claims: Sequence[Claim]) -> Revision:
    if all_supported(claims):
        return Revision(answer, KEPT)
    if not claims and admits_unknown(answer):
        return Revision(answer, ABSTAINED)
    kept = [claim.text for claim in claims if claim.is_supported]
    unsupported = tuple(claim.text for claim in claims if not claim.is_supported)
    return Revision(" ".join(kept), REVISED, unsupported) if kept else Revision(UNKNOWN, ABSTAINED, unsupported)


def _scores(check: Check, claims: Sequence[str], passages: Sequence[str]) -> list[float]:
    if not claims:
        return []
    returned = check(claims, passages)
    try:
        scores = [float(score) for score in (returned.tolist() if hasattr(returned, "tolist") else returned)]
    except (TypeError, ValueError):
        raise InputError(f"the check returned {returned!r:.60}; expected a number for each pair") from None
    if len(scores) != len(claims):
        raise InputError(f"the check returned {len(scores)} scores for {len(claims)} pairs of claim and passage")
    for claim, score in zip(claims, scores, strict=True):
        if math.isnan(score) or not 0 <= score <= 1:
            raise InputError(f"the check returned {score} for the claim {claim[:60]!r}; expected a number from 0 to 1")
    return scores


def _citations_before_points(answer: str) -> str:
    """Return an answer whose citations stand before the point that ends their sentence: `red [1].`, not `red. [1]`."""
    return _CITED_POINT.sub(r"\2\1", answer)
