"""Read pictures of a dataset on the Hub as they are stored: the bytes, or the path, of each.

Decoded by datasets, one broken file would end the reading, and all would be held in memory with all their pixels.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# A feature of datasets, or a dictionary or list of such.
Feature: TypeAlias = Any
# Protocols of what lies inside a file: fsspec opens them within the address that follows after `::`.
ARCHIVES = ("zip", "tar", "gzip", "bz2", "xz", "lz4", "zstd")


def undecoded(name: str, rows: "Dataset | IterableDataset") -> "Iterable[dict[str, Any]]":
    """Return rows whose pictures, at any depth, are paths or bytes; where no feature is a picture, the rows given.

    What is streamed has paths on the Hub, and what lies in files of their own has paths where datasets has stored
    them. Those within the dataset's own repository are read here, and all others are left as they are: rows are
    written by others, and may name what is not theirs to read. `images.to_pictures` refuses these.

    Args:
        name: the dataset's id on the Hub.
        rows: as `datasets.load_dataset` gives them.
    """
    from datasets import Dataset

    features = rows.features
    if not features or not _has_picture(features):
        return rows
    is_stored = isinstance(rows, Dataset)
    rows = (rows.to_iterable_dataset() if is_stored else rows).decode(False)
    # Everything else that is stored in another form, such as values as JSON, is decoded as ever.
    decode = type(features)({column: _as_stored(each) for column, each in features.items()}).decode_example
    return (_fetched(name, features, decode(row)) for row in rows)


def _inside(feature: Feature) -> Feature | None:
    """Return the feature of a list's entries, `None` for what is no list of datasets."""
    from datasets import LargeList, List

    return feature.feature if isinstance(feature, (List, LargeList)) else None


def _has_picture(feature: Feature) -> bool:
    from datasets import Image

    if isinstance(feature, (dict, list)):
        return any(map(_has_picture, feature.values() if isinstance(feature, dict) else feature))
    inside = _inside(feature)
    return isinstance(feature, Image) if inside is None else _has_picture(inside)


def _as_stored(feature: Feature) -> Feature:
    """Return a feature whose pictures, and nothing else, are not decoded."""
    from datasets import Image

    if isinstance(feature, dict):
        return {name: _as_stored(each) for name, each in feature.items()}
    if isinstance(feature, list):
        return [_as_stored(each) for each in feature]
    if isinstance(feature, Image):
        return replace(feature, decode=False)
    inside = _inside(feature)
    return feature if inside is None else replace(feature, feature=_as_stored(inside))


def _fetched(name: str, feature: Feature, value: Any) -> Any:
    """Return a value of a row with the bytes of its pictures that lie in the dataset's repository."""
    from datasets import Image

    if isinstance(feature, dict) and isinstance(value, dict):
        return {key: _fetched(name, feature[key], each) if key in feature else each for key, each in value.items()}
    inside = feature[0] if isinstance(feature, list) else _inside(feature)
    if inside is not None and isinstance(value, list):
        return [_fetched(name, inside, each) for each in value]
    if not isinstance(feature, Image) or not isinstance(value, dict) or value.get("bytes") is not None:
        return value
    if is_downloaded(name, value.get("path") or ""):
        return {**value, "bytes": Path(value["path"]).read_bytes()}
    if not is_in_repository(name, value.get("path") or ""):
        return value
    import fsspec

    with fsspec.open(value["path"], "rb") as stream:
        return {**value, "bytes": stream.read()}


def is_downloaded(name: str, path: str) -> bool:
    """Return whether a path is that of a file that was downloaded with a dataset of the Hub, links resolved."""
    from datasets.config import EXTRACTED_DATASETS_PATH
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        found = Path(path).resolve(strict=True)
        if not path or not found.is_file():
            return False
        if found.is_relative_to(Path(EXTRACTED_DATASETS_PATH).resolve()):
            return True
        cache = Path(HF_HUB_CACHE).resolve()
    except (OSError, ValueError):
        return False
    repository = f"datasets--{name.replace('/', '--')}".lower()
    return found.is_relative_to(cache) and found.relative_to(cache).parts[0].lower() == repository


def is_in_repository(name: str, address: str) -> bool:
    """Return whether an address is that of a file in a dataset's repository, or in an archive there."""
    *archives, file = address.split("::")
    begins = re.match(rf"hf://datasets/{re.escape(name)}(@[^/]+)?/", file, re.IGNORECASE)
    is_above = ".." in file.split("/")
    return bool(begins) and not is_above and all(each.partition("://")[0] in ARCHIVES for each in archives)
