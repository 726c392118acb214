"""Convert rows of all accepted data formats to the columns of TRL's trainers.

Every function maps one row, and refuses a row that it cannot read, naming its origin and its columns.
"""

import re
from collections.abc import Callable
from typing import Any, TypeVar

from hfllm.data.sources import Source
from hfllm.errors import InputError

Row = dict[str, Any]
Message = dict[str, str]
Converted = TypeVar("Converted")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SFT_FORMATS = (
    "instruction+output (Alpaca)",
    "instruction+response (Dolly)",
    "prompt+completion",
    "messages",
    "conversations (ShareGPT)",
    "inputs+targets (FLAN)",
)
PREFERENCE_FORMATS = (
    "prompt+response_a+response_b+preference",
    "prompt+chosen+rejected",
    "chosen+rejected",
    "conversations+chosen+rejected (ShareGPT)",
)
PROMPT_FORMATS = ("prompt", "instruction", "messages", "text")
HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")


def convert(source: Source, mapper: Callable[[str, Row], Converted]) -> list[Converted]:
    """Map every row of `source` with `mapper(origin, row)`."""
    return [mapper(origin, row) for origin, row in source]


def to_text(origin: str, row: Row) -> str:
    """Return the text of a pretraining row: its column `text` or `content`."""
    for column in ("text", "content"):
        if isinstance(row.get(column), str):
            return row[column]
    raise _unreadable(origin, row, ("text", "content"))


def infilling_prompt(prefix: str, suffix: str, suffix_first: bool = False) -> str:
    """Return Code Llama's prompt for the text between `prefix` and `suffix`; the completion ends with `<EOT>`.

    Args:
        suffix_first: the order suffix, prefix (SPM), where the completion follows the prefix, instead of prefix,
            suffix (PSM). Both are trained in equal shares (arXiv:2308.12950, section 2.3).
    """
    return f"<PRE> <SUF>{suffix} <MID> {prefix}" if suffix_first else f"<PRE> {prefix} <SUF>{suffix} <MID>"


def to_sft(origin: str, row: Row) -> Row:
    """Convert an instruction row to conversational `prompt` and `completion`; see `SFT_FORMATS`."""
    if _has(row, "instruction", "output") or _has(row, "instruction", "response"):
        answer = row["output"] if "output" in row else row["response"]
        return {"prompt": _instruction(origin, row), "completion": _said(origin, answer)}
    if _has(row, "prompt", "completion"):
        return {"prompt": _as_messages(origin, row["prompt"]), "completion": _said(origin, row["completion"])}
    if _has(row, "inputs", "targets"):
        return {"prompt": _as_messages(origin, row["inputs"]), "completion": _said(origin, row["targets"])}
    for column in ("messages", "conversations"):
        if column in row:
            messages = _messages(origin, row[column])
            if messages[-1]["role"] != "assistant":
                raise InputError(f"{origin}: {column} must end with the assistant, got {messages[-1]['role']!r}")
            return {"prompt": messages[:-1], "completion": messages[-1:]}
    raise _unreadable(origin, row, SFT_FORMATS)


def to_preference(origin: str, row: Row) -> Row:
    """Convert a comparison to conversational `prompt`, `chosen` and `rejected`; see `PREFERENCE_FORMATS`."""
    if _has(row, "prompt", "response_a", "response_b", "preference"):
        if row["preference"] not in ("a", "b"):
            raise InputError(f"{origin}: preference is {row['preference']!r}; expected 'a' or 'b'")
        chosen, rejected = row["response_a"], row["response_b"]
        if row["preference"] == "b":
            chosen, rejected = rejected, chosen
        return _comparison(_as_messages(origin, row["prompt"]), _said(origin, chosen), _said(origin, rejected))
    if _has(row, "prompt", "chosen", "rejected"):
        prompt = _as_messages(origin, row["prompt"])
        return _comparison(prompt, _said(origin, row["chosen"]), _said(origin, row["rejected"]))
    if _has(row, "conversations", "chosen", "rejected"):
        prompt = _messages(origin, row["conversations"])
        return _comparison(prompt, _said(origin, row["chosen"]), _said(origin, row["rejected"]))
    if _has(row, "chosen", "rejected"):
        chosen, rejected = (_transcript(origin, row[column]) for column in ("chosen", "rejected"))
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        if shared == 0:
            raise InputError(f"{origin}: chosen and rejected do not begin with the same prompt")
        return _comparison(chosen[:shared], chosen[shared:], rejected[shared:])
    raise _unreadable(origin, row, PREFERENCE_FORMATS)


def to_prompt(origin: str, row: Row) -> Row:
    """Convert a prompt row: `prompt` as text or a conversation, and every other column unchanged."""
    if "prompt" in row:
        prompt = row["prompt"]
        return {**row, "prompt": prompt if isinstance(prompt, str) else _messages(origin, prompt)}
    if "instruction" in row:
        return {**row, "prompt": _instruction(origin, row)}
    if "messages" in row:
        messages = _messages(origin, row["messages"])
        return {**row, "prompt": messages[:-1] if messages[-1]["role"] == "assistant" else messages}
    if isinstance(row.get("text"), str):
        return {**row, "prompt": row["text"]}
    raise _unreadable(origin, row, PROMPT_FORMATS)


def as_messages(prompt: str | list[Message]) -> list[Message]:
    """Return a text prompt as the user's turn of a conversation; a conversation unchanged."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def as_completion(prompt: str | list[Message], text: str) -> str | list[Message]:
    """Return a response in the form of its prompt: text, or the assistant's turn of a conversation."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _has(row: Row, *columns: str) -> bool:
    return all(row.get(column) is not None for column in columns)


def _comparison(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _instruction(origin: str, row: Row) -> list[Message]:
    context = row.get("input") or row.get("context")
    return _as_messages(origin, f"{row['instruction']}\n{context}" if context else row["instruction"])


def _as_messages(origin: str, prompt: str | list) -> list[Message]:
    return as_messages(prompt) if isinstance(prompt, str) else _messages(origin, prompt)


def _said(origin: str, answer: Any) -> list[Message]:
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    return _messages(origin, answer if isinstance(answer, list) else [answer])


def _messages(origin: str, messages: Any) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{origin}: expected a list of messages, got {str(messages)[:80]!r}")
    converted = []
    for message in messages:
        role = message.get("role", message.get("from")) if isinstance(message, dict) else None
        content = message.get("content", message.get("value")) if isinstance(message, dict) else None
        if role not in ROLES or not isinstance(content, str):
            raise InputError(
                f"{origin}: a message needs role (one of {', '.join(ROLES)}) and content, got {str(message)[:80]!r}"
            )
        converted.append({"role": ROLES[role], "content": content})
    return converted


def _transcript(origin: str, text: Any) -> list[Message]:
    """Return the messages of a list, or of a text in Anthropic's `\\n\\nHuman: ... \\n\\nAssistant: ...` form."""
    if not isinstance(text, str):
        return _messages(origin, text)
    parts = HH_TURN.split(text)
    if len(parts) < 3 or parts[0].strip():
        raise InputError(f"{origin}: without a prompt column, chosen and rejected must be messages or transcripts")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": content.strip()}
        for speaker, content in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _unreadable(origin: str, row: Row, accepted: tuple[str, ...]) -> InputError:
    return InputError(f"{origin}: columns {', '.join(row) or '(none)'}; expected one of: {'; '.join(accepted)}")
