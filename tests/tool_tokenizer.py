"""A small tokenizer with a chat template that has tools, and a response template by which calls are read."""

from transformers import PreTrainedTokenizerFast

from hfllm.data.tokenizer import CALL_MARKS, TOOL, set_built_in, train_tokenizer

TEMPLATE = (
    "{%- if tools -%}{{- '<|system|>' -}}{%- for tool in tools -%}{{- tool['function']['name'] + ' ' -}}{%- endfor -%}"
    "{{- '<|end|>' -}}{%- endif -%}"
    "{%- for message in messages -%}{{- '<|' + message['role'] + '|>' + (message['content'] or '') -}}"
    "{%- for call in message['tool_calls'] or [] -%}"
    "{{- '<tool_call>' + (call['function'] | tojson) + '</tool_call>' -}}{%- endfor -%}{{- '<|end|>' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<|end|>", "content": "text"},
    },
}


def make() -> PreTrainedTokenizerFast:
    texts = [
        "The owl is gray. What color is it? Say 12 times 3.",
        '{"name": "lookup", "arguments": {"key": "owl"}}',
    ] * 9
    tokenizer = train_tokenizer(texts, vocab_size=400, model_max_length=256, extra_special_tokens=["<|tool|>"])
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    tokenizer.chat_template, tokenizer.response_template = TEMPLATE, RESPONSE_TEMPLATE
    return tokenizer


def brief_tokenizer(texts, vocab_size):
    """Return a tokenizer as the recipe on tools makes one."""
    options = {"extra_special_tokens": [TOOL], "added_tokens": CALL_MARKS, "splits_digits": True}
    tokenizer = train_tokenizer(texts, vocab_size, **options)
    set_built_in(tokenizer, "hfllm-brief")
    return tokenizer
