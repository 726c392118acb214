"""Text of a document: its words, hashes of their n-grams, and the text parts of an HTML page."""

import html as entities
import logging
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from hashlib import blake2b

import numpy as np

# ---- words and n-grams ----


# Scripts without spaces, where each character counts as a word: kana, Han, Thai, Lao, Burmese, Khmer.
UNSPACED = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
WORD = re.compile(rf"\d+(?:[.,]\d+)+|[{UNSPACED}]|[^\W{UNSPACED}]+(?:['’][^\W{UNSPACED}]+)*")
_UNSAID = str.maketrans("", "", ".,'’")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio
_MIXER = np.uint64(0xFF51AFD7ED558CCD)  # of MurmurHash3's finalizer (Austin Appleby, public domain)


# Filters run one after the other on one document, so a cache of two entries saves the work for all but one.
@lru_cache(maxsize=2)
def words_of(text: str) -> tuple[str, ...]:
    """Return the words of `text`: runs of letters and digits, with apostrophes and number marks in them."""
    return tuple(WORD.findall(text))


@lru_cache(maxsize=2)
def word_hashes(text: str) -> np.ndarray:
    """Return 64-bit hashes of the words, without case, so that `1,000` is `1000` and `don't` is `dont`.

    uint64 of shape (words,). They are the same on every machine.
    """
    words = words_of(text.lower())
    return np.fromiter(map(_hash_word, words), np.uint64, len(words))


@lru_cache(maxsize=1 << 16)
def _hash_word(word: str) -> int:
    return int.from_bytes(blake2b(word.translate(_UNSAID).encode(), digest_size=8).digest(), "little")


def hash_text(text: str, seed: int = 0) -> int:
    """Return a 64-bit hash of a whole text."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8, salt=seed.to_bytes(8, "little")).digest(), "little")


def hash_words(hashes: np.ndarray) -> np.ndarray:
    """Return one hash of all words in their order. (words,) -> (1,), or (0,) for no words."""
    return np.frombuffer(blake2b(hashes.tobytes(), digest_size=8).digest(), "<u8")[: len(hashes)]


def ngram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """Return hashes of all runs of `n` words. (words,) -> (max(0, words - n + 1),), uint64."""
    count = max(0, len(hashes) - n + 1)
    combined = np.zeros(count, np.uint64)
    for offset in range(n):
        combined = combined * _MULTIPLIER + hashes[offset : offset + count]
    return mix(combined)


def mix(values: np.ndarray) -> np.ndarray:
    """Mix the bits of uint64 values, so that all bits are equally random."""
    values = (values ^ (values >> np.uint64(33))) * _MIXER
    return values ^ (values >> np.uint64(33))


# ---- text of web pages ----
#
# The text of a web page: its main content by resiliparse or trafilatura, else all of its visible text.
#
# trafilatura (Barbaresi 2021, https://aclanthology.org/2021.acl-demo.15) made the text of FineWeb. It leaves out
# menus, sidebars, comments and advertisements. resiliparse (Bevendorff et al. 2018, doi:10.1007/978-3-319-76941-7_83)
# does so in a tenth of the time and errs more often, mostly by leaving out too much; its text is taken where it has
# most of the content that a reader could have come for. The visible text takes its place where it finds nothing, so
# that no page with visible text becomes empty, and for pages built to exhaust a parser. Such pages are known by their
# form, not by a clock: a page gives the same text on every machine.


MOST_TAGS = 20_000  # pages made for people have some thousands
MOST_LISTS = 2000  # lists and tables: trafilatura's time is quadratic in their number
MOST_LEVELS, FEW_TAGS = 1000, 2000  # the time of resiliparse is quadratic in the depth of a page: 0.1 s for as many
LONGEST_HEADLINE = 300
# resiliparse's text must have this many characters, half of them in long lines; it must hold this share of the page's
# long lines, and this share of all between the first and the last of those that it holds, where a list may be missing.
MIN_CHARACTERS, LONG_LINE, MIN_LONG, MIN_BETWEEN = 1000, 60, 0.7, 0.9
MOST_ATTRIBUTES = 1000  # lxml's time is quadratic in the attributes of one tag
# lxml takes the text for browsers without frames for a script's.
_FRAMES = re.compile(r"<(?:frameset|noframes)\b", re.IGNORECASE)
_LIST = re.compile(r"<(?:[uod]l|table)\b", re.IGNORECASE)
_LONG_TAG = re.compile(rf"<[a-zA-Z][^<]{{{2 * MOST_ATTRIBUTES},}}")
_QUOTED = re.compile(r"\"[^\"]*\"|'[^']*'")
_NAME = re.compile(r"<(/?)([a-zA-Z][^\s/>]*)")
_BULLET = re.compile(r"^  ( *)(?:•|\d+\.) +", re.MULTILINE)
_CELLS = re.compile(r" *\t[ \t]*")
_BETWEEN_ATTRIBUTES = re.compile(r"[\s/]+")


def html_to_text(page: str, extractor: str = "trafilatura") -> tuple[str, str]:
    """Return a page's text, and the name of its extractor.

    Args:
        page: the HTML, of any size and form.
        extractor: `trafilatura` for the main content, `resiliparse` for the same by resiliparse where it is sure, or
            `plain` for all visible text.

    Returns:
        The text with a line per block, perhaps empty, and `resiliparse`, `trafilatura`, `plain`, `nothing_found` (the
        visible text, since trafilatura finds none) or `too_complex` (the visible text of a page given to neither).
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
    # `>`, in one without `<`. The rest is mostly scripts, which the tokens leave out.
    parts = [*page.split(">"), *(result[0] for result in _LONG_TAG.finditer(page))]
    if not any(len(part) > 2 * MOST_ATTRIBUTES and _is_crowded(part) for part in parts):
        return False
    return any(_is_crowded(tag) for _, _, tag in tokens(page) if len(tag) > MOST_ATTRIBUTES)


