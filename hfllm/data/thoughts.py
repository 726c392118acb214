"""Thoughts and answers in what a model says: apart, and the answer that counts."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hfllm.data.chat_templates import THOUGHT_MARKS
from hfllm.data.messages import Message

OPEN, CLOSE = THOUGHT_MARKS
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")
PLAIN_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


def split_thoughts(text: str, is_open: bool = False) -> tuple[str | None, str]:
    """Return the thoughts of a text, `None` without any, and what it says besides.

    Several thoughts are joined by line breaks. One that never ends is all that follows its beginning. Line breaks
    at the borders of a thought are dropped, as chat templates such as Qwen3's add them.

    Args:
        is_open: whether the prompt has opened a thought, as DeepSeek-R1's chat template does.
    """
    # Text that closes a thought which it did not open has got the beginning from its prompt.
    opens, closes = text.find(OPEN), text.find(CLOSE)
    if is_open or (closes >= 0 and not 0 <= opens < closes):
        text = OPEN + text
    elif opens < 0:
        return None, text
    said, *rest = text.split(OPEN)
    thoughts = []
    for part in rest:
        thought, _, after = part.partition(CLOSE)
        thoughts.append(thought.strip("\n"))
        said += after.lstrip("\n") if not said else after
    return "\n".join(thoughts), said


def thinking_message(text: str, is_open: bool = False) -> Message:
    """Return a text as an assistant's message, with its thoughts as `reasoning_content` if it has any."""
    thoughts, said = split_thoughts(text, is_open)
    return {"role": "assistant", "content": said} | ({} if thoughts is None else {"reasoning_content": thoughts})


def thoughts_of(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """Return the thoughts of a completion, text or messages; an empty text without any."""
    if isinstance(completion, str):
        return split_thoughts(completion)[0] or ""
    said = (message for message in completion if message.get("role", "assistant") == "assistant")
    thoughts = (
        message.get("reasoning_content") or split_thoughts(message.get("content") or "")[0] for message in said
    )
    return "\n".join(filter(None, thoughts))


def answer_of(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """Return what a completion says without its thoughts: of messages the last one of the assistant."""
    if not isinstance(completion, str):
        said = [message for message in completion if message.get("role", "assistant") == "assistant"]
        completion = (said[-1].get("content") or "") if said else ""
    return split_thoughts(completion)[1].strip()


def final_answer(text: str) -> str:
    """Return the answer that a solution ends with: after the last `####`, in the last box, or its last number.

    Of a text with none of these the last line that says something. gsm8k's solutions end with a line `#### 42`
    (Cobbe et al. 2021, arXiv:2110.14168); mathematical models put answers into `\\boxed{}`.
    """
    if "####" in text:
        after = text.rpartition("####")[2].strip()
        return after.splitlines()[0].strip() if after else ""
    if boxed := BOXED.findall(text):
        return boxed[-1].strip()
    if numbers := NUMBER.findall(text):
        return numbers[-1]
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def plain_answer(answer: str) -> str:
    """Return an answer in the form in which equal ones are equal: numbers without signs of money, commas and zeros."""
    text = " ".join(answer.casefold().split()).rstrip(".")
    number = re.sub(r"[$€£%,\s]", "", text)
    if not PLAIN_NUMBER.fullmatch(number):
        return text
    sign, digits = ("-", number[1:]) if number.startswith("-") else ("", number.removeprefix("+"))
    whole, _, fraction = digits.partition(".")
    value = whole.lstrip("0") or "0"
    value += f".{rest}" if (rest := fraction.rstrip("0")) else ""
    return value if value == "0" else sign + value
