"""What an evaluation is made of: suites, the questions about pictures, judged models, and the samples of a run."""

import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hfllm.data.formats import Row, to_sft
from hfllm.data.images.rows import (
    ImageReading,
    by_turns,
    flaw_of_pictures,
    picture_mapper,
    refuse_token,
    words_of_places,
)
from hfllm.data.loading import RowSource
from hfllm.data.sources import HubPart
from hfllm.data.world.world import World
from hfllm.errors import InputError
from hfllm.evaluation.pictures import Asked, Part, Pictures
from hfllm.evaluation.suites.base import Item, Record, Subject, Suite
from hfllm.evaluation.suites.calibration import ChoiceCalibration, WorldCalibration
from hfllm.evaluation.suites.few_shot import FewShot
from hfllm.evaluation.suites.interpretability import Interpretability
from hfllm.evaluation.suites.lm_eval import LmEval
from hfllm.evaluation.suites.preferences import Preferences
from hfllm.evaluation.suites.refusals import XSTest
from hfllm.evaluation.suites.robustness import Robustness
from hfllm.evaluation.suites.tools import Tools
from hfllm.evaluation.suites.truthfulness import TruthfulQA, missing_overlaps
from hfllm.evaluation.suites.world_suites import WorldFewShot, WorldPreferences, WorldRefusals, WorldTruthfulness
from hfllm.fingerprint import file_fingerprint
from hfllm.models.loading.adapters import find_adapter
from hfllm.models.loading.weights import check_weight_files
from hfllm.outputs.progress import progress
from hfllm.outputs.report import CHANGED, CONTENTS, compared, write_atomically
from hfllm.runs.command_line import say
from hfllm.runs.models import NamedModel, load_config, load_tokenizer, saved_tokenizer
from hfllm.stages.evaluate.flags import NUM_WORLD_ITEMS, EvaluateArguments
from hfllm.stages.rlhf.build import load_tools
from hfllm.stages.shared import kept_rows, load_speaking, processor_of
from hfllm.stages.vision.build import SHUFFLED, eval_parts, prior_of, question_of
from hfllm.stages.vision.flags import DRAWN

# ---- suites ----


def suites_of(script_args: EvaluateArguments) -> list[Suite]:
    """Return the suites named by the flags."""
    args, count, length = script_args, script_args.num_items, script_args.max_new_tokens
    world, of_world = World(args.world_seed), NUM_WORLD_ITEMS if count is None else count
    truthfulqa, xstest, prompts = args.truthfulqa_file, args.xstest_file, args.robustness_file
    pairs, questions = args.preference_files, args.few_shot_files
    builders: dict[str, Callable[[], Suite]] = {
        "truthfulness": lambda: (
            TruthfulQA(truthfulqa, count, args.write_answers) if truthfulqa else WorldTruthfulness(world, of_world)
        ),
        "hhh": lambda: Preferences(pairs, count) if pairs else WorldPreferences(world, of_world),
        "refusals": lambda: XSTest(xstest, count, max_new_tokens=length) if xstest else WorldRefusals(world, of_world),
        "calibration": lambda: ChoiceCalibration(questions, count) if questions else WorldCalibration(world, of_world),
        "few_shot": lambda: (
            FewShot(questions, count, args.num_shots, length) if questions else WorldFewShot(world, of_world)
        ),
        "interpretability": lambda: Interpretability(args.facts_file, args.world_seed),
        "lm_eval": lambda: LmEval(
            args.tasks or (),
            args.include_path or (),
            args.tasks_data,
            args.num_fewshot,
            count,
            args.allow_code_execution,
            args.tasks_from_hub,
        ),
        "robustness": lambda: (
            Robustness(None, prompts, count, length, args.num_attacks)
            if prompts
            else Robustness(world, num_prompts=count, num_attacks=args.num_attacks)
        ),
        "pictures": lambda: Pictures(
            partial(picture_parts, args.dataset_name, count, args.model_name_or_path or (), args.image_reading()),
            length,
        ),
        "tools": lambda: Tools(args.dataset_name, load_tools(args.tools, args.mcp_servers), count, length),
    }
    return [builders[name]() for name in args.suites]


def add_judge(suites: Sequence[Suite], judge: Subject) -> None:
    """Let a model judge the written answers of these suites."""
    for suite in suites:
        if isinstance(suite, TruthfulQA | XSTest):
            suite.judge_model = judge


def check_items(suites: Sequence[Suite], writes_answers: bool) -> None:
    """Read all files of the suites, and print which measures of written answers are left out."""
    if writes_answers and (missing := missing_overlaps()):
        say(f"evaluate: {missing}")
    for suite in suites:
        suite.items()


def picture_parts(
    dataset_name: str, num_items: int | None, models: Sequence[str], reading: ImageReading
) -> list[Part]:
    """Return the questions about pictures of a dataset: drawn here, or the user's rows.

    Args:
        num_items: questions of each part; by default all rows, and 240 drawn ones.
        models: with the same questions for all of them.
        reading: of the user's pictures.
    """
    if dataset_name not in DRAWN:
        return [Part("", own_questions(dataset_name, models, reading)[:num_items])]
    count = NUM_WORLD_ITEMS if num_items is None else num_items
    prior = prior_of(dataset_name, count)
    return [
        Part(part.replace("_", " "), questions, prior)
        for part, questions in eval_parts(dataset_name, count).items()
        if part != SHUFFLED
    ]


