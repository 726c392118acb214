"""Messages as people have them: what of calls and tools is read, and what is refused."""

import json

import pytest

from hfllm.data.conversations import check_written
from hfllm.data.formats import Dropped, is_begun, read_messages, read_tools, split_beginning
from hfllm.data.images.rows import has_images, take_images
from hfllm.errors import InputError

DEEP = json.loads("[" * 900 + "]" * 900)


def said(**fields):
    (message,) = read_messages("x.jsonl, line 1", [{"role": "assistant", "content": "So.", **fields}])
    return message


@pytest.mark.parametrize("calls", ["[]", "null", "{}", "", [], None])
@pytest.mark.parametrize("field", ["tool_calls", "function_call"])
def test_no_calls_are_no_calls_also_as_text(field, calls):
    assert said(**{field: calls}) == {"role": "assistant", "content": "So."}


def test_null_is_kept_in_text_alone():
    call = {"name": "find", "arguments": {"word": None, "most": 3}}
    assert said(tool_calls=[call])["tool_calls"][0]["function"]["arguments"] == {"most": 3}
    assert said(tool_calls=json.dumps([call]))["tool_calls"][0]["function"]["arguments"] == call["arguments"]


def test_text_in_text_may_spell_halves_of_characters():
    read = said(tool_calls=[{"name": "find", "arguments": r'{"word": "\ud800"}'}])
    assert read["tool_calls"][0]["function"]["arguments"] == {"word": "?"}


def test_what_is_nested_too_deeply_is_refused():
    with pytest.raises(InputError, match=r"x\.jsonl, line 1: a call or a tool is nested too deeply"):
        said(tool_calls=[{"name": "find", "arguments": {"word": DEEP}}])
    with pytest.raises(InputError, match="a row: a call or a tool is nested too deeply"):
        read_tools("a row", [{"name": "find", "parameters": DEEP}])


def test_a_name_that_json_escapes_is_found_in_what_is_written():
    messages = [{"role": "user", "content": "q"}, said(tool_calls=[{"name": 'a"b', "arguments": {}}])]
    check_written("a row", {}, messages, json.dumps(messages), Dropped())
    with pytest.raises(InputError, match="leaves out calls of tools"):
        check_written("a row", {}, messages, "q So.", Dropped())


ASKED = {"role": "user", "content": "Where?"}
CALL = [{"type": "function", "function": {"name": "find", "arguments": {}}}]


@pytest.mark.parametrize(
    "last",
    [
        ASKED,
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": None},
        {"role": "assistant", "tool_calls": CALL},
        {"role": "assistant", "content": "I look.", "tool_calls": CALL},
        {"role": "assistant", "content": [{"type": "text", "text": "So"}]},
    ],
)
def test_only_words_of_the_assistant_begin_an_answer(last):
    for prompt in ([ASKED, last], "Where?"):
        assert not is_begun(prompt) and split_beginning(prompt) == (prompt, "")
    assert not is_begun([]) and split_beginning([]) == ([], "")
    begun = [ASKED, {"role": "assistant", "content": "In the"}]
    assert is_begun(begun) and split_beginning(begun) == ([ASKED], "In the")


@pytest.mark.parametrize("role", [["user"], {"a": 1}, 1, None, True])
def test_a_role_of_another_type_is_none(role):
    with pytest.raises(InputError, match=r"^a row: a message needs role \(one of "):
        read_messages("a row", [{"role": role, "content": "a"}])
    row = {"messages": [{"role": role, "content": [{"type": "text", "text": "a"}]}], "chosen": [{"role": role}]}
    assert not has_images(row)
    assert take_images("a row", row)[1] == []
