"""The suites of `--suites`, a function and a line each, their checks, and the samples and report of a run."""

import difflib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.data.formats import Row, to_sft
from hfllm.data.images.rows import by_turns, flaw_of_pictures, picture_mapper, refuse_token, words_of_places
from hfllm.data.loading import RowArguments
from hfllm.data.world.world import World
from hfllm.errors import InputError
from hfllm.evaluation.pictures import Part, Pictures
from hfllm.evaluation.suites.base import Item, Record, Suite, missing_overlaps
from hfllm.evaluation.suites.calibration import ChoiceCalibration, WorldCalibration
from hfllm.evaluation.suites.few_shot import FewShot
from hfllm.evaluation.suites.interpretability import Interpretability
from hfllm.evaluation.suites.preferences import Preferences
from hfllm.evaluation.suites.refusals import XSTest
from hfllm.evaluation.suites.robustness import Robustness
from hfllm.evaluation.suites.truthfulness import TruthfulQA
from hfllm.evaluation.suites.world_suites import WorldFewShot, WorldPreferences, WorldRefusals, WorldTruthfulness
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
from hfllm.fingerprint import file_fingerprint
from hfllm.flags import check_flags
from hfllm.models.loading.adapters import find_adapter
from hfllm.models.loading.weights import check_weight_files
from hfllm.outputs.report import CHANGED, CONTENTS, Bars, Found, Plot, compared, write_atomically
from hfllm.outputs.statistics import Interval, difference_interval, mean_interval
from hfllm.runs.command_line import say
from hfllm.runs.models import load_config, load_tokenizer, saved_tokenizer
from hfllm.stages.evaluate import flags as evaluate_flags
from hfllm.stages.evaluate.flags import (
    CHANGES,
    FILES,
    NUM_WORLD_ITEMS,
    EvaluateArguments,
    loaded,
    processor_of,
    refuse_foreign_changes,
    slug,
    suite_of,
)
from hfllm.stages.shared import files_changed, kept_rows
from hfllm.stages.vision.build import SHUFFLED, eval_parts, prior_of, question_of
from hfllm.stages.vision.flags import DRAWN

if TYPE_CHECKING:
    from tqdm import tqdm

    from hfllm.evaluation.pictures import Asked, Part
    from hfllm.evaluation.suites.base import Subject


# ---- suites ----


Build = Callable[["EvaluateArguments", "Subject | None"], Suite]


def suites_of(script_args: EvaluateArguments, judge: "Subject | None") -> list[Suite]:
    """Return the suites named by the flags.

    Args:
        judge: a model for judging written answers, if there is one.
    """
    return [SUITES[name](script_args, judge) for name in script_args.suites]


def _world_options(script_args: EvaluateArguments) -> dict:
    count = NUM_WORLD_ITEMS if script_args.num_items is None else script_args.num_items
    return {"world": World(script_args.world_seed), "num_items": count}


def _truthfulness(script_args: EvaluateArguments, judge: "Subject | None") -> Suite:
    if script_args.truthfulqa_file:
        return TruthfulQA(script_args.truthfulqa_file, script_args.num_items, script_args.write_answers, judge)
    return WorldTruthfulness(**_world_options(script_args))


def _hhh(script_args: EvaluateArguments, judge: "Subject | None") -> Suite:
    if script_args.preference_files:
        return Preferences(script_args.preference_files, script_args.num_items)
    return WorldPreferences(**_world_options(script_args))


def _refusals(script_args: EvaluateArguments, judge: "Subject | None") -> Suite:
    if script_args.xstest_file:
        return XSTest(script_args.xstest_file, script_args.num_items, judge, script_args.max_new_tokens)
    return WorldRefusals(**_world_options(script_args))


def _calibration(script_args: EvaluateArguments, judge: "Subject | None") -> Suite:
    if script_args.few_shot_files:
        return ChoiceCalibration(script_args.few_shot_files, script_args.num_items)
    return WorldCalibration(**_world_options(script_args))


def _few_shot(script_args: EvaluateArguments, judge: "Subject | None") -> Suite:
    if script_args.few_shot_files:
        files, count = script_args.few_shot_files, script_args.num_items
        return FewShot(files, count, script_args.num_shots, script_args.max_new_tokens)
    return WorldFewShot(**_world_options(script_args))


def _interpretability(script_args: EvaluateArguments, judge: "Subject | None") -> Suite:
    return Interpretability(script_args.facts_file, script_args.world_seed)


def _lm_eval(script_args: EvaluateArguments, judge: "Subject | None") -> Suite:
    return suite_of(script_args, script_args.num_items)


