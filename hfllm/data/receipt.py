"""The data receipt of a run: files, rows, columns and keys of its datasets that were read, and those that were not."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hfllm.data.formats import MESSAGE_KEYS, Dropped
from hfllm.data.sources import JoinedRow, folder_of, skipped_files, source_files

# Names in a printed line, of files or columns; the file has all.
MAX_NAMES = 8


class ReadRow(dict[str, Any]):
    """A row of a dataset that notes which of its columns are read; looking whether it has one does not count."""

    def __init__(self, columns: Mapping[str, Any], used: set[str] | None = None):
        super().__init__(columns)
        self.used: set[str] = set() if used is None else used

    def __getitem__(self, name: str) -> Any:
        self.used.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.used.add(name)
        return super().get(name, default)


def noting_as(row: Mapping[str, Any], columns: dict[str, Any]) -> dict[str, Any]:
    """Return columns as a row that notes what is read of it where `row` does, for both together."""
    return ReadRow(columns, row.used) if isinstance(row, ReadRow) else columns


@dataclass
class Receipt:
    """What was read of one dataset.

    Args:
        dataset: its name.
        split: of a dataset on the Hub.

    Attributes:
        files: how many rows each file has.
        rows: how many were read.
        used: the columns that were read.
        ignored: in how many rows each column, and in how many messages each key, has a value that nothing has read.
        joined: rows of a table over lines each of which could be a row, and the first of them.
        dropped: the rows that are left out.
        duplicates: rows that were converted to the same as an earlier one.
        is_printed: whether its lines have been printed.
    """

    dataset: str
    split: str = "train"
    files: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    used: set[str] = field(default_factory=set)
    joined: list[str] = field(default_factory=list)
    dropped: Dropped = field(default_factory=Dropped)
    duplicates: int = 0
    is_printed: bool = False
    _seen: set[int] = field(default_factory=set)
    _ignored: Counter[str] = field(default_factory=Counter)
    _present: ReadRow | None = None
    _held: list[ReadRow] = field(default_factory=list)
    _names: dict[str, str] = field(default_factory=dict)

    def take(self, origin: str, row: Mapping[str, Any]) -> ReadRow:
        """Count a row, and return it as one that notes what is read of it until the next one is taken."""
        self._settle()
        self.rows += 1
        self.files[self._file_of(origin)] += 1
        self._present = ReadRow(row)
        return self._present

    def hold(self, origin: str, row: Mapping[str, Any]) -> ReadRow:
        """Count a row, and return it as one that notes what is read of it until the receipt is asked for."""
        result, self._present = self.take(origin, row), None
        self._held.append(result)
        return result

    def drop(self) -> None:
        """Forget what was read of the present row: it is left out."""
        self._present = None

    def add_converted(self, row: object) -> None:
        """Count a converted row that says the same as an earlier one; rows with images are not compared."""
        if isinstance(row, dict) and (row.get("images") or row.get("image")):
            return
        number = hash(str(row))
        self.duplicates += number in self._seen
        self._seen.add(number)

    @property
    def ignored(self) -> dict[str, int]:
        self._settle()
        while self._held:
            self._note(self._held.pop())
        return dict(self._ignored)

    def _settle(self) -> None:
        """Count what nothing has read of the present row."""
        row, self._present = self._present, None
        if row is not None:
            self._note(row)

    def _note(self, row: ReadRow) -> None:
        """Count which columns of a row were read, and which were not."""
        for name, value in dict.items(row):
            if name in row.used:
                self.used.add(name)
                self._ignored.update(_unread_keys(name, value))
            elif value is not None and value != "":
                self._ignored[name] += 1

    @property
    def skipped(self) -> dict[str, str]:
        """The files of a local folder that are not read, and why."""
        return {_name_in(self.dataset, file): why for file, why in skipped_files(self.dataset).items()}

    def as_dict(self) -> dict[str, Any]:
        """Return the receipt for a file, without the paths of this machine."""
        first = {reason: self._short(origin) for reason, origin in self.dropped.first.items() if origin}
        return {
            "dataset": self.dataset,
            **({"split": self.split} if not self._is_local else {}),
            "files": self._all_files(),
            "skipped_files": self.skipped,
            "rows": self.rows,
            "dropped": {
                reason: {"rows": count, "first": first.get(reason)}
                for reason, count in self.dropped.reasons.most_common()
            },
            "duplicates": self.duplicates,
            "ignored": self.ignored,
            "columns": sorted(self.used),
            **(
                {"joined_lines": {"rows": len(self.joined), "first": self._short(self.joined[0])}}
                if self.joined
                else {}
            ),
        }

    def lines(self) -> Iterator[str]:
        """Yield the lines to print: rows and files, rows left out, columns read, and what is not read."""
        names = [name if count else f"{name}: no row" for name, count in self._all_files().items()]
        files = f" in {_counted(len(names), 'file')} ({_listed(names)})" if self._is_local else ""
        repeated = f", {self.duplicates:,} of them like an earlier one" if self.duplicates else ""
        yield f"{self.dataset}: {_counted(self.rows, 'row')}{files}{repeated}"
        if self.dropped.count:
            yield f"{self.dataset}: {self.dropped}"
        if skipped := [f"{name} ({why})" for name, why in self.skipped.items()]:
            yield f"{self.dataset}: {_counted(len(skipped), 'file')} not read: {_listed(skipped)}"
        if self.joined:
            count, first = _counted(len(self.joined), "row"), self.joined[0]
            yield f"{self.dataset}: {count} over lines that could be rows (first: {first}): was a quote left open?"
        ignored = [f"{name} ({count:,})" for name, count in self.ignored.items()]
        columns = _listed(sorted(self.used))
        yield f"{self.dataset}: columns read: {columns}; ignored: {_listed(ignored) or 'none'}"

    def _all_files(self) -> dict[str, int]:
        """Return how many rows were read of each file, of some perhaps none."""
        files = source_files(self.dataset) if self._is_local else ()
        return {_name_in(self.dataset, file): 0 for file in files or ()} | dict(self.files)

    @cached_property
    def _is_local(self) -> bool:
        return folder_of(self.dataset) is not None

    def _file_of(self, origin: str) -> str:
        file = origin.rpartition(", ")[0]
        if file not in self._names:
            self._names[file] = _name_in(self.dataset, Path(file)) if self._is_local else self.dataset
        return self._names[file]

    def _short(self, origin: str) -> str:
        file, comma, number = origin.rpartition(", ")
        return f"{_name_in(self.dataset, Path(file))}{comma}{number}" if self._is_local else origin


# The receipts of this process, by dataset and split; a dataset read again has a new one.
_receipts: dict[tuple[str, str], Receipt] = {}
# What the rows of the running stage became, such as numbers of tokens, by the name of the rows.
_figures: dict[str, Mapping[str, Any]] = {}


def begin_receipt(dataset: str, split: str = "train") -> Receipt:
    """Return the receipt of a dataset that is about to be read."""
    _receipts[dataset, split] = receipt = Receipt(dataset, split)
    return receipt


def receipted(
    dataset: str, rows: Iterable[tuple[str, Mapping[str, Any]]], split: str = "train"
) -> Iterator[tuple[str, ReadRow]]:
    """Yield the rows of a dataset with their origins, each to be read before the next one, and keep a receipt."""
    receipt = begin_receipt(dataset, split)
    for origin, row in rows:
        receipt.joined += [origin] * isinstance(row, JoinedRow)
        yield origin, receipt.take(origin, row)


def receipted_whole(dataset: str, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[tuple[str, ReadRow]]:
    """Return the rows of a small dataset, which are read in any order until the run ends, and keep a receipt."""
    receipt = begin_receipt(dataset)
    return [(origin, receipt.hold(origin, row)) for origin, row in rows]


def receipts_of(arguments: Mapping[str, Any]) -> list[Receipt]:
    """Return the receipts of the datasets that flags name, as far as this process has read them."""
    named: set[str] = set()
    for value in arguments.values():
        texts = [each for each in (value if isinstance(value, list | tuple) else [value]) if isinstance(each, str)]
        # A mixture names each with its weight.
        named |= {*texts, *(text.rpartition(":")[0] for text in texts)}
    return [receipt for receipt in _receipts.values() if receipt.dataset in named]


def note_figures(name: str, figures: Mapping[str, Any]) -> None:
    """Keep what rows became for the file of the running stage.

    Args:
        name: of the rows, such as `training rows`.
    """
    _figures[name] = dict(figures)


def whole_receipt(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of the file: the receipts of the datasets that flags name, and what their rows became."""
    datasets, figures = [receipt.as_dict() for receipt in receipts_of(arguments)], dict(_figures)
    _figures.clear()
    return {"datasets": datasets, **figures} if datasets else {}


