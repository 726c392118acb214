"""The comparison of two finished evaluations: its flags, and the logs of their items.

lm-eval writes with `--log_samples` a file of lines for each task, `samples_TASK_DATE.jsonl`: `doc_id` and `doc_hash`
of an item, the `filter` applied to its answer, and a figure for each of `metrics`. `hfllm evaluate` writes
`samples.jsonl`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hfllm.data.sources import iterate_source, parse_json
from hfllm.errors import InputError, refuse, refuse_if
from hfllm.evaluation.verdicts import (
    ALPHA,
    Compared,
    changed_items,
    shown_changes,
    verdict_of,
    verdict_table,
    verdicts_of,
)
from hfllm.flags import Range, check_flags, flag
from hfllm.outputs.report import Found
from hfllm.outputs.statistics import mean_interval
from hfllm.stages.evaluate.flags import labels_of, refuse_foreign_changes
from hfllm.stages.evaluate.report import interval_metrics, slug

# lm-eval's names; a date stands for a run.
LM_EVAL_LOG = re.compile(r"samples_(.+?)(?:_(\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?))?\.jsonl")
OWN_LOG = "samples.jsonl"
# Columns without figures in lm-eval's logs, for logs without a list of metrics.
NOT_METRICS = frozenset(
    (
        *("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"),
        *("doc_hash", "prompt_hash", "target_hash"),
    )
)
# Of these metrics less is better; of others, more.
LOSSES = re.compile(r"(?:.*_)?(?:perplexity|bits_per_byte|loss|brier|brier_score|wer|cer|ter|toxicity)")
# Our suites with prompts dependent on the model: its template, or an attack on it.
PROMPTED_BY_MODEL = ("robustness", "lm_eval")
# Sums of larger scores would be infinite.
MOST = 1e100
MOST_LISTED = 3


@dataclass(frozen=True)
class CompareArguments:
    """Two evaluations, and what of them is compared."""

    logs: list[str] | None = flag(
        None, "The first evaluation and the second: a log, or a folder of logs, each; also without --logs."
    )
    metrics: list[str] | None = flag(
        None, "Metrics to compare, such as acc; by default all of lm-eval's, and the primary ones of ours."
    )
    pool: list[str] | None = flag(None, "Beginnings of names of tasks that are taken together, such as mmlu.")
    cluster_by: str | None = flag(
        None, "Column of the items, such as passage_id; those with the same value are not independent."
    )
    allow_missing: bool = flag(False, "Compare what both have, where one lacks tasks, metrics or items.")
    alpha: float = flag(
        ALPHA,
        "Chance that equal models are found to differ in anything.",
        takes=Range("a number between 0 and 1, such as .05", lambda value: 0 < value < 1),
    )
    fail_on_regression: bool = flag(
        False, "Exit code 1 where the second is significantly worse, 2 where nothing is tested."
    )
    output_dir: str = flag("outputs/compare", "Where the report and the changes go.")


@dataclass(frozen=True)
class LoggedItem:
    """An item of a log.

    Args:
        origin: its file and line.
        identity: of the item, to check that two logs have the same one; empty if missing in the log.
        scores: its figures by metric.
        cluster: of the item, if requested.
        prompt, answer: the model's input and output, for readers.
        is_own: whether it is of a suite of `hfllm evaluate`.
        primary: of such an item the primary metrics, with 1 if more is better and -1 if less is; `None` if missing in
            an older log.
    """

    origin: str
    identity: str
    scores: dict[str, float]
    cluster: object
    prompt: str
    answer: str
    is_own: bool = False
    primary: Mapping[str, int] | None = None


# A task and a filter of it, or a suite and a group of it.
Part = tuple[str, str]
# The items of an evaluation by their keys, for each part.
Log = dict[Part, dict[str, LoggedItem]]


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation.

    Args:
        path: of its log, or of the folder of its logs.
        label: its name in the report.
        log: its items.
    """

    path: str
    label: str
    log: Log


