"""A spam score from two dozen readable features by logistic regression.

Features are rates per 25 words (a short message's length), so a long article that says `free` once is not taken
for an advertisement. The shipped weights were fitted by `fit` on every other message of the SMS Spam Collection
(Almeida, Hidalgo and Yamakami 2011, CC BY 4.0) and, since its other messages are chat alone, on 300 texts each of web
pages, encyclopedia articles, stories, documentation, instructions, and questions of gsm8k, ARC and StrategyQA, which
speak of prices, numbers and prizes and sell nothing. `benchmarks/curation_quality.py` repeats the fit and measures it.
"""

import csv
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hfllm.data.curation.text import words_of
from hfllm.errors import InputError

MESSAGE_WORDS = 25
MOST = 1.0  # a sign that is repeated, such as the prices of a word problem, is no second sign
PATTERNS = {
    "long number": re.compile(r"(?<!\d)\+?\d[\d\s-]{6,}\d(?!\d)"),
    "short code": re.compile(r"(?<![\d.,/:-])(?!(?:1[5-9]|20)\d\d\b)\d{4,6}(?![\d.,/:-])"),  # and not a year
    "money": re.compile(r"[£$€]\s?\d|\d(?:p\b|\s?(?:pounds?|usd|eur|p(?:er|/)?\s?min|ppm)\b)"),
    "link": re.compile(r"https?://|www\.|\.(?:com|net|co\.uk|biz|info|tv)\b"),
    "exclamation": re.compile(r"!"),
    "capitals": re.compile(r"\b[A-Z]{3,}\b"),
}
WORDS = {
    "free": "free",
    "win": "win won winner winning prize prizes award awarded jackpot lottery voucher",
    "claim": "claim collect collection redeem guaranteed selected bonus",
    "urgent": "urgent important immediately final attempt expires expire hurry now",
    "call": "call calls dial phone ring",
    "text": "txt text reply send msg sms texts",
    "stop": "stop unsubscribe optout cs terms 18",
    "offer": "offer offers deal sale discount cheap save order buy subscribe subscription",
    "money word": "cash credit loan debt money cost costs rate",
    "phone goods": "mobile mobiles ringtone tone tones nokia camera video network min mins",
    "customer": "customer customers service services account member contact details",
    "chat": "chat date dating singles sexy sex xxx adult hot girls babe babes horny flirt",
    "weekly": "weekly week wkly wk daily",
    "first person": "i i'm i'll me my we he she im ill",
    "narrative": "was were had has he his him her hers they them their each how then which after before than into "
    "there would could between more many",
    "second person": "you your u ur yr yours",
    "conversation": "ok lol yeah sorry home gonna later thanks what how so but da lor",
}
FEATURES = (*PATTERNS, *WORDS, "words")
_PLACE = {word: len(PATTERNS) + place for place, words in enumerate(WORDS.values()) for word in words.split()}
WEIGHTS: dict[str, float] = {
    "long number": 4.1,
    "short code": 1.6,
    "money": 2.1,
    "link": 2.9,
    "exclamation": 1.5,
    "capitals": 1.7,
    "free": 0.9,
    "win": 2.5,
    "claim": 0.6,
    "urgent": 1.0,
    "call": 1.4,
    "text": 2.2,
    "stop": 1.3,
    "offer": 1.1,
    "money word": 0.1,
    "phone goods": 2.6,
    "customer": 1.5,
    "chat": 0.7,
    "weekly": 1.6,
    "first person": -1.4,
    "narrative": -1.0,
    "second person": 0.9,
    "conversation": -0.5,
    "words": 0.1,
}
BIAS = -5.8


def features_of(text: str) -> np.ndarray:
    """Return rates of `PATTERNS` and `WORDS` per 25 words, at most 1, and the number of words, at most 25, over 25.

    (features,), float64.
    """
    lowered = text.lower()
    words = words_of(lowered)
    counts = np.zeros(len(FEATURES))
    for place, (name, pattern) in enumerate(PATTERNS.items()):
        counts[place] = len(pattern.findall(text if name == "capitals" else lowered))
    for word in words:
        if word in _PLACE:
            counts[_PLACE[word]] += 1
    rates = np.minimum(MOST, counts * (MESSAGE_WORDS / max(MESSAGE_WORDS, len(words))))
    rates[-1] = min(1.0, len(words) / MESSAGE_WORDS)
    return rates


@dataclass
class SpamModel:
    """Weights by feature name, and a bias; by default the shipped ones."""

    weights: dict[str, float] = field(default_factory=lambda: dict(WEIGHTS))
    bias: float = BIAS

    def __post_init__(self) -> None:
        self._vector = np.array([self.weights.get(name, 0.0) for name in FEATURES])

    def score(self, text: str) -> float:
        """Return the probability of spam."""
        logit = float(features_of(text) @ self._vector) + self.bias
        return 1 / (1 + math.exp(-max(-50.0, min(50.0, logit))))


def fit(texts: Sequence[str], is_spam: Sequence[bool], penalty: float = 1.0, steps: int = 25) -> SpamModel:
    """Fit a logistic regression by Newton's method with an L2 penalty on the weights; deterministic."""
    x = np.stack([np.append(features_of(text), 1.0) for text in texts])
    y, beta = np.asarray(is_spam, float), np.zeros(x.shape[1])
    ridge = np.diag([penalty] * (x.shape[1] - 1) + [1e-6])
    for _ in range(steps):
        p = 1 / (1 + np.exp(-np.clip(x @ beta, -50, 50)))
        gradient = x.T @ (p - y) + ridge @ beta
        beta -= np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + ridge, gradient)
    return SpamModel(dict(zip(FEATURES, map(float, beta[:-1]), strict=True)), float(beta[-1]))


def read_labeled(file: str) -> tuple[list[str], list[bool]]:
    """Read texts and whether each is spam, from a .jsonl, .csv or .tsv file.

    Columns are `label` (spam or ham) and `text`, in any case; `SMS`, `message` and `content` mean `text` too.

    Raises:
        InputError: when the file cannot be read, or holds only one of the labels.
    """
    path, texts, labels = Path(file), [], []
    if path.suffix not in (".jsonl", ".csv", ".tsv"):
        raise InputError(f"--spam_train_file {file}: accepted are .jsonl, .csv and .tsv")
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            for number, row in enumerate(_rows(stream, path.suffix), 1):
                row = {str(name).lower(): value for name, value in row.items()}
                text = next((row[name] for name in ("text", "sms", "message", "content") if row.get(name)), None)
                label = str(row.get("label")).lower()
                if text is None or label not in ("spam", "ham"):
                    raise InputError(
                        f"--spam_train_file {file}, row {number}: columns {', '.join(row)}, label {label!r}; expected "
                        "text, and label spam or ham"
                    )
                texts.append(text)
                labels.append(label == "spam")
    except OSError as error:
        raise InputError(f"--spam_train_file {file}: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"--spam_train_file {file}: {error}") from None
    if len(set(labels)) < 2:
        raise InputError(f"--spam_train_file {file}: needs both spam and ham, got {len(labels)} rows of one")
    return texts, labels


def _rows(stream, suffix: str):
    if suffix == ".jsonl":
        return (json.loads(line) for line in stream if line.strip())
    if suffix == ".tsv":  # tab-separated text is rarely quoted, and messages hold lone quotes
        return csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
    return csv.DictReader(stream)
