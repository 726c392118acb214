"""The report of an evaluation: a verdict, means with intervals by group and metric, models side by side."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfllm.errors import InputError
from hfllm.evaluation.suites.base import Record, Suite
from hfllm.evaluation.verdicts import (
    Compared,
    can_differ,
    changed_items,
    judged,
    left_out_sentence,
    sentence,
    shown_changes,
    verdict_metrics,
    verdict_table,
)
from hfllm.outputs.report import Bars, Found, Plot, write_atomically
from hfllm.outputs.statistics import Interval, difference_interval, mean_interval

# The items in which models differ, and how long a line of them may be.
CHANGES, MOST_READ = "changes.jsonl", 1 << 24
# What ends the names of figures beside a mean. Other endings would make a table of all of them.
RENAMED = {"_se": "_error", "_n": "_items"}
MOST_BARS = 36
# Shown of a suite's answers: the first of each group.
SHOWN_SAMPLES = 2


def report(suites: Sequence[Suite], labels: Sequence[str], records: Sequence[Record]) -> Found:
    """Return what the records say.

    Args:
        suites: in the order of their tables.
        labels: of the models; differences are to the first.

    Returns:
        Metrics `SUITE/GROUP/METRIC/MODEL` with `_low`, `_high` (95%) and `_items`; of other models than the first
        also `..._difference` with its bounds; `SUITE/skipped/MODEL`; the verdict, see `verdict_metrics`. Their tables
        and plots, and those of the suites.
    """
    metrics: dict[str, float] = {}
    tables: dict[str, Sequence[Mapping[str, Any]]] = {}
    plots: dict[str, Plot | Bars] = {}
    verdicts: list[str] = []
    said: list[str] = []
    if len(labels) > 1:
        family = compared_figures(suites, labels, records)
        decided = judged([each for each in family if can_differ(each)])
        left_out = [each for each in family if not can_differ(each)]
        metrics |= verdict_metrics(decided, left_out, labels[1:])
        title = f"Verdict on the primary figures (Holm over {len(decided)})"
        tables |= {title: verdict_table(labels[0], decided, len(labels) > 2)} if decided else {}
        tables |= shown_changes(changes_of(labels, family, records))
        said += [sentence(labels[0], label, decided) for label in labels[1:]]
        said += [left_out_sentence(left_out)] if left_out else []
    num_verdicts = len(said)
    for suite in suites:
        own = [record for record in records if record["suite"] == suite.name]
        found, table, bars = _of_suite(suite, labels, own, verdicts)
        metrics |= found
        tables[f"{suite.name}: means with 95% intervals"] = table
        plots[f"suite_{suite.name}"] = bars
        if (extra := suite.extra(own)) is not None:
            metrics |= {_renamed(name): value for name, value in extra.metrics.items()}
            tables |= extra.tables
            plots |= extra.plots
            said += [extra.summary] if extra.summary else []
        tables[f"{suite.name}: some answers"] = _shown(own, labels)
    summary = "; ".join([*said[:num_verdicts], summary_of(labels, records, verdicts), *said[num_verdicts:]])
    return Found(metrics, summary, tables, plots)


def compared_figures(suites: Sequence[Suite], labels: Sequence[str], records: Sequence[Record]) -> list[Compared]:
    """Return the primary figures of all suites and groups, each model's against the first one's, item by item.

    Those of too few items that both have are among them: see `can_differ`.
    """
    family = []
    for suite in suites:
        scores: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
        for record in records:
            if record["suite"] == suite.name:
                scores.setdefault((record["group"], record["model"]), {})[record["item"]] = record["scores"]
        for group in dict.fromkeys(group for group, _ in scores):
            first = scores.get((group, labels[0]), {})
            for name in suite.primary_of(group):
                for label in labels[1:]:
                    second = scores.get((group, label), {})
                    shared = [item for item in first if name in first[item] and name in second.get(item, ())]
                    compared = Compared(
                        f"{suite.name}, {group}: {name.replace('_', ' ')}",
                        f"{suite.name}/{slug(group)}/{slug(name)}",
                        label,
                        suite.better[name],
                        shared,
                        [first[item][name] for item in shared],
                        [second[item][name] for item in shared],
                    )
                    is_measured = any(name in each for side in (first, second) for each in side.values())
                    family += [compared] if is_measured else []
    return family


def changes_of(labels: Sequence[str], family: Sequence[Compared], records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return each item in whose tested figures a model differs from the first, with what was asked and said."""
    texts = {
        (f"{each['suite']}/{slug(each['group'])}/{each['model']}", each["item"]): (each["asked"], each["said"])
        for each in records
    }
    return changed_items(labels[0], [each for each in family if can_differ(each)], texts)


def refuse_foreign_changes(folder: str | Path) -> None:
    """Refuse to write over a file with the name of `CHANGES` that is no such file, or a link.

    Raises:
        InputError: naming the file.
    """
    path = Path(folder, CHANGES)
    if not path.exists() and not path.is_symlink():
        return
    try:
        with path.open(encoding="utf-8") as stream:
            first = stream.readline(MOST_READ)
        row = json.loads(first) if first else {"figure": "", "change": ""}
    except (OSError, ValueError, RecursionError):
        row = None
    if path.is_symlink() or not isinstance(row, dict) or not {"figure", "change"} <= row.keys():
        raise InputError(f"{path} is not hfllm's and would be overwritten: move it or choose another --output_dir")


