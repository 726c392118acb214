"""Conversations as plain text, for base models that have no chat template."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hfllm.data.chat_templates import plain_chat_template
from hfllm.data.messages import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPEAKERS = {"user": "Human", "assistant": "Assistant"}
# What a base model writes when it goes on with the other side's turn: after a transcript, and after a conversation in
# the plain chat template that it is given where it has none.
NEXT_TURN, NEXT_PLAIN_TURN = "\n\nHuman:", "\nUser:\n"


def to_transcript(messages: Sequence[Message]) -> str:
    """Return a conversation in Anthropic's form, up to where the assistant speaks: `\\n\\nHuman: ...\\n\\nAssistant:`.

    It is the form of Bai et al. 2022 and of the dataset hh-rlhf. What a system message says stands before it.
    """
    turns = [
        f"\n\n{SPEAKERS[message['role']]}: {message['content']}" if message["role"] in SPEAKERS else message["content"]
        for message in messages
    ]
    return "".join([*turns, "\n\nAssistant:"])


def to_prompt(messages: list[Message], tokenizer: "PreTrainedTokenizerBase") -> str | list[Message]:
    """Return a conversation as a tokenizer takes it: messages for its chat template, a transcript without one."""
    return messages if tokenizer.chat_template else to_transcript(messages)


def next_turn(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Return the text by which a base model's answer ends, `None` for a tokenizer with a chat template of its own."""
    if not tokenizer.chat_template:
        return NEXT_TURN
    return NEXT_PLAIN_TURN if tokenizer.chat_template == plain_chat_template() else None
