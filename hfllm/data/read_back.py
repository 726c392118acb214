"""Whether what a chat template writes of calls and thoughts is read back as it was.

A model that is trained on calls which are not read back as they were written calls other tools than it learned to.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from hfllm.data.messages import Message
from hfllm.data.rows import origin_of
from hfllm.data.tokenizer import template_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Rows with calls or thoughts that are tried, each rendered twice for each turn.
MOST_ROWS = 1000


@dataclass
class ReadBack:
    """Counts of what was written and read again.

    Args:
        calls, exact_calls: calls of tools, and those that have name and arguments as before.
        thoughts, exact_thoughts: the same of thoughts.
        first: origin of the first row with one that is not exact.
    """

    calls: int = 0
    exact_calls: int = 0
    thoughts: int = 0
    exact_thoughts: int = 0
    first: str = ""

    def __str__(self) -> str:
        counts = (("calls of tools", self.exact_calls, self.calls), ("thoughts", self.exact_thoughts, self.thoughts))
        said = [f"{exact:,} of {all_:,} {what}" for what, exact, all_ in counts if all_]
        first = f" (first that are not: {self.first})" if self.first else ""
        return f"{' and '.join(said)} are read back exactly{first}"


def response_template_of(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any] | None:
    """Return how a tokenizer's responses are read: as it says, or as TRL knows for its chat template, if at all."""
    from trl.chat_template_utils import add_response_schema

    if getattr(tokenizer, "response_template", None) is not None:
        return tokenizer.response_template
    try:
        return add_response_schema(copy.copy(tokenizer)).response_template
    except (ValueError, *template_errors()):
        return None


def read_back(rows: Sequence[Mapping[str, Any]], tokenizer: "PreTrainedTokenizerBase") -> ReadBack | None:
    """Return how much of the rows' completions is read back by `parse_response` as the chat template wrote it.

    Args:
        rows: with `prompt` and `completion` messages; of those with calls or thoughts the first `MOST_ROWS` are tried.
        tokenizer: with a chat template.

    Returns:
        `None` where rows have neither, or nobody knows how the template's turns are read.
    """
    found, template = ReadBack(), None
    for row in islice(filter(_has_something, rows), MOST_ROWS):
        template = template or response_template_of(tokenizer)
        if template is None:
            return None
        for place, message in enumerate(row["completion"]):
            if message.get("tool_calls") or message.get("reasoning_content"):
                before = [*row["prompt"], *row["completion"][:place]]
                _count(found, message, _read(tokenizer, template, before, message, row.get("tools")), row)
    return found if found.calls or found.thoughts else None


def _has_something(row: Mapping[str, Any]) -> bool:
    return any(message.get("tool_calls") or message.get("reasoning_content") for message in row["completion"])


def _read(
    tokenizer: "PreTrainedTokenizerBase",
    template: dict[str, Any],
    before: Sequence[Message],
    message: Message,
    tools: Sequence[dict[str, Any]] | None,
) -> Message:
    """Return what is read of a turn, from the tokens that a model would write."""
    options = {"tools": tools, "tokenize": False}
    try:
        prompt = tokenizer.apply_chat_template([*before], add_generation_prompt=True, **options)
        whole = tokenizer.apply_chat_template([*before, message], **options)
        if not whole.startswith(prompt):
            return {}
        ids = tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
        return tokenizer.parse_response(ids, template, prefix=prompt)
    # Such as a call that is no JSON.
    except (ValueError, *template_errors()):
        return {}


def _count(found: ReadBack, written: Message, read: Message, row: Mapping[str, Any]) -> None:
    calls = [_call(call) for call in written.get("tool_calls") or ()]
    exact = [_call(call) for call in read.get("tool_calls") or ()]
    found.calls += len(calls)
    found.exact_calls += (same_calls := len(calls) if calls == exact else 0)
    has_thought = bool(written.get("reasoning_content"))
    found.thoughts += has_thought
    is_same = has_thought and read.get("reasoning_content", "").strip() == written["reasoning_content"].strip()
    found.exact_thoughts += is_same
    if not found.first and (same_calls < len(calls) or has_thought > is_same):
        found.first = origin_of(row, "a row")


def _call(call: Mapping[str, Any]) -> tuple[object, object]:
    function = call.get("function", call)
    return function.get("name"), function.get("arguments")
