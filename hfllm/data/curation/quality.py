"""Filters by form: length, Gopher's quality and repetition rules, C4's line and page rules.

Each filter is a datatrove `BaseFilter`: it returns `True`, or `False` and the reason. They judge by words between
spaces and by English stop words, so they suit English and, with other settings, languages that use spaces.
"""

import re
from collections.abc import Sequence

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

from hfllm.data.curation.text import ngram_hashes, word_hashes, words_of

_HAS_WORD = re.compile(r"[^\W_]")
Verdict = bool | tuple[bool, str]
STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
ELLIPSES = ("...", "…")
BULLETS = ("•", "-", "*", "‣", "●")
# What a tokenizer splits off words: WikiText's `@-@` and `= = Title = =`, and the Penn Treebank's quotes.
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

    Unlike in Gopher, punctuation that stands alone is no word without letters: in tokenized text (`a well @-@ known
    man , who`) it would be up to a third of all words.
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
    arrays, without case; characters are those of words. The n-gram rules skip documents of fewer than `min_words`
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
            # Marks alone, such as the `* * *` between scenes of a book, are no text that could repeat.
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
    seen: set[str] = set()
    count = characters = 0
    for part in parts:
        if part in seen:
            count, characters = count + 1, characters + len(part)
        seen.add(part)
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
    # An n-gram that overlaps itself would count a character twice.
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
    bracket, or fewer than `min_sentences` sentences left. What remains of a kept document is its new text.

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
        kept = [part for part in map(self.kept_part, lines) if part]
        if sum(len(self.SENTENCE_END.findall(line)) for line in kept) < self.min_sentences:
            return False, "too_few_sentences"
        if kept != lines:
            self.stat_update("lines_removed", value=len(lines) - len(kept))
            doc.text = "\n".join(kept)
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
        ends = [found.end() for found in self.SENTENCE_END.finditer(line)]
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
