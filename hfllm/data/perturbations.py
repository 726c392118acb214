"""Change how a question is written, and not what it asks: typing errors, case, punctuation, and sentences around it.

A perturbation is a function of a text, a strength and a random source. The same three give the same text, and a
stronger one changes at least the words that a weaker one changes, so that a curve over strengths is of one item. What
is perturbed is a question's first line; what follows is material, such as a passage, a list or code, and stays.

Robustness tests perturb questions (`hfllm.evaluation.suites.robustness`), and training may see some of them perturbed
(`hfllm.data.augmentation`). The sentences that are added differ between the two, see `AddedTexts`.
"""

import random
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hfllm.data.added_texts import AddedTexts
from hfllm.errors import InputError

# Marks between words; those inside of words and numbers, such as an apostrophe, stay.
PUNCTUATION = ".,;:!?"
# Shorter words have no two letters inside that could be swapped.
SHORTEST_TYPO = 4


def typos(text: str, strength: float, rng: random.Random) -> str:
    """Return the text with a typing error in a share of its words: two letters swapped, one left out, or one doubled.

    A word's first and last letters stay, by which people read on (Belinkov and Bisk 2018, arXiv:1711.02173, have the
    same kinds). Words of fewer than four letters, numbers and words with marks inside have none.

    Args:
        strength: share of the words that can have one, 0 to 1.
    """
    return " ".join(_mistyped(word, strength, rng) for word in text.split(" "))


def _mistyped(word: str, strength: float, rng: random.Random) -> str:
    # Every word draws the same numbers, so that no word's fate depends on another's.
    chance, kind, where = rng.random(), rng.randrange(3), rng.random()
    letters = word.strip(string.punctuation)
    if len(letters) < SHORTEST_TYPO or not letters.isalpha() or chance >= strength:
        return word
    before, _, after = word.partition(letters)
    # Two letters are swapped only if both are inside of the word.
    at = 1 + int(where * (len(letters) - (3 if kind == 0 else 2)))
    changed = {
        0: letters[:at] + letters[at + 1] + letters[at] + letters[at + 2 :],
        1: letters[:at] + letters[at + 1 :],
        2: letters[: at + 1] + letters[at:],
    }[kind]
    return before + changed + after


def upper_case(text: str, strength: float, rng: random.Random) -> str:
    """Return the text with a share of its words in upper case."""
    return _of_words(text, strength, rng, str.upper)


def lower_case(text: str, strength: float, rng: random.Random) -> str:
    """Return the text with a share of its words in lower case."""
    return _of_words(text, strength, rng, str.lower)


def _of_words(text: str, strength: float, rng: random.Random, change: Callable[[str], str]) -> str:
    return " ".join(change(word) if rng.random() < strength else word for word in text.split(" "))


def no_punctuation(text: str, strength: float, rng: random.Random) -> str:
    """Return the text without a share of the marks between its words."""
    # A mark inside of a number or a word, as in 3.5 or a.m, belongs to it.
    ends = [at + 1 == len(text) or not text[at + 1].isalnum() for at in range(len(text))]
    kept = [
        not (end and mark in PUNCTUATION and rng.random() < strength) for mark, end in zip(text, ends, strict=True)
    ]
    return "".join(mark for mark, is_kept in zip(text, kept, strict=True) if is_kept)


def _added(kind: str, is_before: bool) -> "Change":
    def add(text: str, strength: float, rng: random.Random, texts: AddedTexts) -> str:
        pool = list(getattr(texts, kind))
        rng.shuffle(pool)
        sentences = " ".join(pool[: round(strength)])
        return " ".join(part for part in ((sentences, text) if is_before else (text, sentences)) if part)

    return add


Change = Callable[[str, float, random.Random, AddedTexts], str]


def _plain(change: Callable[[str, float, random.Random], str]) -> Change:
    return lambda text, strength, rng, texts: change(text, strength, rng)


@dataclass(frozen=True)
class Perturbation:
    """A way to change a question.

    Args:
        change: function of the question's first line, the strength, a random source and the texts that may be added.
        strengths: those that a test tries. Shares of words or marks for changes of these, else sentences.
        is_share: whether a strength is a share.
    """

    change: Change
    strengths: tuple[float, ...]
    is_share: bool = True


PERTURBATIONS: Mapping[str, Perturbation] = {
    "typos": Perturbation(_plain(typos), (0.1, 0.3, 1.0)),
    "upper case": Perturbation(_plain(upper_case), (0.5, 1.0)),
    "lower case": Perturbation(_plain(lower_case), (1.0,)),
    "no punctuation": Perturbation(_plain(no_punctuation), (1.0,)),
    "distractor before": Perturbation(_added("distractors", is_before=True), (1, 2), is_share=False),
    "distractor after": Perturbation(_added("distractors", is_before=False), (1, 2), is_share=False),
    "jailbreak before": Perturbation(_added("jailbreaks", is_before=True), (1, 2), is_share=False),
    "jailbreak after": Perturbation(_added("jailbreaks", is_before=False), (1, 2), is_share=False),
    "injected order": Perturbation(_added("orders", is_before=False), (1,), is_share=False),
}


def check_strength(name: str, strength: float) -> None:
    """Refuse an unknown perturbation, and a strength that it does not have.

    Raises:
        InputError: naming what is accepted.
    """
    if name not in PERTURBATIONS:
        raise InputError(f"perturbation {name!r} is not one of {', '.join(PERTURBATIONS)}")
    most = 1 if PERTURBATIONS[name].is_share else float("inf")
    if not 0 <= strength <= most:
        unit = "a share, 0 to 1" if most == 1 else "a number of sentences, from 0"
        raise InputError(f"perturbation {name!r}: strength {strength} is not {unit}")


def perturb(text: str, name: str, strength: float, texts: AddedTexts, key: str, seed: int = 0) -> str:
    """Return a question with its first line perturbed.

    Args:
        text: the question, perhaps with material after its first line.
        name: one of `PERTURBATIONS`.
        strength: how much; 0 changes nothing.
        texts: the sentences that may be added.
        key: the item's; with the seed it decides where the change falls.
        seed: of the draw.

    Raises:
        InputError: for an unknown name or a strength out of range.
    """
    check_strength(name, strength)
    question, line_break, material = text.partition("\n")
    # Not the strength: a stronger change is to begin with what a weaker one changes.
    rng = random.Random(f"perturb-{seed}-{name}-{key}")
    return PERTURBATIONS[name].change(question, strength, rng, texts) + line_break + material
