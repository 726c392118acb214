"""Does a model know when it is wrong? Its confidence in an answer compared with whether it is right.

Of multiple choice the confidence is the share of the chosen answer among the choices; of a written answer its
probability as a whole, low for a long one regardless of the model's knowledge. Figures are over all items of a group,
with the control of shuffled labels: see `hfllm.outputs.statistics`. Mean confidence and accuracy stand among the
means.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Generic, TypeVar

from hfllm.data.thoughts import split_thoughts
from hfllm.data.world.rubric import RIGHT, gold_score
from hfllm.data.world.world import Task, World
from hfllm.evaluation.suites.base import TOO_LONG, Item, Record, Subject, Suite, chosen, shares
from hfllm.evaluation.suites.few_shot import FewShot, Question, iter_scored
from hfllm.outputs.figures import plus_minus
from hfllm.outputs.report import Found, Plot
from hfllm.outputs.statistics import aurc, auroc_interval, ece, reliability_plot, shuffled_auroc

Body = TypeVar("Body")
CHOICE, WRITTEN = "choice", "written answer"


class Calibration(Suite[Body], Generic[Body]):
    """The common part of both suites: a record has `confidence` and `right`."""

    name: ClassVar[str] = "calibration"
    better: ClassVar[Mapping[str, int]] = {"right": 1}

    def extra(self, records: Sequence[Record]) -> Found | None:
        """Return ECE, AUROC of being wrong and AURC per group and model, and the reliability plots."""
        metrics: dict[str, float] = {}
        table, plots = [], {}
        for group in dict.fromkeys(record["group"] for record in records):
            curves: dict[str, list[float]] = {}
            for model in dict.fromkeys(record["model"] for record in records):
                rows = [each["scores"] for each in records if (each["group"], each["model"]) == (group, model)]
                sure = [row["confidence"] for row in rows if row]
                right = [row["right"] for row in rows if row]
                if not sure:
                    continue
                name = f"{self.name}/{slug(group)}"
                result = figures(sure, right)
                metrics |= {f"{name}/{key}/{model}": value for key, value in result.items()}
                table.append({"group": group, "model": model, **table_cells(result), "n": str(len(sure))})
                curves |= {model: sure, f"{model} right": right}
            plots |= self._plot(group, curves)
        return Found(metrics, "", {"Confidence and being right": table}, plots)

    def _plot(self, group: str, curves: Mapping[str, list[float]]) -> dict[str, Plot]:
        models = [name for name in curves if not name.endswith(" right")]
        lines: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
        for model in models:
            lines |= reliability_plot({model: curves[model]}, curves[f"{model} right"], "").lines
        title = f"Confidence and accuracy, {group}"
        plot = Plot(title, "confidence", "accuracy (share that is right)", lines)
        return {f"calibration_{slug(group)}": plot} if models else {}


def figures(confidence: Sequence[float], right: Sequence[float]) -> dict[str, float]:
    """Return `ece`, `aurc` and, where there are right and wrong answers, `auroc` with `_se` and `_shuffled`."""
    result = {"ece": ece(confidence, right, equal="mass")}
    unsure, wrong = [-each for each in confidence], [1 - each for each in right]
    if len({*wrong}) == 2:
        interval = auroc_interval(unsure, wrong)
        result |= {"auroc": interval.value, "auroc_se": interval.error, "auroc_n": len(right)}
        result["auroc_shuffled"] = shuffled_auroc(unsure, wrong)[0]
    return result | {"aurc": aurc(unsure, wrong)}


def table_cells(result: Mapping[str, float]) -> dict[str, str]:
    """Return the result of `figures` as cells of a table."""
    return {
        "ECE": f"{result['ece']:.3f}",
        "AUROC of being wrong": plus_minus(result["auroc"], result["auroc_se"]) if "auroc" in result else "-",
        "labels shuffled": f"{result['auroc_shuffled']:.3f}" if "auroc" in result else "-",
        "AURC": f"{result['aurc']:.3f}",
    }


def slug(text: str) -> str:
    """Return a name for metrics and files."""
    return "_".join("".join(each if each.isalnum() or each == "." else " " for each in text.lower()).split())


class ChoiceCalibration(Calibration[Question]):
    """Confidence in the choices of local files, see `FewShot` for their forms.

    Args:
        paths: the files.
        num_items: questions per file.
    """

    def __init__(self, paths: Sequence[str], num_items: int | None = None):
        self.questions = FewShot(paths, num_items)

    def items(self) -> list[Item[Question]]:
        return [item for item in self.questions.items() if item.body.choices]

    def judge(self, subject: Subject, items: Sequence[Item[Question]]) -> Iterator[Record]:
        for item, scored in iter_scored(self, subject, items):
            if scored is None:
                yield self.record(subject, item, asked=item.body.question, skipped=TOO_LONG)
                continue
            logprobs = [each.logprob for each in scored]
            answer = item.body.choices[chosen(logprobs)]
            scores = {"confidence": max(shares(logprobs)), "right": float(answer == item.body.answer)}
            yield self.record(subject, item, scores, item.body.question, answer)


class WorldCalibration(Calibration[Task]):
    """Confidence in the world's answers, chosen among the right and wrong ones, and written.

    Args:
        world: whose held-out questions are asked.
        num_items: questions.
    """

    def __init__(self, world: World, num_items: int = 240):
        self.world, self.num_items = world, num_items

    def items(self) -> list[Item[Task]]:
        tasks = [task for task in self.world.evaluation_tasks(self.num_items, seed=1) if task.family != "harm"]
        return [
            Item(f"{group}-{index}", group, task) for group in (CHOICE, WRITTEN) for index, task in enumerate(tasks)
        ]

    def judge(self, subject: Subject, items: Sequence[Item[Task]]) -> Iterator[Record]:
        for item in items:
            if item.group == CHOICE:
                yield self._choose(subject, item)
        written = [item for item in items if item.group == WRITTEN]
        answers = subject.iter_answers([item.body.question for item in written], 40)
        for item, answer in zip(written, answers, strict=True):
            yield self._write(subject, item, answer)

    def _choose(self, subject: Subject, item: Item[Task]) -> Record:
        texts = [item.body.gold.accepted[0], *item.body.wrong]
        logprobs = self.logprobs(subject, item, item.body.question, texts)
        if logprobs is None:
            return self.record(subject, item, asked=item.body.question, skipped=TOO_LONG)
        index = chosen(logprobs)
        scores = {"confidence": max(shares(logprobs)), "right": float(index == 0)}
        return self.record(subject, item, scores, item.body.question, texts[index])

    def _write(self, subject: Subject, item: Item[Task], answer: str | None) -> Record:
        logprobs = self.logprobs(subject, item, item.body.question, [answer]) if answer else None
        if logprobs is None:
            reason = TOO_LONG if answer is None else "nothing was written"
            return self.record(subject, item, asked=item.body.question, skipped=reason)
        right = gold_score(split_thoughts(answer)[1], item.body.gold) >= RIGHT
        scores = {"confidence": min(math.exp(logprobs[0]), 1.0), "right": float(right)}
        return self.record(subject, item, scores, item.body.question, answer)