def unprinted_lines(arguments: Mapping[str, Any]) -> list[str]:
    """Return the lines of the receipts of datasets that flags name, where they were not printed yet."""
    new = [receipt for receipt in receipts_of(arguments) if receipt.rows and not receipt.is_printed]
    for receipt in new:
        receipt.is_printed = True
    return [line for receipt in new for line in receipt.lines()]


def _unread_keys(column: str, value: object) -> list[str]:
    """Return the keys of a column of messages that nothing reads, such as `messages[].timestamp`."""
    messages, mark = (value, "[]") if isinstance(value, list) else ([value], "")
    if not all(isinstance(each, Mapping) and ("role" in each or "from" in each) for each in messages):
        return []
    return [
        f"{column}{mark}.{key}"
        for message in messages
        for key, inside in message.items()
        if key not in MESSAGE_KEYS and inside not in (None, "", [], {})
    ]


def _name_in(dataset: str, file: Path) -> str:
    folder = folder_of(dataset)
    return file.relative_to(folder).as_posix() if folder and file.is_relative_to(folder) else file.name


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _listed(names: Sequence[str]) -> str:
    more = [f"and {len(names) - MAX_NAMES:,} more"] if len(names) > MAX_NAMES else []
    return ", ".join([*names[:MAX_NAMES], *more])
