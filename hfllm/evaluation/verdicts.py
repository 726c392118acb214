"""Whether one model is better than another: one corrected verdict over the primary figures, and where they differ.

Primary figures are declared by a suite before anything is measured; controls and descriptive figures are not
among them. All are tested together, paired by item, and adjusted by Holm's method: see `hfllm.outputs.statistics`.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from hfllm.data.formats import counted
from hfllm.errors import InputError
from hfllm.outputs.intervals import Interval, holm
from hfllm.outputs.statistics import clustered_interval, difference_interval, paired_p_value
from hfllm.outputs.verdict import IS_BETTER, IS_EQUAL, IS_TOO_FEW, IS_WORSE
from hfllm.outputs.verdict import Verdict as RunVerdict
from hfllm.runs.command_line import main_process

ALPHA = 0.05
BETTER, WORSE, EQUAL = "better", "worse", "no different"
# Number of figures named in a sentence, and of items per kind in a table.
MOST_NAMED, MOST_SHOWN = 4, 3


@dataclass(frozen=True)
class Compared:
    """A primary figure of two models on the same items.

    Args:
        name: of the figure in tables, such as `few_shot, sums: acc`.
        key: in report.json, such as `few_shot/sums/acc`.
        model: the second model, compared with the first.
        better: whether more is better (1) or less (-1).
        items: keys of the common items of both.
        first, second: scores of both models, an item each.
        clusters: the items' clusters, where there are any.
    """

    name: str
    key: str
    model: str
    better: int
    items: Sequence[str]
    first: Sequence[float]
    second: Sequence[float]
    clusters: Sequence[object] | None = None

    @property
    def means(self) -> tuple[float, float]:
        """The means of both models."""
        return sum(self.first) / len(self.first), sum(self.second) / len(self.second)

    @property
    def units(self) -> int:
        """How many independent differences there are."""
        return len(self.items) if self.clusters is None else len({*self.clusters})


@dataclass(frozen=True)
class Verdict:
    """The test result of a figure.

    Args:
        compared: the figure.
        difference: of the means, with its unadjusted 95% interval.
        p_value: of the paired test.
        adjusted: by Holm's method.
        word: `better`, `worse` or `no different`.
    """

    compared: Compared
    difference: Interval
    p_value: float
    adjusted: float
    word: str

    def __str__(self) -> str:
        first, second = self.compared.means
        return f"{self.compared.name} {first:.3f} to {second:.3f} (adjusted p {_shown_p(self.adjusted)})"


def can_differ(compared: Compared, alpha: float = ALPHA) -> bool:
    """Return whether so few items could show a difference: for 5 items all worse, p is .06."""
    return compared.units >= fewest(alpha)


def fewest(alpha: float = ALPHA) -> int:
    """Return how many items a figure needs to reach alpha."""
    return next(units for units in count(1) if 2.0 ** (1 - units) <= alpha)


def judged(family: Sequence[Compared], alpha: float = ALPHA) -> list[Verdict]:
    """Return the verdicts of the figures, adjusted for all of them together.

    Args:
        family: figures for which `can_differ` holds.
        alpha: chance of finding a difference between equal models in any of them.
    """
    p_values = [paired_p_value(each.first, each.second, each.clusters) for each in family]
    result = []
    for each, p_value, adjusted in zip(family, p_values, holm(p_values), strict=True):
        if each.clusters is None:
            difference = difference_interval(each.first, each.second)
        else:
            difference = clustered_interval(each.first, each.second, each.clusters)
        word = EQUAL
        if adjusted <= alpha:
            word = BETTER if difference.value * each.better > 0 else WORSE
        result.append(Verdict(each, difference, p_value, adjusted, word))
    return result


def verdicts_of(
    family: Sequence[Compared], models: Sequence[str], alpha: float = ALPHA
) -> tuple[list[Verdict], dict[str, float], list[str]]:
    """Return the verdicts of figures with enough items, the metrics of all, and their sentences.

    Args:
        models: names of the first model and of those compared with it.
        alpha: see `judged`.
    """
    verdicts = judged([each for each in family if can_differ(each, alpha)], alpha)
    left_out = [each for each in family if not can_differ(each, alpha)]
    sentences = [sentence(models[0], model, verdicts, alpha) for model in models[1:]]
    sentences += [left_out_sentence(left_out)] if left_out else []
    return verdicts, verdict_metrics(verdicts, left_out, models[1:], alpha), sentences


def sentence(first: str, second: str, verdicts: Sequence[Verdict], alpha: float = ALPHA) -> str:
    """Return the verdict in one sentence.

    Args:
        first, second: names of the models.
        verdicts: of all figures of all models; the second model's are told.
        alpha: the level of their tests.
    """
    own = [each for each in verdicts if each.compared.model == second]
    if not own:
        return f"no verdict on {second}: no primary figure has enough items"
    of_all = f"at alpha {_shown(alpha)} (Holm over {counted(len(verdicts), 'primary figure')}, paired by item)"
    named = {word: [each for each in own if each.word == word] for word in (WORSE, BETTER)}
    if not any(named.values()):
        least = min(own, key=lambda each: each.adjusted)
        return f"{second} is no different from {first} {of_all}; least p: {least}"
    if all(named.values()):
        clauses = "; ".join(f"{word} in {len(each)}: {_listed(each)}" for word, each in named.items())
        return f"{second} is both worse and better than {first} {of_all}: {clauses}"
    word = next(word for word, each in named.items() if each)
    return f"{second} is {word} than {first} {of_all}: {_listed(named[word])}"


def left_out_sentence(left_out: Sequence[Compared]) -> str:
    """Return the figures with too few items, with the number of common items of both models; empty for none."""
    if not left_out:
        return ""
    named = [f"{each.name} ({each.model}, {each.units})" for each in left_out[:MOST_NAMED]]
    more = f"; and {len(left_out) - MOST_NAMED} more" if len(left_out) > MOST_NAMED else ""
    summary = f"{counted(len(left_out), 'figure')} of too few items left out"
    return f"{summary}: {'; '.join(named)}{more}"


def verdict_metrics(
    verdicts: Sequence[Verdict], left_out: Sequence[Compared], models: Sequence[str], alpha: float = ALPHA
) -> dict[str, float]:
    """Return the verdict as metrics.

    Args:
        verdicts: of all figures of all models.
        left_out: figures with too few items.
        models: names of the later ones.
        alpha: the level of the figures' tests.

    Returns:
        `verdict/alpha`, `verdict/family` (tested figures), for each model `verdict/tested/MODEL`,
        `verdict/too_few/MODEL`, `verdict/better/MODEL` and `verdict/worse/MODEL` (figures), and for each figure
        `KEY/MODEL_difference_p` and `..._p_adjusted`.
    """
    result: dict[str, float] = {"verdict/alpha": alpha, "verdict/family": len(verdicts)}
    for model in models:
        own = [each.word for each in verdicts if each.compared.model == model]
        result |= {f"verdict/{word}/{model}": own.count(word) for word in (BETTER, WORSE)}
        result[f"verdict/tested/{model}"] = len(own)
        result[f"verdict/too_few/{model}"] = sum(each.model == model for each in left_out)
    for each in verdicts:
        key = f"{each.compared.key}/{each.compared.model}_difference"
        result |= {f"{key}_p": each.p_value, f"{key}_p_adjusted": each.adjusted}
    return result


def verdict_of(verdicts: Sequence[Verdict], sentences: Sequence[str], alpha: float = ALPHA) -> RunVerdict:
    """Return the verdict of a run that compares models with the first: one on all of them.

    Args:
        verdicts: of all figures of all models.
        sentences: on each of the others.
        alpha: the level of the figures' tests.
    """
    worse = [f"{each.compared.key}/{each.compared.model}" for each in verdicts if each.word == WORSE]
    is_better = any(each.word == BETTER for each in verdicts)
    decision = (IS_WORSE if worse else IS_BETTER if is_better else IS_EQUAL) if verdicts else IS_TOO_FEW
    return RunVerdict(decision, f"{decision}: {'; '.join(sentences)}", worse, len(verdicts), alpha=alpha)


def verdict_table(first: str, verdicts: Sequence[Verdict], many: bool = False) -> list[dict[str, str]]:
    """Return a row per figure: means, difference, p-values, and the numbers of better and worse items.

    Args:
        first: name of the first model.
        many: whether several models are compared with it, so that rows name their models.
    """
    rows = []
    for each in verdicts:
        compared, result = each.compared, each.difference
        worse, better = (len(_changed(compared, sign)) for sign in (-1, 1))
        before, after = compared.means
        rows.append(
            {
                "figure": compared.name,
                **({"model": compared.model} if many else {}),
                first: f"{before:.3f}",
                "then" if many else compared.model: f"{after:.3f}",
                "difference": f"{result.value:+.3f} [{result.low:+.3f}, {result.high:+.3f}]",
                "worse, better, n": f"{worse}, {better}, {len(compared.items)}",
                "p": _shown_p(each.p_value),
                "adjusted": _shown_p(each.adjusted),
                "": each.word,
            }
        )
    return rows


def _changed(compared: Compared, sign: int) -> list[int]:
    """Return where the second model is better (1) or worse (-1), by how much, the most first."""
    gains = [(second - first) * compared.better for first, second in zip(compared.first, compared.second, strict=True)]
    indices = [index for index, gain in enumerate(gains) if gain * sign > 0]
    return sorted(indices, key=lambda index: -abs(gains[index]))


Texts = Mapping[tuple[str, str], tuple[str, str]]


def changed_items(first: str, family: Sequence[Compared], texts: Texts) -> list[dict[str, Any]]:
    """Return every item with a difference between two models, figure by figure, the worse ones first.

    Args:
        first: name of the first model.
        family: the figures.
        texts: questions, and a model's answers, by figure's key without the metric and item, then `/` and model.
    """
    rows = []
    for each in family:
        part = each.key.rpartition("/")[0]
        for sign, word in ((-1, WORSE), (1, BETTER)):
            for index in _changed(each, sign):
                item = each.items[index]
                exchanges = [texts.get((f"{part}/{model}", item), ("", "")) for model in (first, each.model)]
                rows.append(
                    {
                        "figure": each.name,
                        "item": item,
                        "change": word,
                        "models": [first, each.model],
                        "scores": [each.first[index], each.second[index]],
                        "asked": exchanges[0][0] or exchanges[1][0],
                        "said": [exchanges[0][1], exchanges[1][1]],
                    }
                )
    return rows


def shown_changes(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """Return some of these items for the report, for each figure and model the first worse and better ones."""
    tables: dict[str, list[dict[str, str]]] = {}
    counts: dict[tuple[str, ...], int] = {}
    for row in rows:
        first, second = row["models"]
        kind = (row["figure"], second, row["change"])
        counts[kind] = counts.get(kind, 0) + 1
        if counts[kind] > MOST_SHOWN:
            continue
        change = f"{row['scores'][0]:g} to {row['scores'][1]:g}, {row['change']}"
        line = {"prompt": row["asked"] or row["item"], first: row["said"][0], second: row["said"][1], "change": change}
        tables.setdefault(f"{row['figure']}: where {second} differs from {first}", []).append(line)
    return tables


def fail_if_worse(metrics: Mapping[str, float], first: str, models: Sequence[str]) -> None:
    """End the process with exit code 1, and a line with the reason, if a model is worse than the first.

    Args:
        metrics: of a report, see `verdict_metrics`.
        first: name of the first model.
        models: names of the others.

    Raises:
        InputError: for a report without a verdict, or naming the model without any testable figure.
        SystemExit: with code 1.
    """
    names = [f"verdict/{WORSE}/{model}" for model in models]
    tested = [f"verdict/tested/{model}" for model in models]
    if any(name not in metrics for name in (*names, *tested)):
        raise InputError("--fail_on_regression: the report there has no verdict: remove the folder to make it again")
    alpha = metrics.get("verdict/alpha", ALPHA)
    worse = [(model, int(metrics[name])) for model, name in zip(models, names, strict=True) if metrics[name]]
    if worse:
        regressions = ", ".join(f"{model} in {counted(count, 'primary figure')}" for model, count in worse)
        if main_process():
            print(
                f"regression: worse than {first} at alpha {_shown(alpha)}: {regressions}", file=sys.stderr, flush=True
            )
        raise SystemExit(1)
    for model, name in zip(models, tested, strict=True):
        if not metrics[name]:
            too_few = int(metrics.get(f"verdict/too_few/{model}", 0))
            figures = "primary figures have" if too_few > 1 else "primary figure has"
            why = f"its {too_few} {figures} fewer than {fewest(alpha)} items that both have"
            raise InputError(
                f"--fail_on_regression: nothing of {model} could be tested against {first}: "
                f"{why if too_few else 'no primary figure was measured'}"
            )


def _listed(verdicts: Sequence[Verdict]) -> str:
    """Return the surest figures of a kind."""
    surest = sorted(verdicts, key=lambda each: each.adjusted)
    more = f"; and {len(surest) - MOST_NAMED} more" if len(surest) > MOST_NAMED else ""
    return "; ".join(map(str, surest[:MOST_NAMED])) + more


def _shown(alpha: float) -> str:
    return f"{alpha:g}".removeprefix("0")


def _shown_p(p_value: float) -> str:
    return "below .0001" if p_value < 0.0001 else f"{p_value:.4f}".removeprefix("0")
