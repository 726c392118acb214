"""Say what a model was merged from, as the record in its folder tells."""

from pathlib import Path
from typing import Any

from hfllm.outputs.files import ADAPTER_CONFIG, MERGED_FROM, read_json


def merged_from(folder: Path) -> dict[str, Any]:
    """Return the record of a merged model: its `adapter` and `base_model_name_or_path`; empty for any other model."""
    return read_json(folder / MERGED_FROM)


def first_base(folder: Path) -> str | None:
    """Return the model of the Hub that the first of the merged adapters was trained on, `None` if that is local."""
    record = merged_from(folder)
    if not record or record.get("base_is_local") is False:
        return record.get("base_model_name_or_path")
    return first_base(Path(record["base_model_name_or_path"]))


def merged_adapters(folder: Path) -> list[str]:
    """Return the names of the adapters that were merged one after the other, the first one first."""
    record = merged_from(folder)
    if not record:
        return []
    return [*merged_adapters(Path(record["base_model_name_or_path"])), record["adapter"]]


def merged_base(folder: Path) -> Path | None:
    """Return the local merged model that an adapter was trained on; `None` for any other adapter."""
    base = Path(read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    # The run's folder may have moved, with the base in it.
    places = (base, folder / base.name) if base.name else ()
    return next((place for place in places if (place / MERGED_FROM).is_file()), None)
