"""Calls of tools in a policy's turns, and the tokens of the turns that answer them."""

import copy
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from hfllm.data.rows import Message
from hfllm.data.tokenizer import template_errors
from hfllm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REWRITES = "tools: the chat template writes a turn otherwise when a result follows it: set one that does not"
UNREADABLE = "{'error': 'the result cannot be written as plain text'}"
# Replies that are kept: tools say the same again and again.
KEPT_REPLIES = 512


class ToolTurns:
    """The policy's own way to call tools and to read their results, by its chat template and response template.

    Args:
        tokenizer: the policy's. Without a `response_template` it gets the one that TRL knows for its chat template.
        schemas: of the tools, as `get_json_schema` gives them.
        end_token_ids: tokens that end a turn.

    Raises:
        InputError: when its chat template cannot write calls and results, or calls cannot be told from its text.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        schemas: Sequence[dict[str, Any]],
        end_token_ids: Sequence[int],
    ):
        from trl.chat_template_utils import supports_tool_calling

        given, tokenizer = tokenizer, _with_one_template(tokenizer)
        self.tokenizer, self.schemas, self.end_token_ids = tokenizer, list(schemas), set(end_token_ids)
        if not supports_tool_calling(tokenizer):
            raise InputError(
                "tools: the tokenizer's chat template cannot write an assistant's tool_calls and a tool's message"
            )
        _find_response_template(tokenizer)
        given.response_template = tokenizer.response_template
        self.chat_template = _lasting_template(tokenizer)
        added, template = tokenizer.added_tokens_decoder.items(), str(self.chat_template)
        self.control = {
            number
            for number, token in added
            if token.special or (token.content in template and not token.content.isspace())
        }
        asked = _calling([])[:1]
        before, opened = (self._tokens(asked, add_generation_prompt=is_opened) for is_opened in (False, True))
        self.opening, self._asked = opened[len(before) :], before
        self._before = lru_cache(KEPT_REPLIES)(self._tokens_before)
        self._written = lru_cache(KEPT_REPLIES)(self._write)
        self._turn_end = set(self._before(("tool",))[-1:]) & self.end_token_ids
        # Of one result, so that a chat template that does not serve is refused before training.
        self._skeletons = {1: self._control_of(self._reply([_message_of("tool", "x")]))}

    def parse(self, turn_ids: Sequence[int]) -> Message:
        """Return the assistant's message of a turn, with `tool_calls` where it has them.

        As in TRL, a turn whose calls cannot be read, such as broken JSON, is a message of plain text.
        """
        from trl.chat_template_utils import parse_response

        try:
            message = parse_response(self.tokenizer, list(turn_ids), prefix=self.opening, tools=self.schemas)
            if message.get("tool_calls"):
                message["tool_calls"] = _encodable(message["tool_calls"])
            return message
        # What TRL does not expect a model to write, such as JSON that is nested too deeply.
        except Exception:
            return {"role": "assistant", "content": self.tokenizer.decode(turn_ids, skip_special_tokens=True)}

    def reply_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens from the end of a turn with calls to the beginning of the policy's next turn.

        What tools say is plain text, also where it spells special tokens: they cannot open or end a turn. A result
        that would is replaced in place, in `messages`, by an error.
        """
        for content in (UNREADABLE, ""):
            try:
                ids = self._reply(messages)
                if self._control_of(ids) == self._skeleton(len(messages)):
                    return ids
            # The tokenizer makes a special token even of plain text.
            except ValueError:
                pass
            for message in messages:
                message |= _message_of("tool", content)
        # Nothing of what the tools said is left.
        return self._reply(messages)

    def end_of(self, turn_ids: Sequence[int]) -> list[int]:
        """Return the token that a turn lacks because a text has ended it, such as one of `stop_strings`."""
        return [] if {*turn_ids[-1:]} & self.end_token_ids else list(self._turn_end)

    def forges(self, text: str) -> bool:
        """Return whether a text spells special tokens, or others that the chat template writes."""
        tokens = self.tokenizer.added_tokens_decoder
        return any(tokens[number].content in text for number in self.control)

    def _skeleton(self, count: int) -> list[int]:
        """Return the special tokens of a reply with so many results."""
        if count not in self._skeletons:
            self._skeletons[count] = self._control_of(self._reply([_message_of("tool", "x")] * count))
        return self._skeletons[count]

    def _control_of(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token in self.control]

    def _reply(self, messages: Sequence[Message]) -> list[int]:
        return list(self._written(tuple((each["name"], each["content"]) for each in messages)))

    def _write(self, results: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        """Return the tokens of a reply with these results, each with the name of its tool."""
        names = tuple(name for name, _ in results)
        try:
            return self._write_after(names, results)
        # Some chat templates, such as Llama 3.1's, refuse to write more than one call.
        except template_errors():
            if len(names) == 1:
                raise
            return self._write_after(names[:1], results)

    def _write_after(self, names: tuple[str, ...], results: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        """Return the tokens of a reply to a turn that calls these tools."""
        before = self._before(names)
        whole = self._tokens([*_calling(names), *(_message_of(*each) for each in results)], add_generation_prompt=True)
        if tuple(whole[: len(before)]) != before:
            raise InputError(REWRITES)
        return tuple(whole[len(before) :])

    def _tokens_before(self, names: Sequence[str]) -> tuple[int, ...]:
        """Return the tokens of a conversation up to the end of a turn that calls these tools."""
        before = self._tokens(_calling(names), add_generation_prompt=False)
        # The policy's turn stops at its end token: what the template writes after that is part of the reply. Some
        # templates, such as Gemma 4's, end a turn with calls by none.
        pairs = enumerate(zip(before, self._asked, strict=False))
        begin = next((place for place, (one, other) in pairs if one != other), len(self._asked))
        ends = [place for place in range(begin, len(before)) if before[place] in self.end_token_ids]
        return tuple(before[: ends[-1] + 1] if ends else before)

    def _tokens(self, messages: list[Message], add_generation_prompt: bool) -> list[int]:
        options = {"tokenize": True, "return_dict": False, "sanitize_control_tokens": True}
        options |= {"add_generation_prompt": add_generation_prompt, "chat_template": self.chat_template}
        return self.tokenizer.apply_chat_template(messages, **options)


def _message_of(name: str, content: str) -> Message:
    return {"role": "tool", "name": name, "content": content}


def _calling(names: Sequence[str]) -> list[Message]:
    calls = [{"type": "function", "function": {"name": name, "arguments": {}}} for name in names]
    return [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "", "tool_calls": calls}]


def _encodable(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return calls without halves of characters, which JSON may spell and no tokenizer, file or log can hold."""
    return json.loads(json.dumps(calls, ensure_ascii=False).encode("utf-8", "replace"))


def _with_one_template(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """Return the tokenizer, or where it has several chat templates one with that for tools alone."""
    if not isinstance(tokenizer.chat_template, dict):
        return tokenizer
    one = copy.copy(tokenizer)
    one.chat_template = tokenizer.chat_template.get("tool_use") or tokenizer.chat_template.get("default")
    return one


def _lasting_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a chat template that writes a turn alike whatever follows: the tokenizer's, or TRL's for training."""
    from trl.chat_template_utils import get_training_chat_template, is_chat_template_prefix_preserving

    if is_chat_template_prefix_preserving(tokenizer):
        return tokenizer.chat_template
    try:
        return get_training_chat_template(tokenizer) or tokenizer.chat_template
    except ValueError:
        raise InputError(REWRITES) from None


def _find_response_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Set the response template that TRL knows for a chat template, where the tokenizer has none."""
    from trl.chat_template_utils import add_response_schema

    if getattr(tokenizer, "response_template", None) is not None:
        return
    try:
        add_response_schema(tokenizer)
    except (ValueError, *template_errors()):
        raise InputError(
            "tools: the tokenizer has no response_template, by which calls are read, and TRL knows none for its chat "
            "template: set tokenizer.response_template"
        ) from None
