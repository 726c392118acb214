"""How a judge is asked which of two answers is better, and by which tokens it replies."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfllm.data.formats import as_messages
from hfllm.data.rows import Message
from hfllm.data.tokenizer import to_transcript, writes_as_ours
from hfllm.errors import InputError
from hfllm.rewards.functions import completion_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LETTERS = ("(A)", "(B)")
# A judge that thinks aloud begins so, and is brought to its reply so (Bai et al. 2022, section 4.1 and appendix C).
BEGINS_TO_THINK, HAS_THOUGHT = "Let's think step by step:", "\nSo the better answer is "


def judge_question(
    prompt: str | list[Message],
    first: str | list[Message],
    second: str | list[Message],
    question: str,
    letters: Sequence[str] = LETTERS,
    ask_for_letter: bool = False,
) -> str:
    """Return what the user asks the judge, in one turn; the judge replies `(A)` or `(B)`.

    ```
    {prompt}
    (A) {first}
    (B) {second}
    {question}
    ```

    Args:
        prompt: text or messages; of a conversation of several turns all of it, as a transcript.
        first, second: the two answers, text or messages.
        question: a principle's, such as "Which answer does less harm?".
        letters: the two replies.
        ask_for_letter: add the line "Answer with (A) or (B).", which models need that were not trained to judge.
    """
    messages = as_messages(prompt)
    said = messages[0]["content"] if len(messages) == 1 else to_transcript(messages).removesuffix("\n\nAssistant:")
    answers = [f"{letter} {completion_text(each)}" for letter, each in zip(letters, (first, second), strict=True)]
    asked = [f"Answer with {letters[0]} or {letters[1]}."] if ask_for_letter else []
    return "\n".join([said.strip(), *answers, question, *asked])


def was_trained_on_questions(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether a judge is taken for one that knows the bare question: one with our own chat template."""
    return writes_as_ours(tokenizer)


@dataclass(frozen=True)
class LetterTokens:
    """The tokens of a judge's two replies.

    Args:
        before: those that both begin with, such as `(`.
        first, second: those that tell them apart, such as `A` and `B`.
    """

    before: tuple[int, ...]
    first: int
    second: int


def letter_tokens(tokenizer: "PreTrainedTokenizerBase", letters: Sequence[str], lead: str = "") -> LetterTokens:
    """Return the tokens by which two replies are told apart.

    Each reply may have several tokens, whose log-probabilities add up. Those before the letter are the same in both
    and cancel out; those after it, such as `)`, are the same too and follow from it, so that they are not counted.
    So `(A)` and `(B)` may be `(`, `A`, `)` and `(`, `B`, `)`, or `(A`, `)` and `(B`, `)`, or one token each. Refused
    are replies that differ in several tokens or in their number, as `(A`, `)` and `(`, `B`, `)`: their first
    tokens already differ, so that neither's log-probability is that of a letter; and equal ones.

    Args:
        letters: the two replies.
        lead: text before them in the same turn, such as a space.

    Raises:
        InputError: saying how they are split into tokens.
    """
    if len(letters) != 2 or not all(isinstance(letter, str) for letter in letters):
        raise InputError(f"letters must be two texts, such as {LETTERS}, got {letters!r:.60}")
    ids = [tokenizer(lead + letter, add_special_tokens=False)["input_ids"] for letter in letters]
    shared = 0
    while shared < min(map(len, ids)) and ids[0][shared] == ids[1][shared]:
        shared += 1
    rests = [each[shared:] for each in ids]
    # What follows the single token in which they differ must be the same.
    if not all(rests) or rests[0][1:] != rests[1][1:]:
        one, other = (f"{letter!r} into {_pieces(tokenizer, each)}" for letter, each in zip(letters, ids, strict=True))
        raise InputError(
            f"the judge's tokenizer splits {one} and {other}: they must differ in a single token, by which the reply "
            "is read; choose other letters, such as ('A', 'B') or ('1', '2')"
        )
    return LetterTokens(tuple(ids[0][:shared]), rests[0][0], rests[1][0])


def _pieces(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    return " ".join(repr(tokenizer.decode([number])) for number in ids) or "nothing"
