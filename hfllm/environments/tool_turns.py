"""Calls of tools in a policy's turns, and the tokens of the turns that answer them."""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from hfllm.data.messages import Message
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

        self.tokenizer, self.schemas, self.end_token_ids = tokenizer, list(schemas), set(end_token_ids)
        if not supports_tool_calling(tokenizer):
            raise InputError(
                "tools: the tokenizer's chat template cannot write an assistant's tool_calls and a tool's message"
            )
        _find_response_template(tokenizer)
        self.chat_template = _lasting_template(tokenizer)
        added, template = tokenizer.added_tokens_decoder.items(), str(self.chat_template)
        self.control = {
            number
            for number, token in added
            if token.special or (token.content in template and not token.content.isspace())
        }
        asked = [{"role": "user", "content": "Say it."}]
        before, opened = (self._tokens(asked, add_generation_prompt=is_opened) for is_opened in (False, True))
        self.opening = opened[len(before) :]
        self._before = lru_cache(KEPT_REPLIES)(self._tokens_before)
        self._written = lru_cache(KEPT_REPLIES)(self._write)
        # Of one result, so that a chat template that does not serve is refused before training.
        self._skeletons = {1: self._control_of(self._reply([_message_of("tool", "x")]))}

    def parse(self, turn_ids: Sequence[int]) -> Message:
        """Return the assistant's message of a turn, with `tool_calls` where it has them.

        As in TRL, a turn whose calls cannot be read, such as broken JSON, is a message of plain text.
        """
        from trl.chat_template_utils import parse_response

        try:
            return parse_response(self.tokenizer, list(turn_ids), prefix=self.opening, tools=self.schemas)
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
        before = self._before(names)
        whole = self._tokens([*_calling(names), *(_message_of(*each) for each in results)], add_generation_prompt=True)
        if tuple(whole[: len(before)]) != before:
            raise InputError(REWRITES)
        return tuple(whole[len(before) :])

    def _tokens_before(self, names: Sequence[str]) -> tuple[int, ...]:
        """Return the tokens of a conversation up to the end of a turn that calls these tools."""
        before = self._tokens(_calling(names), add_generation_prompt=False)
        # The policy's turn stops at its end token: what the template writes after that is part of the reply.
        ends = [place for place, token in enumerate(before) if token in self.end_token_ids]
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
