"""Sentences in passages that tell the reader what to do, found by their words and left out before a model reads them.

What a model reads it may follow (indirect prompt injection: Greshake et al. 2023, arXiv:2302.12173), and a small one
cannot be taught not to within minutes. Rules of this kind cost nothing and are the same for every model. They miss
instructions in other words, in other languages or spelled oddly, and take some sentences of manuals and recipes, which
do tell the reader what to do: they are one line of defense, not all of it.
"""

import re

# What an instruction to an assistant begins with, after words of politeness or emphasis.
_COMMANDS = (
    *("say", "tell", "answer", "reply", "respond", "repeat", "print", "output", "write", "claim that", "pretend"),
    *("ignore", "forget", "disregard", "override", "act", "behave", "roleplay", "translate", "summarize", "summarise"),
    *("reveal", "show me", "send", "call", "execute", "run", "do not", "don't", "never", "always", "stop", "refuse"),
    *("only say", "only answer", "only reply", "begin your", "start your", "end your"),
)
_POLITE = r"(?:(?:please|now|then|also|just|important|note|attention|system|assistant|user|instructions?|ai)\W+)*"
_BEGINS = re.compile(rf"\W*{_POLITE}(?:{'|'.join(_COMMANDS)})\b", re.IGNORECASE)
# To the reader, in other words.
_ADDRESSES = re.compile(
    r"\byou (?:must|should|shall|will|have to|need to|are to|are now|may only|can only)\b"
    r"|\byou (?:say|tell|answer|reply|respond)\b"
    r"|\b(?:i|we) (?:want|ask|order|need|tell|command|instruct|beg|would like) you\b"
    r"|\b(?:previous|above|earlier|prior|your|all) (?:instructions|rules|orders|prompts?|guidelines)\b"
    r"|\bsystem prompt\b",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n")


def is_instruction(sentence: str) -> bool:
    """Return whether a sentence tells its reader what to do, as far as its words tell."""
    return bool(_BEGINS.match(sentence) or _ADDRESSES.search(sentence))


def without_instructions(text: str) -> str:
    """Return a text without its sentences that are instructions; what remains is joined by single spaces.

    A text that has none is returned as it is, its spaces and line ends too.
    """
    sentences = _SENTENCE.split(text)
    kept = [sentence for sentence in sentences if not is_instruction(sentence)]
    return text if len(kept) == len(sentences) else " ".join(" ".join(kept).split())
