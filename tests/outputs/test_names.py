"""Names stay inside their code spans, headings and blocks of a card, as a reader of Markdown sees it."""

import ast
import shutil

import pytest
from test_card import finished

from hfllm.outputs.card import code_span, model_card, plain_line, quoted
from hfllm.outputs.report import markdown_table

HOSTILE = [
    "a\n\n# INJECTED",
    "a\r\n\r\n# INJECTED",
    "a\u2028# INJECTED",
    "a` **INJECTED** `b",
    "```\nINJECTED\n```",
    "``INJECTED``",
    "`INJECTED",
    "INJECTED`",
    "a | INJECTED | b",
    "</summary></details><h1>INJECTED</h1>",
    "[INJECTED](https://evil.example)",
    '"); INJECTED("',
    " INJECTED ",
    "\x1b[31mINJECTED",
]


def parsed(text):
    return pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"linkify": False}).parse(text)


def outside_of_code(tokens):
    """The texts that are no code, and the kinds of all blocks."""
    texts, kinds = [], []
    for token in tokens:
        kinds.append(token.type)
        for child in token.children or []:
            if child.type != "code_inline":
                texts.append(child.content)
                kinds.append(child.type)
    return texts, kinds


@pytest.mark.parametrize("name", [*HOSTILE, "", " ", "plain/name"])
def test_a_code_span_is_one_span(name):
    (paragraph,) = (token for token in parsed(f"x {code_span(name)} y") if token.type == "inline")
    assert [child.type for child in paragraph.children] == ["text", "code_inline", "text"]
    assert paragraph.children[1].content.split() == "".join(c if c.isprintable() else " " for c in name).split()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_code_span_is_one_cell(name):
    tokens = parsed("\n".join(markdown_table([{"one": code_span(name), "two": "end"}])))
    assert sum(token.type == "td_open" for token in tokens) == 2
    texts, _ = outside_of_code(tokens)
    assert not any("INJECTED" in text for text in texts)


@pytest.mark.parametrize("name", HOSTILE)
def test_names_in_a_card_are_code(name, saved, tmp_path):
    parent = tmp_path / "parent"
    finished(parent, "sft", {"examples": 3}, {"model": name}, dataset_name=name)
    arguments = {"dataset_name": name, "reward_funcs": [name], "model_name_or_path": name, "reward_aggregation": name}
    finished(saved, "rlhf", {"train_prompts": 5}, {"model": str(parent), "reward model": [name, name]}, **arguments)
    hub = {"dataset_name": "org/rows", "dataset_config": name, "dataset_train_split": name}
    for card in (model_card(saved), (finished(saved, "sft", **hub), model_card(saved))[1]):
        texts, kinds = outside_of_code(parsed(card.split("---\n", 2)[2]))
        assert "## Data" in card and not any("INJECTED" in text for text in texts)
        assert "link_open" not in [kind for kind, text in zip(kinds, texts, strict=False) if "evil" in text]


def test_a_folder_of_any_name_is_a_heading_and_a_string(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / 'x"); INJECTED(" <b>\n# y')
    card = model_card(folder)
    code = card.partition("```python\n")[2].partition("```")[0]
    assert not [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name) and node.id == "INJECTED"]
    assert card.count("\n# ") == 1 and "<b>" not in card.partition("\n# ")[2].partition("\n")[0]
    assert plain_line("plain/name") == "plain/name" and quoted("me/model") == '"me/model"'


def test_a_report_from_elsewhere_breaks_no_card(saved, tmp_path):
    parents = ["no entry", {"role": "model"}, {"role": "model", "model": "org/base", "rows": "many", "stage": ["x"]}]
    theirs = tmp_path / "theirs"
    finished(theirs, "sft", {"examples": "many"})
    file = theirs / "report.json"
    file.write_text(file.read_text().replace('"parents": []', f'"parents": {parents}'.replace("'", '"')))
    finished(saved, "rlhf", {}, {"model": str(theirs)})
    assert "org/base" in model_card(saved)