def check(script_args: CompareArguments) -> None:
    """Refuse impossible flags."""
    logs = script_args.logs or []
    if len(logs) != 2:
        raise InputError(f"expected two logs, got {len(logs)}: hfllm compare A.jsonl B.jsonl, then the other flags")
    check_flags(script_args)
    for name in logs:
        refuse_if(not Path(name).exists(), f"--logs {name}: no such file or folder")
    refuse(Path(logs[0]).resolve() == Path(logs[1]).resolve(), f"--logs {logs[1]}", "it is the first one again")
    refuse_foreign_changes(script_args.output_dir)


# ---- logs ----


def read_evaluations(names: Sequence[str], cluster_by: str | None, pool: Sequence[str]) -> list[Evaluation]:
    """Return two evaluations, the second with the name of the first's task where files of one task have any names.

    Args:
        names: logs, or folders of logs.
        cluster_by: see `CompareArguments`.
        pool: beginnings of names of tasks that are taken together.
    """
    labels = _labels(names)
    first, second = (read_log(name, cluster_by, pool) for name in names)
    logs = first, renamed(first, second, names)
    return [Evaluation(*each) for each in zip(names, labels, logs, strict=True)]


def _labels(names: Sequence[str]) -> list[str]:
    """Return a short name of each evaluation: for logs with assigned names, the name of their folder."""
    paths = [Path(name) for name in names]
    is_usual = all(path.is_file() and (path.name == OWN_LOG or _task_of(path)) for path in paths)
    if is_usual and paths[0].resolve().parent != paths[1].resolve().parent:
        paths = [path.resolve().parent for path in paths]
    return labels_of([str(path) for path in paths], "--logs")


def read_log(name: str, cluster_by: str | None = None, pool: Sequence[str] = ()) -> Log:
    """Return the items of a log, or of all logs of a folder; see `read_evaluations`."""
    result: Log = {}
    of_task: dict[str, Path] = {}
    for path in _files(name):
        task = _task_of(path)
        if task is not None and of_task.setdefault(task, path) != path:
            raise InputError(f"--logs {name}: two logs of {task}: {of_task[task]} and {path}; name one of them")
        models: set[str] = set()
        for origin, row in iterate_source(str(path)):
            if "suite" in row and "scores" in row:
                models.add(str(row.get("model")))
                refuse_if(len(models) > 1, f"{origin}: the log has several models, which hfllm evaluate has compared")
                part, key, logged = _own(origin, row, cluster_by)
            else:
                part, key, logged = _of_lm_eval(origin, row, task or path.stem, cluster_by, pool)
            if logged is None:
                continue
            items = result.setdefault(part, {})
            if key in items:
                raise InputError(f"{origin}: item {key} of {' '.join(part)} again, after {items[key].origin}")
            items[key] = logged
    refuse_if(not result, f"--logs {name}: no item with a figure")
    return result


def _files(name: str) -> list[Path]:
    """Return the logs of a folder, or the named one."""
    path = Path(name)
    if path.is_file():
        return [path]
    own = path / OWN_LOG
    files = [own] if own.is_file() else sorted(each for each in path.rglob("samples_*.jsonl") if each.is_file())
    refuse_if(not files, f"--logs {name}: the folder holds no samples_TASK_DATE.jsonl and no {OWN_LOG}")
    return files


def _task_of(path: Path) -> str | None:
    """Return the task in the name of an lm-eval file; `None` for a file with another name."""
    result = LM_EVAL_LOG.fullmatch(path.name)
    return result[1] if result else None


def _own(origin: str, row: Mapping[str, Any], cluster_by: str | None) -> tuple[Part, str, LoggedItem | None]:
    """Return an item of `hfllm evaluate`; none for a skipped one."""
    scores = row["scores"]
    if not isinstance(scores, dict) or not all(isinstance(row.get(name), str) for name in ("suite", "group", "item")):
        raise InputError(f"{origin}: expected suite, group, item and scores, as hfllm evaluate writes them")
    numbers = {name: _number(origin, name, value) for name, value in scores.items()}
    primary = row.get("primary")
    is_right = isinstance(primary, dict) and all(way in (1, -1) for way in primary.values())
    if primary is not None and not is_right:
        raise InputError(f"{origin}: primary is {primary!r:.80}, expected metrics with 1 or -1")
    cluster = _cluster(origin, row, cluster_by)
    texts = str(row.get("asked", "")), str(row.get("said", ""))
    identity = "" if row["suite"] in PROMPTED_BY_MODEL else texts[0]
    logged = LoggedItem(origin, identity, numbers, cluster, *texts, is_own=True, primary=primary) if numbers else None
    return (row["suite"], row["group"]), row["item"], logged


