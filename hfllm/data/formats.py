"""Rows of all accepted data formats: their flaws, their messages, and conversion to the columns of TRL's trainers.

Every function of conversion maps one row, and refuses an unreadable row, naming its origin and its columns.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

from hfllm.data.sources import Source, parse_json
from hfllm.errors import InputError, refuse_if

# ---- rows and their flaws ----

NO_QUESTION = "without a question"
NO_ANSWER, DOUBLED, EQUAL, TIE = "without an answer", "with doubled turns", "with equal answers", "with a tie"
UNDESIRED = "with the label false, answers that are not wanted"
NOT_LEARNED = "whose answers are all marked as not to be learned"
OPPOSITE = "with a rejected answer scored above the chosen one"


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
        first: the origin of the first row by reason.
    """

    def __init__(self, total: int = 0):
        self.total, self.reasons = total, Counter()
        self.first: dict[str, str] = {}

    def add(self, reason: str, origin: str = "") -> None:
        """Count a row."""
        self.reasons[reason] += 1
        self.first.setdefault(reason, origin)

    @property
    def count(self) -> int:
        """How many rows are left out."""
        return self.reasons.total()

    def __str__(self) -> str:
        reasons = []
        for reason, count in self.reasons.most_common():
            first = f" ({'first: ' * (count > 1)}{self.first[reason]})" if self.first[reason] else ""
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
    **{"developer": "system", "bot": "assistant", "model": "assistant"},
    # ShareGPT's words for a tool call and its result; OpenAI's first word for the latter was `function`.
    **{"function_call": "assistant", "tool": "tool", "observation": "tool", "function": "tool"},
}
KEPT = ("name", "tool_call_id")
# Names of an assistant's thoughts, as transformers knows them; chat templates read the first.
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
# Whether an answer is learned: OpenAI's `weight`, 0 or 1, and `train` of others. A message that is read has `train`,
# and only where it is False.
TRAIN, WEIGHT = "train", "weight"
# The keys of messages that are read.
MESSAGE_KEYS = frozenset(
    ("role", "from", "content", "value", "tool_calls", "function_call", TRAIN, WEIGHT, *KEPT, *THOUGHTS)
)


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


def in_parts(messages: Sequence[Message]) -> list[Message]:
    """Return messages whose contents are lists of parts, the form for templates of processors."""

    def listed(content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    return [{**each, "content": listed(each["content"])} if "content" in each else each for each in messages]


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
    if read["role"] == "assistant" and not _is_to_learn(origin, fields):
        read[TRAIN] = False
    return read | {name: fields[name] for name in KEPT if fields.get(name) is not None}


def _is_to_learn(origin: str, fields: Mapping[str, Any]) -> bool:
    """Return whether a message is learned; a csv file may have a text.

    Raises:
        InputError: for a mark that is neither yes nor no.
    """
    marks = {name: fields[name] for name in (TRAIN, WEIGHT) if fields.get(name) is not None}
    values = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
    for name, mark in marks.items():
        if str(mark).strip().lower() not in values:
            raise InputError(f"{origin}: {name} of a message is {mark!r}; expected 0 or 1, or false or true")
    return all(values[str(mark).strip().lower()] for mark in marks.values())


def learned_turns(messages: Sequence[Message]) -> list[int]:
    """Return the indices of the assistant's messages that are learned."""
    return [
        index
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and message.get(TRAIN) is not False
    ]


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


# ---- conversion ----

Row = dict[str, Any]
Converted = TypeVar("Converted")
SFT_FORMATS = (
    "instruction+output (Alpaca)",
    "instruction+response (Dolly)",
    "prompt+completion",
    "prompt+response",
    "messages",
    "conversations (ShareGPT)",
    "inputs+targets (FLAN)",
)
PREFERENCE_FORMATS = (
    "input+preferred_output+non_preferred_output (OpenAI)",
    "prompt+response_a+response_b+preference",
    "prompt+chosen+rejected",
    "instruction+chosen+rejected (LLaMA-Factory)",
    "chosen+rejected",
    "conversations+chosen+rejected (ShareGPT)",
    "instruction+response1+response2+label (PandaLM)",
    "input+output_1+output_2+label (LLMBar)",
    "instruction+completions with scores (UltraFeedback)",
)
# OpenAI's comparison.
OPENAI = ("preferred_output", "non_preferred_output")
# Scores beside chosen and rejected answers, of which the first is the higher one.
SCORED = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"),
)
PROMPT_FORMATS = (
    "prompt",
    "instruction",
    "messages",
    "conversations (ShareGPT)",
    "text",
    "chosen+rejected (what both begin with)",
)
# The columns of an instruction and of its answer.
ANSWERED = (
    *(("instruction", "output"), ("instruction", "response"), ("prompt", "completion"), ("inputs", "targets")),
    *(("prompt", "response"), ("prompt", "output"), ("instruction", "completion")),
)
# The columns of a pair of answers with a label: which is better, the first (1) or the second (2), or neither (0).
LABELED = (("response1", "response2"), ("output_1", "output_2"))
SCORES = ("overall_score", "score", "rating", "fine-grained_score")
# Our names in `--column_mapping`: every column of a format.
COLUMNS = (
    *("text", "content", "instruction", "input", "context", "output", "prompt", "completion", "response", "inputs"),
    *("targets", "messages", "conversations", "system", "history", "tools", "chosen", "rejected"),
    *("response_a", "response_b"),
    *("preference", "response1", "response2", "output_1", "output_2", "label", "completions", "scores"),
    *("image", "images"),
)
HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")


