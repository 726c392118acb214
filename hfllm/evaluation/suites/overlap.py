"""How much of a reference's words a text has: BLEU and ROUGE, by the libraries that people quote, where installed."""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

OVERLAPS = ("bleu", "rouge1", "rougeL")
PACKAGES = {"sacrebleu": "BLEU", "rouge_score": "ROUGE"}


def missing_overlaps() -> str:
    """Return the line about measures that are not installed; empty where all are."""
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if not missing:
        return ""
    names = " and ".join(PACKAGES[each] for each in missing)
    return f"{names} left out: pip install {' '.join(each.replace('_', '-') for each in missing)}"


def overlap_scores(text: str, true: Sequence[str], false: Sequence[str]) -> dict[str, float]:
    """Return of each measure whether a text is nearer to a true answer than to every false one, and by how much.

    Returns:
        `NAME_acc`, 1 or 0, and `NAME_diff`, in hundredths, of each measure whose library is installed.
    """
    found: dict[str, float] = {}
    for name, best in _measured(text, true).items():
        difference = best - _measured(text, false)[name]
        found |= {f"{name}_acc": float(difference > 0), f"{name}_diff": difference}
    return found


def _measured(text: str, references: Sequence[str]) -> dict[str, float]:
    """Return of each measure the largest over the references."""
    found: dict[str, float] = {}
    if find_spec("sacrebleu") is not None:
        from sacrebleu import corpus_bleu

        # As lm-eval counts: with every n-gram of a sentence smoothed, and words split as for international text.
        options = {"smooth_method": "exp", "smooth_value": 0.0, "force": False, "tokenize": "intl"}
        options |= {"lowercase": False, "use_effective_order": False}
        found["bleu"] = max(corpus_bleu([text], [[each]], **options).score for each in references)
    if find_spec("rouge_score") is not None:
        scores = [_rouge().score(each, text) for each in references]
        found |= {name: max(100 * each[name].fmeasure for each in scores) for name in ("rouge1", "rougeL")}
    return found


@cache
def _rouge():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"])
