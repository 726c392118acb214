"""Conversations as text: the form that hh-rlhf has, which the reader of that dataset takes apart again."""

import copy

from hfllm.data.formats import to_preference
from hfllm.data.tokenizer import to_prompt, to_transcript

SAID = ["Hi", "Hello.", "Why?"]
MESSAGES = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), SAID, strict=True)]


def test_a_transcript_is_what_the_reader_of_hh_rlhf_reads():
    text = to_transcript(MESSAGES)
    assert text == "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"
    row = to_preference("row 1", {"chosen": f"{text} Because.", "rejected": f"{text} Go."})
    assert row["prompt"] == MESSAGES and row["chosen"] == [{"role": "assistant", "content": "Because."}]


def test_what_the_system_says_stands_before_it(tokenizer):
    messages = [{"role": "system", "content": "Be kind."}, *MESSAGES[:1]]
    assert to_transcript(messages) == "Be kind.\n\nHuman: Hi\n\nAssistant:"
    base = copy.deepcopy(tokenizer)
    base.chat_template = None
    assert to_prompt(messages, base) == to_transcript(messages) and to_prompt(messages, tokenizer) is messages
