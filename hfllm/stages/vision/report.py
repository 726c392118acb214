"""A vision-language model's answers by family, with images of other rows as control, and the best guess without any.

A faultless answer about another row's image is right now and then, too: if two images show the same number of
things, or neither has the requested thing. `other_truth` is this frequency; a model must not exceed it.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hfllm.data.images.files import read_image
from hfllm.data.world.pictures import ABSENT, NOT_THERE, answer_about
from hfllm.evaluation.pictures import Asked, answer_pictures, best_guesses, is_right
from hfllm.outputs.figures import Promise, mean_of, plus_minus
from hfllm.outputs.pictures import PictureGrid
from hfllm.outputs.report import Bars, Found
from hfllm.stages.vision.build import HELD_OUT, SEEN, SHUFFLED

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

CHANCE, OTHER_TRUTH = "chance", "other_truth"
LABELS = {
    SEEN: "seen",
    HELD_OUT: "held out",
    SHUFFLED: "other pictures",
    OTHER_TRUTH: "truth about these",
    CHANCE: "best guess without",
}
# Images of the plot, and rows of the table of samples.
SHOWN = 24


def judge_answers(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    parts: Mapping[str, Sequence[Asked]],
    prior: Sequence[Asked] = (),
    max_new_tokens: int = 16,
) -> Found:
    """Judge a model on all parts, and by family.

    Args:
        model: the model.
        processor: its processor.
        parts: questions by the name of the part; the questions of `shuffled` have other images.
        prior: more questions of the kinds of the first part, for finding the best guess.
        max_new_tokens: of an answer at most.
    """
    responses = {
        name: answer_pictures(
            model, processor, [q.prompt for q in questions], [q.images for q in questions], max_new_tokens
        )
        for name, questions in parts.items()
    }
    first = next(iter(parts))
    responses |= {OTHER_TRUTH: truth} if (truth := _truth_about_others(parts.get(SHUFFLED, ()))) else {}
    responses[CHANCE] = best_guesses(parts[first], prior)
    everything = {**parts, OTHER_TRUTH: parts.get(SHUFFLED, ()), CHANCE: parts[first]}
    right = {
        name: [float(is_right(*pair)) for pair in zip(answers, (q.answer for q in everything[name]), strict=True)]
        for name, answers in responses.items()
    }
    metrics: dict[str, float] = {}
    for name, values in right.items():
        metrics |= mean_of(f"{name}_right", values)
        for family, result in by_family(everything[name], values).items():
            metrics |= mean_of(f"{name}_{family}_right", result)
    metrics |= _false_alarms(parts[first], responses[first])
    summary = ", ".join(f"{LABELS[name]} {_figure(metrics, name)}" for name in right)
    tables = {
        "Right answers": _table(everything, right),
        "Samples": _samples(parts[first], responses[first], right[first]),
    }
    bars = Bars(
        f"Right answers of {len(parts[first]):,} questions",
        "share that is right",
        {LABELS[name]: metrics[f"{name}_right"] for name in right},
        {LABELS[name]: _figure(metrics, name) for name in right},
    )
    plots = {"right": bars, "pictures": _grid(parts[first], responses[first], right[first])}
    promises = [
        Promise(f"questions about images ({LABELS[first]}) answered right", f"{first}_right", f"{name}_right", beside)
        for name, beside in ((CHANCE, "the best guess without any"), (SHUFFLED, "the same with other images"))
    ]
    return Found(metrics, f"right answers: {summary}", tables, plots, promises)


def _truth_about_others(shuffled: Sequence[Asked]) -> list[str]:
    """Return the right answers about the images of other rows: the answers of a perfect reader of these images."""
    return [answer_about(each.scene, each.question) for each in shuffled if each.scene is not None]


def by_family(questions: Sequence[Asked], values: Sequence[float]) -> dict[str, list[float]]:
    """Return values of questions, one per question, by family."""
    result: dict[str, list[float]] = {}
    for question, value in zip(questions, values, strict=True):
        if question.family:
            result.setdefault(question.family, []).append(value)
    return dict(sorted(result.items()))


def _false_alarms(questions: Sequence[Asked], responses: Sequence[str]) -> dict[str, float]:
    """Return the share of questions about present things with an answer for absent ones."""
    values = [
        float(is_right(each, NOT_THERE)) for each, q in zip(responses, questions, strict=True) if q.family != ABSENT
    ]
    has_absent = any(question.family == ABSENT for question in questions)
    return mean_of("called_absent", values) if has_absent and values else {}


def _figure(metrics: Mapping[str, float], name: str) -> str:
    return plus_minus(metrics[f"{name}_right"], metrics.get(f"{name}_right_se"))


def _table(parts: Mapping[str, Sequence[Asked]], right: Mapping[str, Sequence[float]]) -> list[dict[str, str]]:
    families = {name: {**by_family(parts[name], right[name]), "all": list(right[name])} for name in right}
    table = []
    for family in dict.fromkeys(family for each in families.values() for family in each):
        row = {"family": family}
        for name, result in families.items():
            figures = mean_of("x", result.get(family, []))
            row[LABELS[name]] = plus_minus(figures["x"], figures.get("x_se")) if result.get(family) else ""
        table.append({**row, "questions": str(len(families[next(iter(families))].get(family, [])))})
    return table


def _samples(questions: Sequence[Asked], responses: Sequence[str], right: Sequence[float]) -> list[dict[str, str]]:
    """Return some questions with answers: wrong ones first, as the most informative."""
    rows = [
        {"prompt": question.question, "said": answer, "gold": question.answer, "right": "yes" if is_good else "no"}
        for question, answer, is_good in zip(questions, responses, right, strict=True)
    ]
    rows.sort(key=lambda row: row["right"])
    return rows[: SHOWN // 2] if len(rows) <= SHOWN // 2 else rows[: SHOWN // 4] + rows[-(SHOWN // 4) :]


def _grid(questions: Sequence[Asked], responses: Sequence[str], right: Sequence[float]) -> PictureGrid:
    indices = [index for index, question in enumerate(questions) if len(question.images) == 1][:SHOWN]
    return PictureGrid(
        "Questions, and what the model says",
        [read_image(questions[index].images[0], "a sample", max_pixels=sys.maxsize, min_side=1) for index in indices],
        [f"{_printed(questions[index].question)}\n{_printed(responses[index])}" for index in indices],
        [bool(right[index]) for index in indices],
    )


def _printed(text: str) -> str:
    """Return the beginning of a text in a form for plots."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:40]).replace("$", "\\$")
