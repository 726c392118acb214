"""The report of an evaluation: a verdict, means with intervals by group and metric, models side by side."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.evaluation.verdicts import (
    Compared,
    can_differ,
    changed_items,
    shown_changes,
    verdict_of,
    verdict_table,
    verdicts_of,
)
from hfllm.outputs.intervals import Interval
from hfllm.outputs.report import Bars, Found, Plot, is_samples, markdown_table, write_atomically
from hfllm.outputs.statistics import difference_interval, mean_interval
from hfllm.runs.command_line import say
from hfllm.stages.evaluate.flags import CHANGES

if TYPE_CHECKING:
    from hfllm.evaluation.suites.base import Record, Suite

# Endings of the names of figures next to a mean. Other endings would make a table of all of them.
RENAMED = {"_se": "_error", "_n": "_items"}
MOST_BARS = 36
# Number of shown answers of a suite: the first of each group.
SHOWN_SAMPLES = 2


def report(suites: Sequence["Suite"], labels: Sequence[str], records: Sequence["Record"]) -> Found:
    """Return the report of the records.

    Args:
        suites: in the order of their tables.
        labels: of the models; differences are to the first.

    Returns:
        Metrics `SUITE/GROUP/METRIC/MODEL` with `_low`, `_high` (95%) and `_items`; of other models than the first
        also `..._difference` with its bounds; `SUITE/skipped/MODEL`; the verdict, see `verdict_metrics`. Their tables
        and plots, and the tables and plots of the suites.
    """
    metrics: dict[str, float] = {}
    tables: dict[str, Sequence[Mapping[str, Any]]] = {}
    plots: dict[str, Plot | Bars] = {}
    words: list[str] = []
    sentences: list[str] = []
    extras: list[str] = []
    if len(labels) > 1:
        family = compared_figures(suites, labels, records)
        decided, metrics, sentences = verdicts_of(family, labels)
        title = f"Verdict on the primary figures (Holm over {len(decided)})"
        tables |= {title: verdict_table(labels[0], decided, len(labels) > 2)} if decided else {}
        tables |= shown_changes(changes_of(labels, family, records))
    for suite in suites:
        own = [record for record in records if record["suite"] == suite.name]
        figures, table, bars, differences = _of_suite(suite, labels, own)
        metrics |= figures
        words += differences
        tables[f"{suite.name}: means with 95% intervals"] = table
        plots[f"suite_{suite.name}"] = bars
        if (extra := suite.extra(own)) is not None:
            metrics |= {_renamed(name): value for name, value in extra.metrics.items()}
            tables |= extra.tables
            plots |= extra.plots
            extras += [extra.summary] if extra.summary else []
        tables[f"{suite.name}: some answers"] = _answers(own, labels)
    summary = "; ".join([*sentences, summary_of(labels, records, words), *extras])
    verdict = verdict_of(decided, sentences) if len(labels) > 1 else None
    return Found(metrics, summary, tables, plots, verdict=verdict)


def compared_figures(suites: Sequence["Suite"], labels: Sequence[str], records: Sequence["Record"]) -> list[Compared]:
    """Return the primary figures of all suites and groups, each model's against the first one's, item by item.

    Figures with too few shared items are among them: see `can_differ`.
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


def changes_of(labels: Sequence[str], family: Sequence[Compared], records: Sequence["Record"]) -> list[dict[str, Any]]:
    """Return the items with tested figures different from the first model's, with question and answers."""
    texts = {
        (f"{each['suite']}/{slug(each['group'])}/{each['model']}", each["item"]): (each["asked"], each["said"])
        for each in records
    }
    return changed_items(labels[0], [each for each in family if can_differ(each)], texts)


