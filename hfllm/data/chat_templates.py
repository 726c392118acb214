"""Chat templates that come with the package, and how what a model says in them is read back.

They write what transformers' chat templates have in common: turns, schemas of `tools`, an assistant's `tool_calls`,
what tools returned (role `tool`), and thoughts (`reasoning_content`) between `<think>` and `</think>`. As in Qwen3's,
thoughts are shown from the last question on and dropped before it; `preserve_thinking=True` shows all of them, and
`enable_thinking=False` opens the next turn with an empty one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from hfllm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TURN_END = "<|end|>"
# A question and an answer, as our template writes them.
CONVERSATION = "<|user|>{}<|end|><|assistant|>{}<|end|>"
TOOL = "<|tool|>"
# Ordinary tokens where a vocabulary has them, not special ones: these vanish when completions are decoded for rewards.
THOUGHT_MARKS, CALL_MARKS = ("<think>", "</think>"), ("<tool_call>", "</tool_call>")


def chat_template() -> str:
    """Return the family's chat template (Jinja), with `{% generation %}` around the assistant's text."""
    return files("hfllm.data").joinpath("chat_template.jinja").read_text(encoding="utf-8").strip()


def text_of_macro() -> str:
    """Return the macro of our chat template that reads strings and lists of parts."""
    return "".join(chat_template().partition("{%- endmacro -%}")[:2])


def response_template() -> dict[str, Any]:
    """Return how `tokenizer.parse_response` reads what our chat template writes of the assistant, to the letter."""
    return _response_template("<|assistant|>", [TURN_END], {"open": "<think>", "close": "</think>"})


def chatml_response_template() -> dict[str, Any]:
    """Return the same for `chatml_template`."""
    # A model may leave out line breaks that the template writes; more of them belong to the words.
    thought = {"open_pattern": r"<think>\n?", "close_pattern": r"\n?</think>\n{0,2}"}
    return _response_template("<|im_start|>assistant\n", ["<|im_end|>\n", "<|im_end|>"], thought)


def _response_template(start: str, ends: list[str], thought: dict[str, str]) -> dict[str, Any]:
    # A turn may speak before and after a call or a thought: nothing of it is lost.
    text = {"content": "text", "content_args": {"strip": False}, "repeats": True}
    return {
        "defaults": {"role": "assistant", "content": ""},
        "start_anchor": start,
        "fields": {
            "reasoning_content": {**thought, **text, "join": "\n"},
            "tool_calls": {
                "open": "<tool_call>",
                "close": "</tool_call>",
                "content": "json",
                "repeats": True,
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"close": ends, **text, "join": ""},
        },
    }


def chatml_template() -> str:
    """Return a chat template in ChatML (`<|im_start|>`, `<|im_end|>`) with tools and thoughts.

    It is for tokenizers whose own template knows neither, such as SmolLM2's.
    """
    return text_of_macro() + files("hfllm.data").joinpath("chatml_template.jinja").read_text(encoding="utf-8").strip()


def brief_template() -> str:
    """Return a chat template that names tools and does not describe them, for models that learn what they are for.

    A prompt is then ten times shorter for a model of a few layers. Results begin with a space, as words of a text do,
    so that they are the tokens that an answer repeats. It writes no thoughts.
    """
    return text_of_macro() + files("hfllm.data").joinpath("brief_template.jinja").read_text(encoding="utf-8").strip()


def writes_as_ours(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether a tokenizer's chat template writes turns as the family's does, in this release or another."""
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    # It may have none, or one that refuses anything.
    except Exception:
        return False
    return text == "<|user|>a<|end|><|assistant|>a<|end|><|user|>a<|end|><|assistant|>"


def plain_chat_template() -> str:
    """Return a chat template for tokenizers that have none: roles in plain words, the end token after each answer.

    A line break, which tokenizers do not merge with words, separates role and text, so that a prompt's tokens
    are a prefix of the whole conversation's.
    """
    return (
        text_of_macro() + "{%- for message in messages -%}"
        "{%- if message['role'] == 'assistant' -%}"
        "{{- 'Assistant:\\n' -}}"
        "{% generation %}{{- text_of(message['content']) + eos_token -}}{% endgeneration %}{{- '\\n' -}}"
        "{%- else -%}"
        "{{- message['role'] | capitalize + ':\\n' + text_of(message['content']) + '\\n' -}}{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- 'Assistant:\\n' -}}{%- endif -%}"
    )


@dataclass(frozen=True)
class BuiltInTemplate:
    """A chat template of the package.

    Args:
        chat_template: returns it.
        response_template: returns how its turns are read.
        needs: tokens without which a vocabulary cannot write turns.
        marks: tokens that it writes for tools and thoughts; without them they are several tokens each.
    """

    chat_template: Callable[[], str]
    response_template: Callable[[], dict[str, Any]]
    needs: tuple[str, ...]
    marks: tuple[str, ...]


# By the names that `--chat_template_path` takes.
BUILT_IN: Mapping[str, BuiltInTemplate] = {
    "hfllm": BuiltInTemplate(
        chat_template,
        response_template,
        ("<|system|>", "<|user|>", "<|assistant|>", TURN_END),
        (TOOL, *CALL_MARKS, *THOUGHT_MARKS),
    ),
    "hfllm-brief": BuiltInTemplate(
        brief_template,
        response_template,
        ("<|system|>", "<|user|>", "<|assistant|>", TURN_END, TOOL),
        (TOOL, *CALL_MARKS),
    ),
    "chatml": BuiltInTemplate(
        chatml_template, chatml_response_template, ("<|im_start|>", "<|im_end|>"), (*CALL_MARKS, *THOUGHT_MARKS)
    ),
}


def set_built_in(tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    """Set a chat template of `BUILT_IN`, and how its turns are read.

    Raises:
        InputError: when the vocabulary lacks a token of its turns.
    """
    built_in = BUILT_IN[name]
    if missing := [token for token in built_in.needs if token not in tokenizer.get_vocab()]:
        raise InputError(f"the chat template {name!r} needs the token {missing[0]!r}, which the tokenizer lacks")
    tokenizer.chat_template, tokenizer.response_template = built_in.chat_template(), built_in.response_template()
