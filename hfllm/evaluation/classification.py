"""How good labels are, with errors over rows for all figures, and a bag of words as the control.

F1 of a class or of entities is `2 tp / (2 tp + fp + fn)`; macro F1 is its mean over all classes in the labels or in
the predictions. An entity counts only where its first word, its last word and its type are all right (Tjong Kim Sang &
De Meulder 2003, arXiv:cs/0306050, section 4).
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy

from hfllm.data.labelled import SPANS, TEXT, WORDS, Row
from hfllm.outputs.figures import mean_of, with_error

if TYPE_CHECKING:
    import torch


# ---- figures of labels ----


RESAMPLES = 500
# Rows of a table of classes.
MOST_CLASSES = 30
# First word, last word, type.
Entity = tuple[int, int, str]
OUTSIDE = "O"


def label_metrics(predicted: Sequence[str], gold: Sequence[str], prefix: str = "") -> dict[str, float]:
    """Return `accuracy` and `macro_f1` of one label per row, with errors.

    Args:
        prefix: before the names, such as `majority_`.
    """
    right = [guess == true for guess, true in zip(predicted, gold, strict=True)]
    name = f"{prefix}accuracy"
    counts = _class_counts([[guess] for guess in predicted], [[true] for true in gold])
    return {**mean_of(name, list(map(float, right))), **_macro(f"{prefix}macro_f1", counts)}


def tag_metrics(
    predicted: Sequence[Sequence[str]], gold: Sequence[Sequence[str]], prefix: str = ""
) -> dict[str, float]:
    """Return `accuracy` of words, `macro_f1` of tags and `entity_f1`, with errors over rows: their words are alike.

    Args:
        predicted, gold: the tags of the rows.
        prefix: before the names.
    """
    right = [
        [sum(g == t for g, t in zip(guess, true, strict=True)), len(true)]
        for guess, true in zip(predicted, gold, strict=True)
    ]
    result = {}
    for name, parts, figure in (
        ("accuracy", numpy.array(right, float), lambda sums: sums[..., 0] / sums[..., 1]),
        ("entity_f1", _entity_counts(predicted, gold), _f1),
    ):
        result[f"{prefix}{name}"] = float(figure(parts.sum(0)))
        result |= with_error(f"{prefix}{name}", bootstrap_error(parts, figure), len(gold))
    return result | _macro(f"{prefix}macro_f1", _class_counts(predicted, gold))


def _macro(name: str, counts: numpy.ndarray) -> dict[str, float]:
    def macro(sums: numpy.ndarray) -> numpy.ndarray:
        return _f1(sums).mean(-1)

    return {name: float(macro(counts.sum(0))), **with_error(name, bootstrap_error(counts, macro), len(counts))}


def _f1(counts: numpy.ndarray) -> numpy.ndarray:
    """Return F1 of the last axis: right, predicted, gold; 0 where there is neither."""
    total = counts[..., 1] + counts[..., 2]
    return numpy.where(total > 0, 2 * counts[..., 0] / numpy.maximum(total, 1), 0.0)


def _class_counts(predicted: Sequence[Sequence[str]], gold: Sequence[Sequence[str]]) -> numpy.ndarray:
    """Return counts (rows, classes, 3): right, predicted and gold per class in the rows."""
    names = sorted({label for rows in (predicted, gold) for row in rows for label in row})
    number = {name: index for index, name in enumerate(names)}
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
    """Return the entities marked by tags, as conlleval reads them.

    `B-x` begins one of type x; `I-x` continues one of the same type and begins one after anything else. `E-x` and
    `L-x` end one, `S-x` and `U-x` are whole ones. A tag without such a letter is a type, and continues the same one.
    """
    result: set[Entity] = set()
    begin, kind, has_ended = 0, None, False
    for index, tag in enumerate([*tags, OUTSIDE]):
        letter, name = ("", None) if tag == OUTSIDE else _parts(tag)
        if kind is not None and (name != kind or letter in ("B", "S", "U") or has_ended):
            result.add((begin, index - 1, kind))
            kind = None
        if name is not None and kind is None:
            begin, kind = index, name
        has_ended = letter in ("E", "L", "S", "U")
    return result


def _parts(tag: str) -> tuple[str, str]:
    letter, dash, name = tag.partition("-")
    return (letter, name) if dash and len(letter) == 1 and letter in "BIELSU" else ("", tag)


def bootstrap_error(
    parts: numpy.ndarray, figure: Callable[[numpy.ndarray], numpy.ndarray], count: int = RESAMPLES
) -> float | None:
    """Return the standard error of a figure of sums over rows, by drawing rows again; `None` below two rows.

    Args:
        parts: the rows' contributions, (rows, ...).
        figure: from sums (draws, ...) to figures (draws).
        count: how many draws.
    """
    rows = len(parts)
    if rows < 2:
        return None
    times = numpy.random.default_rng(0).multinomial(rows, numpy.full(rows, 1 / rows), size=count)
    sums = numpy.tensordot(times, parts, axes=1)
    error = float(numpy.std(figure(sums), ddof=1))
    # For identical rows only rounding is left.
    return error if error > 1e-12 else 0.0


def class_table(predicted: Sequence[str], gold: Sequence[str]) -> list[dict[str, object]]:
    """Return the rows of a table: precision, recall, F1 and the most frequent mistake of each class."""
    rows = []
    names = sorted(set(gold) | set(predicted))
    for name in names[:MOST_CLASSES]:
        here = [guess for guess, true in zip(predicted, gold, strict=True) if true == name]
        tp, predicted_positives, n = here.count(name), list(predicted).count(name), len(here)
        wrong = [guess for guess in here if guess != name]
        row: dict[str, object] = {"class": name, "rows": n}
        row |= {"precision": tp / predicted_positives if predicted_positives else 0.0, "recall": tp / n if n else 0.0}
        row |= {"F1": 2 * tp / (predicted_positives + n) if predicted_positives + n else 0.0}
        row["mistaken for"] = max(sorted(set(wrong)), key=wrong.count, default="")
        rows.append(row)
    return rows


def span_metrics(scores: Sequence[tuple[float, float]], prefix: str = "") -> dict[str, float]:
    """Return `exact_match` and `f1` with errors, of both scores of the questions: see `hfllm.generation.spans`."""
    exact, f1 = ([row[side] for row in scores] for side in (0, 1))
    return {**mean_of(f"{prefix}exact_match", exact), **mean_of(f"{prefix}f1", f1)}


# ---- bag of words ----
#
# Controls for classifiers: the most frequent label, and logistic regression on words.
#
# Both learn from the same rows as the model next to them. The regression has an L2 penalty of half the squared weights
# against the summed loss, as scikit-learn's has by default (C=1), and no penalty on its biases.


Features = list[str]
# Words of fewer rows than this tell nothing of others.
MIN_ROWS = 2
_WORDS = re.compile(r"\w+|[^\w\s]")
TOLERANCE, MAX_STEPS = 1e-7, 100
# Around a tagged word.
NEAR = (-2, -1, 0, 1, 2)


class LogisticRegression:
    """Multinomial logistic regression on how often features occur.

        control = LogisticRegression().fit([["free", "prize"], ["see", "you"]], ["spam", "ham"])
        control.predict([["free"]])

    Args:
        penalty: of half the squared weights.
        min_rows: how many rows a feature must occur in.
    """

    def __init__(self, penalty: float = 1.0, min_rows: int = 1):
        self.penalty, self.min_rows = penalty, min_rows

    def fit(self, rows: Sequence[Features], labels: Sequence[str]) -> "LogisticRegression":
        """Learn from rows of features with one label per row; the same rows give the same weights."""
        import torch

        row_counts = Counter(name for row in rows for name in set(row))
        names = sorted(name for name, count in row_counts.items() if count >= self.min_rows)
        self.number = {name: index for index, name in enumerate(names)}
        self.labels = sorted(set(labels))
        index = {label: number for number, label in enumerate(self.labels)}
        counts, targets = self._counts(rows), torch.tensor([index[label] for label in labels])
        self.weights = torch.zeros(len(names), len(self.labels), dtype=torch.double, requires_grad=True)
        self.biases = torch.zeros(len(self.labels), dtype=torch.double, requires_grad=True)
        parameters = [self.weights, self.biases]
        solver = torch.optim.LBFGS(
            parameters, max_iter=MAX_STEPS, tolerance_grad=TOLERANCE * len(rows), line_search_fn="strong_wolfe"
        )

        def loss() -> "torch.Tensor":
            solver.zero_grad()
            logits = torch.sparse.mm(counts, self.weights) + self.biases
            total = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
            total = total + self.penalty / 2 * self.weights.square().sum()
            total.backward()
            return total

        solver.step(loss)
        return self

    def log_probabilities(self, rows: Sequence[Features]) -> "torch.Tensor":
        """Return log probabilities (rows, labels), in the order of `labels`."""
        import torch

        with torch.no_grad():
            return (torch.sparse.mm(self._counts(rows), self.weights) + self.biases).log_softmax(-1)

    def predict(self, rows: Sequence[Features]) -> list[str]:
        """Return the most likely labels of the rows."""
        return [self.labels[index] for index in self.log_probabilities(rows).argmax(-1).tolist()]

    def _counts(self, rows: Sequence[Features]) -> "torch.Tensor":
        import torch

        result = [
            (row, self.number[name], count)
            for row, names in enumerate(rows)
            for name, count in Counter(names).items()
            if name in self.number
        ]
        indices = torch.tensor([each[:2] for each in result], dtype=torch.long).reshape(-1, 2).T
        values = torch.tensor([each[2] for each in result], dtype=torch.double)
        size = (len(rows), max(len(self.number), 1)) if self.number else (len(rows), 0)
        return torch.sparse_coo_tensor(indices, values, size, check_invariants=False).coalesce()


def words_of(text: str) -> Features:
    """Return the words and marks of a text, in lower case."""
    return _WORDS.findall(text.lower())


def most_frequent(labels: Iterable[str]) -> str:
    """Return the most frequent label, the first in the alphabet among equals."""
    counts = Counter(labels)
    return min(counts, key=lambda label: (-counts[label], label))


# ---- one control of each kind for each task ----


def majority(task: str, train: Sequence[Row], held_out: Sequence[Row]) -> list:
    """Return predictions for held-out rows without any information on them except, for a word, the word itself.

    The most frequent label; for each word its most frequent tag, and the most frequent tag of all words for a new one;
    the most frequent answer.
    """
    if task == TEXT:
        return [most_frequent(row["label"] for row in train)] * len(held_out)
    if task == SPANS:
        return [most_frequent((row["texts"] or [""])[0] for row in train)] * len(held_out)
    tags: dict[str, list[str]] = {}
    for row in train:
        for word, tag in zip(row["words"], row["tags"], strict=True):
            tags.setdefault(word, []).append(tag)
    tag_of = {word: most_frequent(each) for word, each in tags.items()}
    other = most_frequent(tag for each in tags.values() for tag in each)
    return [[tag_of.get(word, other) for word in row["words"]] for row in held_out]


def bag_of_words(task: str, train: Sequence[Row], held_out: Sequence[Row]) -> list:
    """Return predictions of a logistic regression: on the words of a text, or on the words near a word.

    For spans each word of the context is judged by itself, its neighbors, and their presence in the question; the
    answer is the likeliest word with its likely neighbors, or nothing where none is likely.
    """
    if task == TEXT:
        control = LogisticRegression(min_rows=MIN_ROWS).fit(
            [_text_features(row) for row in train], [row["label"] for row in train]
        )
        return control.predict([_text_features(row) for row in held_out])
    if task == WORDS:
        features = [_near(row["words"], index) for row in train for index in range(len(row["words"]))]
        control = LogisticRegression(min_rows=MIN_ROWS).fit(features, [tag for row in train for tag in row["tags"]])
        return [
            control.predict([_near(row["words"], index) for index in range(len(row["words"]))]) for row in held_out
        ]
    return _span_control(train, held_out)


def _text_features(row: Row) -> Features:
    pair = [f"second {word}" for word in words_of(row["text_pair"] or "")]
    return words_of(row["text"]) + pair


def _near(words: Sequence[str], index: int) -> Features:
    return [f"{step} {words[index + step].lower()}" for step in NEAR if 0 <= index + step < len(words)]


def _span_control(train: Sequence[Row], held_out: Sequence[Row]) -> list[str]:
    features, labels = [], []
    for row in train:
        spans = _word_spans(row["context"])
        marked = [(start, start + len(text)) for text, start in zip(row["texts"], row["starts"], strict=True)]
        features += _features_near(row, spans)
        labels += [str(any(begin < stop and end > start for start, stop in marked)) for begin, end, _ in spans]
    if len(set(labels)) < 2:
        return [""] * len(held_out)
    control = LogisticRegression(min_rows=MIN_ROWS).fit(features, labels)
    answer = control.labels.index("True")
    return [_likeliest(row, control, answer) for row in held_out]


def _likeliest(row: Row, control: LogisticRegression, answer: int) -> str:
    spans = _word_spans(row["context"])
    likely = control.log_probabilities(_features_near(row, spans))[:, answer].exp().tolist()
    best = max(range(len(spans)), key=likely.__getitem__, default=None)
    if best is None or likely[best] < 0.5:
        return ""
    first = last = best
    while first and likely[first - 1] >= 0.5:
        first -= 1
    while last + 1 < len(spans) and likely[last + 1] >= 0.5:
        last += 1
    return row["context"][spans[first][0] : spans[last][1]]


def _word_spans(context: str) -> list[tuple[int, int, str]]:
    return [(match.start(), match.end(), match.group().lower()) for match in _WORDS.finditer(context)]


def _features_near(row: Row, spans: Sequence[tuple[int, int, str]]) -> list[Features]:
    """Return per word of the context: the words near it, their presence in the question, and a word of both."""
    question_words = words_of(row["question"])
    words, question_vocabulary = [word for _, _, word in spans], set(question_words)
    rows = []
    for index in range(len(words)):
        near = _near(words, index)
        shared = [
            f"asked {step}"
            for step in range(-4, 5)
            if 0 <= index + step < len(words) and words[index + step] in question_vocabulary
        ]
        rows.append([*near, *shared, *(f"{word} + {words[index]}" for word in question_vocabulary)])
    return rows