def _robustness(script_args: EvaluateArguments, judge: "Subject | None") -> Suite:
    count, attacks = script_args.num_items, script_args.num_attacks
    if script_args.robustness_file:
        return Robustness(None, script_args.robustness_file, count, script_args.max_new_tokens, attacks)
    return Robustness(World(script_args.world_seed), num_prompts=count, num_attacks=attacks)


def _pictures(script_args: EvaluateArguments, judge: "Subject | None") -> Suite:
    return Pictures(partial(parts_of, script_args), script_args.max_new_tokens)


SUITES: Mapping[str, Build] = {
    "truthfulness": _truthfulness,
    "hhh": _hhh,
    "refusals": _refusals,
    "calibration": _calibration,
    "few_shot": _few_shot,
    "interpretability": _interpretability,
    "lm_eval": _lm_eval,
    "robustness": _robustness,
    "pictures": _pictures,
}


# ---- pictures ----
#
# The evaluation's questions about images: drawn here, or the user's rows.


SUITE = "pictures"
STAGE = "hfllm evaluate"


def check_pictures(script_args: EvaluateArguments) -> None:
    """Refuse flags of images without the suite, and the suite without images."""

    name, is_asked = script_args.dataset_name, SUITE in script_args.suites
    if is_asked and not name:
        raise InputError(f"--suites {SUITE} needs --dataset_name: rows with pictures, or 'pictures' or 'digits'")
    if is_asked and not script_args.model_name_or_path:
        raise InputError(f"--suites {SUITE} needs --model_name_or_path: a model that sees (hfllm vision makes one)")


def parts_of(script_args: EvaluateArguments) -> "list[Part]":
    """Return the questions named by `--dataset_name`."""
    name, count = script_args.dataset_name, script_args.num_items
    if name not in DRAWN:
        return [Part("", own_questions(script_args))]
    count = NUM_WORLD_ITEMS if count is None else count
    prior = prior_of(name, count)
    return [
        Part(part.replace("_", " "), questions, prior)
        for part, questions in eval_parts(name, count).items()
        if part != SHUFFLED
    ]


def own_questions(script_args: EvaluateArguments) -> "Sequence[Asked]":
    """Return the first answer of each of the user's rows as a question, of the first `--num_items` kept ones."""
    name = script_args.dataset_name
    read = RowArguments(dataset_name=name, dataset_train_split="test")
    pictures = picture_mapper(script_args, name, to_sft, STAGE)
    # All models get the same questions; a processor without images is refused later.
    processors = map(evaluate_flags.processor_of, script_args.model_name_or_path or ())
    tokens = sorted({token for processor in processors for token in words_of_places(processor)})

    def mapper(origin: str, row: Row) -> Row:
        row = by_turns(pictures(origin, row))[0]
        refuse_token(origin, {"prompt": row["prompt"]}, tokens)
        return row

    return [question_of(row) for row in kept_rows(read, mapper, flaw_of_pictures)][: script_args.num_items]


# ---- samples ----
#
# Judge models item by item, and keep all records: a killed run resumes where it was.
#
# Every record is written to samples.jsonl as a line at once. The same command reads them and judges the missing items.
# Items are asked in blocks of a batch, and an incomplete block is asked again as a whole: batches are then the same as
# in an uninterrupted run, and so are their numbers, to the last digit.


SAMPLES, SAMPLES_OF = "samples.jsonl", "samples_of.json"
# More suites may be added later; the records of the others stay.
NOT_OF_SAMPLES = ("suites", f"suites{CHANGED}", f"suites{CONTENTS}")

Key = tuple[str, str, str]


class Samples:
    """The records of a run, in its folder.

    Args:
        folder: of samples.jsonl.
        arguments: of the run. Records of other flags are dropped, but for `suites`.
    """

    def __init__(self, folder: str | Path, arguments: Mapping[str, Any]):
        self.path, self.identity = Path(folder, SAMPLES), Path(folder, SAMPLES_OF)
        self.records: dict[Key, Record] = {}
        flags = {name: value for name, value in arguments.items() if name not in NOT_OF_SAMPLES}
        text = json.dumps(flags, indent=2, default=str) + "\n"
        Path(folder).mkdir(parents=True, exist_ok=True)
        if self.path.exists() and not self.identity.exists():
            raise InputError(f"{self.path} is not hfllm's and would be overwritten: move it or choose another folder")
        if self.identity.exists() and _are_same(self.identity.read_text(encoding="utf-8"), text):
            self._read()
        elif self.path.exists():
            say(f"evaluate: {self.path} is of other flags, and is written again")
            self.path.unlink()
        write_atomically(self.identity, text)

    def _read(self) -> None:
        """Read the records; a line cut off by a kill is dropped."""
        if not self.path.exists():
            return
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
                key = key_of(record)
            except (KeyError, TypeError, ValueError, RecursionError):
                continue
            self.records[key] = record
        self.write([*self.records.values()])

    def append(self, record: Record) -> None:
        """Add a record and write it at once."""
        self.records[key_of(record)] = record
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(_line(record))

    def write(self, records: Sequence[Record]) -> None:
        """Write the file again with these records in their order."""
        write_atomically(self.path, "".join(map(_line, records)))


