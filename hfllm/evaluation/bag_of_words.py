"""Controls for classifiers: the label that is most frequent, and logistic regression on words.

Both learn from the same rows as the model that they stand beside. The regression has an L2 penalty of half the squared
weights against the summed loss, as scikit-learn's has by default (C=1), and no penalty on its biases.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from hfllm.data.labelled import SPANS, TEXT, WORDS, Row

Features = list[str]
# Words of fewer rows than this tell nothing of others.
MIN_ROWS = 2
_WORDS = re.compile(r"\w+|[^\w\s]")
TOLERANCE, MAX_STEPS = 1e-7, 100
# Around a word that is tagged.
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
        """Learn from rows of features with a label each; the same rows give the same weights."""
        seen = Counter(name for row in rows for name in set(row))
        names = sorted(name for name, count in seen.items() if count >= self.min_rows)
        self.number = {name: place for place, name in enumerate(names)}
        self.labels = sorted(set(labels))
        place = {label: number for number, label in enumerate(self.labels)}
        counts, targets = self._counts(rows), torch.tensor([place[label] for label in labels])
        self.weights = torch.zeros(len(names), len(self.labels), dtype=torch.double, requires_grad=True)
        self.biases = torch.zeros(len(self.labels), dtype=torch.double, requires_grad=True)
        parameters = [self.weights, self.biases]
        solver = torch.optim.LBFGS(
            parameters, max_iter=MAX_STEPS, tolerance_grad=TOLERANCE * len(rows), line_search_fn="strong_wolfe"
        )

        def loss() -> torch.Tensor:
            solver.zero_grad()
            logits = torch.sparse.mm(counts, self.weights) + self.biases
            total = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
            total = total + self.penalty / 2 * self.weights.square().sum()
            total.backward()
            return total

        solver.step(loss)
        return self

    def log_probabilities(self, rows: Sequence[Features]) -> torch.Tensor:
        """Return log probabilities (rows, labels), in the order of `labels`."""
        with torch.no_grad():
            return (torch.sparse.mm(self._counts(rows), self.weights) + self.biases).log_softmax(-1)

    def predict(self, rows: Sequence[Features]) -> list[str]:
        """Return the most likely label of each row."""
        return [self.labels[place] for place in self.log_probabilities(rows).argmax(-1).tolist()]

    def _counts(self, rows: Sequence[Features]) -> torch.Tensor:
        found = [
            (row, self.number[name], count)
            for row, names in enumerate(rows)
            for name, count in Counter(names).items()
            if name in self.number
        ]
        places = torch.tensor([each[:2] for each in found], dtype=torch.long).reshape(-1, 2).T
        values = torch.tensor([each[2] for each in found], dtype=torch.double)
        size = (len(rows), max(len(self.number), 1)) if self.number else (len(rows), 0)
        return torch.sparse_coo_tensor(places, values, size, check_invariants=False).coalesce()


def words_of(text: str) -> Features:
    """Return the words and marks of a text, in lower case."""
    return _WORDS.findall(text.lower())


def most_frequent(labels: Iterable[str]) -> str:
    """Return the most frequent label, the first in the alphabet among equals."""
    counts = Counter(labels)
    return min(counts, key=lambda label: (-counts[label], label))


# ---- one control of each kind for each task ----


def majority(task: str, train: Sequence[Row], held_out: Sequence[Row]) -> list:
    """Return predictions for held-out rows that know nothing of them but, of a word, which one it is.

    The most frequent label; of each word the tag that it has most often, and that of all words for a new one; the
    most frequent answer.
    """
    if task == TEXT:
        return [most_frequent(row["label"] for row in train)] * len(held_out)
    if task == SPANS:
        return [most_frequent((row["texts"] or [""])[0] for row in train)] * len(held_out)
    tags: dict[str, list[str]] = {}
    for row in train:
        for word, tag in zip(row["words"], row["tags"], strict=True):
            tags.setdefault(word, []).append(tag)
    known = {word: most_frequent(each) for word, each in tags.items()}
    other = most_frequent(tag for each in tags.values() for tag in each)
    return [[known.get(word, other) for word in row["words"]] for row in held_out]


def bag_of_words(task: str, train: Sequence[Row], held_out: Sequence[Row]) -> list:
    """Return predictions of a logistic regression: on the words of a text, or on those near a word.

    For spans each word of the context is judged by itself, its neighbors, and which of them the question has; the
    answer is the likeliest word with its likely neighbors, or nothing where none is likely.
    """
    if task == TEXT:
        control = LogisticRegression(min_rows=MIN_ROWS).fit(
            [_text_features(row) for row in train], [row["label"] for row in train]
        )
        return control.predict([_text_features(row) for row in held_out])
    if task == WORDS:
        features = [_near(row["words"], place) for row in train for place in range(len(row["words"]))]
        control = LogisticRegression(min_rows=MIN_ROWS).fit(features, [tag for row in train for tag in row["tags"]])
        return [
            control.predict([_near(row["words"], place) for place in range(len(row["words"]))]) for row in held_out
        ]
    return _span_control(train, held_out)


def _text_features(row: Row) -> Features:
    pair = [f"second {word}" for word in words_of(row["text_pair"] or "")]
    return words_of(row["text"]) + pair


def _near(words: Sequence[str], place: int) -> Features:
    return [f"{step} {words[place + step].lower()}" for step in NEAR if 0 <= place + step < len(words)]


def _span_control(train: Sequence[Row], held_out: Sequence[Row]) -> list[str]:
    features, labels = [], []
    for row in train:
        found = _places(row["context"])
        marked = [(start, start + len(text)) for text, start in zip(row["texts"], row["starts"], strict=True)]
        features += _asked_near(row, found)
        labels += [str(any(begin < stop and end > start for start, stop in marked)) for begin, end, _ in found]
    if len(set(labels)) < 2:
        return [""] * len(held_out)
    control = LogisticRegression(min_rows=MIN_ROWS).fit(features, labels)
    answer = control.labels.index("True")
    return [_likeliest(row, control, answer) for row in held_out]


def _likeliest(row: Row, control: LogisticRegression, answer: int) -> str:
    found = _places(row["context"])
    likely = control.log_probabilities(_asked_near(row, found))[:, answer].exp().tolist()
    best = max(range(len(found)), key=likely.__getitem__, default=None)
    if best is None or likely[best] < 0.5:
        return ""
    first = last = best
    while first and likely[first - 1] >= 0.5:
        first -= 1
    while last + 1 < len(found) and likely[last + 1] >= 0.5:
        last += 1
    return row["context"][found[first][0] : found[last][1]]


def _places(context: str) -> list[tuple[int, int, str]]:
    return [(match.start(), match.end(), match.group().lower()) for match in _WORDS.finditer(context)]


def _asked_near(row: Row, found: Sequence[tuple[int, int, str]]) -> list[Features]:
    """Return of each word of the context: the words near it, which of them the question has, and a word of both."""
    asked = words_of(row["question"])
    words, known = [word for _, _, word in found], set(asked)
    rows = []
    for place in range(len(words)):
        near = _near(words, place)
        shared = [
            f"asked {step}" for step in range(-4, 5) if 0 <= place + step < len(words) and words[place + step] in known
        ]
        rows.append([*near, *shared, *(f"{word} + {words[place]}" for word in known)])
    return rows
