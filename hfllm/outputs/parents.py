"""Where a model comes from: the stages before it and the model that the first of them started from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfllm.outputs.files import ADAPTER_CONFIG, read_json
from hfllm.outputs.report import read_report

# The metrics that count what a stage learned from, and what the rows are.
ROWS = {
    "documents": "texts",
    "examples": "demonstrations",
    "train_comparisons": "comparisons",
    "train_prompts": "prompts",
    "train_rows": "rows",
}
# The role of the model that training starts from; others are such as `reward model` and `teacher`.
START = "model"
BEFORE = "start of the "


def lineage(models: Mapping[str, str | Sequence[str] | None]) -> list[dict[str, Any]]:
    """Return the models that a stage reads and those before them, in the order in which they were made, each once.

    Args:
        models: names or folders, by role: `model` is the one that training starts from.

    Returns:
        An entry per model: its `role` and `model` (folder or Hub id); `hub_id` of one of the Hub; of one that a
        stage made `stage`, `data`, `rows` and `kind` of rows, as far as its report tells.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for role, named in models.items():
        for name in [named] if isinstance(named, str) else named or []:
            for entry in _with_parents(role, name):
                found.setdefault((entry["model"], entry.get("stage", "")), entry)
    return list(found.values())


def _with_parents(role: str, name: str, children: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Return a model's entry after those of the models before it.

    Args:
        children: the models that come after it, none of which is before it.
    """
    if not Path(name).is_dir():
        return [{"role": role, "model": name, "hub_id": name}]
    report, ancestor = read_report(name), role if role == START else f"{BEFORE}{role.removeprefix(BEFORE)}"
    own = {"role": role, "model": name}
    if report is None:
        base = read_json(Path(name) / ADAPTER_CONFIG).get("base_model_name_or_path")
        parents = None
    else:
        base, parents = report.get("arguments", {}).get("model_name_or_path"), entries(report.get("parents"))
        own |= {"stage": report.get("stage"), **learned_from(report)}
    if parents is None:
        # Another tool's model, or one whose report is of before the lineage was written.
        is_known = isinstance(base, str) and base and base not in (name, *children)
        parents = _with_parents(START, base, (name, *children)) if is_known else []
    return [*({**entry, "role": ancestor if entry["role"] == START else entry["role"]} for entry in parents), own]


def learned_from(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the name of the data of a run and the number of rows, as far as its report has them."""
    metrics, data = report.get("metrics") or {}, report.get("arguments", {}).get("dataset_name")
    counts = {name: metrics[name] for name in ROWS if isinstance(metrics.get(name), int | float)}
    rows = next(({"rows": count, "kind": ROWS[name]} for name, count in counts.items()), {})
    return {**({"data": data} if data else {}), **rows}


def entries(parents: object) -> list[dict[str, Any]] | None:
    """Return the lineage that a report tells, without what is no entry: models come from elsewhere too."""
    if not isinstance(parents, list):
        return None
    kinds = {"role": str, "model": str, "stage": str, "hub_id": str, "data": str, "kind": str, "rows": int | float}
    return [
        {name: value for name, value in entry.items() if name not in kinds or isinstance(value, kinds[name])}
        for entry in parents
        if isinstance(entry, dict) and isinstance(entry.get("role"), str) and isinstance(entry.get("model"), str)
    ]


def origin(parents: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the first model of the line that training started from: a base model, or what a first stage made."""
    return next((entry for entry in parents if entry["role"] == START), None)