def _are_same(before: str, now: str) -> bool:
    """Return whether samples are of these arguments, both as JSON."""
    try:
        was, arguments = json.loads(before), json.loads(now)
        return all(was.get(name) == arguments.get(name) for name in compared(was, arguments))
    except (ValueError, AttributeError, TypeError):
        return False


def key_of(record: Record) -> Key:
    """Return the unique key of a record."""
    return record["model"], record["suite"], record["item"]


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def judge_all(
    script_args: EvaluateArguments, models: Mapping[str, str], suites: Sequence[Suite], samples: Samples
) -> list[Record]:
    """Judge all models by all suites as far as missing in the samples, and return all records, in one order."""
    from tqdm import tqdm

    items = {suite.name: list(suite.items()) for suite in suites}
    for name, each in items.items():
        _check_keys(name, each)
    count = len(models) * sum(map(len, items.values()))
    with tqdm(total=count, unit="item", disable=not sys.stderr.isatty(), leave=False) as bar:
        for label, model in models.items():
            missing = {
                suite.name: pending(items[suite.name], label, suite.name, samples, script_args.batch_size)
                for suite in suites
            }
            bar.update(sum(map(len, items.values())) - sum(map(len, missing.values())))
            if any(missing.values()):
                _judge_one(script_args, label, model, suites, missing, samples, bar)
    keys = [(label, suite.name, item.key) for label in models for suite in suites for item in items[suite.name]]
    records = [samples.records[key] for key in keys]
    samples.write(records)
    return records


def _judge_one(
    script_args: EvaluateArguments,
    label: str,
    model: str,
    suites: Sequence[Suite],
    missing: Mapping[str, Sequence[Item]],
    samples: Samples,
    bar: "tqdm",
) -> None:
    with loaded(script_args, label, model) as subject:
        for suite in suites:
            waiting = {item.key for item in missing[suite.name]}
            if not waiting:
                continue
            bar.set_description(f"{suite.name} of {label}")
            how = "by its chat template" if subject.uses_chat_template else "as plain text"
            say(f"evaluate: {label}, {suite.name}: {len(waiting)} items, {how}")
            for record in suite.judge(subject, missing[suite.name]):
                samples.append(record)
                waiting.discard(record["item"])
                bar.update(1)
            if waiting:
                raise InputError(f"--suites {suite.name}: item {sorted(waiting)[0]} was not judged")


def pending(items: Sequence[Item], label: str, suite: str, samples: Samples, block: int) -> list[Item]:
    """Return the items of all blocks with missing records."""
    blocks = [items[start : start + block] for start in range(0, len(items), block)]
    return [
        item
        for each in blocks
        if any((label, suite, item.key) not in samples.records for item in each)
        for item in each
    ]


def _check_keys(suite: str, items: Sequence[Item]) -> None:
    keys = [item.key for item in items]
    if len(set(keys)) < len(keys):
        twice = next(key for index, key in enumerate(keys) if key in keys[:index])
        raise InputError(f"--suites {suite}: two items have the key {twice!r}")


# ---- report ----
#
# The report of an evaluation: a verdict, means with intervals by group and metric, models side by side.


# Endings of the names of figures next to a mean. Other endings would make a table of all of them.
RENAMED = {"_se": "_error", "_n": "_items"}
MOST_BARS = 36
# Number of shown answers of a suite: the first of each group.
SHOWN_SAMPLES = 2