def write_changes(
    folder: str | Path, suites: Sequence[Suite], labels: Sequence[str], records: Sequence[Record]
) -> dict[str, str]:
    """Write `changes_of` as lines of `CHANGES`, and return it as an artifact; nothing for a single model."""
    if len(labels) < 2:
        return {}
    rows = changes_of(labels, compared_figures(suites, labels, records), records)
    write_atomically(Path(folder, CHANGES), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return {"changes": CHANGES}


def _of_suite(
    suite: Suite, labels: Sequence[str], records: Sequence[Record], verdicts: list[str]
) -> tuple[dict[str, float], list[dict[str, str]], Bars]:
    metrics: dict[str, float] = {}
    table, bars, notes = [], {}, {}
    for group in dict.fromkeys(record["group"] for record in records):
        of_group = {
            label: {
                each["item"]: each["scores"] for each in records if (each["model"], each["group"]) == (label, group)
            }
            for label in labels
        }
        names = dict.fromkeys(name for scores in of_group.values() for each in scores.values() for name in each)
        for name in names:
            values = {
                label: {item: each[name] for item, each in scores.items() if name in each}
                for label, scores in of_group.items()
            }
            key, line = f"{suite.name}/{slug(group)}/{slug(name)}", {"group": group, "figure": name.replace("_", " ")}
            for label in labels:
                found = mean_interval(list(values[label].values())) if values[label] else None
                line[label] = _cell(found)
                if found is not None:
                    metrics |= _named(f"{key}/{label}", found, len(values[label]))
                    bars[f"{group}: {line['figure']}, {label}"] = found.value
                    notes[f"{group}: {line['figure']}, {label}"] = _cell(found)
            for label in labels[1:]:
                change, verdict = _difference(values[labels[0]], values[label], suite.better.get(name, 0))
                line[f"{label} - {labels[0]}"] = _cell(change, signed=True)
                line["" if len(labels) == 2 else f"({label})"] = verdict
                verdicts.append(verdict)
                if change is not None:
                    metrics |= _named(f"{key}/{label}_difference", change, None)
            line["n"] = str(len(values[labels[0]]))
            table.append(line)
    for label in labels:
        skipped = sum(bool(record["skipped"]) for record in records if record["model"] == label)
        metrics[f"{suite.name}/skipped/{label}"] = skipped
    shown = dict(list(bars.items())[:MOST_BARS])
    return metrics, table, Bars(f"{suite.name} (95% intervals)", "mean over items", shown, notes)


def _difference(first: Mapping[str, float], second: Mapping[str, float], better: int) -> tuple[Interval | None, str]:
    """Return the paired difference over the items that both have, and what it says."""
    shared = [item for item in first if item in second]
    if not shared:
        return None, ""
    found = difference_interval([first[item] for item in shared], [second[item] for item in shared])
    if found.low <= 0 <= found.high:
        return found, "noise"
    if not better:
        return found, "more" if found.value > 0 else "less"
    return found, "better" if found.value * better > 0 else "worse"


def summary_of(labels: Sequence[str], records: Sequence[Record], verdicts: Sequence[str]) -> str:
    """Return how many figures differ, and how many items have none."""
    items = {(record["suite"], record["item"]) for record in records}
    parts = [f"{len(items)} items, {len(labels)} model{'s' if len(labels) > 1 else ''}"]
    if len(labels) > 1:
        counts = {name: verdicts.count(name) for name in ("better", "worse", "more", "less")}
        said = ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "none"
        parts.append(
            f"{said} of all {len(verdicts)} differences to {labels[0]}, controls too and not adjusted, beyond their "
            f"95% intervals (by chance some {0.05 * len(verdicts):.0f})"
        )
    reasons: dict[str, int] = {}
    for record in records:
        if record["skipped"]:
            reasons[record["skipped"]] = reasons.get(record["skipped"], 0) + 1
    parts += [f"{count} answers skipped: {reason}" for reason, count in reasons.items()]
    return "; ".join(parts)


def _named(key: str, found: Interval, count: int | None) -> dict[str, float]:
    named = {key: found.value, f"{key}_low": found.low, f"{key}_high": found.high}
    return named if count is None else {**named, f"{key}_items": count}


def _renamed(name: str) -> str:
    ending = next((ending for ending in RENAMED if name.endswith(ending)), "")
    return name.removesuffix(ending) + RENAMED.get(ending, "")


def _cell(found: Interval | None, signed: bool = False) -> str:
    if found is None:
        return "-"
    sign = "+" if signed else ""
    return f"{found.value:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def _shown(records: Sequence[Record], labels: Sequence[str]) -> list[dict[str, str]]:
    """Return some questions of each group with what each model said."""
    said = {(record["item"], record["model"]): record for record in records}
    rows, counts = [], {}
    for record in records:
        if record["model"] != labels[0] or counts.get(record["group"], 0) >= SHOWN_SAMPLES or not record["asked"]:
            continue
        counts[record["group"]] = counts.get(record["group"], 0) + 1
        answers = {label: said[record["item"], label] for label in labels if (record["item"], label) in said}
        rows.append(
            {"prompt": record["asked"], **{label: each["said"] or each["skipped"] for label, each in answers.items()}}
        )
    return rows


def slug(text: str) -> str:
    """Return a part of a metric's name: small letters, digits and points, with `_` between words."""
    return "_".join("".join(each if each.isalnum() or each in ".-" else " " for each in text.lower()).split())