def convert(source: Source, mapper: Callable[[str, Row], Converted]) -> list[Converted]:
    """Map every row of `source` with `mapper(origin, row)`."""
    return [mapper(origin, row) for origin, row in source]


def to_text(origin: str, row: Row) -> str:
    """Return the text of a pretraining row: its column `text` or `content`."""
    for column in ("text", "content"):
        if isinstance(row.get(column), str):
            return row[column]
    # A number or a list, where there is such a column.
    for column in ("text", "content"):
        if row.get(column) is not None:
            raise InputError(f"{origin}: {column} must be a text, got {row[column]!r:.60}")
    raise _unreadable(origin, row, ("text", "content"))


def infilling_prompt(prefix: str, suffix: str, suffix_first: bool = False) -> str:
    """Return Code Llama's prompt for the text between `prefix` and `suffix`; the completion ends with `<EOT>`.

    Args:
        suffix_first: the order suffix, prefix (SPM), where the completion follows the prefix, instead of prefix,
            suffix (PSM). Both are trained in equal shares (arXiv:2308.12950, section 2.3).
    """
    return f"<PRE> <SUF>{suffix} <MID> {prefix}" if suffix_first else f"<PRE> {prefix} <SUF>{suffix} <MID>"


def to_sft(origin: str, row: Row) -> Row:
    """Convert an instruction row to conversational `prompt` and `completion`, and `tools`; see `SFT_FORMATS`.

    The completion of a conversation begins with the assistant's first turn: each of its turns is to be learned.

    Raises:
        BadRow: when there is no answer at its end, or its `label` says that the answer is undesired (KTO).
        InputError: when the row cannot be read.
    """
    # A csv file has a text; anything else is the label of something else, and not read.
    is_mark = str(dict.get(row, "label")).strip().lower() in ("true", "false")
    if is_mark and str(label := row["label"]).strip().lower() == "false":
        raise BadRow(f"{origin}: label is {label!r}: the answer is one that is not wanted", UNDESIRED)
    tools = read_tools(origin, row.get("tools"))
    found = [columns for columns in ANSWERED if _has(row, *columns)]
    found += [(column,) for column in ("messages", "conversations") if _has(row, column)]
    if not found:
        raise _unreadable(origin, row, SFT_FORMATS)
    converted = _demonstration(origin, row, found[0])
    for others in found[1:]:
        _refuse_other_answer(origin, row, converted, found[0], others)
    return to_be_learned(origin, converted | ({"tools": tools} if tools else {}))


def to_be_learned(origin: str, row: Row) -> Row:
    """Return a row with `prompt` and `completion`, unless all answers in its completion are marked otherwise.

    Raises:
        BadRow: when they are.
    """
    # A first message of the conversation answers nothing.
    answers = [index for index in learned_turns(row["completion"]) if index or row["prompt"]]
    if not answers and any(message.get(TRAIN) is False for message in row["completion"]):
        raise BadRow(f"{origin}: a row {NOT_LEARNED} ({TRAIN}, {WEIGHT})", NOT_LEARNED)
    return row


def _demonstration(origin: str, row: Row, columns: Sequence[str]) -> Row:
    """Return prompt and completion of these columns: a question's and its answer's, or a conversation's."""
    if len(columns) == 1:
        messages = _ended(origin, columns[0], _conversation(origin, row, columns[0]))
        first = [message["role"] for message in messages].index("assistant")
        return {"prompt": messages[:first], "completion": messages[first:]}
    question, answer = columns
    prompt = _instruction(origin, row) if question == "instruction" else _as_messages(origin, row[question])
    completion = _ended(origin, answer, _answer(origin, row[answer]))
    return {"prompt": _after_history(origin, row, prompt), "completion": completion}


