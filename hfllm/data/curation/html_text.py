"""The text of a web page: its main content by resiliparse or trafilatura, else all of its visible text.

trafilatura (Barbaresi 2021, https://aclanthology.org/2021.acl-demo.15) made the text of FineWeb. It leaves out menus,
sidebars, comments and advertisements. resiliparse (Bevendorff et al. 2018, doi:10.1007/978-3-319-76941-7_83) does so
in a tenth of the time and errs more often, mostly by leaving out too much; its text is taken where most of what a
reader could have come for is in it. The visible text takes its place where it finds nothing, so that no page becomes
empty that shows text, and for pages built to exhaust a parser. Such pages are known by their form, not by a clock: a
page gives the same text on every machine.
"""

import logging
import re
from collections import Counter

from hfllm.data.curation.html_tokens import VOID, plain_text, tokens

MOST_TAGS = 20_000  # pages made for people have some thousands
MOST_LISTS = 2000  # lists and tables: trafilatura's time is quadratic in their number
MOST_LEVELS, FEW_TAGS = 1000, 2000  # the time of resiliparse is quadratic in the depth of a page: 0.1 s for as many
LONGEST_HEADLINE = 300
# resiliparse's text must have this many characters, half of them in long lines; it must hold this share of the page's
# long lines, and this share of all between the first and the last of those that it holds, where a list may be missing.
MIN_CHARACTERS, LONG_LINE, MIN_LONG, MIN_BETWEEN = 1000, 60, 0.7, 0.9
MOST_ATTRIBUTES = 1000  # lxml's time is quadratic in those of one tag
# lxml takes the text for browsers without frames for that of a script.
_FRAMES = re.compile(r"<(?:frameset|noframes)\b", re.IGNORECASE)
_LIST = re.compile(r"<(?:[uod]l|table)\b", re.IGNORECASE)
_LONG_TAG = re.compile(rf"<[a-zA-Z][^<]{{{2 * MOST_ATTRIBUTES},}}")
_QUOTED = re.compile(r"\"[^\"]*\"|'[^']*'")
_NAME = re.compile(r"<(/?)([a-zA-Z][^\s/>]*)")
_BULLET = re.compile(r"^  ( *)(?:•|\d+\.) +", re.MULTILINE)
_CELLS = re.compile(r" *\t[ \t]*")
_BETWEEN_ATTRIBUTES = re.compile(r"[\s/]+")


def html_to_text(page: str, extractor: str = "trafilatura") -> tuple[str, str]:
    """Return a page's text, and what found it.

    Args:
        page: the HTML, of any size and form.
        extractor: `trafilatura` for the main content, `resiliparse` for the same by resiliparse where it is sure, or
            `plain` for all visible text.

    Returns:
        The text with a line per block, perhaps empty, and `resiliparse`, `trafilatura`, `plain`, `nothing_found` (the
        visible text, since trafilatura finds none) or `too_complex` (that of a page that neither is given).
    """
    page = page.replace("\0", "")  # as browsers do
    if extractor == "plain":
        return plain_text(page), "plain"
    if is_too_complex(page):
        return plain_text(page), "too_complex"
    has_frames = _FRAMES.search(page)
    if extractor == "resiliparse" and not has_frames and not _is_deep(page) and (text := _sure_text(page)):
        return text, "resiliparse"
    text = "" if has_frames else _main_text(page)
    if text is None:
        return plain_text(page), "too_complex"
    return (text, "trafilatura") if text.strip() else (plain_text(page), "nothing_found")


def is_too_complex(page: str) -> bool:
    """Return whether a page has more tags, or more attributes in one, than pages made for people."""
    if page.count("<") > MOST_TAGS or sum(1 for _ in _LIST.finditer(page)) > MOST_LISTS:
        return True
    # A quick look first: so many attributes take two characters each, in a part without `>` or, where attributes hold
    # that, in one without `<`. What is left is mostly scripts, which the tokens leave out.
    parts = [*page.split(">"), *(found[0] for found in _LONG_TAG.finditer(page))]
    if not any(len(part) > 2 * MOST_ATTRIBUTES and _is_crowded(part) for part in parts):
        return False
    return any(_is_crowded(tag) for _, _, tag in tokens(page) if len(tag) > MOST_ATTRIBUTES)


def _is_crowded(tag: str) -> bool:
    if len(tag.split()) + tag.count("/") <= MOST_ATTRIBUTES:
        return False
    bare = _QUOTED.sub(" ", tag)  # a picture may be written into an attribute
    return len(_BETWEEN_ATTRIBUTES.findall(bare)) > MOST_ATTRIBUTES


def _is_deep(page: str) -> bool:
    """Return whether a page of many tags may have more levels than pages made for people."""
    if page.count("<") <= FEW_TAGS:
        return False
    opened: Counter[str] = Counter()
    levels = 0
    for is_end, name in _NAME.findall(page.lower()):
        if not is_end and name not in VOID:
            opened[name] += 1
            levels += 1
            if levels > MOST_LEVELS:
                return True
        elif is_end and opened[name]:
            opened[name] -= 1
            levels -= 1
    return False


def _sure_text(page: str) -> str:
    """Return the main content that resiliparse finds, or nothing where it may lack a part."""
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    try:
        tree = HTMLTree.parse(page)
        found, everything = (
            extract_plain_text(tree, main_content=is_main, alt_texts=False, comments=False)
            for is_main in (True, False)
        )
        headlines = [heading.text for heading in tree.document.get_elements_by_tag_name("h1")]
    except Exception:
        # As in `_main_text`: no page may end a run.
        return ""
    text = _CELLS.sub(" | ", _BULLET.sub(r"\1- ", found))
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    if not _is_most(found, everything):
        return ""
    return _with_headline("\n".join(lines), headlines)


def _is_most(found: str, everything: str) -> bool:
    """Return whether a text holds most of the long lines of another, and of what stands between them."""
    lines, every = ([" ".join(line.split()) for line in text.splitlines()] for text in (found, everything))
    size, known = sum(map(len, lines)), set(lines)
    if size < MIN_CHARACTERS or 2 * sum(len(line) for line in lines if len(line) >= LONG_LINE) < size:
        return False
    long = [line for line in every if len(line) >= LONG_LINE]
    places = [place for place, line in enumerate(every) if len(line) >= LONG_LINE and line in known]
    between = every[places[0] : places[-1] + 1] if places else []
    return all(
        parts and sum(len(line) for line in parts if line in known) >= least * sum(map(len, parts))
        for parts, least in ((long, MIN_LONG), (between, MIN_BETWEEN))
    )


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
        headlines = [heading.text_content() for heading in tree.iter("h1")]
        text = trafilatura.extract(tree, include_comments=False) or ""
    except Exception:
        # Two libraries and what they stand on meet any page that someone could write; none may end a run.
        return None
    return _with_headline(text, headlines)


def _with_headline(text: str, headlines: list[str]) -> str:
    """Return a text below the page's only `h1`, which extractors leave out where they find paragraphs alone."""
    headline = " ".join(headlines[0].split()) if len(headlines) == 1 else ""
    is_missing = text and len(headline) <= LONGEST_HEADLINE and headline not in " ".join(text.split())
    return f"{headline}\n{text}" if is_missing else text
