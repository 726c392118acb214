"""What a suite is: items with keys that never change, and a judge that gives each of them its scores.

    suite = TruthfulQA("TruthfulQA.csv")
    for record in suite.judge(subject, suite.items()):
        print(record["item"], record["scores"])

A suite only judges. Whoever runs it averages the records by group and metric, puts errors beside the means, and leaves
out the items that have been judged already.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, TypedDict, TypeVar

from hfllm.errors import InputError
from hfllm.outputs.report import Found

if TYPE_CHECKING:
    from hfllm.evaluation.suites.subjects import Subject

Body = TypeVar("Body")
# Why an item has no scores, where it is for want of room.
TOO_LONG = "longer than the model's context"


@dataclass(frozen=True)
class Item(Generic[Body]):
    """One question of a suite.

    Args:
        key: unique in the suite, and the same in every run.
        group: the row of the table that it counts in, such as `typos 0.1`.
        body: what the suite needs to ask it.
    """

    key: str
    group: str
    body: Body


class Record(TypedDict):
    """What became of an item.

    Fields:
        model, suite, item, group: whose it is.
        scores: figures of this item by metric, all finite.
        asked, said: what the model read and wrote, for readers; either may be empty.
        skipped: why there are no scores; empty where there are.
        primary: metrics by which models are compared in this group, each with whether more is better (1) or less (-1).
    """

    model: str
    suite: str
    item: str
    group: str
    scores: dict[str, float]
    asked: str
    said: str
    skipped: str
    primary: dict[str, int]


class Suite(ABC, Generic[Body]):
    """Items, and how a model is judged by them.

    Attributes:
        name: as `--suites` names it.
        better: of each metric whether more is better (1) or less (-1); others are neither.
        primary: metrics by which models are compared, each of them in `better`; not controls, nor what only describes.
    """

    name: ClassVar[str]
    better: ClassVar[Mapping[str, int]] = {}
    primary: ClassVar[Sequence[str]] = ()

    def primary_of(self, group: str) -> Sequence[str]:
        """Return the primary metrics of a group of items; none for a group that is a control."""
        return self.primary

    @abstractmethod
    def items(self) -> Sequence[Item[Body]]:
        """Return all items, the same in every run; read and check the files that they come from.

        Raises:
            InputError: naming the file and the row.
        """

    @abstractmethod
    def judge(self, subject: "Subject", items: Sequence[Item[Body]]) -> Iterator[Record]:
        """Yield the record of each of these items, which may be some of all, as soon as it is known, in any order.

        An item's scores do not depend on which others are asked.
        """

    def extra(self, records: Sequence[Record]) -> Found | None:
        """Return what stands in the report beside the mean of each metric, of all models' records; `None` for nothing.

        Names of metrics, tables and plots begin with the suite's.
        """
        return None

    def record(
        self,
        subject: "Subject",
        item: Item[Body],
        scores: Mapping[str, float] | None = None,
        asked: str = "",
        said: str = "",
        skipped: str = "",
    ) -> Record:
        """Return the record of an item.

        Raises:
            InputError: for a score that is not finite, naming the item, and for an item with neither.
        """
        scores = {name: float(value) for name, value in (scores or {}).items()}
        for name, value in scores.items():
            if not math.isfinite(value):
                raise InputError(f"{self.name}, item {item.key}: {name} of {subject.label} is {value}, not a number")
        if not scores and not skipped:
            raise InputError(f"{self.name}, item {item.key}: it has neither scores nor a reason why not")
        return Record(
            model=subject.label,
            suite=self.name,
            item=item.key,
            group=item.group,
            scores=scores,
            asked=asked,
            said=said,
            skipped=skipped,
            primary={name: self.better[name] for name in self.primary_of(item.group)},
        )
