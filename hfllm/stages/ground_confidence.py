"""How sure the grounded model is of what it says without passages, and when it should rather say nothing."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from hfllm.data.world.vocabulary import RIGHT, gold_meaning, gold_score
from hfllm.data.world.world import World
from hfllm.evaluation.grounding import RESPONSE_LENGTH
from hfllm.grounding.abstention import control_risk, over_splits
from hfllm.grounding.uncertainty import CONFIDENCE, answer_with_samples, uncertainties
from hfllm.outputs.report import Found, plus_minus
from hfllm.outputs.statistics import reliability_plot, risk_coverage_plot, uncertainty_metrics
from hfllm.stages.course import Speaking

if TYPE_CHECKING:
    import numpy as np

# Questions, of all families; risks that are asked for, and random halves.
NUM_TASKS, ALPHAS, NUM_SPLITS = 360, (0.02, 0.05, 0.1), 200
# By which measures abstention is shown, and which are drawn.
ABSTAINS_BY = ("sequence_probability", "semantic_entropy")


def measure(world: World, speaking: Speaking, num_samples: int, seed: int) -> Found:
    """Return how well a model's uncertainty tells which of its answers are wrong, and what abstaining by it keeps.

    Args:
        world: whose held-out questions of all families are asked.
        speaking: the model.
        num_samples: answers of a question that are sampled.
        seed: of the samples.

    Returns:
        Metrics `MEASURE_auroc` (of being wrong) and the like, see `uncertainty_metrics`; `risk_ALPHA_MEASURE` (given,
        wrong) and `coverage_ALPHA_MEASURE` of conformal risk control over random halves, alpha in percent.
    """
    tasks = world.evaluation_tasks(NUM_TASKS, seed=1)
    prompts = [task.prompt_row()["prompt"] for task in tasks]
    rows = answer_with_samples(speaking.model, speaking.tokenizer, prompts, num_samples, RESPONSE_LENGTH, seed)
    wrong = [gold_score(row.given.text, task.gold) < RIGHT for task, row in zip(tasks, rows, strict=True)]
    meanings = [
        [gold_meaning(each.text, task.gold) for each in (row.given, *row.samples)]
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
    best = max(ABSTAINS_BY, key=lambda name: metrics.get(f"{name}_auroc", 0.0))
    kept = ", ".join(f"{metrics[f'coverage_{percent(alpha)}_{best}']:.3f} at {alpha:g}" for alpha in ALPHAS)
    auroc = metrics.get(f"{best}_auroc", 0.5)
    summary = f"wrong answers are told by {best.replace('_', ' ')} with an AUROC of {auroc:.3f}, which keeps {kept}"
    return Found(metrics, summary, _tables(metrics, list(found)), plots)


def percent(alpha: float) -> int:
    """Return a risk as it stands in names of metrics."""
    return round(100 * alpha)


def _abstention(found: "Mapping[str, np.ndarray]", wrong: list[bool]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name in ABSTAINS_BY:
        for alpha in ALPHAS:
            split = over_splits(found[name], wrong, partial(control_risk, alpha=alpha), NUM_SPLITS)
            for figure in ("risk", "coverage"):
                key = f"{figure}_{percent(alpha)}_{name}"
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
                "given and wrong": told[f"risk_{percent(alpha)}_{name}"],
                "answered": told[f"coverage_{percent(alpha)}_{name}"],
            }
            for name in ABSTAINS_BY
            for alpha in ALPHAS
        ],
    }