def own_questions(dataset_name: str, models: Sequence[str], reading: ImageReading) -> list[Asked]:
    """Return the first answer of each of the user's usable rows as a question; see `picture_parts`."""
    read = picture_mapper(dataset_name, reading, to_sft, "hfllm evaluate")
    # A processor without images is refused later.
    tokens = sorted({token for processor in map(processor_of, models) for token in words_of_places(processor)})

    def mapper(origin: str, row: Row) -> Row:
        row = by_turns(read(origin, row))[0]
        refuse_token(origin, {"prompt": row["prompt"]}, tokens)
        return row

    source = RowSource(dataset_name, HubPart("test"))
    return [question_of(row) for row in kept_rows(source, mapper, flaw_of_pictures)]


# ---- models ----


@dataclass(frozen=True)
class Loader:
    """Loads judged models.

    Args:
        settings: arguments of `from_pretrained`: their type of numbers, attention and quantization.
        batch_size: prompts, or choices of a question, in one pass.
        uses_chat_template: by default where a tokenizer has a template.
    """

    settings: Mapping[str, Any]
    batch_size: int
    uses_chat_template: bool | None = None

    @contextmanager
    def load(self, label: str, name: str) -> Iterator[Subject]:
        """Load a model to be judged, and let it go afterwards."""
        uses_chat_template = self.uses_chat_template
        if uses_chat_template is None:
            uses_chat_template = saved_tokenizer(name).chat_template is not None
        processor = processor_of(name)
        speaking = load_speaking(NamedModel(name, settings=self.settings), processor)
        yield Subject(label, speaking.model, speaking.tokenizer, uses_chat_template, self.batch_size, processor)
        del speaking
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def check_models(names: Sequence[str], judge: str | None, needs_template: bool, needs_images: bool) -> None:
    """Refuse unloadable models, and judged ones without a requested chat template, or blind before pictures.

    Args:
        judge: judges written answers.
    """
    for name in [*names, *([judge] if judge else ())]:
        try:
            load_config(name)
            if find_adapter(name) is None:
                check_weight_files(name)
            template = saved_tokenizer(name).chat_template
            load_tokenizer(name)
            if processor_of(name) is None and needs_images and name != judge:
                raise InputError(f"--suites pictures: {name!r} reads text alone: name a model that sees")
        except InputError as error:
            raise InputError(f"--judge_model_name_or_path: {error}" if name == judge else str(error)) from None
        if needs_template and template is None and name != judge:
            raise InputError(
                f"--apply_chat_template true: the tokenizer of {name!r} has no chat template; leave the flag out, or "
                "save a template with the tokenizer"
            )


def changed_files(paths: Sequence[str]) -> dict[str, int | str]:
    """Return, by name, the last changes of files, and hashes of their contents."""
    changed = {f"{path}{CHANGED}": Path(path).stat().st_mtime_ns for path in paths}
    return {**changed, **{f"{path}{CONTENTS}": file_fingerprint([("", Path(path))], True) for path in paths}}


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

    def pending(self, label: str, suite: str, items: Sequence[Item], block: int) -> list[Item]:
        """Return the items of all blocks with missing records."""
        blocks = [items[start : start + block] for start in range(0, len(items), block)]
        is_missing = [any((label, suite, item.key) not in self.records for item in each) for each in blocks]
        return [item for each in compress(blocks, is_missing) for item in each]

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


def judge_all(loader: Loader, models: Mapping[str, str], suites: Sequence[Suite], samples: Samples) -> list[Record]:
    """Judge all models by all suites as far as missing in the samples, and return all records, in one order.

    Args:
        models: by their labels.
    """
    items = {suite.name: list(suite.items()) for suite in suites}
    for name, each in items.items():
        _check_keys(name, each)
    count = len(models) * sum(map(len, items.values()))
    with progress(total=count, unit="item") as bar:
        for label, model in models.items():
            missing = {name: samples.pending(label, name, each, loader.batch_size) for name, each in items.items()}
            bar.update(sum(map(len, items.values())) - sum(map(len, missing.values())))
            if any(missing.values()):
                with loader.load(label, model) as subject:
                    _judge(subject, suites, missing, samples, bar)
                # Memory holds one model at a time.
                del subject
    keys = [(label, suite.name, item.key) for label in models for suite in suites for item in items[suite.name]]
    records = [samples.records[key] for key in keys]
    samples.write(records)
    return records


def _judge(
    subject: Subject, suites: Sequence[Suite], missing: Mapping[str, Sequence[Item]], samples: Samples, bar: tqdm
) -> None:
    for suite in suites:
        waiting = {item.key for item in missing[suite.name]}
        if not waiting:
            continue
        bar.set_description(f"{suite.name} of {subject.label}")
        how = "by its chat template" if subject.uses_chat_template else "as plain text"
        say(f"evaluate: {subject.label}, {suite.name}: {len(waiting)} items, {how}")
        for record in suite.judge(subject, missing[suite.name]):
            samples.append(record)
            waiting.discard(record["item"])
            bar.update(1)
        if waiting:
            raise InputError(f"--suites {suite.name}: item {sorted(waiting)[0]} was not judged")


def _check_keys(suite: str, items: Sequence[Item]) -> None:
    keys = [item.key for item in items]
    if len(set(keys)) < len(keys):
        twice = next(key for index, key in enumerate(keys) if key in keys[:index])
        raise InputError(f"--suites {suite}: two items have the key {twice!r}")
