"""The visible text of a web page by a tokenizer of our own, whose time and memory grow with the page's size alone.

The standard library's parser needs quadratic time for unclosed comments and quotes up to Python 3.13, and lxml's for
a tag with very many attributes. Here each character is looked at a bounded number of times, whatever the page is.
"""

import html as entities
import re
from collections import Counter
from collections.abc import Iterator

# What is never prose, with all that is inside it.
SKIPPED = frozenset(
    (
        *("script", "style", "nav", "noscript", "template", "head", "footer", "button", "svg", "math", "iframe"),
        *("select", "datalist", "textarea", "object", "canvas", "title"),
    )
)
INLINE = frozenset(
    (
        *("a", "abbr", "b", "bdi", "bdo", "cite", "code", "data", "dfn", "em", "font", "i", "kbd", "mark", "q", "s"),
        *("samp", "small", "span", "strong", "sub", "sup", "time", "tt", "u", "var", "wbr", "img", "label", "input"),
    )
)
PARAGRAPHS = frozenset(("p", "div", "section", "article", "table", "ul", "ol", "form", "blockquote", "pre"))
# Elements without content, which are never closed.
VOID = frozenset(
    ("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr")
)
# Inside these a tag is only text, until the element's own end.
RAW = frozenset(("script", "style", "textarea", "title", "iframe", "noembed", "xmp"))
IN_HEAD = frozenset((*SKIPPED, "meta", "link", "base", "html"))
_BEGINNING = re.compile(r"<!doctype html|<html|<head|<body", re.IGNORECASE)
_TAG = re.compile(r"<(?:(!--)|[!?]|(/?)([a-zA-Z][^\s/>]*))")
_TAG_PART = re.compile(r"=\s*([\"'])|>")
_END = {name: re.compile(rf"</{name}(?=[\s/>])", re.IGNORECASE) for name in RAW}

# Kind (text, open or close), the text or the name of the tag, and the whole tag.
Token = tuple[str, str, str]


def looks_like_html(text: str) -> bool:
    """Return whether a document begins like a web page."""
    return _BEGINNING.search(text[:2000]) is not None


def tokens(page: str) -> Iterator[Token]:
    """Yield a page's texts and tags in order, without comments, declarations and the content of scripts.

    As in the standard (https://html.spec.whatwg.org/multipage/parsing.html), a quoted attribute may hold `>`, and a
    comment, a script or a quote that never ends takes the rest of the page. A title that never ends is left out.
    """
    place, endless = 0, set()
    while found := _TAG.search(page, place):
        if found.start() > place:
            yield "text", page[place : found.start()], ""
        if found[1]:
            end = page.find("-->", found.start() + 2)
            place = len(page) if end < 0 else end + 3
            continue
        place = _end_of_tag(page, found.end())
        if not found[3]:
            continue
        name, tag = found[3].lower(), page[found.start() : place]
        if name in RAW and not found[2]:
            end = None if name in endless else _END[name].search(page, place)
            if end:
                place = end.start()
            elif name in ("script", "style"):
                return
            else:
                endless.add(name)
                continue
        yield "close" if found[2] else "open", name, tag
    if place < len(page):
        yield "text", page[place:], ""


def _end_of_tag(page: str, place: int) -> int:
    while part := _TAG_PART.search(page, place):
        if not part[1]:
            return part.end()
        end = page.find(part[1], part.end())
        if end < 0:
            break
        place = end + 1
    return len(page)


def plain_text(page: str) -> str:
    """Return the visible text but for menus and footers: a line per block, an empty line between paragraphs."""
    parts: list[str] = []
    skipping: list[str] = []
    opened: Counter[str] = Counter()
    for kind, value, _ in tokens(page):
        if kind == "text":
            if not skipping:
                parts.append(_unescaped(value).replace("\n", " "))
            continue
        if kind == "open" and "head" in opened and value not in IN_HEAD:
            skipping.clear()  # a head that was never closed
            opened.clear()
        if value in SKIPPED and kind == "open":
            skipping.append(value)
            opened[value] += 1
        elif value in SKIPPED and opened[value]:
            # Unclosed tags inside end with it.
            while (last := skipping.pop()) != value:
                opened[last] -= 1
            opened[value] -= 1
        if value not in INLINE:
            parts.append("\n\n" if value in PARAGRAPHS else "\n")
    lines = (" ".join(line.split()) for line in "".join(parts).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _unescaped(text: str) -> str:
    try:
        return entities.unescape(text)
    except ValueError:  # `&#` with thousands of digits
        return text
