"""What the suite of interpretability adds to a report: the table of methods with their controls, and heat maps."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hfllm.outputs.report import Found, Heatmap

if TYPE_CHECKING:
    from hfllm.evaluation.suites.base import Record

PLANTS, TRACED = "planted edits", "causal tracing"
RANDOM, SHUFFLED = "random_weights", "shuffled_labels"
_LAYER = re.compile(r"(?:(\w+)_)?layer_(\d+)$")


def found(records: Sequence["Record"], scores: Mapping[str, str]) -> Found | None:
    """Return the table and the heat maps of all models' records; `None` without records.

    Args:
        scores: of each method, in order, the name of its figure.
    """
    if not records:
        return None
    models = list(dict.fromkeys(record["model"] for record in records))
    rows, plots = [], {}
    for number, model in enumerate(models):
        own = [record for record in records if record["model"] == model]
        groups = {name: [each for each in own if each["group"] == name] for name in scores}
        rows += [_row(model, name, groups[name], scores[name]) for name in scores if groups[name]]
        stem = f"interpretability_{number + 1}" if len(models) > 1 else "interpretability"
        plots |= {f"{stem}_layers": _layers(model, groups), f"{stem}_trace": _trace(model, groups.get(TRACED, []))}
    kept = {name: plot for name, plot in plots.items() if plot is not None}
    return Found({}, "", {"interpretability: methods and their controls": rows}, kept)


def _row(model: str, method: str, records: Sequence["Record"], score: str) -> dict[str, str]:
    kept = [record["scores"] for record in records if record["scores"]]
    reasons = [record["skipped"] for record in records if record["skipped"]]
    # Of items that are skipped one by one, most have scores; a method that is left out has none.
    why = "" if kept else max(set(reasons), key=reasons.count)
    return {
        "model": model,
        "method": method,
        "figure": score,
        "value": _mean(kept, score),
        "random weights": _mean(kept, f"{score}_{RANDOM}"),
        "shuffled labels": _mean(kept, f"{score}_{SHUFFLED}"),
        "n": str(len(kept)),
        "left out because": why,
    }


def _mean(scores: Sequence[Mapping[str, float]], name: str) -> str:
    values = [each[name] for each in scores if name in each]
    return f"{sum(values) / len(values):.3f}" if values else ""


def _layers(model: str, groups: Mapping[str, Sequence["Record"]]) -> Heatmap | None:
    """Return the figures of each method by layer, as far as it has any."""
    rows: dict[str, dict[int, float]] = {}
    for method, records in groups.items():
        kept = [record["scores"] for record in records if record["scores"]]
        for name in kept[0] if kept else ():
            if matched := _LAYER.fullmatch(name):
                values = [each[name] for each in kept]
                label = f"{method}, {matched[1]}" if matched[1] else method
                rows.setdefault(label, {})[int(matched[2])] = sum(values) / len(values)
    if not rows:
        return None
    layers = sorted({layer for row in rows.values() for layer in row})
    values = [[row.get(layer, math.nan) for layer in layers] for row in rows.values()]
    return Heatmap(model, "layer", "", list(rows), [str(layer) for layer in layers], values, 0.0, 1.0)


def _trace(model: str, records: Sequence["Record"]) -> Heatmap | None:
    """Return the causal trace of the first fact: what brings its answer back, by token and layer."""
    said = next((record["said"] for record in records if record["said"].startswith("{")), "")
    if not said:
        return None
    rows = json.loads(said)
    tokens = [token.strip() or repr(token) for token in rows.pop("tokens")]
    title = f"{model}: probability of the answer brought back"
    return Heatmap(title, "", "restored after", list(rows), tokens, list(rows.values()))
