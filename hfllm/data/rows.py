"""Rows with their origin, the reasons for leaving some out, and their messages."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from hfllm.data.sources import parse_json
from hfllm.errors import InputError

# ---- rows and their flaws ----


NO_QUESTION = "without a question"
NO_ANSWER, DOUBLED, EQUAL, TIE = "without an answer", "with doubled turns", "with equal answers", "with a tie"
UNDESIRED = "with the label false, answers that are not wanted"


def counted(count: int, what: str) -> str:
    """Return a number with its noun, such as `1 picture` and `2 pictures`."""
    return f"{count} {what}{'' if count == 1 else 's'}"


class OriginRow(dict[str, Any]):
    """A row of a dataset, with its origin, such as `pairs.jsonl, line 3`."""

    def __init__(self, columns: Mapping[str, Any], origin: str):
        super().__init__(columns)
        self.origin = origin


def origin_of(row: Mapping[str, Any], otherwise: str) -> str:
    """Return where a row was read, or `otherwise` if it does not know."""
    return getattr(row, "origin", otherwise)


class BadRow(InputError):
    """A readable row that cannot be learned from.

    Args:
        message: the flaw, with the row's origin.
        kind: the same in its form for counting, such as `without an answer`.
    """

    def __init__(self, message: str, kind: str):
        super().__init__(message)
        self.kind = kind


class Dropped:
    """Counts of rows by the reason for leaving them out.

    Attributes:
        total: how many rows there were.
        reasons: counts by reason.
    """

    def __init__(self, total: int = 0):
        self.total, self.reasons = total, Counter()
        self._first: dict[str, str] = {}

    def add(self, reason: str, origin: str = "") -> None:
        """Count a row."""
        self.reasons[reason] += 1
        self._first.setdefault(reason, origin)

    @property
    def count(self) -> int:
        """How many rows are left out."""
        return self.reasons.total()

    def __str__(self) -> str:
        reasons = []
        for reason, count in self.reasons.most_common():
            first = f" ({'first: ' * (count > 1)}{self._first[reason]})" if self._first[reason] else ""
            reasons.append(f"{count:,} {reason}{first}")
        return f"{self.count:,} of {self.total:,} rows dropped: {', '.join(reasons)}"


def flaw_of(row: Mapping[str, Any]) -> str | None:
    """Return why answers or comparisons should not be learned from, in words to count them by, or `None`.

    Args:
        row: as `formats.to_sft` and `formats.to_preference` give it.
    """
    sides = [row[side] for side in ("completion", "chosen", "rejected") if side in row]
    for side in sides:
        if any(is_empty(message) for message in side if message["role"] == "assistant"):
            return NO_ANSWER
    if all(message["role"] == "assistant" for message in [*row["prompt"], *sides[0]]):
        return NO_QUESTION
    if any(doubled_turn([*row["prompt"], *side]) for side in sides):
        return DOUBLED
    return EQUAL if "chosen" in row and row["chosen"] == row["rejected"] else None


def flaw_of_prompt(row: Mapping[str, Any]) -> str | None:
    """Return why a prompt should not be answered, in words to count it by, or `None`; see `formats.to_prompt`."""
    return DOUBLED if isinstance(row["prompt"], list) and doubled_turn(row["prompt"]) else None


# ---- messages ----
#
# Read conversations in their usual forms: roles, tool calls and tool results, in OpenAI's and in ShareGPT's form.
#
# The content of a message is a text, or a list of parts `{"type": "text", "text": ...}` to be joined.


# `role` and `content`, and, where the row has them, the keys of `KEPT`, `tool_calls` and `reasoning_content`.
Message = dict[str, Any]
ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"},
    # ShareGPT's words for a tool call and its result; OpenAI's first word for the latter was `function`.
    **{"function_call": "assistant", "tool": "tool", "observation": "tool", "function": "tool"},
}
KEPT = ("name", "tool_call_id")
# Names of an assistant's thoughts, as transformers knows them; chat templates read the first.
THOUGHTS = ("reasoning_content", "thinking", "reasoning")


def read_messages(origin: str, messages: Any) -> list[Message]:
    """Return a list of messages with the roles system, user, assistant and tool.

    Arguments of calls that are None are left out: `datasets` fills in the arguments of other rows' tools. In JSON
    text, which it cannot change, they are kept.

    Raises:
        InputError: when it is no such list, naming the origin and the message.
    """
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{origin}: expected a list of messages, got {str(messages)[:80]!r}")
    return _in_reach(origin, lambda: [_message(origin, message) for message in messages])


def read_tools(origin: str, tools: Any) -> list[dict[str, Any]] | None:
    """Return the tools of a row as JSON schemas, `None` if it has none; they may be a JSON text.

    Fields that are None are left out of values, which `datasets` fills up with the fields of other rows' tools.

    Raises:
        InputError: when they are neither.
    """
    raw_tools = tools
    tools = _in_reach(
        origin,
        lambda: _from_json(raw_tools.strip() or "null") if isinstance(raw_tools, str) else _without_none(raw_tools),
    )
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"{origin}: tools must be a list of JSON objects, or such a list as text, got {tools!r:.80}")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def role_of(message: Mapping[str, Any]) -> str | None:
    """Return the role of a message in any format, `None` where it has none."""
    role = message.get("role", message.get("from"))
    return ROLES.get(role) if isinstance(role, str) else None


def is_begun(prompt: str | list[Message]) -> bool:
    """Return whether a prompt ends with the beginning of its answer: words of the assistant, to be continued.

    A call of a tool is not continued, nor is a message without words.
    """
    if isinstance(prompt, str) or not prompt or prompt[-1]["role"] != "assistant" or prompt[-1].get("tool_calls"):
        return False
    return isinstance(prompt[-1].get("content"), str) and bool(prompt[-1]["content"])


def split_beginning(prompt: str | list[Message]) -> tuple[str | list[Message], str]:
    """Return a prompt without the beginning of its answer, and that beginning, which is empty if it has none."""
    return (prompt[:-1], prompt[-1]["content"]) if is_begun(prompt) else (prompt, "")


def content_text(content: str | list[dict[str, Any]] | None, placeholder: str = "<image>") -> str:
    """Return the words of a message's content, a text or a list of parts, with `placeholder` for each other part."""
    if not isinstance(content, list):
        return content or ""
    return "".join(part["text"] if part.get("type") == "text" else placeholder for part in content)


