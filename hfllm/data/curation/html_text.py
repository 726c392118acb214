"""The text of a web page: its main content by trafilatura, else all of its visible text.

trafilatura (Barbaresi 2021, https://aclanthology.org/2021.acl-demo.15) made the text of FineWeb. It leaves out menus,
sidebars, comments and advertisements. The visible text takes its place where it finds nothing, so that no page becomes
empty that shows text, and for pages built to exhaust a parser. Such pages are known by their form, not by a clock: a
page gives the same text on every machine.
"""

import logging
import re
from typing import TYPE_CHECKING

from hfllm.data.curation.html_tokens import plain_text, tokens

if TYPE_CHECKING:
    from lxml.html import HtmlElement

MOST_TAGS = 20_000  # pages made for people have some thousands
MOST_LISTS = 2000  # lists and tables: trafilatura's time is quadratic in their number
LONGEST_HEADLINE = 300
MOST_ATTRIBUTES = 1000  # lxml's time is quadratic in those of one tag
# lxml takes the text for browsers without frames for that of a script.
_FRAMES = re.compile(r"<(?:frameset|noframes)\b", re.IGNORECASE)
_LIST = re.compile(r"<(?:[uod]l|table)\b", re.IGNORECASE)
_QUOTED = re.compile(r"\"[^\"]*\"|'[^']*'")
_BETWEEN_ATTRIBUTES = re.compile(r"[\s/]+")


def html_to_text(page: str, extractor: str = "trafilatura") -> tuple[str, str]:
    """Return a page's text, and what found it.

    Args:
        page: the HTML, of any size and form.
        extractor: `trafilatura` for the main content, or `plain` for all visible text.

    Returns:
        The text with a line per block, perhaps empty, and `trafilatura`, `plain`, `nothing_found` (the visible text,
        since trafilatura finds none) or `too_complex` (the visible text of a page that trafilatura is not given).
    """
    page = page.replace("\0", "")  # as browsers do
    if extractor == "plain":
        return plain_text(page), "plain"
    if is_too_complex(page):
        return plain_text(page), "too_complex"
    text = "" if _FRAMES.search(page) else _main_text(page)
    if text is None:
        return plain_text(page), "too_complex"
    return (text, "trafilatura") if text.strip() else (plain_text(page), "nothing_found")


def is_too_complex(page: str) -> bool:
    """Return whether a page has more tags, or more attributes in one, than pages made for people."""
    if page.count("<") > MOST_TAGS or sum(1 for _ in _LIST.finditer(page)) > MOST_LISTS:
        return True
    # A quick look first: long runs without `>` are rare and mostly scripts, which the tokens leave out.
    if all(len(part) <= MOST_ATTRIBUTES for part in page.split(">")):
        return False
    return any(_is_crowded(tag) for _, _, tag in tokens(page) if len(tag) > MOST_ATTRIBUTES)


def _is_crowded(tag: str) -> bool:
    bare = _QUOTED.sub(" ", tag)  # a picture may be written into an attribute
    return len(_BETWEEN_ATTRIBUTES.findall(bare)) > MOST_ATTRIBUTES


def _main_text(page: str) -> str | None:
    """Return the main content, or `None` for a page that lxml cannot hold or trafilatura fails on."""
    import trafilatura
    from lxml import etree, html

    for name in ("trafilatura", "htmldate", "justext"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    parser = html.HTMLParser(encoding="utf-8", collect_ids=False, remove_comments=True, remove_pis=True)
    try:
        tree = html.document_fromstring(page.encode("utf-8", "replace"), parser=parser)
        # Beyond 256 levels lxml leaves out the rest of the page without an error.
        if any(entry.type == etree.ErrorTypes.ERR_RESOURCE_LIMIT for entry in parser.error_log):
            return None
        # trafilatura drops groups of a form, with any prose in them.
        for group in tree.iter("fieldset"):
            group.tag = "div"
        headline = _headline(tree)
        text = trafilatura.extract(tree, include_comments=False) or ""
    except Exception:
        # Two libraries and what they stand on meet any page that someone could write; none may end a run.
        return None
    # trafilatura leaves the headline out where it finds paragraphs alone.
    return f"{headline}\n{text}" if text and headline not in " ".join(text.split()) else text


def _headline(tree: "HtmlElement") -> str:
    """Return the text of a page's only `h1`, on one line; else nothing."""
    found = list(tree.iter("h1"))
    text = " ".join(found[0].text_content().split()) if len(found) == 1 else ""
    return text if len(text) <= LONGEST_HEADLINE else ""
