"""Test whether an ability appears suddenly or only seems to: probes of many runs, by two metrics side by side.

Wei et al. 2022, arXiv:2206.07682, call an ability emergent that smaller models lack; Schaeffer et al. 2023,
arXiv:2304.15004, show that most such leaps come from the metric, which counts an answer only if every token is right.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hfllm.evaluation.few_shot import KINDS, METRICS, NEVER_TOLD, ZERO_SHOT, mean_scores
from hfllm.outputs.report import Plot

NAMES = {
    "exact_match": "exact match",
    "token_match": "token match",
    "log_likelihood": "log-likelihood, nats per token",
}


@dataclass(frozen=True)
class ProbedRun:
    """A run and its probe results.

    Args:
        name: name of the run.
        parameters, compute, loss: its size, its training FLOPs, and its held-out loss.
        rows: results of `run_probes`.
    """

    name: str
    parameters: float
    compute: float
    loss: float
    rows: Sequence[Mapping[str, Any]]


class Emergence:
    """Probed runs, ordered by compute.

    Args:
        runs: at least one.
    """

    def __init__(self, runs: Sequence[ProbedRun]):
        self.runs = sorted(runs, key=lambda run: run.compute)
        # Answers in no document are left out of the means: the more a model has read, the less likely they become.
        told = [[row for row in run.rows if row["family"] not in NEVER_TOLD] for run in self.runs]
        self.by_kind = [mean_scores(rows) for rows in told]
        self.by_family = [
            mean_scores([row for row in run.rows if row["kind"] == ZERO_SHOT], by="family") for run in self.runs
        ]

    def metrics(self) -> dict[str, float]:
        """Return the last run's scores, and the share of each metric's total rise in its largest step."""
        found = {}
        for kind in KINDS:
            name = kind.replace("-", "_")
            for metric in METRICS:
                values = [means[kind][metric] for means in self.by_kind]
                found[f"{name}_{metric}"] = values[-1]
                found[f"{name}_{metric}_sharpest_step"] = sharpest_step(values)
        return found

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """Return tables of each metric's sharpest step, and of scores by run, by prompt and (zero-shot) by family."""
        return {
            "Share of a metric's rise in its sharpest step": self._steps(),
            "Probes by prompt": self._rows(self.by_kind, "prompt"),
            "Zero-shot probes by family": self._rows(self.by_family, "family"),
        }

    def plots(self) -> dict[str, Plot]:
        """Return plots of each metric over compute, by prompt and by family: the best run so far, and all runs."""
        compute, drawn = [run.compute for run in self.runs], {}
        for title, means, stem in (
            ("mean of the families that documents tell of", self.by_kind, "prompt"),
            ("zero-shot", self.by_family, "family"),
        ):
            for metric in METRICS:
                labels = [label for label in means[0] if label not in NEVER_TOLD]
                values = {label: [each[label][metric] for each in means] for label in labels}
                drawn[f"probe_{metric}_by_{stem}"] = Plot(
                    f"{NAMES[metric]} ({title})",
                    "training FLOPs",
                    NAMES[metric],
                    {label: (compute, best_so_far(series)) for label, series in values.items()},
                    points={f"_{label}": (compute, series) for label, series in values.items()},
                    xscale="log",
                )
        return drawn

    def _steps(self) -> list[dict[str, Any]]:
        rows = []
        for title, means in (("", self.by_kind), (f"{ZERO_SHOT}, ", self.by_family)):
            for label in means[0]:
                series = {name: [each[label][name] for each in means] for name in METRICS}
                shares = {name.replace("_", " "): f"{sharpest_step(series[name]):.2f}" for name in METRICS}
                best = f"{max(series['exact_match']):.2f}"
                rows.append({"questions": title + label, "best exact match": best, **shares})
        return rows

    def _rows(self, means: Sequence[Mapping[str, Mapping[str, float]]], column: str) -> list[dict[str, Any]]:
        return [
            {
                "run": run.name,
                "N": f"{run.parameters:,.0f}",
                "FLOPs": f"{run.compute:.3g}",
                "loss": f"{run.loss:.4f}",
                column: label,
                **{name.replace("_", " "): f"{scores[name]:.3f}" for name in METRICS},
            }
            for run, each in zip(self.runs, means, strict=True)
            for label, scores in each.items()
        ]


def best_so_far(values: Sequence[float]) -> list[float]:
    """Return the running maximum."""
    best = []
    for value in values:
        best.append(max(value, best[-1]) if best else value)
    return best


def sharpest_step(values: Sequence[float]) -> float:
    """Return the largest step of the running maximum as a share of its total rise; 0 if there is no rise.

    1 is a single leap, 1 / (runs - 1) a straight line.
    """
    best = best_so_far(values)
    rise = best[-1] - best[0]
    steps = [after - before for before, after in pairwise(best)]
    return max(steps) / rise if values[-1] > values[0] else 0.0