def write_changes(folder: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write changed items as lines of `CHANGES`."""
    write_atomically(Path(folder, CHANGES), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def print_tables(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Print the tables of a report, without those of samples."""
    for title, rows in tables.items():
        if not is_samples(rows):
            say("\n".join(["", title, *markdown_table(rows)]))


def _of_suite(
    suite: "Suite", labels: Sequence[str], records: Sequence["Record"]
) -> tuple[dict[str, float], list[dict[str, str]], Bars, list[str]]:
    """Return the metrics, table and bars of a suite, and its differences to the first model in words."""
    metrics: dict[str, float] = {}
    table, bars, notes, words = [], {}, {}, []
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
                result = mean_interval(list(values[label].values())) if values[label] else None
                line[label] = _cell(result)
                if result is not None:
                    metrics |= interval_metrics(f"{key}/{label}", result, len(values[label]))
                    bars[f"{group}: {line['figure']}, {label}"] = result.value
                    notes[f"{group}: {line['figure']}, {label}"] = _cell(result)
            for label in labels[1:]:
                change, word = _difference(values[labels[0]], values[label], suite.better.get(name, 0))
                line[f"{label} - {labels[0]}"] = _cell(change, signed=True)
                line["" if len(labels) == 2 else f"({label})"] = word
                words.append(word)
                if change is not None:
                    metrics |= interval_metrics(f"{key}/{label}_difference", change)
            line["n"] = str(len(values[labels[0]]))
            table.append(line)
    for label in labels:
        skipped = sum(bool(record["skipped"]) for record in records if record["model"] == label)
        metrics[f"{suite.name}/skipped/{label}"] = skipped
    displayed = dict(list(bars.items())[:MOST_BARS])
    return metrics, table, Bars(f"{suite.name} (95% intervals)", "mean over items", displayed, notes), words


def _difference(first: Mapping[str, float], second: Mapping[str, float], better: int) -> tuple[Interval | None, str]:
    """Return the paired difference over the shared items, and its verdict."""
    shared = [item for item in first if item in second]
    if not shared:
        return None, ""
    result = difference_interval([first[item] for item in shared], [second[item] for item in shared])
    if result.low <= 0 <= result.high:
        return result, "noise"
    if not better:
        return result, "more" if result.value > 0 else "less"
    return result, "better" if result.value * better > 0 else "worse"


def summary_of(labels: Sequence[str], records: Sequence["Record"], verdicts: Sequence[str]) -> str:
    """Return a sentence on how many figures differ, and how many items have none."""
    items = {(record["suite"], record["item"]) for record in records}
    parts = [f"{len(items)} items, {len(labels)} model{'s' if len(labels) > 1 else ''}"]
    if len(labels) > 1:
        counts = {name: verdicts.count(name) for name in ("better", "worse", "more", "less")}
        tally = ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "none"
        parts.append(
            f"{tally} of all {len(verdicts)} differences to {labels[0]}, controls too and not adjusted, beyond their "
            f"95% intervals (by chance some {0.05 * len(verdicts):.0f})"
        )
    reasons: dict[str, int] = {}
    for record in records:
        if record["skipped"]:
            reasons[record["skipped"]] = reasons.get(record["skipped"], 0) + 1
    parts += [f"{count} answers skipped: {reason}" for reason, count in reasons.items()]
    return "; ".join(parts)


def interval_metrics(key: str, interval: Interval, num_items: int | None = None) -> dict[str, float]:
    """Return a figure and its bounds as metrics, with the number of its items where it is named."""
    metrics = {key: interval.value, f"{key}_low": interval.low, f"{key}_high": interval.high}
    return metrics if num_items is None else {**metrics, f"{key}_items": num_items}


def slug(text: str) -> str:
    """Return a part of a metric's name: small letters, digits and points, with `_` between words."""
    return "_".join("".join(each if each.isalnum() or each in ".-" else " " for each in text.lower()).split())


def _renamed(name: str) -> str:
    ending = next((ending for ending in RENAMED if name.endswith(ending)), "")
    return name.removesuffix(ending) + RENAMED.get(ending, "")


def _cell(interval: Interval | None, signed: bool = False) -> str:
    if interval is None:
        return "-"
    sign = "+" if signed else ""
    return f"{interval.value:{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"


def _answers(records: Sequence["Record"], labels: Sequence[str]) -> list[dict[str, str]]:
    """Return some questions of each group with the answers of all models."""
    record_of = {(record["item"], record["model"]): record for record in records}
    rows, counts = [], {}
    for record in records:
        if record["model"] != labels[0] or counts.get(record["group"], 0) >= SHOWN_SAMPLES or not record["asked"]:
            continue
        counts[record["group"]] = counts.get(record["group"], 0) + 1
        answers = {label: record_of[record["item"], label] for label in labels if (record["item"], label) in record_of}
        rows.append(
            {"prompt": record["asked"], **{label: each["said"] or each["skipped"] for label, each in answers.items()}}
        )
    return rows
