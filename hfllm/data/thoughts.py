"""Thoughts and answers in what a model says."""

OPEN, CLOSE = "<think>", "</think>"


def split_thoughts(text: str) -> tuple[str | None, str]:
    """Return the thought of a text, `None` without any, and what it says besides.

    A thought that never ends is all that follows its beginning.
    """
    said, opened, rest = text.partition(OPEN)
    if not opened:
        return None, text
    thought, _, after = rest.partition(CLOSE)
    return thought, said + after