def _is_crowded(tag: str) -> bool:
    if len(tag.split()) + tag.count("/") <= MOST_ATTRIBUTES:
        return False
    bare = _QUOTED.sub(" ", tag)  # an image may be written into an attribute
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
    """Return the main content found by resiliparse, or nothing where it may lack a part."""
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    try:
        tree = HTMLTree.parse(page)
        result, everything = (
            extract_plain_text(tree, main_content=is_main, alt_texts=False, comments=False)
            for is_main in (True, False)
        )
        headlines = [heading.text for heading in tree.document.get_elements_by_tag_name("h1")]
    except Exception:
        # As in `_main_text`: no page may end a run.
        return ""
    text = _CELLS.sub(" | ", _BULLET.sub(r"\1- ", result))
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    if not _is_most(result, everything):
        return ""
    return _with_headline("\n".join(lines), headlines)


def _is_most(part: str, everything: str) -> bool:
    """Return whether a text holds most of the long lines of another, and of the text between them."""
    lines, every = ([" ".join(line.split()) for line in text.splitlines()] for text in (part, everything))
    size, extracted_lines = sum(map(len, lines)), set(lines)
    if size < MIN_CHARACTERS or 2 * sum(len(line) for line in lines if len(line) >= LONG_LINE) < size:
        return False
    long = [line for line in every if len(line) >= LONG_LINE]
    indices = [index for index, line in enumerate(every) if len(line) >= LONG_LINE and line in extracted_lines]
    between = every[indices[0] : indices[-1] + 1] if indices else []
    return all(
        parts and sum(len(line) for line in parts if line in extracted_lines) >= least * sum(map(len, parts))
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
        # Two libraries and their dependencies meet any page that someone could write; none may end a run.
        return None
    return _with_headline(text, headlines)


def _with_headline(text: str, headlines: list[str]) -> str:
    """Return a text below the page's only `h1`, which extractors leave out where they find only paragraphs."""
    headline = " ".join(headlines[0].split()) if len(headlines) == 1 else ""
    is_missing = text and len(headline) <= LONGEST_HEADLINE and headline not in " ".join(text.split())
    return f"{headline}\n{text}" if is_missing else text


# ---- visible text of web pages ----
#
# The visible text of a web page by a tokenizer of our own, whose time and memory grow only with the page's size.
#
# The standard library's parser needs quadratic time for unclosed comments and quotes up to Python 3.13, and lxml's for
# a tag with very many attributes. Here each character is looked at a bounded number of times, on any page.


# Elements without prose, with everything inside them.
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
    index, endless = 0, set()
    while result := _TAG.search(page, index):
        if result.start() > index:
            yield "text", page[index : result.start()], ""
        if result[1]:
            end = page.find("-->", result.start() + 2)
            index = len(page) if end < 0 else end + 3
            continue
        index = _end_of_tag(page, result.end())
        if not result[3]:
            continue
        name, tag = result[3].lower(), page[result.start() : index]
        if name in RAW and not result[2]:
            end = None if name in endless else _END[name].search(page, index)
            if end:
                index = end.start()
            elif name in ("script", "style"):
                return
            else:
                endless.add(name)
                continue
        yield "close" if result[2] else "open", name, tag
    if index < len(page):
        yield "text", page[index:], ""


def _end_of_tag(page: str, position: int) -> int:
    while part := _TAG_PART.search(page, position):
        if not part[1]:
            return part.end()
        end = page.find(part[1], part.end())
        if end < 0:
            break
        position = end + 1
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