def _refuse_other_answer(origin: str, row: Row, converted: Row, columns: Sequence[str], others: Sequence[str]) -> None:
    """Refuse a row with another answer to the same question in other columns; what else they hold is not read."""
    try:
        other = _demonstration(origin, dict(row), others)
    except InputError:
        return
    one, another = ([_words(each[side]) for side in ("prompt", "completion")] for each in (converted, other))
    answers = [" ".join(text for _, text in completion) for _, completion in (one, another)]
    if one[0] == another[0] and one[1] != another[1] and all(answers):
        raise InputError(
            f"{origin}: {' and '.join(columns)} give another answer than {' and '.join(others)}: leave one of them out"
        )


def _words(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"].strip()) for message in messages]


def _after_history(origin: str, row: Row, prompt: list[Message]) -> list[Message]:
    """Return a prompt after what its row has of the columns `system` and `history`, as LLaMA-Factory has them."""
    begin = int(bool(prompt) and prompt[0]["role"] == "system")
    return _after_system(row, [*prompt[:begin], *_history(origin, row), *prompt[begin:]])


def _history(origin: str, row: Row) -> list[Message]:
    """Return the messages of a row's column `history`: pairs of a question and its answer, or messages, also as JSON.

    Anything else is of another kind, and not read.
    """
    history = dict.get(row, "history")
    history = _from_json(history) if isinstance(history, str) else history
    if not isinstance(history, list) or not history:
        return []
    if all(isinstance(each, dict) and role_of(each) for each in history):
        return read_messages(origin, row["history"] if isinstance(row["history"], list) else history)
    is_pairs = all(isinstance(each, list | tuple) and [*map(type, each)] == [str, str] for each in history)
    # Now it counts as read.
    history = history if is_pairs and row["history"] else []
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in history for role, text in zip(roles, pair, strict=True)]


def _after_system(row: Row, messages: list[Message]) -> list[Message]:
    """Return messages after the one of a row's column `system`, if it has one and they begin with no other."""
    system = dict.get(row, "system")
    if isinstance(system, str) and system.strip() and not (messages and messages[0]["role"] == "system"):
        return [{"role": "system", "content": row["system"]}, *messages]
    return messages


def last_turn(row: Row) -> Row:
    """Return a row of `to_sft` whose completion is only the last turn; the turns before it are the prompt."""
    prompt, completion = row["prompt"], row["completion"]
    return (
        row if len(completion) == 1 else {**row, "prompt": [*prompt, *completion[:-1]], "completion": completion[-1:]}
    )


def to_preference(origin: str, row: Row) -> Row:
    """Convert a comparison to conversational `prompt`, `chosen` and `rejected`, and `tools`; see `PREFERENCE_FORMATS`.

    Raises:
        BadRow: when neither answer is better.
        InputError: when the row cannot be read.
    """
    compared = _compared(origin, row)
    given = dict.get(row, "input")
    tools = read_tools(origin, row.get("tools") or (given.get("tools") if isinstance(given, dict) else None))
    compared["prompt"] = _after_history(origin, row, compared["prompt"])
    return compared | ({"tools": tools} if tools else {})


def _compared(origin: str, row: Row) -> Row:
    if _has(row, "input", *OPENAI):
        given = row["input"]
        prompt = given.get("messages") if isinstance(given, dict) else given
        return _comparison(_as_messages(origin, prompt), *(_answer(origin, row[side]) for side in OPENAI))
    if _has(row, "prompt", "response_a", "response_b", "preference"):
        if row["preference"] not in ("a", "b"):
            raise InputError(f"{origin}: preference is {row['preference']!r}; expected 'a' or 'b'")
        chosen, rejected = row["response_a"], row["response_b"]
        if row["preference"] == "b":
            chosen, rejected = rejected, chosen
        return _comparison(_as_messages(origin, row["prompt"]), _answer(origin, chosen), _answer(origin, rejected))
    for first, second in LABELED:
        label = next((column for column in ("label", "preference") if _has(row, column)), None)
        if label and _has(row, first, second) and _instruction_column(row) is not None:
            chosen, rejected = _by_label(origin, label, row[label], row[first], row[second])
            return _comparison(_question(origin, row), _answer(origin, chosen), _answer(origin, rejected))
    if _has(row, "chosen", "rejected"):
        return _chosen_and_rejected(origin, row)
    if _has(row, "completions") and _instruction_column(row) is not None:
        best, worst = _best_and_worst(origin, row)
        return _comparison(_question(origin, row), _answer(origin, best), _answer(origin, worst))
    raise _unreadable(origin, row, PREFERENCE_FORMATS)