def _of_lm_eval(
    origin: str, row: Mapping[str, Any], task: str, cluster_by: str | None, pool: Sequence[str]
) -> tuple[Part, str, LoggedItem | None]:
    """Return an item of lm-eval; figures of a whole corpus (lists) are left out."""
    if "doc_id" not in row:
        raise InputError(
            f"{origin}: no doc_id; expected lm-eval's log of items (--log_samples) or hfllm's {OWN_LOG}, found "
            f"{', '.join(map(repr, list(row)[:8]))}"
        )
    names = row.get("metrics")
    names = names if isinstance(names, list) else [name for name in row if name not in NOT_METRICS]
    scores = {
        name: _number(origin, name, row[name])
        for name in names
        if isinstance(name, str) and isinstance(row.get(name), (bool, int, float))
    }
    doc = row.get("doc")
    identity = str(row.get("doc_hash") or "") or (json.dumps(doc, sort_keys=True) if doc is not None else "")
    whole = {**row, **doc} if isinstance(doc, Mapping) else row
    cluster, key = _cluster(origin, whole, cluster_by), str(row["doc_id"])
    pooled = next((each for each in pool if task.startswith(each)), None)
    if pooled is not None:
        key, task, cluster = f"{task}/{key}", pooled, None if cluster is None else (task, cluster)
    logged = LoggedItem(origin, identity, scores, cluster, *_texts(row)) if scores else None
    return (task, str(row.get("filter") or "none")), key, logged


def _number(origin: str, name: str, value: object) -> float:
    if isinstance(value, (bool, int, float)) and abs(value) < MOST:
        return float(value)
    raise InputError(f"{origin}: {name} is {value!r:.40}, expected a number below {MOST:g}")


def _cluster(origin: str, row: Mapping[str, Any], column: str | None) -> object:
    if column is None:
        return None
    if row.get(column) is None:
        raise InputError(f"--cluster_by {column}: {origin} has no such column; found {', '.join(list(row)[:12])}")
    return str(row[column])


