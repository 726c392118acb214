"""A spam score from two dozen readable features by logistic regression.

Features are rates to 25 words (a short message's length), so that a long article that says `free` once is not taken
for an advertisement. The shipped weights were fitted by `fit` on every other message of the SMS Spam Collection
(Almeida, Hidalgo and Yamakami 2011, CC BY 4.0); `benchmarks/curation_quality.py` repeats the fit and measures it.
"""

import csv
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hfllm.errors import InputError

MESSAGE_WORDS = 25
MOST = 3.0  # a rate above this says no more
_FLAGS = re.IGNORECASE
PATTERNS = {
    "long number": re.compile(r"(?<!\d)\+?\d[\d\s-]{6,}\d(?!\d)"),
    "short code": re.compile(r"(?<![\d.,/:])\d{4,6}(?![\d.,/:])"),
    "money": re.compile(r"[£$€]\s?\d|\d+\s?(?:pounds?|usd|eur|p(?:er|/)?\s?min|ppm)\b|\d+p\b", _FLAGS),
    "link": re.compile(r"https?://|www\.|\b[\w-]+\.(?:com|net|co\.uk|biz|info|tv)\b", _FLAGS),
    "exclamation": re.compile(r"!"),
    "capitals": re.compile(r"\b[A-Z]{3,}\b"),
    "digits": re.compile(r"\b\w*\d\w*\b"),
    "free": re.compile(r"\bfree\b", _FLAGS),
    "win": re.compile(r"\b(?:win|won|winner|winning|prize|prizes|award|awarded|jackpot|lottery|voucher)\b", _FLAGS),
    "claim": re.compile(r"\b(?:claim|collect|collection|redeem|guaranteed|selected|bonus)\b", _FLAGS),
    "urgent": re.compile(r"\b(?:urgent|important|immediately|last chance|final|attempt|expires?|hurry|now)\b", _FLAGS),
    "call": re.compile(r"\b(?:call|calls|dial|phone|ring)\b", _FLAGS),
    "text": re.compile(r"\b(?:txt|text|reply|send|msg|sms|texts)\b", _FLAGS),
    "stop": re.compile(r"\b(?:stop|unsubscribe|opt[ -]?out|t&cs?|terms|18\+?)\b", _FLAGS),
    "offer": re.compile(
        r"\b(?:offer|offers|deal|sale|discount|cheap|save|order|buy|subscribe|subscription)\b", _FLAGS
    ),
    "money word": re.compile(r"\b(?:cash|credit|loan|debt|money|cost|costs|rate|\d+%)\b", _FLAGS),
    "phone goods": re.compile(r"\b(?:mobile|mobiles|ringtone|tone|tones|nokia|camera|video|network|mins?)\b", _FLAGS),
    "customer": re.compile(r"\b(?:customer|customers|service|services|account|member|contact|details)\b", _FLAGS),
    "chat": re.compile(r"\b(?:chat|date|dating|singles|sexy|sex|xxx|adult|hot|girls|babes?|horny|flirt)\b", _FLAGS),
    "weekly": re.compile(r"\b(?:weekly|every week|wkly?|per week|daily)\b", _FLAGS),
    "first person": re.compile(r"\b(?:i|i'm|i'll|me|my|we|he|she|im|ill)\b", _FLAGS),
    "conversation": re.compile(r"\b(?:ok|lol|yeah|sorry|home|gonna|later|thanks|what|how|so|but|da|lor)\b", _FLAGS),
}
FEATURES = (*PATTERNS, "words")
WEIGHTS: dict[str, float] = {
    "long number": 3.1,
    "short code": 1.4,
    "money": 0.7,
    "link": 2.4,
    "exclamation": 0.5,
    "capitals": 0.5,
    "digits": 1.0,
    "free": 1.2,
    "win": 2.0,
    "claim": 0.6,
    "urgent": 1.0,
    "call": 0.9,
    "text": 1.6,
    "stop": 1.3,
    "offer": 0.7,
    "money word": 0.3,
    "phone goods": 2.3,
    "customer": 0.8,
    "chat": 0.5,
    "weekly": 0.3,
    "first person": -0.9,
    "conversation": -0.4,
    "words": 0.8,
}
BIAS = -5.6


def features_of(text: str) -> np.ndarray:
    """Rates of `PATTERNS` to 25 words, at most 3, and the number of words, at most 25, over 25. (features,)."""
    words = max(1, len(text.split()))
    scale = MESSAGE_WORDS / max(MESSAGE_WORDS, words)
    rates = [min(MOST, len(pattern.findall(text)) * scale) for pattern in PATTERNS.values()]
    return np.array([*rates, min(1.0, words / MESSAGE_WORDS)])


@dataclass
class SpamModel:
    """Weights by feature name, and a bias; by default the shipped ones."""

    weights: dict[str, float] = field(default_factory=lambda: dict(WEIGHTS))
    bias: float = BIAS

    def __post_init__(self) -> None:
        self._vector = np.array([self.weights.get(name, 0.0) for name in FEATURES])

    def score(self, text: str) -> float:
        """The probability of spam."""
        logit = float(features_of(text) @ self._vector) + self.bias
        return 1 / (1 + math.exp(-max(-50.0, min(50.0, logit))))


def fit(texts: Sequence[str], is_spam: Sequence[bool], penalty: float = 1.0, steps: int = 25) -> SpamModel:
    """Logistic regression by Newton's method with an L2 penalty on the weights; deterministic."""
    x = np.stack([np.append(features_of(text), 1.0) for text in texts])
    y, beta = np.asarray(is_spam, float), np.zeros(x.shape[1])
    ridge = np.diag([penalty] * (x.shape[1] - 1) + [1e-6])
    for _ in range(steps):
        p = 1 / (1 + np.exp(-np.clip(x @ beta, -50, 50)))
        gradient = x.T @ (p - y) + ridge @ beta
        beta -= np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + ridge, gradient)
    return SpamModel(dict(zip(FEATURES, map(float, beta[:-1]), strict=True)), float(beta[-1]))


def read_labelled(file: str) -> tuple[list[str], list[bool]]:
    """Texts and whether each is spam, from a .jsonl, .csv or .tsv file.

    Columns are `label` (spam or ham) and `text`, in any case; `SMS`, `message` and `content` mean `text` too.

    Raises:
        InputError: when the file cannot be read so, or holds only one of the labels.
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
