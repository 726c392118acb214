"""A chat template with tools that keeps a model's own turns, for models whose template knows no tools."""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from hfllm.data.formats import Message
from hfllm.errors import InputError, refuse_if

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM: Message = {"role": "system", "content": "probe3x"}
CANNOT = "the chat template 'own' needs a template of the model whose turns it can keep, and {}"


def own_template(tokenizer: "PreTrainedTokenizerBase", macro: str) -> tuple[str, list[str], dict[str, str]]:
    """Return a chat template that writes turns as the tokenizer's own, and calls and results as Qwen 2.5's does.

    What the tokenizer's template writes around a text is found by writing conversations of probes. Schemas of tools
    are in the system's message, or where there is none in the first of the user; results are in turns of the user.

    Args:
        macro: which reads contents, see `text_of_macro`.

    Returns:
        The template, the texts that end a turn, and how the assistant's opens, as a response template has it.

    Raises:
        InputError: where the tokenizer has no template, or one that writes turns otherwise depending on others.
    """
    marks = _marks(tokenizer)
    body = files("hfllm.data").joinpath("own_template.jinja").read_text(encoding="utf-8").strip()
    template = f"{macro}{{%- set marks = {json.dumps(marks, ensure_ascii=False)} -%}}{body}"
    ends = [marks["end"] + marks["after_end"], marks["end"]] if marks["after_end"] else [marks["end"]]
    for turns in (_turns("uau"), _turns("ua"), _turns("uaua")):
        for is_opened in (False, True):
            before, now = (_written(tokenizer, turns, is_opened, each) for each in (None, template))
            refuse_if(
                before != now, CANNOT.format(f"this one writes {before[-80:]!r} where it would be {now[-80:]!r}")
            )
    # Some, as Mistral's, open the assistant's turn by nothing: it follows the user's.
    pattern = {"start_anchor_pattern": rf"\A|{re.escape(marks['user_end'])}"}
    return template, ends, {"start_anchor": marks["opening"]} if marks["opening"] else pattern


def _marks(tokenizer: "PreTrainedTokenizerBase") -> dict[str, str | bool]:
    """Return what stands before and after the texts of a conversation, and whether these are trimmed."""
    refuse_if(not tokenizer.chat_template, CANNOT.format("it has none"))
    first, user_end = _around(_written(tokenizer, _turns("u"), False), 1)
    opening = _around(_written(tokenizer, _turns("u"), True), 1)[1].removeprefix(user_end)
    _, middle, answer_end = _around(_written(tokenizer, _turns("ua"), False), 2)
    *_, between, _ = _around(_written(tokenizer, _turns("uau"), False), 3)
    is_known = middle.startswith(user_end) and between.startswith(answer_end) and bool(answer_end.strip())
    refuse_if(not is_known, CANNOT.format("this one writes a turn otherwise when others follow it"))
    # What is learned ends with the last token that is no white space.
    end = answer_end.rstrip()
    marks = {"first": first, "user": between.removeprefix(answer_end), "user_end": user_end, "opening": opening}
    marks |= {"assistant": middle.removeprefix(user_end), "end": end, "after_end": answer_end[len(end) :]}
    # A thought that is opened for the policy would be read as its answer.
    opens_more = opening.strip() not in ("", marks["assistant"].strip())
    refuse_if(opens_more, CANNOT.format(f"this one opens the assistant's turn by {opening!r}"))
    spaced = [{"role": "user", "content": " probe0x "}]
    marks["trims"] = " probe0x " not in _written(tokenizer, spaced, False)
    return {**marks, **_system_marks(tokenizer, first)}


def _system_marks(tokenizer: "PreTrainedTokenizerBase", first: str) -> dict[str, str]:
    """Return what stands around a system's message; a template without one has it in the user's first."""
    text = ""
    with suppress(InputError):
        text = _written(tokenizer, [SYSTEM, *_turns("u")], False)
    before, found, after = text.partition("probe3x")
    if not found or "probe0x" not in after:
        return {"system": first, "system_end": "\n\n"}
    return {"system": before, "system_end": after.partition("probe0x")[0]}


def _turns(roles: str) -> list[Message]:
    names, counts = {"u": "user", "a": "assistant"}, range(len(roles))
    return [{"role": names[role], "content": f"probe{index}x"} for role, index in zip(roles, counts, strict=True)]


def _written(
    tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Message], is_opened: bool, template: str | None = None
) -> str:
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": is_opened}
    options |= {} if template is None else {"chat_template": template}
    try:
        return tokenizer.apply_chat_template(list(turns), **options)
    except Exception as error:
        raise InputError(CANNOT.format(f"this one refuses a conversation: {error}")) from None


def _around(text: str, count: int) -> list[str]:
    """Return what stands before, between and after the probes."""
    parts = []
    for number in range(count):
        before, found, text = text.partition(f"probe{number}x")
        refuse_if(not found, CANNOT.format("this one leaves texts out"))
        parts.append(before)
    return [*parts, text]