def _chosen_and_rejected(origin: str, row: Row) -> Row:
    """Return the comparison of a row with answers, or with whole conversations, in `chosen` and `rejected`."""
    for columns in SCORED:
        better, worse = (_number(row.get(column)) for column in columns)
        if better is not None and worse is not None and better < worse:
            raise BadRow(f"{origin}: {columns[0]} is {better:g}, below {columns[1]}, {worse:g}", OPPOSITE)
    for column in ("prompt", "conversations", "instruction"):
        if not _has(row, column):
            continue
        # UltraFeedback's and others' answers repeat the prompt; the answers by themselves begin with the assistant.
        sides = [row[side] for side in ("chosen", "rejected")]
        if not any(isinstance(side, list) and _role(origin, side) in ("user", "system") for side in sides):
            is_instruction = column == "instruction"
            prompt = _instruction(origin, row) if is_instruction else _as_messages(origin, row[column])
            return _comparison(prompt, *(_answer(origin, side) for side in sides))
    chosen, rejected = (_transcript(origin, row[column]) for column in ("chosen", "rejected"))
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    refuse_if(shared == 0, f"{origin}: chosen and rejected do not begin with the same prompt")
    return _comparison(chosen[:shared], chosen[shared:], rejected[shared:])


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (OverflowError, TypeError, ValueError):
        return None


def _role(origin: str, messages: list) -> str | None:
    return read_messages(origin, messages[:1])[0]["role"] if messages else None


def _by_label(origin: str, column: str, label: Any, first: Any, second: Any) -> tuple[Any, Any]:
    """Return the better answer and the other; a label may be a text, as in a csv file."""
    text = str(label).strip()
    if text in ("1", "1.0"):
        return first, second
    if text in ("2", "2.0"):
        return second, first
    if text in ("0", "0.0"):
        raise BadRow(f"{origin}: {column} is 0, a tie", TIE)
    raise InputError(f"{origin}: {column} is {label!r}; expected 1 or 2, which answer is better, or 0 for a tie")


def _best_and_worst(origin: str, row: Row) -> tuple[Any, Any]:
    """Return the answers with the highest and the lowest score.

    `completions` are objects with `response` and a score, or texts next to a column of scores.
    """
    completions, beside = row["completions"], row.get("scores") or row.get("ratings")
    scored = []
    for index, completion in enumerate(completions if isinstance(completions, list) else []):
        if isinstance(completion, dict):
            answer = completion.get("response", completion.get("text", completion.get("content")))
            score = next((completion[name] for name in SCORES if completion.get(name) is not None), None)
        else:
            answer, score = completion, None
        if score is None and isinstance(beside, list) and index < len(beside):
            score = beside[index]
        try:
            scored.append((float(score), answer))
        except (TypeError, ValueError):
            raise InputError(
                f"{origin}: completion {index + 1} has no score; expected {', '.join(SCORES)}, or a column scores"
            ) from None
    if len(scored) < 2:
        raise BadRow(
            f"{origin}: {len(scored)} completion(s), of which none is better", "with fewer than two completions"
        )
    # The first of equals.
    best, worst = max(scored, key=lambda pair: pair[0]), min(scored, key=lambda pair: pair[0])
    if best[0] == worst[0]:
        raise BadRow(f"{origin}: all {len(scored)} completions have the score {best[0]:g}", TIE)
    return best[1], worst[1]


def to_prompt(origin: str, row: Row) -> Row:
    """Convert a prompt row: `prompt` as text or a conversation, and every other column unchanged.

    A row with `system` or `history` is a conversation.
    """
    # Rewards may read each column.
    row = {name: row[name] for name in row}
    return {**row, "prompt": prompt_of(origin, row)}


def prompt_of(origin: str, row: Row) -> str | list[Message]:
    """Return the prompt of a row, text or a conversation with its `system` and `history`; no other column is read."""
    prompt = _prompt_of(origin, row)
    messages = as_messages(prompt)
    told = _after_history(origin, row, messages)
    return prompt if told == messages else told


