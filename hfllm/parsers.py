"""The parser of the recipes that train: TrlParser with this package's messages. Importing it imports torch."""

from collections.abc import Sequence
from typing import Any

from trl import TrlParser

from hfllm.flags import OneLineErrors


class RecipeParser(OneLineErrors, TrlParser):
    """TrlParser whose complaints are one line and name the nearest valid flag or YAML key."""

    def __init__(self, dataclass_types: Sequence[type], **kwargs: Any):
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
