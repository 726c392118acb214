"""The text of a web page: a plain extractor on the standard library's parser.

It drops what is never prose (scripts, styles, navigation, forms, headers and footers of a page) and breaks lines
at block elements. It does not find the main content as trafilatura does; the quality filters judge the rest.
"""

import re
from html.parser import HTMLParser

SKIPPED = frozenset(("script", "style", "nav", "noscript", "template", "head", "form", "footer", "button", "svg"))
INLINE = frozenset(
    (
        *("a", "abbr", "b", "bdi", "bdo", "cite", "code", "data", "dfn", "em", "font", "i", "kbd", "mark", "q", "s"),
        *("samp", "small", "span", "strong", "sub", "sup", "time", "tt", "u", "var", "wbr", "img"),
    )
)
_HTML = re.compile(r"<!doctype html|<html|<head|<body", re.IGNORECASE)


def looks_like_html(text: str) -> bool:
    """Return whether a document begins like a web page."""
    return _HTML.search(text[:2000]) is not None


def html_to_text(html: str) -> str:
    """Return the visible text, with a line per block element and an empty line between paragraphs."""
    parser = _TextParser()
    parser.feed(html)
    parser.close()
    lines = (" ".join(line.split()) for line in "".join(parser.parts).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


class _TextParser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.skipping: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag in SKIPPED:
            self.skipping.append(tag)
        elif tag == "body":
            self.skipping.clear()  # a head that was never closed
        self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.skipping:
            # Unclosed tags inside end with it.
            del self.skipping[self.skipping.index(tag) :]
        self._break(tag)

    def _break(self, tag: str) -> None:
        if tag not in INLINE:
            self.parts.append("\n\n" if tag in ("p", "div", "section", "article", "table", "ul", "ol") else "\n")

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.parts.append(data.replace("\n", " "))
