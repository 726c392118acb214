"""The text of web pages: what a reader came for, from any page, in bounded time and memory."""

import logging
import re
import sys
from collections import Counter
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("trafilatura", reason="needs the extra 'data'")

from html_pages import BEES, MILL, PAGES, article, menu, paragraphs

from hfllm.data.curation.options import CurationOptions
from hfllm.data.curation.text import (
    MOST_ATTRIBUTES,
    MOST_LISTS,
    MOST_TAGS,
    html_to_text,
    is_too_complex,
    plain_text,
    tokens,
)

PROSE = "The old mill below the bridge has ground no corn since the flood, and yet its wheel still turns. "


def precision_and_recall(found, expected):
    """Shares of the found and of the expected words that are in both."""
    found, expected = (Counter(re.findall(r"\w+", text.lower())) for text in (found, expected))
    both = sum((found & expected).values())
    return both / max(1, sum(found.values())), both / sum(expected.values())


def f1(found, expected):
    precision, recall = precision_and_recall(found, expected)
    return 2 * precision * recall / max(1e-9, precision + recall)


@pytest.mark.slow
def test_labeled_pages():
    scores = {name: f1(html_to_text(page)[0], text) for name, (page, text) in PAGES.items()}
    assert min(scores.values()) > 0.9, scores
    assert sum(scores.values()) / len(scores) > 0.98
    plain = [f1(html_to_text(page, "plain")[0], text) for page, text in PAGES.values()]
    assert 0.94 < sum(plain) / len(plain) < sum(scores.values()) / len(scores)


@pytest.mark.parametrize("extractor", ["trafilatura", "plain"])
def test_nothing_of_the_text_is_lost_in_a_form(extractor):
    for name, (page, text) in PAGES.items():
        if "form" in name:
            found = html_to_text(page, extractor)[0]
            for line in text.split("\n"):
                assert line in found, name
    # Whatever the form is around, and however short.
    for count in (1, 2, 5):
        text = paragraphs(MILL[:count])
        for page in (
            f"<form>{text}</form>",
            f"<form><div>{text}</form>",
            f"<div><form><fieldset>{text}</fieldset></form></div>",
        ):
            found = html_to_text(f"<html><body>{page}</body></html>", extractor)[0]
            assert all(line in found for line in MILL[:count]), page


def test_groups_of_a_form_beside_other_text():
    form = f"<form>{paragraphs(MILL)}<fieldset>{paragraphs(BEES)}</fieldset></form>"
    found = html_to_text(article("", "", f"<article>{form}</article>", ""))[0]
    assert all(line in found for line in (*MILL, *BEES))


@pytest.mark.parametrize("name", [name for name in PAGES if "German" in name or "Japanese" in name])
def test_other_languages_lose_nothing(name):
    page, text = PAGES[name]
    assert all(line in html_to_text(page)[0] for line in text.split("\n"))


def test_the_headline_is_not_lost():
    for head in ("h1", "h1 class=x"):
        page = article("", "", f"<div id=inhalt><{head}>A wheel turns</h1>{paragraphs(MILL)}</div>", "")
        assert html_to_text(page)[0].split("\n")[0] == "A wheel turns"
        assert html_to_text(page)[0].count("A wheel turns") == 1


SENTENCES = [
    f"{line} It was so in the {number}th year too, and nobody knows why." for number in range(4) for line in MILL
]
HAS_RESILIPARSE = find_spec("resiliparse") is not None
real = pytest.mark.skipif(not HAS_RESILIPARSE, reason="needs resiliparse, of the extra 'data'")


