"""Sampled tokens as the completions that rewards get: text, or an assistant's message with its thoughts apart."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hfllm.data.rows import Message, split_beginning
from hfllm.data.thoughts import OPEN, thinking_message
from hfllm.data.tokenizer import template_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The end of a prompt, in which a chat template may open a thought: `<think>` and line breaks.
TAIL = 16


def completions_of(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | list[Message]],
    prompt_ids: Sequence[Sequence[int]],
    response_ids: Sequence[Sequence[int]],
) -> list[str | list[Message]]:
    """Return completions in the form of their prompts, without special tokens.

    Where a prompt ends with the beginning of its answer, the completion is the whole answer. A message has
    `reasoning_content` where the policy has thought: between `<think>` and `</think>`, or as the tokenizer's
    `response_template` says. Texts keep thoughts and marks.
    """
    texts = tokenizer.batch_decode(response_ids, skip_special_tokens=True)
    fields = (getattr(tokenizer, "response_template", None) or {}).get("fields", {})
    has_own_marks = "reasoning_content" in fields and OPEN not in str(fields["reasoning_content"])
    completions = []
    for prompt, before, ids, text in zip(prompts, prompt_ids, response_ids, texts, strict=True):
        if isinstance(prompt, str):
            completions.append(text)
            continue
        _, beginning = split_beginning(prompt)
        is_open = tokenizer.decode(before[-TAIL:]).rstrip().endswith(OPEN)
        if beginning:
            # Some tokenizers drop a space before the first token that they decode.
            texts_of = [tokenizer.decode([*before[-TAIL:], *some], skip_special_tokens=True) for some in ([], ids)]
            text, is_open = beginning + texts_of[1].removeprefix(texts_of[0]), False
        message = thinking_message(text, is_open)
        if has_own_marks and "reasoning_content" not in message:
            message |= _parsed(tokenizer, before, ids)
        completions.append([message])
    return completions


def _parsed(tokenizer: "PreTrainedTokenizerBase", before: Sequence[int], ids: Sequence[int]) -> dict[str, Any]:
    try:
        read = tokenizer.parse_response(list(ids), prefix=list(before))
    except (ValueError, *template_errors()):
        return {}
    thoughts = read.get("reasoning_content")
    return {"content": read.get("content") or "", "reasoning_content": thoughts} if thoughts else {}