def report(suites: Sequence[Suite], labels: Sequence[str], records: Sequence[Record]) -> Found:
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
    verdicts: list[str] = []
    sentences: list[str] = []
    if len(labels) > 1:
        family = compared_figures(suites, labels, records)
        decided = judged([each for each in family if can_differ(each)])
        left_out = [each for each in family if not can_differ(each)]
        metrics |= verdict_metrics(decided, left_out, labels[1:])
        title = f"Verdict on the primary figures (Holm over {len(decided)})"
        tables |= {title: verdict_table(labels[0], decided, len(labels) > 2)} if decided else {}
        tables |= shown_changes(changes_of(labels, family, records))
        sentences += [sentence(labels[0], label, decided) for label in labels[1:]]
        sentences += [left_out_sentence(left_out)] if left_out else []
    num_verdicts = len(sentences)
    for suite in suites:
        own = [record for record in records if record["suite"] == suite.name]
        result, table, bars = _of_suite(suite, labels, own, verdicts)
        metrics |= result
        tables[f"{suite.name}: means with 95% intervals"] = table
        plots[f"suite_{suite.name}"] = bars
        if (extra := suite.extra(own)) is not None:
            metrics |= {_renamed(name): value for name, value in extra.metrics.items()}
            tables |= extra.tables
            plots |= extra.plots
            sentences += [extra.summary] if extra.summary else []
        tables[f"{suite.name}: some answers"] = _shown(own, labels)
    summary = "; ".join([*sentences[:num_verdicts], summary_of(labels, records, verdicts), *sentences[num_verdicts:]])
    return Found(metrics, summary, tables, plots)


def compared_figures(suites: Sequence[Suite], labels: Sequence[str], records: Sequence[Record]) -> list[Compared]:
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


def changes_of(labels: Sequence[str], family: Sequence[Compared], records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return the items with tested figures different from the first model's, with question and answers."""
    texts = {
        (f"{each['suite']}/{slug(each['group'])}/{each['model']}", each["item"]): (each["asked"], each["said"])
        for each in records
    }
    return changed_items(labels[0], [each for each in family if can_differ(each)], texts)


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
                result = mean_interval(list(values[label].values())) if values[label] else None
                line[label] = _cell(result)
                if result is not None:
                    metrics |= _named(f"{key}/{label}", result, len(values[label]))
                    bars[f"{group}: {line['figure']}, {label}"] = result.value
                    notes[f"{group}: {line['figure']}, {label}"] = _cell(result)
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
    displayed = dict(list(bars.items())[:MOST_BARS])
    return metrics, table, Bars(f"{suite.name} (95% intervals)", "mean over items", displayed, notes)


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


def summary_of(labels: Sequence[str], records: Sequence[Record], verdicts: Sequence[str]) -> str:
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


# ---- checks ----
#
# The checks of an evaluation before any training or loading.


def check(script_args: EvaluateArguments) -> None:
    """Refuse flags that would fail later and flags without effect, and read all files."""
    for name in script_args.suites:
        if name not in SUITES:
            nearest = difflib.get_close_matches(name, SUITES, n=1, cutoff=0.0)[0]
            raise InputError(f"--suites {name!r}: no such suite; did you mean {nearest!r}? All: {', '.join(SUITES)}")
    if not script_args.suites or len(set(script_args.suites)) < len(script_args.suites):
        raise InputError(f"--suites {' '.join(script_args.suites)}: expected one or more, each once")
    check_flags(script_args)
    if script_args.write_answers and (missing := missing_overlaps()):
        say(f"evaluate: {missing}")
    if len(script_args.model_name_or_path or ()) != 1:
        refuse_foreign_changes(script_args.output_dir)
    evaluate_flags.check(script_args, script_args.suites)
    check_pictures(script_args)
    for suite in suites_of(script_args, None):
        suite.items()


def check_models(script_args: EvaluateArguments) -> None:
    """Refuse unloadable models, and a requested but absent chat template."""
    judge = script_args.judge_model_name_or_path
    for name in [*(script_args.model_name_or_path or ()), *([judge] if judge else ())]:
        try:
            load_config(name)
            if find_adapter(name) is None:
                check_weight_files(name)
            template = saved_tokenizer(name).chat_template
            load_tokenizer(name)
            if processor_of(name) is None and "pictures" in script_args.suites and name != judge:
                raise InputError(f"--suites pictures: {name!r} reads text alone: name a model that sees")
        except InputError as error:
            raise InputError(f"--judge_model_name_or_path: {error}" if name == judge else str(error)) from None
        if script_args.apply_chat_template and template is None and name != judge:
            raise InputError(
                f"--apply_chat_template true: the tokenizer of {name!r} has no chat template; leave the flag out, or "
                "save a template with the tokenizer"
            )


def changed_files(script_args: EvaluateArguments) -> dict[str, int | str]:
    """Return, by name, the last changes of the files named by flags and rows, and hashes of their contents."""
    named = [getattr(script_args, flag) or [] for flag in FILES]
    paths = [path for each in named for path in ([each] if isinstance(each, str) else each)]
    paths += evaluate_flags.files_of(script_args)
    changed = {f"{path}{CHANGED}": Path(path).stat().st_mtime_ns for path in paths}
    contents = {f"{path}{CONTENTS}": file_fingerprint([("", Path(path))], True) for path in paths}
    return {**changed, **contents, **files_changed(script_args, script_args.model_name_or_path or ())}
