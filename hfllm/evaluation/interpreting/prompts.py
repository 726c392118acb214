"""Facts as prompts whose next token is the value, with the places of the subject's tokens."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from hfllm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Fact:
    """A question about a subject, and how its answer begins.

    Args:
        subject: as both texts spell it, such as `fox`.
        question: such as `What colour is the fox?`.
        beginning: of the answer, up to what is asked, such as `The fox is`; it may be empty.
        value: what comes next, such as `red`; empty where nothing is to be judged.
        others: other values that could stand there.
    """

    subject: str
    question: str
    beginning: str = ""
    value: str = ""
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class FactPrompt:
    """A `Fact` in tokens.

    Args:
        fact: what it is made of.
        ids: its tokens, the last of which is the place before the value.
        mentions: the places of the subject's tokens, one group for each time that it is named.
        value: the first token of the value; -1 without one.
        others: the first tokens of the other values, each once; those that begin as the value does are left out.
    """

    fact: Fact
    ids: tuple[int, ...] = field(repr=False)
    mentions: tuple[tuple[int, ...], ...]
    value: int
    others: tuple[int, ...]

    @property
    def subject_places(self) -> list[int]:
        """The places of all tokens of the subject."""
        return [place for mention in self.mentions for place in mention]


def encode_facts(
    tokenizer: "PreTrainedTokenizerBase", facts: Sequence[Fact], uses_chat_template: bool
) -> list[FactPrompt]:
    """Return facts as prompts: by the chat template, or question and beginning as plain text.

    Raises:
        InputError: for a tokenizer that does not say where its tokens stand in the text, and for other values that
            all begin with the same token as the right one.
    """
    if not tokenizer.is_fast:
        raise InputError(f"{type(tokenizer).__name__} does not tell the places of tokens in a text: a fast one does")
    return [_encoded(tokenizer, fact, uses_chat_template) for fact in facts]


def _encoded(tokenizer: "PreTrainedTokenizerBase", fact: Fact, uses_chat_template: bool) -> FactPrompt:
    text = _text(tokenizer, fact, uses_chat_template)
    ids, spans = _tokens(tokenizer, text, uses_chat_template)
    mentions = tuple(_places(spans, start, end) for start, end in _found(text, fact.subject))
    gap = "" if not text or text[-1].isspace() or not fact.beginning else " "
    said = [each for each in (fact.value, *fact.others) if each] if fact.value else []
    firsts = dict.fromkeys(_next(tokenizer, text, gap + each, ids, uses_chat_template) for each in said)
    if fact.others and len(firsts) == 1:
        raise InputError(
            f"all values of {fact.question!r} begin with the same token, so they cannot be compared: {', '.join(said)}"
        )
    value, *others = firsts or [-1]
    return FactPrompt(fact, tuple(ids), tuple(each for each in mentions if each), value, tuple(others))


def _text(tokenizer: "PreTrainedTokenizerBase", fact: Fact, uses_chat_template: bool) -> str:
    if not uses_chat_template:
        return f"{fact.question} {fact.beginning}".strip()
    asked = [{"role": "user", "content": fact.question}]
    return tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False) + fact.beginning


def _tokens(
    tokenizer: "PreTrainedTokenizerBase", text: str, uses_chat_template: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """Return tokens and their places in the text; a template has written the special ones itself."""
    encoded = tokenizer(text, add_special_tokens=not uses_chat_template, return_offsets_mapping=True)
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    if ids and ids[-1] == tokenizer.eos_token_id and not uses_chat_template:
        # Some tokenizers end each text; what follows here is the value.
        ids, spans = ids[:-1], spans[:-1]
    return ids, spans


def _next(
    tokenizer: "PreTrainedTokenizerBase", text: str, more: str, before: Sequence[int], uses_chat_template: bool
) -> int:
    """Return the token that follows when a text continues."""
    ids, _ = _tokens(tokenizer, text + more, uses_chat_template)
    if ids[: len(before)] == list(before):
        return ids[len(before)]
    # The end of the text and what follows are one token: the nearest is what follows alone.
    return tokenizer(more, add_special_tokens=False)["input_ids"][0]


def _found(text: str, subject: str) -> Iterator[tuple[int, int]]:
    """Yield where a text names a subject, not inside another word."""
    for found in re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", text) if subject else ():
        yield found.span()


def _places(spans: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, ...]:
    """Return the tokens that have a character of a part of the text; a space before it is none."""
    return tuple(place for place, (first, last) in enumerate(spans) if first < end and last > start)


def batch_of(
    prompts: Sequence[FactPrompt], device: "torch.device | str" = "cpu", pad: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return input ids (B, S), padded on the right, unseen by causal models, and each row's last place (B,)."""
    rows = [torch.tensor(prompt.ids) for prompt in prompts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    return ids.to(device), torch.tensor([len(row) - 1 for row in rows], device=device)


def mask_of(places: Sequence[Sequence[int]], length: int, device: "torch.device | str" = "cpu") -> torch.Tensor:
    """Return a mask (B, length), true at each row's places."""
    mask = torch.zeros(len(places), length, dtype=torch.bool)
    for row, each in enumerate(places):
        mask[row, list(each)] = True
    return mask.to(device)
