"""Progress bars: on a terminal alone, and gone when they are done."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(over: Iterable[Any] | None = None, total: int | None = None, unit: str = "it") -> tqdm:
    """Return a bar over items, or one to be moved by `update`, for what takes more than some seconds.

    Args:
        over: the items; `None` for a bar that is moved by its owner.
        total: how many there are, where `over` does not say.
        unit: what they are called.
    """
    return tqdm(over, total=total, unit=unit, disable=not sys.stderr.isatty(), leave=False)