def _texts(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return question and answer: the generated text, or the most likely choice."""
    requests = row.get("arguments")
    requests = list(requests.values()) if isinstance(requests, Mapping) else requests
    pairs = []
    for each in requests if isinstance(requests, list) else ():
        each = list(each.values()) if isinstance(each, Mapping) else each
        pairs.append([str(part) for part in each] if isinstance(each, list) else [str(each)])
    prompt = pairs[0][0] if pairs and pairs[0] else ""
    responses = row.get("filtered_resps")
    responses = responses if isinstance(responses, list) else [responses]
    try:
        logprobs = [float(each[0]) for each in responses if isinstance(each, list)]
    except (IndexError, TypeError, ValueError):
        logprobs = []
    if logprobs and len(logprobs) == len(pairs):
        return prompt, pairs[max(range(len(pairs)), key=logprobs.__getitem__)][-1].strip()
    return prompt, str(responses[0]) if responses and responses[0] is not None else ""


# ---- the comparison ----


def family_of(
    first: Evaluation, second: Evaluation, metrics: Sequence[str] = (), allow_missing: bool = False
) -> list[Compared]:
    """Return the compared figures, over the items in both evaluations.

    Args:
        metrics: the compared ones; by default all of lm-eval's, and the primary ones of ours.
        allow_missing: whether one may lack items of the other.
    """
    family, missing = [], []
    for part in dict.fromkeys((*first.log, *second.log)):
        one, other = first.log.get(part, {}), second.log.get(part, {})
        _refuse_other_items(part, one, other)
        for metric in _metrics(metrics, part, one, other):
            having = [{key for key, item in each.items() if metric in item.scores} for each in (one, other)]
            for lacking, has, label in ((having[1], having[0], second.label), (having[0], having[1], first.label)):
                if absent := sorted(has - lacking):
                    listed = ", ".join(absent[:MOST_LISTED])
                    missing.append(
                        f"{label} lacks {len(absent)} of {len(has)} items of {_title(part)} {metric} ({listed})"
                    )
            if shared := [key for key in one if key in having[0] & having[1]]:
                pairs = {key: (one[key], other[key]) for key in shared}
                items = [each for pair in pairs.values() for each in pair]
                better = _direction(part, metric, items, (first.path, second.path))
                family.append(_compared(part, metric, second.label, better, pairs))
    if missing and not allow_missing:
        more = f", and {len(missing) - 1} more such" if len(missing) > 1 else ""
        raise InputError(f"--logs: {missing[0]}{more}; --allow_missing compares what both have")
    if not family:
        condition = f"with the metrics {', '.join(metrics)}" if metrics else "with the same figure"
        raise InputError(f"--logs: no item {condition} in both")
    return family


def missing_of(first: Log, second: Log) -> int:
    """Return the number of items in only one of the logs."""
    parts = {*first, *second}
    return sum(len(first.get(part, {}).keys() ^ second.get(part, {}).keys()) for part in parts)


def renamed(first: Log, second: Log, files: Sequence[str]) -> Log:
    """Return the second log with the task of the first, if two files of any names contain one task each."""
    names = {part[0] for part in first}, {part[0] for part in second}
    tasks = {_task_of(Path(name)) for name in files}
    are_single = all(Path(name).is_file() for name in files) and all(len(each) == 1 for each in names)
    is_own = any(item.is_own for items in (*first.values(), *second.values()) for item in items.values())
    if is_own or not are_single or (None not in tasks and len(tasks) > 1):
        return second
    (task,) = names[0]
    return {(task, part[1]): items for part, items in second.items()}


def _metrics(selected: Sequence[str], part: Part, *logs: Mapping[str, LoggedItem]) -> list[str]:
    """Return the compared metrics of a part."""
    items = [item for log in logs for item in log.values()]
    names = list(dict.fromkeys(name for item in items for name in item.scores))
    if selected:
        return [name for name in names if name in selected]
    primaries = [item.primary for item in items if item.primary is not None]
    if primaries:
        return [name for name in names if any(name in primary for primary in primaries)]
    # Tasks of lm-eval have no primary ones here, nor in older logs of our suite of that name.
    if not items[0].is_own or part[0] == "lm_eval":
        return names
    from hfllm.evaluation.suites import robustness

    primary = own_metrics().get(part[0], ((), {}))[0]
    if part[0] == robustness.Robustness.name:
        primary = robustness.primary_of(part[1], "gold" in names)
    return [name for name in names if name in primary]


@cache
def own_metrics() -> dict[str, tuple[frozenset[str], dict[str, int]]]:
    """Return the primary metrics of our suites, and the better direction of metrics."""
    from hfllm.evaluation import pictures
    from hfllm.evaluation.suites import few_shot, preferences, refusals, robustness, truthfulness, world_suites

    kinds = [
        *(few_shot.FewShot, pictures.Pictures, preferences.Preferences, refusals.XSTest, robustness.Robustness),
        *(truthfulness.TruthfulQA, world_suites.WorldTruthfulness, world_suites.WorldPreferences),
        *(world_suites.WorldRefusals, world_suites.WorldFewShot),
    ]
    result: dict[str, tuple[frozenset[str], dict[str, int]]] = {}
    for kind in kinds:
        primary, better = result.get(kind.name, (frozenset(), {}))
        result[kind.name] = primary | {*kind.primary}, {**better, **kind.better}
    return result


def _refuse_other_items(part: Part, one: Mapping[str, LoggedItem], other: Mapping[str, LoggedItem]) -> None:
    for key in (key for key in one if key in other):
        identities = one[key].identity, other[key].identity
        if all(identities) and identities[0] != identities[1]:
            raise InputError(
                f"{other[key].origin}: item {key} of {_title(part)} is another one than in {one[key].origin}: the "
                "logs are of other data, or of another version of the task"
            )


def _compared(
    part: Part, metric: str, label: str, better: int, pairs: Mapping[str, tuple[LoggedItem, LoggedItem]]
) -> Compared:
    clusters = [one.cluster for one, _ in pairs.values()]
    key = "/".join(map(slug, (*part, metric)))
    scores = [[each.scores[metric] for each in side] for side in zip(*pairs.values(), strict=True)]
    name = f"{_title(part)}: {metric.replace('_', ' ')}"
    return Compared(name, key, label, better, [*pairs], *scores, None if None in clusters else clusters)


def _direction(part: Part, metric: str, items: Sequence[LoggedItem], logs: Sequence[str]) -> int:
    """Return whether more of a metric is better.

    The source is its items, or our suite, or lm-eval's results next to the log, or its name.
    """
    for item in items:
        if item.primary is not None and metric in item.primary:
            return item.primary[metric]
    if items[0].is_own and metric in (own := own_metrics().get(part[0], ((), {}))[1]):
        return own[metric]
    for name in logs:
        ways = _higher_is_better(name)
        for key in ((part[0], metric), metric):
            if isinstance(way := ways.get(key), bool):
                return 1 if way else -1
    return -1 if LOSSES.fullmatch(metric) else 1


@cache
def _higher_is_better(name: str) -> dict[Any, Any]:
    """Return the directions of metrics from lm-eval's results next to a log, or a folder's logs, by task too."""
    result: dict[Any, Any] = {}
    for path in dict.fromkeys(path for log in _files(name) for path in _results_beside(log)):
        try:
            results = parse_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        of_tasks = results.get("higher_is_better") if isinstance(results, dict) else None
        for task, ways in of_tasks.items() if isinstance(of_tasks, dict) else ():
            for metric, way in ways.items() if isinstance(ways, dict) else ():
                result |= {(task, metric): way, metric: way}
    return result


def _results_beside(log: Path) -> list[Path]:
    """Return the results of a log's run: of its date, if its name has one, since a folder may hold several runs."""
    dated = LM_EVAL_LOG.fullmatch(log.name)
    if dated and dated[2]:
        return [log.with_name(f"results_{dated[2]}.json")]
    return sorted(log.parent.glob("results_*.json"))


def _title(part: Part) -> str:
    return part[0] if part[1] == "none" else ", ".join(part)


# ---- the report ----


def changes_of(evaluations: Sequence[Evaluation], family: Sequence[Compared]) -> list[dict[str, Any]]:
    """Return the items with different figures in two evaluations, with question and answers."""
    texts = {
        (f"{'/'.join(map(slug, part))}/{each.label}", key): (item.prompt, item.answer)
        for each in evaluations
        for part, items in each.log.items()
        for key, item in items.items()
    }
    return changed_items(evaluations[0].label, family, texts)


def report(
    evaluations: Sequence[Evaluation],
    family: Sequence[Compared],
    changes: Sequence[Mapping[str, Any]],
    alpha: float = ALPHA,
) -> Found:
    """Return the verdict, the figures and some changed items of two evaluations."""
    first, second = labels = [each.label for each in evaluations]
    verdicts, metrics, sentences = verdicts_of(family, labels, alpha)
    for each in family:
        for label, values in zip(labels, (each.first, each.second), strict=True):
            metrics |= interval_metrics(f"{each.key}/{label}", mean_interval(values), len(values))
    for each in verdicts:
        metrics |= interval_metrics(f"{each.compared.key}/{second}_difference", each.difference)
    decided = verdict_of(verdicts, sentences, alpha)
    table = {f"{second} against {first} (Holm over {len(verdicts)})": verdict_table(first, verdicts)}
    if absent := missing_of(*(each.log for each in evaluations)):
        sentences.append(f"{absent} items that only one of them has left out")
    tables = {**(table if verdicts else {}), **shown_changes(changes)}
    return Found(metrics, "; ".join(sentences), tables, {}, verdict=decided)