def _prompt_of(origin: str, row: Row) -> str | list[Message]:
    if "prompt" in row:
        prompt = row["prompt"]
        return prompt if isinstance(prompt, str) else read_messages(origin, prompt)
    if "instruction" in row:
        return _instruction(origin, row)
    for column in ("messages", "conversations"):
        if column in row:
            messages = _conversation(origin, row, column)
            return messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if isinstance(row.get("text"), str):
        return row["text"]
    if _has(row, "chosen", "rejected"):
        return _chosen_and_rejected(origin, row)["prompt"]
    raise _unreadable(origin, row, PROMPT_FORMATS)


def as_messages(prompt: str | list[Message]) -> list[Message]:
    """Return a text prompt as the user's turn of a conversation; a conversation unchanged."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def is_blank(prompt: str | list[Message]) -> bool:
    """Return whether a prompt is empty; a prompt with an image is not."""
    return not any(content_text(message["content"]).strip() for message in as_messages(prompt))


def as_completion(prompt: str | list[Message], text: str) -> str | list[Message]:
    """Return a response in the form of its prompt: text, or the assistant's turn of a conversation, all of it."""
    if isinstance(prompt, str):
        return text
    return [{"role": "assistant", "content": split_beginning(prompt)[1] + text}]


def _has(row: Row, *columns: str) -> bool:
    # Looked for, and not yet used: see `ReadRow`.
    return all(dict.get(row, column) is not None for column in columns)


def _comparison(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> Row:
    # Marks of what is learned are of demonstrations.
    sides = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return {
        name: [{key: value for key, value in message.items() if key != TRAIN} for message in messages]
        for name, messages in sides.items()
    }


def _instruction_column(row: Row) -> str | None:
    """Return the column of a labeled pair's instruction, `None` if there is none."""
    return next((column for column in ("instruction", "prompt", "input") if row.get(column) is not None), None)


def _question(origin: str, row: Row) -> list[Message]:
    column = _instruction_column(row)
    return _instruction(origin, row) if column == "instruction" else _as_messages(origin, row[column])


def _instruction(origin: str, row: Row) -> list[Message]:
    context = row.get("input") or row.get("context")
    return _as_messages(origin, f"{row['instruction']}\n{context}" if context else row["instruction"])


def _as_messages(origin: str, prompt: str | list) -> list[Message]:
    return as_messages(prompt) if isinstance(prompt, str) else read_messages(origin, prompt)


def _answer(origin: str, answer: Any) -> list[Message]:
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    return read_messages(origin, answer if isinstance(answer, list) else [answer])


def _conversation(origin: str, row: Row, column: str) -> list[Message]:
    """Return the messages of a row, after the message of a column `system` if it has one."""
    return _after_system(row, read_messages(origin, row[column]))


def _ended(origin: str, column: str, messages: Sequence[Message]) -> list[Message]:
    if messages[-1]["role"] != "assistant":
        raise BadRow(f"{origin}: {column} must end with the assistant, got {messages[-1]['role']!r}", NO_ANSWER)
    return list(messages)


def _transcript(origin: str, text: Any) -> list[Message]:
    """Return the messages of a list, or of a text in Anthropic's `\\n\\nHuman: ... \\n\\nAssistant: ...` form."""
    if not isinstance(text, str):
        return read_messages(origin, text)
    parts = HH_TURN.split(text)
    if len(parts) < 3 or parts[0].strip():
        raise InputError(f"{origin}: without a prompt column, chosen and rejected must be messages or transcripts")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": content.strip()}
        for speaker, content in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _unreadable(origin: str, row: Row, accepted: tuple[str, ...]) -> InputError:
    return InputError(
        f"{origin}: columns {', '.join(row) or '(none)'}; expected one of: {'; '.join(accepted)}; name others by "
        f"--column_mapping OURS=THEIRS{_likely_mapping(row, accepted)}"
    )


def _likely_mapping(row: Row, accepted: Sequence[str]) -> str:
    """Return what a row's columns are likely called here, such as `, here prompt=Question completion=Answer`."""
    alike = {"question": "prompt", "query": "prompt", "answer": "completion", "reply": "completion"}
    names = {name.split(" ")[0] for each in accepted for name in each.split("+")}
    pairs: dict[str, str] = {}
    for column in row:
        plain = column.strip().lower()
        ours = plain if plain in names else alike.get(plain)
        if ours in names and ours not in row:
            pairs.setdefault(ours, f"{ours}={column}")
    return f", here {' '.join(pairs.values())}" if pairs else ""
