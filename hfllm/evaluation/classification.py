"""How good labels are: accuracy, macro F1, and F1 of whole entities, each with its error over rows.

F1 of a class or of entities is `2 tp / (2 tp + fp + fn)`; macro F1 is its mean over all classes that occur, in the
labels or in the predictions. An entity counts only where its first word, its last word and its type are all right
(Tjong Kim Sang & De Meulder 2003, arXiv:cs/0306050, section 4).
"""

from collections.abc import Callable, Sequence

import numpy

from hfllm.outputs.report import mean_of, share_error, with_error

RESAMPLES = 500
# First word, last word, type.
Entity = tuple[int, int, str]
OUTSIDE = "O"


def label_metrics(predicted: Sequence[str], gold: Sequence[str], prefix: str = "") -> dict[str, float]:
    """Return `accuracy` and `macro_f1` of one label per row, with errors.

    Args:
        prefix: before the names, such as `majority_`.
    """
    n = len(gold)
    right = [guess == true for guess, true in zip(predicted, gold, strict=True)]
    accuracy, name = sum(right) / n, f"{prefix}accuracy"
    counts = _class_counts([[guess] for guess in predicted], [[true] for true in gold])
    return {name: accuracy, **with_error(name, share_error(accuracy, n), n), **_macro(f"{prefix}macro_f1", counts)}


def tag_metrics(
    predicted: Sequence[Sequence[str]], gold: Sequence[Sequence[str]], prefix: str = ""
) -> dict[str, float]:
    """Return `accuracy` of words, `macro_f1` of tags and `entity_f1`, with errors over rows: their words are alike.

    Args:
        predicted, gold: the tags of each row.
        prefix: before the names.
    """
    right = [
        [sum(g == t for g, t in zip(guess, true, strict=True)), len(true)]
        for guess, true in zip(predicted, gold, strict=True)
    ]
    found = {}
    for name, parts, figure in (
        ("accuracy", numpy.array(right, float), lambda sums: sums[..., 0] / sums[..., 1]),
        ("entity_f1", _entity_counts(predicted, gold), _f1),
    ):
        found[f"{prefix}{name}"] = float(figure(parts.sum(0)))
        found |= with_error(f"{prefix}{name}", bootstrap_error(parts, figure), len(gold))
    return found | _macro(f"{prefix}macro_f1", _class_counts(predicted, gold))


def _macro(name: str, counts: numpy.ndarray) -> dict[str, float]:
    def macro(sums: numpy.ndarray) -> numpy.ndarray:
        return _f1(sums).mean(-1)

    return {name: float(macro(counts.sum(0))), **with_error(name, bootstrap_error(counts, macro), len(counts))}


def _f1(counts: numpy.ndarray) -> numpy.ndarray:
    """Return F1 of the last axis: right, predicted, gold; 0 where there is neither."""
    total = counts[..., 1] + counts[..., 2]
    return numpy.where(total > 0, 2 * counts[..., 0] / numpy.maximum(total, 1), 0.0)


def _class_counts(predicted: Sequence[Sequence[str]], gold: Sequence[Sequence[str]]) -> numpy.ndarray:
    """Return counts (rows, classes, 3): right, predicted and gold of each class that occurs."""
    names = sorted({label for rows in (predicted, gold) for row in rows for label in row})
    number = {name: place for place, name in enumerate(names)}
    counts = numpy.zeros((len(gold), len(names), 3))
    for row, (guesses, trues) in enumerate(zip(predicted, gold, strict=True)):
        for guess, true in zip(guesses, trues, strict=True):
            counts[row, number[guess], 1] += 1
            counts[row, number[true], 2] += 1
            counts[row, number[true], 0] += guess == true
    return counts


def _entity_counts(predicted: Sequence[Sequence[str]], gold: Sequence[Sequence[str]]) -> numpy.ndarray:
    pairs = [(entities(guess), entities(true)) for guess, true in zip(predicted, gold, strict=True)]
    return numpy.array([[len(guess & true), len(guess), len(true)] for guess, true in pairs], float)


def entities(tags: Sequence[str]) -> set[Entity]:
    """Return the entities that tags mark, as conlleval reads them.

    `B-x` begins one of type x; `I-x` continues one of the same type and begins one after anything else. `E-x` and
    `L-x` end one, `S-x` and `U-x` are whole ones. A tag without such a letter is a type, and continues the same one.
    """
    found: set[Entity] = set()
    begin, kind, has_ended = 0, None, False
    for place, tag in enumerate([*tags, OUTSIDE]):
        letter, name = ("", None) if tag == OUTSIDE else _parts(tag)
        if kind is not None and (name != kind or letter in ("B", "S", "U") or has_ended):
            found.add((begin, place - 1, kind))
            kind = None
        if name is not None and kind is None:
            begin, kind = place, name
        has_ended = letter in ("E", "L", "S", "U")
    return found


def _parts(tag: str) -> tuple[str, str]:
    letter, dash, name = tag.partition("-")
    return (letter, name) if dash and len(letter) == 1 and letter in "BIELSU" else ("", tag)


def bootstrap_error(
    parts: numpy.ndarray, figure: Callable[[numpy.ndarray], numpy.ndarray], count: int = RESAMPLES, seed: int = 0
) -> float | None:
    """Return the standard error of a figure of sums over rows, by drawing rows again; `None` below two rows.

    Args:
        parts: what each row adds, (rows, ...).
        figure: from sums (draws, ...) to figures (draws).
        count: how many draws.
        seed: of the draws.
    """
    rows = len(parts)
    if rows < 2:
        return None
    times = numpy.random.default_rng(seed).multinomial(rows, numpy.full(rows, 1 / rows), size=count)
    sums = numpy.tensordot(times, parts, axes=1)
    error = float(numpy.std(figure(sums), ddof=1))
    # Of rows that are all alike nothing is left but rounding.
    return error if error > 1e-12 else 0.0


def class_table(predicted: Sequence[str], gold: Sequence[str], most: int = 30) -> list[dict[str, object]]:
    """Return the rows of a table: precision, recall and F1 of each class, and what it is mistaken for most often."""
    rows = []
    names = sorted(set(gold) | set(predicted))
    for name in names[:most]:
        here = [guess for guess, true in zip(predicted, gold, strict=True) if true == name]
        tp, said, n = here.count(name), list(predicted).count(name), len(here)
        wrong = [guess for guess in here if guess != name]
        row: dict[str, object] = {"class": name, "rows": n}
        row |= {"precision": tp / said if said else 0.0, "recall": tp / n if n else 0.0}
        row |= {"F1": 2 * tp / (said + n) if said + n else 0.0}
        row["mistaken for"] = max(sorted(set(wrong)), key=wrong.count, default="")
        rows.append(row)
    return rows


def span_metrics(scores: Sequence[tuple[float, float]], prefix: str = "") -> dict[str, float]:
    """Return `exact_match` and `f1` with errors, of both scores of each question: see `hfllm.evaluation.spans`."""
    exact, f1 = ([row[side] for row in scores] for side in (0, 1))
    return {**mean_of(f"{prefix}exact_match", exact), **mean_of(f"{prefix}f1", f1)}
