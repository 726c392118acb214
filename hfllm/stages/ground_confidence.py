"""How sure the grounded model is of what it says without passages, and when it should rather say nothing."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from hfllm.data.world.rubric import REFUSAL_PHRASES, RIGHT, UNKNOWN_PHRASES, gold_score, words_of
from hfllm.data.world.world import Task, World
from hfllm.grounding.calibration import reliability_plot, risk_coverage_plot, uncertainty_metrics
from hfllm.grounding.conformal import control_risk, over_splits
from hfllm.grounding.samples import Answered, answer_with_samples
from hfllm.grounding.uncertainty import CONFIDENCE, uncertainties
from hfllm.outputs.figures import plus_minus
from hfllm.outputs.report import Plot
from hfllm.stages.course import Speaking

if TYPE_CHECKING:
    import numpy as np

# The longest answer in tokens; answers of a question that are sampled; risks that are asked for, and random halves.
RESPONSE_LENGTH, NUM_SAMPLES, ALPHAS, NUM_SPLITS = 40, 10, (0.02, 0.05, 0.1), 200
# By which measures abstention is shown, and which are drawn.
ABSTAINS_BY = ("sequence_probability", "semantic_entropy")


@dataclass(frozen=True)
class Confidence:
    """A part of the report.

    Args:
        tasks: what was asked.
        rows: the greedy answers, with others that were sampled.
        metrics, tables, plots: of the report.
    """

    tasks: list[Task]
    rows: list[Answered]
    metrics: dict[str, float]
    tables: Mapping[str, list[dict[str, str]]]
    plots: Mapping[str, Plot] = field(default_factory=dict)


def measure(world: World, speaking: Speaking, count: int, seed: int) -> Confidence:
    """Return how well a model's uncertainty tells which of its answers are wrong, and what abstaining by it keeps.

    Args:
        world: whose held-out questions of all families are asked.
        speaking: the model.
        count: questions.
        seed: of the samples.

    Returns:
        Metrics `MEASURE_auroc` (of being wrong) and the like, see `uncertainty_metrics`; `risk_ALPHA_MEASURE` (given and
        wrong) and `coverage_ALPHA_MEASURE` of conformal risk control over random halves, alpha in percent.
    """
    tasks = world.evaluation_tasks(count, seed=1)
    prompts = [task.prompt_row()["prompt"] for task in tasks]
    rows = answer_with_samples(speaking.model, speaking.tokenizer, prompts, NUM_SAMPLES, RESPONSE_LENGTH, seed)
    wrong = [gold_score(row.given.text, task.gold) < RIGHT for task, row in zip(tasks, rows, strict=True)]
    meanings = [
        [meaning_of(task, each.text) for each in (row.given, *row.samples)]
        for task, row in zip(tasks, rows, strict=True)
    ]
    found = uncertainties(rows, meanings)
    metrics = uncertainty_metrics(found, wrong)
    metrics |= _abstention(found, wrong)
    sure = {name: CONFIDENCE[name](numbers) for name, numbers in found.items() if name in CONFIDENCE}
    plots = {
        "risk_coverage": risk_coverage_plot(found, wrong, "Wrong answers among the surest"),
        "reliability": reliability_plot(sure, [not each for each in wrong], "Confidence and accuracy"),
    }
    return Confidence(tasks, rows, metrics, _tables(metrics, list(found)), plots)


def meaning_of(task: Task, response: str) -> Hashable:
    """Return what a response means by the rubric: what it states of that which is asked, or that it does not know."""
    words = words_of(response)
    plain = " ".join(words)
    counts = (*task.gold.needed, *task.gold.forbidden)
    stated = tuple(dict.fromkeys(word for word in words if word in counts))
    admits, refuses = (any(each in plain for each in said) for said in (UNKNOWN_PHRASES, REFUSAL_PHRASES))
    return stated, admits, refuses


def _abstention(found: "Mapping[str, np.ndarray]", wrong: list[bool]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name in ABSTAINS_BY:
        for alpha in ALPHAS:
            split = over_splits(found[name], wrong, partial(control_risk, alpha=alpha), NUM_SPLITS)
            for figure in ("risk", "coverage"):
                key = f"{figure}_{round(100 * alpha)}_{name}"
                metrics |= {key: split[figure], f"{key}_se": split[f"{figure}_se"], f"{key}_n": NUM_SPLITS}
    return metrics


def _tables(metrics: Mapping[str, float], measures: list[str]) -> dict[str, list[dict[str, str]]]:
    told = {name: plus_minus(value, metrics.get(f"{name}_se")) for name, value in metrics.items()}
    return {
        "Uncertainty and being wrong": [
            {
                "measure": name.replace("_", " "),
                "AUROC": told.get(f"{name}_auroc", "-"),
                "labels shuffled": told.get(f"{name}_auroc_shuffled", "-"),
                "AURC": told[f"{name}_aurc"],
            }
            for name in measures
        ],
        f"Conformal risk control over {NUM_SPLITS} random halves": [
            {
                "measure": name.replace("_", " "),
                "alpha": f"{alpha:g}",
                "given and wrong": told[f"risk_{round(100 * alpha)}_{name}"],
                "answered": told[f"coverage_{round(100 * alpha)}_{name}"],
            }
            for name in ABSTAINS_BY
            for alpha in ALPHAS
        ],
    }
