"""Names of users' models, data and folders in Markdown: whatever characters they have, they stay what they are."""

import json
import re

# The Hub takes no longer names.
_HUB_ID = re.compile(r"[\w][\w.-]{0,95}(/[\w][\w.-]{0,95})?")


def is_hub_id(value: object) -> bool:
    """Return whether a name can be that of a repository of the Hub."""
    return isinstance(value, str) and _HUB_ID.fullmatch(value) is not None


def code_span(value: object) -> str:
    """Return a name as a code span, which it does not leave; a pipe is for `markdown_table` to escape."""
    text = _printable(value)
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    space = " " if longest or not text.strip() else ""
    return f"{fence}{space}{text or ' '}{space}{fence}"


def plain_line(value: object) -> str:
    """Return a name as the text of a heading, without tags that a page would follow."""
    return _printable(value).strip().replace("<", "&lt;")


def quoted(value: object) -> str:
    """Return a name as a string of Python in a block of code, which it does not end."""
    return json.dumps(_printable(value), ensure_ascii=False).replace("```", "'''")


def _printable(value: object) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in str(value))