def joined_texts(origin: str, content: Any) -> Any:
    """Return the text of a content in the form of text parts; any other content as it is.

    Raises:
        InputError: for a part of another kind, naming the origin.
    """
    if not isinstance(content, list):
        return content
    for part in content:
        if not _is_text(part):
            raise InputError(f"{origin}: a part of a message must be a text here, got {str(part)[:80]!r}")
    return "".join(part["text"] for part in content)


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)


def words_of(message: Message) -> Message:
    """Return a message without its images: of a list of parts, the text."""
    is_in_parts = isinstance(message.get("content"), list)
    return {**message, "content": content_text(message["content"], "")} if is_in_parts else message


def spells(tokens: Sequence[str], value: Any) -> bool:
    """Return whether one of several texts occurs in messages, tools or other values of a row, at any depth."""
    if isinstance(value, str):
        return any(token in value for token in tokens)
    if isinstance(value, dict):
        return any(spells(tokens, part) for pair in value.items() for part in pair)
    return isinstance(value, (list, tuple)) and any(spells(tokens, each) for each in value)


def unspelled(tokens: Sequence[str], text: str) -> str:
    """Return a text in which nothing spells one of these tokens: with a space after the first letter of each."""
    for token in tokens:
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def _in_reach(origin: str, read: Callable[[], Any]) -> Any:
    """Return the parsed value; refuse values nested more deeply than Python can follow."""
    try:
        return read()
    except RecursionError:
        raise InputError(f"{origin}: a call or a tool is nested too deeply") from None


def doubled_turn(messages: Sequence[Message]) -> bool:
    """Return whether the user or the assistant speaks twice in a row, calls of tools aside."""
    return any(
        one["role"] == other["role"] and one["role"] in ("user", "assistant") and "tool_calls" not in one
        for one, other in pairwise(messages)
    )


def is_empty(message: Message) -> bool:
    """Return whether a message says nothing and calls no tool."""
    return not message["content"].strip() and "tool_calls" not in message


def _message(origin: str, message: Any) -> Message:
    fields = message if isinstance(message, dict) else {}
    role, content = fields.get("role", fields.get("from")), fields.get("content", fields.get("value"))
    role = role if isinstance(role, str) else None
    if role == "function_call":
        calls, content = content, ""
    else:
        calls = fields.get("tool_calls") or fields.get("function_call")
        if isinstance(calls, str) and not _from_json(calls):
            # No calls, written as JSON text.
            calls = None
    if calls and content is None:
        content = ""
    if role in ROLES and ROLES[role] == "tool" and not isinstance(content, str) and content is not None:
        # Without their type they may be any result, such as passages.
        in_parts = isinstance(content, list) and content and all(_is_text(each) and "type" in each for each in content)
        content = content if in_parts else json.dumps(content, ensure_ascii=False)
    content = joined_texts(origin, content)
    if role not in ROLES or not isinstance(content, str):
        raise InputError(
            f"{origin}: a message needs role (one of {', '.join(ROLES)}) and content, got {str(message)[:80]!r}"
        )
    read = {"role": ROLES[role], "content": content}
    if calls:
        read["tool_calls"] = _calls(origin, calls)
    thoughts = [fields[name] for name in THOUGHTS if isinstance(fields.get(name), str)]
    if thoughts and read["role"] == "assistant":
        read["reasoning_content"] = thoughts[0]
    return read | {name: fields[name] for name in KEPT if fields.get(name) is not None}


def _calls(origin: str, calls: Any) -> list[dict[str, Any]]:
    """Return calls in the form for chat templates, with their arguments as values, not as JSON text."""
    calls = _from_json(calls) if isinstance(calls, str) else _without_none(calls)
    read = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InputError(f"{origin}: a call of a tool needs a name and arguments, as JSON, got {call!r:.80}")
        arguments = function.get("arguments", function.get("parameters")) or {}
        arguments = _from_json(arguments) if isinstance(arguments, str) else arguments
        number = {"id": call["id"]} if call.get("id") is not None else {}
        read.append({"type": "function", **number, "function": {"name": function["name"], "arguments": arguments}})
    return read


def _without_none(value: Any) -> Any:
    """Return a value without the fields that are None in it, at any depth; entries of lists are kept."""
    if isinstance(value, dict):
        return {name: _without_none(each) for name, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, list) else value


def _from_json(text: str) -> Any:
    """Return the value of a JSON text, or the text if it is none."""
    try:
        return parse_json(text)
    except (ValueError, RecursionError):
        return text
