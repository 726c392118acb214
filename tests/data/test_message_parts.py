"""Messages whose content is a list of parts: text reads as the text, and pictures in comparisons as in a column."""

import json
from pathlib import Path

import pytest
from PIL import Image

from hfllm.data.formats import to_preference, to_prompt, to_sft
from hfllm.data.images.rows import has_images, refuse_images, take_images, to_pictures
from hfllm.errors import InputError
from hfllm.evaluation.suites.preferences import pair_of

ORIGIN = "rows.jsonl, line 3"


def in_parts(value):
    """Return messages with each content as parts, in two where it has two words."""
    if isinstance(value, list):
        return [in_parts(each) for each in value]
    first, space, rest = value["content"].partition(" ")
    texts = [first + space, rest] if rest else [first]
    return {**value, "content": [{"type": "text", "text": text} for text in texts]}


def filled(messages):
    """Return messages in parts as datasets fills them up."""
    return [{**each, "content": [{**part, "image": None} for part in each["content"]]} for each in messages]


SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}
FOX, CAT = {"role": "assistant", "content": "A fox."}, {"role": "assistant", "content": "Cat"}
ROWS = [
    (to_sft, {"messages": [SYSTEM, USER, FOX]}),
    (to_sft, {"prompt": [USER], "completion": [FOX]}),
    (to_sft, {"prompt": [USER], "response": FOX}),
    (to_preference, {"prompt": [USER], "chosen": [FOX], "rejected": [CAT]}),
    (to_preference, {"chosen": [SYSTEM, USER, FOX], "rejected": [SYSTEM, USER, CAT]}),
    (to_preference, {"prompt": [USER], "response_a": [FOX], "response_b": [CAT], "preference": "b"}),
    (to_prompt, {"prompt": [SYSTEM, USER]}),
    (to_prompt, {"messages": [USER, FOX]}),
]


@pytest.mark.parametrize(("read", "row"), ROWS)
def test_text_in_parts_reads_as_the_text(read, row):
    parts = {name: value if isinstance(value, str) else in_parts(value) for name, value in row.items()}
    assert "text" in str(parts) and not has_images(parts)
    refuse_images(ORIGIN, parts, "a model of text")
    expected = read(ORIGIN, row)
    for each in (parts, {name: filled(value) if isinstance(value, list) else value for name, value in parts.items()}):
        # A prompt keeps its row's other columns as they are.
        assert read(ORIGIN, each) | {"messages": None} == expected | {"messages": None}


def test_what_a_tool_returns_may_be_in_parts_or_a_value():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    for content, expected in (
        ([{"type": "text", "text": "4"}, {"type": "text", "text": "2"}], "42"),
        ([{"text": "42"}], '[{"text": "42"}]'),
        ([1, 2], "[1, 2]"),
        ([], "[]"),
        ({"a": 1}, '{"a": 1}'),
        ([{"type": "rows", "text": "x"}], '[{"type": "rows", "text": "x"}]'),
    ):
        row = to_sft(ORIGIN, {"messages": [USER, call, {"role": "tool", "content": content}, FOX]})
        assert row["completion"][1]["content"] == expected


def test_pairs_of_the_evaluation_may_be_in_parts():
    row = {"prompt": [USER], "chosen": [FOX], "rejected": [CAT]}
    assert pair_of(ORIGIN, {name: in_parts(said) for name, said in row.items()}) == pair_of(ORIGIN, row)


@pytest.mark.parametrize("part", [{"type": "audio", "audio": "a.wav"}, {"type": "text", "text": None}, "a text", 3])
def test_other_parts_are_named(part):
    with pytest.raises(InputError, match="line 3: a part of a message must be a text here, got ") as error:
        to_sft(ORIGIN, {"messages": [{"role": "user", "content": [part]}, FOX]})
    assert "\n" not in str(error.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (8, 8), color).save(tmp_path / name)
    return tmp_path


def shown(path, text="What is it?"):
    return {"role": "user", "content": [{"type": "image", "image": path}, {"type": "text", "text": text}]}


PLACE = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}


def read(folder, row):
    return to_pictures(to_preference, folder)(ORIGIN, row)


