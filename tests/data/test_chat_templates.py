"""The chat templates of the package: what they write, and that `parse_response` reads it back to the letter."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hfllm.data.tokenizer import BUILT_IN, plain_chat_template, set_built_in, train_tokenizer, writes_as_ours
from hfllm.errors import InputError

SCHEMA = {"type": "function", "function": {"name": "weather", "description": "Tells it", "parameters": {}}}
ASKED = {"role": "user", "content": "Weather?"}


def call(name="weather", **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def said(content, **more):
    return {"role": "assistant", "content": content, **more}


@pytest.fixture(scope="module", params=["hfllm", "chatml"])
def tokenizer(request):
    tokenizer = train_tokenizer(["Weather in Rome?"], 300, extra_special_tokens=["<|im_start|>", "<|im_end|>"])
    set_built_in(tokenizer, request.param)
    return tokenizer


def written(tokenizer, *messages, **options):
    return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)


def read(tokenizer, *messages):
    """What is read of the last message, from its tokens."""
    before = tokenizer.apply_chat_template(list(messages[:-1]), add_generation_prompt=True)["input_ids"]
    ids = tokenizer.apply_chat_template(list(messages))["input_ids"]
    assert ids[: len(before)] == before
    return tokenizer.parse_response(ids[len(before) :], prefix=before)


MARKS = ["<tool_call>", "</tool_call>", "<|end|>", "<|im_end|>", "<|im_end|>\n", "\n", " ", '"', "\\", "{", "é", "<"]
WORDS = st.lists(st.one_of(st.sampled_from(MARKS), st.text(st.characters(exclude_categories=["Cs"]))), max_size=4)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), WORDS.map("".join)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS.map("".join), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(names=st.lists(WORDS.map("".join), min_size=1, max_size=2), values=st.dictionaries(WORDS.map("".join), VALUES))
def test_any_call_is_read_back(tokenizer, names, values):
    """Whatever its arguments spell, also the marks that end calls and turns."""
    calls = [{"type": "function", "function": {"name": f"f{at}", "arguments": values}} for at, _ in enumerate(names)]
    message = said("", tool_calls=calls)
    assert read(tokenizer, ASKED, message) == message
    # A policy that writes it goes on to its end.
    ids = tokenizer.apply_chat_template([ASKED, message])["input_ids"]
    ends = {token: ids.count(tokenizer.convert_tokens_to_ids(token)) for token in ("<|end|>", "<|im_end|>")}
    is_ours = "<|assistant|>" in tokenizer.chat_template
    assert ends == {"<|end|>": 2 * is_ours, "<|im_end|>": 2 * (not is_ours)}


@pytest.mark.slow
@settings(max_examples=50, deadline=None, derandomize=True)
@given(content=st.text("ab \n.", max_size=8), thought=st.text("ab \n.", min_size=1, max_size=8), calls=st.booleans())
def test_any_thought_and_text_is_read_back(tokenizer, content, thought, calls):
    message = said(content, reasoning_content=thought) | ({"tool_calls": [call(city="Rome")]} if calls else {})
    assert read(tokenizer, ASKED, message) == message


@pytest.mark.parametrize(
    "arguments", ['{"city": "Rome", "when": null}', '{"x": "</tool_call><|end|>"}', {"city": None}, None, {}]
)
def test_arguments_may_be_json_text(tokenizer, arguments):
    message = said("", tool_calls=[{"function": {"name": "f", "arguments": arguments}}])
    (got,) = read(tokenizer, ASKED, message)["tool_calls"]
    assert got["function"]["arguments"] == (json.loads(arguments) if isinstance(arguments, str) else arguments or {})


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}], ids=str)
def test_a_turn_of_calls_needs_no_words(tokenizer, content):
    """Other renderers than transformers' leave None as it is."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    message = {"role": "assistant", "tool_calls": [call(city="Rome")], **content}
    text = _compile_jinja_template(tokenizer.chat_template).render(messages=[ASKED, message])
    assert text == written(tokenizer, ASKED, said("", tool_calls=[call(city="Rome")]))


def test_nothing_is_lost_of_a_turn_that_mixes_words_thoughts_and_calls(tokenizer):
    text = 'One.<think>a</think>Two.<tool_call>{"name": "f", "arguments": {}}</tool_call>Three.<think>b</think>'
    got = tokenizer.parse_response(text, prefix="")
    assert got["content"] == "One.Two.Three." and got["reasoning_content"] == "a\nb" and len(got["tool_calls"]) == 1
    assert tokenizer.parse_response("<think>cut off", prefix="")["content"] == ""


