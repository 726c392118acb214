"""Constitutions: what is shipped, the formats that people have, and errors that name file, line, principle and key."""

import json
import random
import re

import pytest

from hfllm.errors import InputError
from hfllm.synthesis.constitution import Constitution, Principle, load_constitution, shipped_constitutions

CRITIC, REVISION = "Say whether the response is unkind.", "Make the response kind."
CHAT = [
    *({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Go away."}),
    *({"role": "user", "content": CRITIC}, {"role": "assistant", "content": "It is unkind."}),
    *({"role": "user", "content": REVISION}, {"role": "assistant", "content": "Hello!"}),
]


def test_what_is_shipped_can_be_used_as_it_is():
    assert shipped_constitutions() == ["general", "politeness", "world"]
    for name in shipped_constitutions():
        constitution = load_constitution(name)
        assert constitution.name == name and constitution.judging_principles() == constitution.principles
    general = load_constitution("general")
    assert 8 <= len(general.principles) <= 12
    # The examples ask in the words of a principle.
    asked = {wording for each in general.principles for wording in (*each.critique, *each.revision)}
    assert [len(example) for example in general.examples] == [6, 6]
    assert all(message["content"] in asked for example in general.examples for message in example[2::2])


def test_each_wording_is_drawn():
    (harm,) = load_constitution("world").principles
    assert len(harm.critique) == 3 and len(harm.revision) == 2
    rng = random.Random(0)
    assert {harm.draw("critique", rng) for _ in range(50)} == set(harm.critique)


def test_our_own_format_is_read_from_json_and_yaml(tmp_path):
    expected = Constitution([Principle("kind", [CRITIC, "Is it kind?"], REVISION, "Which?")], [CHAT], "mine")
    (tmp_path / "mine.json").write_text(json.dumps(expected.as_dict()))
    assert load_constitution(tmp_path / "mine.json") == expected
    (tmp_path / "mine.yaml").write_text(
        f"- name: kind\n  critique:\n  - {CRITIC}\n  - Is it kind?\n  revision: {REVISION}\n  preference: Which?\n"
    )
    assert load_constitution(str(tmp_path / "mine.yaml")) == Constitution(expected.principles, (), "mine")


def test_llm_swarms_recipe_is_read_as_it_is(tmp_path):
    recipe = {"constitutions": [{"critic": CRITIC, "revision": REVISION}] * 2, "system_chat": [CHAT, CHAT[:2]]}
    (tmp_path / "grok.json").write_text(json.dumps(recipe))
    found = load_constitution(tmp_path / "grok.json")
    expected = [Principle(f"principle {number}", CRITIC, REVISION) for number in (1, 2)]
    assert found == Constitution(expected, [CHAT, CHAT[:2]], "grok")


@pytest.mark.parametrize("by_name", [False, True])
def test_langchains_principles_are_read(tmp_path, by_name):
    entries = {name: {"critique_request": CRITIC, "revision_request": REVISION} for name in ("harmful1", "thoughtful")}
    listed = [entries["harmful1"], {"name": "thoughtful", **entries["thoughtful"]}]
    (tmp_path / "some.json").write_text(json.dumps(entries if by_name else listed))
    names = ["harmful1" if by_name else "principle 1", "thoughtful"]
    assert load_constitution(tmp_path / "some.json").principles == tuple(Principle(n, CRITIC, REVISION) for n in names)


def test_a_file_without_preferences_serves_all_but_judging(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "- {name: a, critique: x, revision: y, preference: z}\n- {name: b, critique: x, revision: y}"
    )
    constitution = load_constitution(tmp_path / "c.yaml")
    with pytest.raises(InputError, match="constitution 'c': principle 'b' has no preference question"):
        constitution.judging_principles()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "c.yaml: empty; expected a list of principles"),
        ("[]", r"c.yaml, line 1: expected a list of at least one principle, got \[\]"),
        ("principles:", "c.yaml, line 1: expected a list of at least one principle, got None"),
        ("examples: []", "c.yaml, line 1: no principles; it has examples"),
        ("- critique: x\n  revision: y\n- critique: x", "line 3: principle 2: no revision; a principle needs"),
        (
            "- name: a\n  critique: x\n  revisoin: y",
            r"line 3: unknown key of principle 1 \('a'\): 'revisoin'; did .*on'",
        ),
        ("- critique: x\n  revision:\n  - y\n  - 3", r"line 2: principle 1: revision must be a text or .* \['y', 3\]"),
        ("- critique: x\n  revision: y\n  preference: 7", "line 3: principle 1: preference must be a text or a list"),
        ("- critique: ' '\n  revision: y", "line 1: principle 1: critique is empty, or one of its wordings is"),
        ("- name: no\n  critique: x\n  revision: y", "line 1: principle 1 .False.: name must be a text, got False"),
        ("- x\n", "line 1: principle 1: expected critique and revision by name, got 'x'"),
        ("- &a {name: a, critique: x, revision: y}\n- *a", "line 1: a second principle of the name 'a'"),
        ("principels:\n- x", "line 1: unknown key 'principels'; did you mean 'principles'"),
        ("- critique: x\n  critic: x\n  revision: y", "line 2: 'critique' and 'critic' mean the same: leave one out"),
        ("- critique: [x\n  revision: y", "c.yaml, line 2: not YAML: "),
        ("- critique: x\n  critique: x", "c.yaml: not YAML: 'critique' a second time in line 2"),
        ("- ? [x]\n  : y", "c.yaml, line 1: not YAML: found unhashable key"),
        ("principles:\n- {critique: x, revision: y}\nexamples: hi", "line 3: examples: expected a list of conv.* str"),
        (
            "principles:\n- {critique: x, revision: y}\nexamples:\n- - {role: user, content: Hi}",
            "line 4: example 1: user and assistant must take turns, the user first and the assistant last; got user",
        ),
        (
            "principles:\n- {critique: x, revision: y}\nexamples:\n- - {role: king, content: Hi}",
            "line 4: example 1: a message needs role",
        ),
    ],
)
def test_errors_name_line_principle_and_key(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_constitution(tmp_path / "c.yaml")
    assert str(caught.value).startswith(str(tmp_path / "c.yaml")) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"critique": "x",\n"revision": "y",}]', "c.json, line 2: not JSON: "),
        ('[{"critique": "x", "critique": "y"}]', "c.json: 'critique' a second time in one object"),
        ('[{"critique": "x",\n"revision": ""}]', "c.json, line 2: principle 1: revision is empty"),
        ('[{"critique": "x",\n"revision": "\\ud83d"}]', "c.json, line 2: principle 1: revision holds half of a char"),
        pytest.param("[" * 100_000, "c.json: cannot be read: maximum recursion depth", id="deep"),
        pytest.param(f'[{{"critique": {"9" * 5000}}}]', "c.json: cannot be read: Exceeds the limit", id="digits"),
    ],
)
def test_errors_in_json_name_them_too(tmp_path, text, message):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(InputError, match=message):
        load_constitution(tmp_path / "c.json")