def test_comparisons_show_their_pictures_in_any_form(folder):
    """In a column, in the prompt, in conversations that repeat it, as a place: the row that is learned is the same."""
    fox, cat = in_parts([FOX]), in_parts([CAT])
    forms = [
        {"prompt": "What is it?", "chosen": "A fox.", "rejected": "Cat", "image": "a.png"},
        {"prompt": "<image>\nWhat is it?", "chosen": [FOX], "rejected": [CAT], "images": ["a.png"]},
        {"prompt": [shown("a.png")], "chosen": fox, "rejected": cat},
        {"prompt": [shown("a.png")], "chosen": fox[0], "rejected": "Cat"},
        {"prompt": [PLACE], "chosen": fox, "rejected": cat, "images": ["a.png"]},
        {"chosen": [shown("a.png"), *fox], "rejected": [shown("a.png"), *cat]},
        {"chosen": [PLACE, *fox], "rejected": [PLACE, *cat], "image": "a.png"},
        {"prompt": [shown("a.png")], "chosen": [shown("a.png"), *fox], "rejected": [shown("a.png"), *cat]},
        {"prompt": "What is it?", "chosen": [shown("a.png"), FOX], "rejected": [shown("a.png"), CAT]},
        {"prompt": [shown("a.png")], "response_a": cat, "response_b": fox, "preference": "b"},
    ]
    for form in forms:
        assert has_images(form), form
        with pytest.raises(InputError, match="reads text alone"):
            refuse_images(ORIGIN, form, "the model")
    expected = read(folder, forms[0])
    assert expected["images"] == [str(folder / "a.png")] and expected["prompt"][0]["content"][0] == {"type": "image"}
    for form in forms[1:]:
        assert read(folder, form) == expected, form


def test_comparisons_with_pictures_that_cannot_be_are_refused_in_a_line(folder):
    answer = {"role": "assistant", "content": [{"type": "image", "image": "b.png"}, {"type": "text", "text": "So."}]}
    others = "show different pictures: they must begin with the same prompt"
    for row, words in (
        ({"prompt": [shown("a.png")], "chosen": [answer], "rejected": [CAT]}, r"a place \(<image>\) in an answer"),
        ({"prompt": "What?", "chosen": [FOX], "rejected": [answer]}, r"a place \(<image>\) in an answer"),
        ({"chosen": [shown("a.png"), FOX], "rejected": [shown("b.png"), CAT]}, others),
        ({"chosen": [shown("a.png"), answer], "rejected": [shown("a.png"), CAT]}, others),
        ({"prompt": [shown("b.png")], "chosen": [shown("a.png"), FOX], "rejected": [shown("a.png"), CAT]}, others),
        ({"prompt": [shown("a.png")], "chosen": [USER, FOX], "rejected": [USER, CAT]}, others),
        (
            {"prompt": [shown("a.png")], "chosen": [FOX], "rejected": [CAT], "image": "b.png"},
            "expected one of the two",
        ),
        ({"prompt": [PLACE, PLACE], "chosen": [FOX], "rejected": [CAT], "image": "b.png"}, "1 picture and 2 places"),
    ):
        with pytest.raises(InputError, match=words) as error:
            read(folder, row)
        assert str(error.value).startswith(ORIGIN) and "\n" not in str(error.value)


def test_what_a_table_has_in_place_of_a_picture_is_none(folder):
    """Structs of a parquet file are filled up with nothing, at each depth."""
    empty = {"bytes": None, "path": None}
    text = {"prompt": [{"role": "user", "content": [{"type": "text", "text": "What?", "image": empty}]}]}
    row = {**text, "chosen": "A", "rejected": "B", "image": empty, "images": [empty]}
    assert not has_images(row) and not has_images({"image": None, "images": []})
    assert take_images(ORIGIN, row)[1] == []
    place = {"role": "user", "content": [{"type": "image", "image": empty}, {"type": "text", "text": "What?"}]}
    row = {"prompt": [place], "chosen": "A", "rejected": "B", "image": "a.png"}
    assert read(folder, row)["images"] == [str(folder / "a.png")]
    assert json.dumps(row)


def test_pairs_keep_the_roles_of_their_file():
    """As some chat templates call them: who judges a model gives it what it knows."""
    prompt = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    prompt += [{"role": "model", "content": [{"type": "text", "text": "Hi."}]}, {"role": "user", "content": "How?"}]
    sides = {side: [{"role": "model", "content": f"{side}."}] for side in ("chosen", "rejected")}
    pair = pair_of(ORIGIN, {"prompt": prompt, **sides})
    assert pair.prompt == (("developer", "Be brief."), ("user", "Hello"), ("model", "Hi."), ("user", "How?"))
    assert (pair.better, pair.worse) == ("chosen.", "rejected.")
    for wrong in ({"role": "nobody", "content": "a"}, {"role": "model", "content": 3}, "a", 3):
        with pytest.raises(InputError, match=f"^{ORIGIN}: "):
            pair_of(ORIGIN, {"prompt": [wrong], **sides})
