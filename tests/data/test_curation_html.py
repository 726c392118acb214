"""The text of web pages: what a reader came for, from any page, in bounded time and memory."""

import logging
import re
from collections import Counter

import pytest

pytest.importorskip("trafilatura", reason="needs the extra 'data'")

from html_pages import BEES, MILL, PAGES, article, paragraphs

from hfllm.data.curation.html_text import MOST_ATTRIBUTES, MOST_LISTS, MOST_TAGS, html_to_text, is_too_complex
from hfllm.data.curation.html_tokens import plain_text, tokens

PROSE = "The old mill below the bridge has ground no corn since the flood, and yet its wheel still turns. "


def precision_and_recall(found, expected):
    """Shares of the found and of the expected words that are in both."""
    found, expected = (Counter(re.findall(r"\w+", text.lower())) for text in (found, expected))
    both = sum((found & expected).values())
    return both / max(1, sum(found.values())), both / sum(expected.values())


def f1(found, expected):
    precision, recall = precision_and_recall(found, expected)
    return 2 * precision * recall / max(1e-9, precision + recall)


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


def test_no_page_changes_the_text_of_another():
    """trafilatura keeps caches; a resumed run begins with empty ones."""
    alone = {name: html_to_text(page)[0] for name, (page, _) in PAGES.items()}
    for name in reversed(PAGES):
        for _ in range(3):
            assert html_to_text(PAGES[name][0])[0] == alone[name]
    assert logging.getLogger("trafilatura").level == logging.CRITICAL
