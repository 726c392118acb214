"""Requests of OpenAI's chat completions: what is read of them, and what is refused."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hfllm.data.formats import Message
from hfllm.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
# Read, or accepted with these values alone; a client that sends others would wait for what never comes.
ONLY: Mapping[str, Sequence[object]] = {
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "logit_bias": ({}, None),
    "response_format": ({"type": "text"}, None),
    "parallel_tool_calls": (True, None),
    "function_call": (None,),
    "functions": (None,),
}
# Of no effect on the answer.
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
READ = (
    *("model", "messages", "temperature", "top_p", "max_tokens", "max_completion_tokens", "stop", "seed", "n"),
    *("stream", "stream_options", "logprobs", "top_logprobs", "tools", "tool_choice"),
)
MOST_TOP, MOST_STOPS, MOST_CHOICES = 20, 4, 16
# Lower ones are greedy: they leave no token to sample.
LEAST_TEMPERATURE = 1e-3
# Of a message; others are refused, but where a client sends them empty, as from an answer of before.
OF_MESSAGE = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")


@dataclass(frozen=True)
class ChatRequest:
    """What a client asks for.

    Args:
        messages: as chat templates take them.
        sampling: arguments of `generate`; what the client does not name is the model's own.
        stop: strings before which an answer ends.
        num_top: see `StreamSettings`.
        max_new_tokens: 0 for the server's own limit.
        choices: number of answers.
        seed: of the sampling; `None` for another answer each time.
        tools: schemas of the functions that the client can call.
        is_streamed, has_usage: whether words are sent as they come, and a last chunk with the number of tokens.
    """

    messages: list[Message]
    sampling: dict[str, Any] = field(default_factory=dict)
    stop: Sequence[str] = ()
    num_top: int | None = None
    max_new_tokens: int = 0
    choices: int = 1
    seed: int | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    is_streamed: bool = False
    has_usage: bool = False


def read_request(body: object, reads_images: bool) -> ChatRequest:
    """Return a request's body as a `ChatRequest`.

    Args:
        reads_images: whether the model does.

    Raises:
        InputError: naming the field, the value and what is accepted.
    """
    if not isinstance(body, dict):
        raise InputError(f"the body is {_kind(body)}: expected an object with messages")
    for name, value in body.items():
        if name in ONLY and value not in ONLY[name]:
            accepted = " or ".join(json.dumps(each) for each in ONLY[name])
            raise InputError(f"{name} {_shown(value)} has no effect here: leave it out, or send {accepted}")
        if name not in (*READ, *ONLY, *IGNORED):
            raise InputError(f"unknown field {name!r}: accepted are {', '.join(READ)}")
    top = _number(body, "top_logprobs", int, 0, MOST_TOP)
    has_logprobs = _flag(body, "logprobs")
    if top is not None and not has_logprobs:
        raise InputError("top_logprobs needs logprobs: true")
    options = body.get("stream_options") or {}
    if not isinstance(options, dict) or set(options) - {"include_usage"}:
        raise InputError(f"stream_options {_shown(options)}: expected an object with include_usage")
    is_off = body.get("tool_choice") == "none"
    if body.get("tool_choice") not in (None, "none", "auto"):
        raise InputError(f"tool_choice {_shown(body['tool_choice'])}: the model chooses itself: expected none or auto")
    limit = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    return ChatRequest(
        messages=_messages(body.get("messages"), reads_images),
        sampling=_sampling(body),
        stop=_stop(body.get("stop")),
        num_top=(top or 0) if has_logprobs else None,
        max_new_tokens=_number(body, limit, int, 1) or 0,
        choices=_number(body, "n", int, 1, MOST_CHOICES) or 1,
        seed=_number(body, "seed", int, 0, 2**63 - 1),
        tools=() if is_off else _tools(body.get("tools")),
        is_streamed=_flag(body, "stream"),
        has_usage=_flag(options, "include_usage"),
    )


def _sampling(body: Mapping[str, Any]) -> dict[str, Any]:
    temperature = _number(body, "temperature", float, 0, 2)
    top_p = _number(body, "top_p", float, 0, 1)
    result: dict[str, Any] = {}
    if top_p is not None and top_p > 0:
        result |= {"do_sample": True, "top_p": top_p}
    if temperature is not None or top_p == 0:
        # A probability of no tokens is the likeliest one.
        is_greedy = top_p == 0 or (temperature is not None and temperature < LEAST_TEMPERATURE)
        if is_greedy:
            return {"do_sample": False}
        result |= {"do_sample": True} | ({} if temperature is None else {"temperature": float(temperature)})
    return result


def _number(
    body: Mapping[str, Any], name: str, kind: type[int] | type[float], least: float, most: float = float("inf")
) -> Any:
    value = body.get(name)
    if value is None:
        return None
    is_number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:
        noun, end = "an integer" if kind is int else "a number", "or more" if most == float("inf") else f"to {most:g}"
        raise InputError(f"{name} {_shown(value)}: expected {noun}, {least:g} {end}")
    return value


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{name} {_shown(value)}: expected true or false")
    return bool(value)


def _stop(value: object) -> list[str]:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(each, str) for each in stops):
        raise InputError(f"stop {_shown(value)}: expected a string, or at most {MOST_STOPS} of them")
    return [each for each in stops if each]


def _tools(value: object) -> list[dict[str, Any]]:
    if value is None or value == []:
        return []
    good = isinstance(value, list) and all(isinstance(each, dict) and each.get("type") == "function" for each in value)
    functions = [each.get("function") for each in value] if good else [None]
    if not all(isinstance(each, dict) and isinstance(each.get("name"), str) for each in functions):
        raise InputError(f"tools {_shown(value)}: expected a list of {{type: function, function: {{name, ...}}}}")
    return value


# ---- messages ----


def _messages(value: object, reads_images: bool) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise InputError(f"messages {_shown(value)}: expected a list of at least one message")
    names: dict[str, str] = {}
    return [_message(index, each, names, reads_images) for index, each in enumerate(value)]


def _message(index: int, value: object, names: dict[str, str], reads_images: bool) -> Message:
    """Return a message as chat templates take it.

    Args:
        names: of the called functions by the ids of their calls, so far.
    """
    where = f"messages[{index}]"
    if not isinstance(value, dict) or not isinstance(value.get("role"), str) or value["role"] not in ROLES:
        raise InputError(f"{where} {_shown(value)}: expected an object with a role: {', '.join(ROLES)}")
    role = ROLES[value["role"]]
    for name in value:
        if name not in OF_MESSAGE and value[name] not in (None, "", [], {}):
            raise InputError(f"{where}.{name} has no effect here: leave it out")
    message: Message = {"role": role, "content": _content(where, value.get("content"), role, reads_images)}
    if role == "assistant" and isinstance(value.get("reasoning_content"), str):
        message["reasoning_content"] = value["reasoning_content"]
    if calls := value.get("tool_calls"):
        if role != "assistant" or not isinstance(calls, list):
            raise InputError(f"{where}.tool_calls {_shown(calls)}: expected a list, of an assistant's message")
        message["tool_calls"] = [_call(f"{where}.tool_calls[{at}]", call, names) for at, call in enumerate(calls)]
    if role == "tool":
        message["name"] = value.get("name") or names.get(str(value.get("tool_call_id")), "tool")
    return message


def _content(where: str, value: object, role: str, reads_images: bool) -> str | list[dict[str, Any]]:
    if value is None and role == "assistant":
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InputError(f"{where}.content {_shown(value)}: expected a text, or a list of parts")
    parts = [_part(f"{where}.content[{at}]", part, reads_images) for at, part in enumerate(value)]
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


def _part(where: str, value: object, reads_images: bool) -> dict[str, Any]:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text" and isinstance(value.get("text"), str):
        return {"type": "text", "text": value["text"]}
    if kind == "image_url":
        if not reads_images:
            raise InputError(f"{where}: the model reads words alone")
        url = value.get("image_url")
        return {"type": "image", "image": _image(where, url.get("url") if isinstance(url, dict) else url)}
    raise InputError(f"{where} {_shown(value)}: expected a part of type text or image_url")


def _image(where: str, url: object) -> "Image":
    """Return the image of a data URL. Others are refused: a server that fetches them reaches into its own network."""
    from hfllm.data.images.files import read_image

    if not isinstance(url, str) or not url.startswith("data:image/"):
        raise InputError(f"{where}.image_url.url {_shown(url)}: expected data:image/...;base64,...")
    return read_image(url, where)


def _call(where: str, value: object, names: dict[str, str]) -> dict[str, Any]:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError(f"{where} {_shown(value)}: expected a call of a function with a name")
    arguments = function.get("arguments") or "{}"
    try:
        read = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        raise InputError(f"{where}.function.arguments {_shown(arguments)}: not JSON") from None
    if not isinstance(read, dict):
        raise InputError(f"{where}.function.arguments {_shown(arguments)}: expected an object")
    names[str(value.get("id"))] = function["name"]
    return {"type": "function", "function": {"name": function["name"], "arguments": read}}


def _shown(value: object) -> str:
    # In ASCII: JSON may spell halves of characters, which no answer can hold.
    return json.dumps(value, default=str)[:80]


def _kind(value: object) -> str:
    return "nothing" if value is None else f"of type {type(value).__name__}"
