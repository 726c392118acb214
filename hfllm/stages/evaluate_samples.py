"""Judge models item by item, and keep what is known: a run that was killed resumes where it was.

Every record is a line of samples.jsonl as soon as it is known. The same command reads them and judges the items that
are missing. Items are asked in blocks of a batch, and a block that is not complete is asked again as a whole: batches
are then the same as in a run that was never stopped, and so are their numbers, to the last digit.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.errors import InputError
from hfllm.evaluation.suites.base import Item, Record, Suite
from hfllm.outputs.report import CHANGED, CONTENTS, compared, write_atomically
from hfllm.runs.command_line import say
from hfllm.stages.evaluate import EvaluateArguments, loaded

if TYPE_CHECKING:
    from tqdm import tqdm

SAMPLES, SAMPLES_OF = "samples.jsonl", "samples_of.json"
# More suites may be asked for later; the records of the others stay.
NOT_OF_SAMPLES = ("suites", f"suites{CHANGED}", f"suites{CONTENTS}")

Key = tuple[str, str, str]


class Samples:
    """The records of a run, in its folder.

    Args:
        folder: where samples.jsonl is.
        arguments: of the run. Records of other flags are dropped, but for `suites`.
    """

    def __init__(self, folder: str | Path, arguments: Mapping[str, Any]):
        self.path, self.identity = Path(folder, SAMPLES), Path(folder, SAMPLES_OF)
        self.records: dict[Key, Record] = {}
        told = {name: value for name, value in arguments.items() if name not in NOT_OF_SAMPLES}
        text = json.dumps(told, indent=2, default=str) + "\n"
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
        """Read the records; a line that was cut off by a kill is dropped."""
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
        """Write the file anew with these records in their order."""
        write_atomically(self.path, "".join(map(_line, records)))


def _are_same(before: str, now: str) -> bool:
    """Return whether samples are of these arguments, both as JSON."""
    try:
        was, arguments = json.loads(before), json.loads(now)
        return all(was.get(name) == arguments.get(name) for name in compared(was, arguments))
    except (ValueError, AttributeError, TypeError):
        return False


def key_of(record: Record) -> Key:
    """Return what tells a record from all others."""
    return record["model"], record["suite"], record["item"]


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def judge_all(
    script_args: EvaluateArguments, models: Mapping[str, str], suites: Sequence[Suite], samples: Samples
) -> list[Record]:
    """Judge each model by each suite as far as the samples lack it, and return all records, in one order.

    Raises:
        InputError: naming the item, such as for logits that are not numbers.
    """
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
    """Return the items of all blocks that lack a record."""
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
        twice = next(key for place, key in enumerate(keys) if key in keys[:place])
        raise InputError(f"--suites {suite}: two items have the key {twice!r}")
