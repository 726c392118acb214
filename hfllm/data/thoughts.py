"""Thoughts and answers in a model's text: their separation, and the final answer."""

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

from hfllm.data.formats import Message
from hfllm.data.tokenizer import THOUGHT_MARKS

OPEN, CLOSE = THOUGHT_MARKS
# Digits and commas, a power of ten; a fraction, also one of whole ones and a part. No sign is in `10-7` or `A-19`.
NUMBER = re.compile(
    r"(?:(?<![\w)}])-)?\$?(?:\d+ \d+/\d+|(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3}(?!\d)| ?/ ?\d+)?)", re.ASCII
)
PLAIN_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,3})?", re.ASCII)
FRACTION = re.compile(r"([+-]?)(?:(\d{1,40}) )?(\d{1,40}) ?/ ?(\d{1,40})", re.ASCII)
BOX = "\\boxed{"
ADMITS = re.compile(
    r"\bI (do not|don['\u2019]t|cannot|can['\u2019]t|can not) (know|say|tell|answer)\b|\bnever heard of\b", re.I
)
LATEX_FRACTION = re.compile(r"(\d)?\\[dt]?frac\s*(?:\{(\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d))", re.ASCII)
LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
# LaTeX marks around numbers: thin spaces, commas in braces, degrees, signs that it would else read itself.
LATEX_MARKS = ((r"\\[!,;:]|\\(?:left|right)\b|\^\s*\{?\\circ\}?", ""), (r"\{,\}", ","), (r"\\([$%])", r"\1"))


def split_thoughts(text: str, is_open: bool = False) -> tuple[str | None, str]:
    """Return the thoughts of a text, `None` without any, and the rest of it.

    Several thoughts are joined by line breaks. An unclosed one is all the text after its beginning. Line breaks at
    the borders of a thought are dropped, as chat templates such as Qwen3's add them.

    Args:
        is_open: whether the prompt has opened a thought, as DeepSeek-R1's chat template does.
    """
    # Text that closes a thought without opening it has got the beginning from its prompt.
    opens, closes = text.find(OPEN), text.find(CLOSE)
    if is_open or (closes >= 0 and not 0 <= opens < closes):
        text = OPEN + text
    elif opens < 0:
        return None, text
    answer, *rest = text.split(OPEN)
    thoughts = []
    for part in rest:
        thought, _, after = part.partition(CLOSE)
        thoughts.append(thought.strip("\n"))
        answer += after.lstrip("\n") if not answer else after
    return "\n".join(thoughts), answer


def thinking_message(text: str, is_open: bool = False) -> Message:
    """Return a text as an assistant's message, with its thoughts as `reasoning_content` if it has any."""
    thoughts, answer = split_thoughts(text, is_open)
    return {"role": "assistant", "content": answer} | ({} if thoughts is None else {"reasoning_content": thoughts})


def thoughts_of(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """Return the thoughts of a completion, text or messages; an empty text without any."""
    if isinstance(completion, str):
        return split_thoughts(completion)[0] or ""
    messages = (message for message in completion if message.get("role", "assistant") == "assistant")
    thoughts = (
        message.get("reasoning_content") or split_thoughts(message.get("content") or "")[0] for message in messages
    )
    return "\n".join(filter(None, thoughts))


def answer_of(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """Return a completion without its thoughts: of messages the last one of the assistant."""
    if not isinstance(completion, str):
        messages = [message for message in completion if message.get("role", "assistant") == "assistant"]
        completion = (messages[-1].get("content") or "") if messages else ""
    return split_thoughts(completion)[1].strip()


def admits_unknown(text: str) -> bool:
    """Return whether a text says `I do not know` or the like: an answer that claims nothing."""
    return bool(ADMITS.search(text))


def final_answer(text: str) -> str:
    """Return the answer at the end of a solution: after the last `####`, in the last box, or its last number.

    For a text with none of these it is the last line that says something. gsm8k's solutions end with a line `#### 42`
    (Cobbe et al. 2021, arXiv:2110.14168); mathematical models put answers into `\\boxed{}`.
    """
    if "####" in text:
        after = _without_latex(text.rpartition("####")[2]).strip()
        line = after.splitlines()[0].strip("* ") if after else ""
        numbers = list(NUMBER.finditer(line))
        # `42 dollars` says as much as `42`.
        return numbers[0].group() if len(numbers) == 1 and numbers[0].start() == 0 else line
    if (boxed := _last_box(text)) is not None:
        return _without_latex(boxed)
    text = _without_latex(text)
    if numbers := NUMBER.findall(text):
        return numbers[-1]
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def plain_answer(answer: str) -> str:
    """Return an answer in a normal form, equal for equal answers: numbers without signs of money, commas and zeros.

    Fractions are reduced, and fractions with a finite decimal form are written so: `2/4` is `0.5`.
    """
    text = " ".join(_without_latex(answer).casefold().split()).rstrip(".")
    number = re.sub(r"[$€£%,]", "", text).strip()
    if fraction := FRACTION.fullmatch(number):
        text = number = _decimal(*fraction.groups()) or text
    number = re.sub(r"\s", "", number)
    if not (result := PLAIN_NUMBER.fullmatch(number)):
        # Spaces mean nothing in a formula.
        return re.sub(r"\s", "", text) if "\\" in text else text
    if result[2]:
        number = format(Decimal(number), "f")
    sign, digits = ("-", number[1:]) if number.startswith("-") else ("", number.removeprefix("+"))
    whole, _, fraction = digits.partition(".")
    value = whole.lstrip("0") or "0"
    value += f".{rest}" if (rest := fraction.rstrip("0")) else ""
    return value if value == "0" else sign + value


def _decimal(sign: str, whole: str | None, over: str, under: str) -> str | None:
    """Return a fraction as a decimal if it ends as one, or else reduced; `None` for any other text."""
    if not int(under):
        return None
    sign, value = sign.removeprefix("+"), int(whole or 0) + Fraction(int(over), int(under))
    indices = next((count for count in range(40) if 10**count % value.denominator == 0), None)
    if indices is None:
        return f"{sign}{value.numerator}/{value.denominator}"
    digits = str(value.numerator * 10**indices // value.denominator).rjust(indices + 1, "0")
    return f"{sign}{digits[: len(digits) - indices]}.{digits[len(digits) - indices :]}"


def _last_box(text: str) -> str | None:
    """Return the content of the last closed box, with the braces in it; `None` without one."""
    before, result, after = text.rpartition(BOX)
    while result:
        depth = 1
        for index, sign in enumerate(after):
            depth += (sign == "{") - (sign == "}")
            if not depth:
                return after[:index].strip()
        before, result, after = before.rpartition(BOX)
    return None


def _without_latex(text: str) -> str:
    """Return a text with numbers in their form without LaTeX, and words out of its `\\text{}`.

    Words after a number are its unit, and are left out.
    """
    text = text.replace("\u2212", "-")
    for pattern, written in LATEX_MARKS:
        text = re.sub(pattern, written, text)
    text = LATEX_FRACTION.sub(_fraction, text)
    bare = LATEX_TEXT.sub("", text).strip()
    return bare if NUMBER.fullmatch(bare) else LATEX_TEXT.sub(r"\1", text)


def _fraction(match: re.Match) -> str:
    whole = f"{match[1]} " if match[1] else ""
    return f"{whole}{match[2] or match[3]}/{match[4] or match[5]}"