def by_hand(messages, is_open):
    turns = [f"<|{message['role']}|>{message['content']}<|end|>" for message in messages]
    return "".join([*turns, "<|assistant|>" * is_open])


@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize("roles", ["u", "ua", "uau", "suaua", "a", "au", "us", "uaa"])
def test_conversations_without_tools_and_thoughts_are_turns_and_nothing_else(roles, is_open):
    tokenizer = train_tokenizer(["Weather in Rome?"], 300)
    names = {"u": "user", "a": "assistant", "s": "system"}
    messages = [{"role": names[role], "content": f" {at}<tool>\n"} for at, role in enumerate(roles)]
    text = by_hand(messages, is_open)
    assert written(tokenizer, *messages, add_generation_prompt=is_open) == text
    options = {"add_generation_prompt": is_open, "return_dict": True, "return_assistant_tokens_mask": True}
    encoded = tokenizer.apply_chat_template(messages, **options)
    assert encoded["input_ids"] == tokenizer(text)["input_ids"]
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    learned = tokenizer.decode([token for token, mask in pairs if mask])
    assert learned == "".join(f"{each['content']}<|end|>" for each in messages if each["role"] == "assistant")


def test_tools_are_shown_in_the_system_turn():
    tokenizer = train_tokenizer(["Weather in Rome?"], 300)
    schema = json.dumps(SCHEMA)
    assert written(tokenizer, ASKED, tools=[SCHEMA]) == f"<|system|>{schema}<|end|><|user|>Weather?<|end|>"
    system = {"role": "system", "content": "Be kind."}
    text = written(tokenizer, system, ASKED, tools=[SCHEMA, SCHEMA])
    assert text == f"<|system|>Be kind.\n{schema}\n{schema}<|end|><|user|>Weather?<|end|>"


def test_thoughts_are_shown_from_the_last_question_on(tokenizer):
    first = [ASKED, said("", reasoning_content="look", tool_calls=[call()]), {"role": "tool", "content": "sun"}]
    first.append(said("Sunny.", reasoning_content="so"))
    assert all(thought in written(tokenizer, *first) for thought in ("look", "so"))
    later = [*first, ASKED, said("Still.", reasoning_content="again")]
    text = written(tokenizer, *later)
    assert "again" in text and "look" not in text and text.count("<think>") == 1
    assert written(tokenizer, *later, preserve_thinking=True).count("<think>") == 3


def test_thoughts_inside_the_text_are_dropped_alike(tokenizer):
    inside = said("<think>\nlook\n</think>\n\nSunny.")
    assert "look" in written(tokenizer, ASKED, inside)
    assert written(tokenizer, ASKED, inside, ASKED) == written(tokenizer, ASKED, said("Sunny."), ASKED)


def test_thinking_can_be_switched_off(tokenizer):
    options = {"add_generation_prompt": True}
    usual = written(tokenizer, ASKED, **options)
    assert written(tokenizer, ASKED, enable_thinking=True, **options) == usual
    closed = written(tokenizer, ASKED, enable_thinking=False, **options)
    assert closed == written(tokenizer, ASKED, said("", reasoning_content="")).partition("<|end|>\n")[0][: len(closed)]
    assert tokenizer.parse_response("Yes.", prefix=closed)["content"] == "Yes."


def test_trl_takes_them_for_templates_with_tools(tokenizer):
    from trl.chat_template_utils import is_chat_template_prefix_preserving, supports_tool_calling

    assert supports_tool_calling(tokenizer) and is_chat_template_prefix_preserving(tokenizer)


def test_how_turns_are_read_is_saved(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.response_template == tokenizer.response_template
    message = said("Yes.", reasoning_content="look", tool_calls=[call(city="Rome")])
    assert read(loaded, ASKED, message) == message


def test_a_vocabulary_without_the_tokens_of_turns_is_refused():
    with pytest.raises(InputError, match=r"'chatml' needs the token '<\|im_start\|>'"):
        set_built_in(train_tokenizer(["text"], 300), "chatml")


def test_ours_is_known_by_what_it_writes():
    tokenizer = train_tokenizer(["text"], 300, extra_special_tokens=["<|im_start|>", "<|im_end|>"])
    assert writes_as_ours(tokenizer)
    # As in an earlier release.
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    assert writes_as_ours(tokenizer)
    for template in (BUILT_IN["chatml"].chat_template(), plain_chat_template(), None, "{{ 1 / 0 }}"):
        tokenizer.chat_template = template
        assert not writes_as_ours(tokenizer)