@pytest.mark.slow
def test_a_few_lines_of_yaml_cannot_take_all_memory(tmp_path):
    # Each level stands for nine of the one before: the last, written out as an error would, takes gigabytes.
    levels = ["&a [x, x, x, x, x, x, x, x, x]"]
    for name, before in zip("bcdefghi", "abcdefgh", strict=True):
        levels.append(f"&{name} [{levels[-1]}{f', *{before}' * 8}]")
    path = tmp_path / "c.yaml"
    for text in (f"- {levels[-1]}", f"- name: {levels[-1]}", f"- critique: {levels[-1]}", f"principles: {levels[-1]}"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"c\.yaml: not YAML: its aliases stand for more than 1,000,000 values"):
            load_constitution(path)
    path.write_text("[" * 5000)
    with pytest.raises(InputError, match=r"c\.yaml: not YAML: nested too deeply"):
        load_constitution(path)
    # Aliases themselves are YAML like any other, also of what holds them.
    path.write_text("- {critique: &c [x, y], revision: *c}\n- {critique: *c, revision: z}")
    assert load_constitution(path).principles[1].critique == ("x", "y")
    path.write_text("- &p {critique: x, revision: *p}")
    with pytest.raises(InputError, match="revision must be a text or a list of texts"):
        load_constitution(path)


def test_a_complaint_of_yaml_is_one_line(tmp_path):
    (tmp_path / "c.yaml").write_text("- critique: \0")
    with pytest.raises(InputError, match=r"^[^\n]*special characters are not allowed[^\n]*$"):
        load_constitution(tmp_path / "c.yaml")


def test_names_of_nothing_are_refused_with_the_nearest(tmp_path):
    with pytest.raises(InputError, match="comes with general, politeness, world; did you mean 'politeness'"):
        load_constitution("polite")
    with pytest.raises(InputError, match=f"{re.escape(str(tmp_path))}/no.yaml': no such file, .* world$"):
        load_constitution(tmp_path / "no.yaml")
    (tmp_path / "c.txt").write_text("- x")
    with pytest.raises(InputError, match=r"c.txt: cannot read .txt; accepted: .json, .yaml, .yml"):
        load_constitution(tmp_path / "c.txt")


def test_constitutions_made_in_python_are_checked_likewise():
    with pytest.raises(InputError, match="principle 'a': no revision; a principle needs critique and revision"):
        Principle("a", "x", [])
    with pytest.raises(InputError, match="constitution 'constitution' has no principles"):
        Constitution([])
    with pytest.raises(InputError, match="two principles of the name 'a'"):
        Constitution([Principle("a", "x", "y")] * 2)