def give(monkeypatch, main, everything, headlines=()):
    """Let resiliparse find these texts, whether it is installed or not."""

    class Tree:
        @staticmethod
        def parse(page):
            page.encode()
            found = [SimpleNamespace(text=headline) for headline in headlines]
            return SimpleNamespace(document=SimpleNamespace(get_elements_by_tag_name=lambda name: found))

    def extract_plain_text(tree, main_content, **options):
        if main is None:
            raise ValueError("no tree")
        return main if main_content else everything

    modules = {"parse.html": {"HTMLTree": Tree}, "extract.html2text": {"extract_plain_text": extract_plain_text}}
    for name in ("resiliparse", "resiliparse.parse", "resiliparse.extract"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, content in modules.items():
        module = ModuleType(f"resiliparse.{name}")
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize(
    ("main", "everything", "extractor"),
    [
        (SENTENCES, SENTENCES, "resiliparse"),
        (SENTENCES, ["Home", *SENTENCES, "Contact", "Imprint"], "resiliparse"),
        # A remark below the text, as long as a line of it.
        (SENTENCES[:-1], SENTENCES, "resiliparse"),
        (SENTENCES[: len(SENTENCES) // 2], SENTENCES, "trafilatura"),
        (SENTENCES, [*SENTENCES[:5], *[f"item {number}" for number in range(60)], *SENTENCES[5:]], "trafilatura"),
        (SENTENCES[:3], SENTENCES[:3], "trafilatura"),
        ([f"item {number}" for number in range(300)], [f"item {number}" for number in range(300)], "trafilatura"),
        ([], SENTENCES, "trafilatura"),
        (None, None, "trafilatura"),
    ],
)
def test_resiliparse_is_believed_where_it_holds_most_of_the_page(monkeypatch, main, everything, extractor):
    page = article("", "", f"<article>{paragraphs(tuple(SENTENCES))}</article>", "")
    give(monkeypatch, main if main is None else "\n\n".join(main), "\n".join(everything or []))
    text, how = html_to_text(page, "resiliparse")
    assert how == extractor
    if how == "resiliparse":
        assert text == "\n".join(main)
    else:
        assert html_to_text(page) == (text, "trafilatura")
    # Half of a surrogate pair and frames are left to the others.
    assert html_to_text(page.replace("mill", "mill \ud800"), "resiliparse")[1] == "trafilatura"
    assert html_to_text(page.replace("<article>", "<noframes>"), "resiliparse")[1] != "resiliparse"


def test_text_of_resiliparse_is_written_as_that_of_trafilatura(monkeypatch):
    main = "\n\n".join(
        [*SENTENCES, "  • one thing\n  • two\n    1. inner", "a\t\tb\n1\t\t2", "def f():\n    return 1"]
    )
    give(monkeypatch, main, main, ["A wheel\n turns"])
    text, how = html_to_text("<p>", "resiliparse")
    assert how == "resiliparse" and text.startswith(f"A wheel turns\n{SENTENCES[0]}\n{SENTENCES[1]}\n")
    assert text.endswith("- one thing\n- two\n  - inner\na | b\n1 | 2\ndef f():\n    return 1")
    give(monkeypatch, f"A wheel turns\n{main}", main, ["A wheel turns"])
    assert html_to_text("<p>", "resiliparse")[0].count("A wheel turns") == 1


@real
def test_resiliparse_reads_a_long_article_and_leaves_others_alone():
    around = "<nav>" + menu("Home", "News") + "</nav>", "<footer>" + menu("Imprint") + "</footer>"
    page = article("", around[0], f"<main><article>{paragraphs(tuple(SENTENCES))}</article></main>", around[1])
    assert html_to_text(page, "resiliparse") == ("\n".join(SENTENCES), "resiliparse")
    for name, (page, text) in PAGES.items():
        assert f1(html_to_text(page, "resiliparse")[0], text) > 0.9, name


def test_a_deep_page_is_not_given_to_resiliparse(monkeypatch):
    """Its time is quadratic in the levels: half a minute for as many as tags are accepted."""
    give(monkeypatch, "\n".join(SENTENCES), "\n".join(SENTENCES))
    for page, is_deep in (
        ("<div>" * 1001 + "<br>" * 1000, True),
        ("<DIV>" * 1001 + "</div>" * 1001, True),
        # Ends of what was never opened take no level away.
        ("<div></a>" * 1001, True),
        ("<div><b>x</b></div>" * 4000, False),
        ("<img><br>" * 4000, False),
        ("<div>" * 1001, False),
    ):
        assert (html_to_text(page, "resiliparse")[1] == "resiliparse") is not is_deep, page[:20]


@pytest.mark.parametrize("is_installed", [True, False])
def test_the_default_extractor_is_the_fast_one_where_it_is_installed(monkeypatch, is_installed):
    monkeypatch.setattr("hfllm.data.curation.options.find_spec", lambda name: name if is_installed else None)
    assert CurationOptions().html_extractor == ("resiliparse" if is_installed else "trafilatura")
    assert CurationOptions(html_extractor="plain").html_extractor == "plain"


def test_plain_text_has_a_line_per_block():
    page = (
        "<!doctype html><html><head><title>T</title><style>p {}</style></head><body><nav>Home</nav><h1>Big&nbsp;news"
        "</h1><p>One <b>bold</b>\nword.</p><script>var x = '</p>';</script><p>Two &amp; three<br>four</p>"
        "<form>Name <input><select><option>1</select></form><footer>Imprint</footer></body></html>"
    )
    assert plain_text(page) == "Big news\n\nOne bold word.\n\nTwo & three\nfour\n\nName"
    assert plain_text("<p>never closed <script>x") == "never closed"
    assert plain_text("<head><title>T</title><p>no body tag") == "no body tag"
    assert plain_text("<nav><nav>a</nav>b</nav>c <nav><svg>d</nav>e") == "c\n\ne"
    assert plain_text("<title>endless <p>but read") == "endless\n\nbut read"
    assert plain_text(f"a &#{'1' * 9999}; b") == f"a &#{'1' * 9999}; b"


def test_tokens_follow_the_standard_where_tags_are_odd():
    page = "a<b c='>' d=\">\" e = '>'>f</B ><!-- <i> --><script>if (a<b) {}</SCRIPT>1 < 2 <3 <!x><?y>g<img/>"
    found = [(kind, value) for kind, value, _ in tokens(page)]
    assert found == [
        *(("text", "a"), ("open", "b"), ("text", "f"), ("close", "b"), ("open", "script"), ("close", "script")),
        *(("text", "1 < 2 <3 "), ("text", "g"), ("open", "img")),
    ]


DEEP = 100_000
HOSTILE = {
    "divs": "<div>" * DEEP + PROSE + "</div>" * DEEP,
    "spans, never closed": "<span>" * DEEP + PROSE,
    "tables": "<table><tr><td>" * (DEEP // 3) + PROSE,
    "paragraphs in bold": "<b><p>" * (DEEP // 2) + PROSE,
    "text between depths": f"<p>{PROSE}</p>" + "<div>" * 300 + "</div>" * 300 + f"<p>{PROSE}</p>",
    "menus": "<nav>" + "<svg>" * DEEP + "</button>" * DEEP + "</nav>" + PROSE,
    "attributes": "<p " + " ".join(f"a{number}" for number in range(DEEP)) + f">{PROSE}",
    "attributes between slashes": "<p " + "a/" * DEEP + f">{PROSE}",
    "a picture in an attribute": f"<img src='data:{'A/+' * DEEP}'><p>{PROSE}",
    "lists": "<ul><li>x</ul>" * 6600 + PROSE,
    "lists, as many as are accepted": "<ul><li>x</ul>" * 1990 + f"<p>{PROSE}</p>",
    "less-than signs": PROSE + "<" * (10 * DEEP),
    "comments, never closed": PROSE + "<!--x" * DEEP,
    "declarations": "<!a " * DEEP,
    "quotes, never closed": f"<p>{PROSE}</p>" + "<a b='" * DEEP,
    "quotes of both kinds": f"<p>{PROSE}</p>" + '<a b="x" c=\'' * DEEP,
    "titles, never closed": "<title>" * DEEP + PROSE,
    "scripts, never closed": f"<p>{PROSE}</p>" + "<script>x</scr" * DEEP,
    "ends of tags, never closed": f"<p>{PROSE}</p>" + "</a " * DEEP,
    "ampersands": PROSE + "&" * (10 * DEEP),
    "references": PROSE + "&#x110000;&#0;&bogus;&#" + "9" * DEEP,
    "NUL bytes": PROSE.replace(" ", " \0") * 100,
    "half characters": PROSE + "\ud800 \udfff",
    "one word": f"<p>{PROSE}</p>" + "x" * (50 * DEEP),
    "spaces": f"<p>{PROSE}</p>" + " " * (50 * DEEP),
    "brackets in data": "<script type='application/ld+json'>" + "[" * DEEP + f"</script><p>{PROSE}</p>",
    "nothing": "",
    "a tag": "<html>",
}


@pytest.mark.slow
@real
def test_hostile_pages_keep_their_text_by_resiliparse():
    """Those that it is given; the others are too complex for both."""
    for name in ("ampersands", "references", "NUL bytes", "half characters", "one word", "spaces"):
        page = HOSTILE[name]
        text, how = html_to_text(page, "resiliparse")
        assert how in ("resiliparse", "trafilatura", "nothing_found"), name
        assert ("wheel still turns" in text) is ("wheel still turns" in page.replace("\0", "")), name


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pages_keep_their_text(name):
    """Each of them would end the run or hold it for minutes to hours, were it given to the parsers as it is."""
    text, how = html_to_text(HOSTILE[name])
    assert how in ("trafilatura", "too_complex", "nothing_found")
    prose = "wheel still turns" in HOSTILE[name].replace("\0", "")
    assert ("wheel still turns" in text) is prose
    if name == "text between depths":
        assert (text.count("wheel still turns"), how) == (2, "too_complex")
    if name == "a picture in an attribute":
        assert how == "trafilatura"


def test_what_is_too_complex():
    for tag, most in (("<p>", MOST_TAGS), ("<ul>", MOST_LISTS), ("<TABLE>", MOST_LISTS)):
        assert not is_too_complex(tag * most)
        assert is_too_complex(tag * (most + 1))
    attributes = " ".join(f"a{number}" for number in range(MOST_ATTRIBUTES - 1))
    assert not is_too_complex(f"<p {attributes}>")
    assert is_too_complex(f"<p {attributes} b c>")
    # Nor do quotes hide them.
    for mark in ("<", ">"):
        crowded = "<p " + " ".join(f"a{number}='{mark}'" for number in range(MOST_ATTRIBUTES + 9)) + ">"
        assert is_too_complex(crowded) and is_too_complex(crowded.replace("'", '"'))
    # Nor is a script's content a tag.
    assert not is_too_complex(f"<script>if (a<b) {attributes} b c</script>")


@pytest.mark.parametrize("size", [1, 4])
def test_tokens_take_time_by_the_page_alone(size, monkeypatch):
    """Counted, not timed: what the searches of the tokenizer look at, for pages that make parsers quadratic."""
    looked_at = 0

    class Page(str):
        def find(self, sub, start=0, *rest):
            nonlocal looked_at
            end = str.find(self, sub, start, *rest)
            looked_at += (len(self) if end < 0 else end) - start
            return end

    for part in ("<!--x", "<a b='", '<a b="x" c=\'', "<a", "</a ", "<!a "):
        looked_at = 0
        page = Page(part * 2000 * size)
        list(tokens(page))
        assert looked_at <= 3 * len(page), part


def test_a_parser_that_fails_does_not_end_the_run(monkeypatch):
    import trafilatura

    for error in (RecursionError, ValueError, MemoryError, AssertionError):
        monkeypatch.setattr(trafilatura, "extract", lambda *_, error=error, **__: (_ for _ in ()).throw(error("x")))
        assert html_to_text(f"<html><body><p>{PROSE}</p></body></html>") == (PROSE.strip(), "too_complex")


@pytest.mark.slow
def test_no_page_changes_the_text_of_another():
    """trafilatura keeps caches; a resumed run begins with empty ones."""
    alone = {name: html_to_text(page)[0] for name, (page, _) in PAGES.items()}
    for name in reversed(PAGES):
        for _ in range(3):
            assert html_to_text(PAGES[name][0])[0] == alone[name]
    assert logging.getLogger("trafilatura").level == logging.CRITICAL
