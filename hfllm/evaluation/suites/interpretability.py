"""Where a model keeps its answers, by methods first tested on the model, and the report of it.

Each method gives one figure per item and stands next to two controls: the same model with random weights, and edits
planted in known layers. A method without all plants found, or with a score on random weights of at least half of the
model's, is left out: its items state the reason, with its figures.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from hfllm.data.world.world import World
from hfllm.errors import InputError
from hfllm.evaluation.interpreting.hooks import Parts, evaluated, parts_of
from hfllm.evaluation.interpreting.material import (
    Material,
    Prompts,
    encode_material,
    file_material,
    names_of,
    world_material,
)
from hfllm.evaluation.interpreting.measures import causal_trace, subject_spread
from hfllm.evaluation.interpreting.methods import METHODS, Measured, shown_layers
from hfllm.evaluation.interpreting.planted import Verdict, plant_names, random_parts, tested_plants
from hfllm.evaluation.suites.base import TOO_LONG, Item, Record, Subject, Suite
from hfllm.models.loading.saved import max_length_of
from hfllm.outputs.report import Found, Heatmap, standard_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# ---- the suite ----


# Models of random weights; one where weights are many.
RANDOM_MODELS, MANY_WEIGHTS = 2, 20_000_000
NOT_TAKEN = "no edit of this layer changes the answer"


@dataclass(frozen=True)
class MethodItem:
    """A method's item.

    Args:
        method: one of `METHODS`, or `PLANTS`.
        number: of the item among the items of its kind.
    """

    method: str
    number: int


@dataclass
class _Findings:
    """The results of a method for a model and its controls."""

    measured: Measured | None = None
    controls: list[torch.Tensor] = field(default_factory=list)
    failed: str = ""

    @property
    def control(self) -> torch.Tensor:
        return torch.stack(self.controls).mean(0)


class Interpretability(Suite[MethodItem]):
    """Probes, logit lens, patching, attention and attribution, on the embedded world or on a user's facts.

    Args:
        path: rows of subject, question and answer, see `file_material`; the embedded world's facts without one.
        world_seed: of the embedded world.
    """

    name = "interpretability"

    def __init__(self, path: str | None = None, world_seed: int = 0):
        self.path, self.world_seed = path, world_seed
        self._material: Material | None = None

    @property
    def material(self) -> Material:
        """Test material of methods."""
        if self._material is None:
            self._material = file_material(self.path) if self.path else world_material(World(self.world_seed))
        return self._material

    def items(self) -> Sequence[Item[MethodItem]]:
        """Return an item for each figure of each method, and for each plant."""
        names = names_of(self.material)
        plants = [
            Item(f"{PLANTS}/{component} {depth}", f"{PLANTS}, {component}", MethodItem(PLANTS, number))
            for number, (component, depth) in enumerate(plant_names())
        ]
        return [
            *plants,
            *(
                Item(f"{method}/{name}", method, MethodItem(method, number))
                for method, each in METHODS.items()
                for number, name in enumerate(names[each.items])
            ),
        ]

    def judge(self, subject: Subject, items: Sequence[Item[MethodItem]]) -> Iterator[Record]:
        """Yield the records; plants and controls are asked whole, whichever items are left, as they decide over all.

        Raises:
            InputError: for a model without accessible parts, see `parts_of`.
        """
        parts = parts_of(subject.model)
        longest = max_length_of(parts.model.config)
        prompts = encode_material(subject.tokenizer, self.material, subject.uses_chat_template, longest, TOO_LONG)
        methods = {item.body.method for item in items}
        with evaluated(parts.model):
            tested = [each.hits for each in tested_plants(parts, prompts.facts)] if _has_others(prompts) else []
            yield from self._plant_records(subject, items, tested)
            findings = _measured(parts, prompts, [name for name in METHODS if name in methods], subject.batch_size)
            for method, each in findings.items():
                locator = METHODS[method].locator
                verdict = _verdict(each, locator, [hits[locator] for hits in tested if hits and locator])
                yield from self._records(subject, parts, prompts, items, method, each, verdict)

    def _plant_records(
        self, subject: Subject, items: Sequence[Item[MethodItem]], tested: Sequence[Mapping[str, bool]]
    ) -> Iterator[Record]:
        for item in items:
            if item.body.method == PLANTS:
                hits = tested[item.body.number] if tested else {}
                scores = {name.replace(" ", "_"): float(each) for name, each in hits.items()}
                yield self.record(subject, item, scores, skipped="" if hits else NOT_TAKEN)

    def _records(
        self,
        subject: Subject,
        parts: Parts,
        prompts: Prompts,
        items: Sequence[Item[MethodItem]],
        method: str,
        findings: _Findings,
        left_out: str,
    ) -> Iterator[Record]:
        unit = METHODS[method].items
        column = {number: at for at, number in enumerate(prompts.columns[unit])}
        for item in items:
            if item.body.method != method:
                continue
            number = item.body.number
            reason = left_out or prompts.skipped[unit].get(number, "")
            if reason:
                yield self.record(subject, item, skipped=reason)
                continue
            # The map of the fact with the largest loss by noise.
            is_first = method == TRACED and column[number] == int(findings.measured.score.argmax())
            trace = _trace(parts, prompts, column[number], subject.tokenizer) if is_first else ""
            yield self.record(subject, item, _scores(method, findings, column[number]), said=trace)

    def extra(self, records: Sequence[Record]) -> Found | None:
        """Return the table of methods with their controls, and heat maps of all models."""
        return methods_report(records, {name: method.score for name, method in METHODS.items()})


def _has_others(prompts: Prompts) -> bool:
    """Return whether a fact has another value to plant."""
    return bool(prompts.facts) and all(prompt.others for prompt in prompts.facts)


def _measured(parts: Parts, prompts: Prompts, methods: Sequence[str], batch_size: int) -> dict[str, _Findings]:
    """Return the results of methods for a model and random weights; for a failed method its reason."""
    findings = {name: _Findings() for name in methods}
    few = parts.model.num_parameters() < MANY_WEIGHTS
    for seed in range(-1, RANDOM_MODELS if few else 1):
        measured_parts = parts if seed < 0 else random_parts(parts, seed)
        for name, each in findings.items():
            if each.failed:
                continue
            if not prompts.columns[METHODS[name].items]:
                each.failed = "nothing is there to ask"
                continue
            try:
                measured = METHODS[name].measure(measured_parts, prompts, batch_size)
            except InputError as error:
                each.failed = str(error)
                continue
            if seed < 0:
                each.measured = measured
            else:
                each.controls.append(measured.score)
    return findings


def _verdict(findings: _Findings, locator: str, hits: Sequence[bool]) -> str:
    """Return why a method is left out; empty where it is shown.

    Args:
        locator: the name of the locator to find plants with; empty for none.
        hits: whether it has found them, one by one.
    """
    if findings.failed or findings.measured is None:
        return findings.failed
    measured = findings.measured
    chance = float(torch.as_tensor(measured.chance).double().mean())
    control = float(findings.control.mean())
    if measured.shuffled is not None:
        control = max(control, float(measured.shuffled.mean()))
    if locator and not hits:
        return "no edit could be planted to test it"
    score = float(measured.score.mean())
    error = standard_error(measured.score.tolist()) or 0.0
    return Verdict(score, control, chance, sum(hits), len(hits), error).left_out


def _scores(method: str, findings: _Findings, column: int) -> dict[str, float]:
    """Return the figures of an item: the method's, its controls', and its own by layer, counted from 1."""
    name, measured = METHODS[method].score, findings.measured
    scores = {name: measured.score[column], f"{name}_random_weights": findings.control[column]}
    if measured.shuffled is not None:
        scores[f"{name}_shuffled_labels"] = measured.shuffled[column]
    for part, figures in measured.layers.items():
        for layer in shown_layers(len(figures)):
            scores["_".join(filter(None, (part, "layer", str(layer + 1))))] = figures[layer, column]
    scores |= {key: figures[column] for key, figures in measured.more.items() if not figures[column].isnan()}
    return {key: float(value) for key, value in scores.items()}


def _trace(parts: Parts, prompts: Prompts, column: int, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the map of one fact as JSON: the effect of restored positions after the embeddings and after layers."""
    prompt = prompts.facts[prompts.some[column]]
    layers = shown_layers(len(parts.layers))
    sites = {"embeddings": parts.embeddings, **{f"layer {layer + 1}": parts.layers[layer] for layer in layers}}
    effects, _ = causal_trace(parts, prompt, sites, subject_spread(parts, prompts.facts))
    rows = {name: [round(each, 3) for each in row] for name, row in zip(sites, effects.tolist(), strict=True)}
    return json.dumps({"tokens": [tokenizer.decode([token]) for token in prompt.ids], **rows}, ensure_ascii=False)


# ---- report ----
#
# Additions of the interpretability suite to a report: the table of methods with their controls, and heat maps.


PLANTS, TRACED = "planted edits", "causal tracing"
RANDOM, SHUFFLED = "random_weights", "shuffled_labels"
_LAYER = re.compile(r"(?:(\w+)_)?layer_(\d+)$")


def methods_report(records: Sequence[Record], scores: Mapping[str, str]) -> Found | None:
    """Return the table and the heat maps of all models' records; `None` without records.

    Args:
        scores: the names of the methods' figures, in order.
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
        plots |= {f"{stem}_layers": _layers(model, groups), f"{stem}_trace": _trace_map(model, groups.get(TRACED, []))}
    heatmaps = {name: plot for name, plot in plots.items() if plot is not None}
    return Found({}, "", {"interpretability: methods and their controls": rows}, heatmaps)


def _row(model: str, method: str, records: Sequence[Record], score: str) -> dict[str, str]:
    scores = [record["scores"] for record in records if record["scores"]]
    reasons = [record["skipped"] for record in records if record["skipped"]]
    # Of items skipped one by one, most have scores; an excluded method has none.
    why = "" if scores else max(set(reasons), key=reasons.count)
    return {
        "model": model,
        "method": method,
        "figure": score,
        "value": _mean(scores, score),
        "random weights": _mean(scores, f"{score}_{RANDOM}"),
        "shuffled labels": _mean(scores, f"{score}_{SHUFFLED}"),
        "n": str(len(scores)),
        "left out because": why,
    }


def _mean(scores: Sequence[Mapping[str, float]], name: str) -> str:
    values = [each[name] for each in scores if name in each]
    return f"{sum(values) / len(values):.3f}" if values else ""


def _layers(model: str, groups: Mapping[str, Sequence[Record]]) -> Heatmap | None:
    """Return the figures of the methods by layer, as far as they have any."""
    rows: dict[str, dict[int, float]] = {}
    for method, records in groups.items():
        scores = [record["scores"] for record in records if record["scores"]]
        for name in scores[0] if scores else ():
            if matched := _LAYER.fullmatch(name):
                values = [each[name] for each in scores]
                label = f"{method}, {matched[1]}" if matched[1] else method
                rows.setdefault(label, {})[int(matched[2])] = sum(values) / len(values)
    if not rows:
        return None
    layers = sorted({layer for row in rows.values() for layer in row})
    values = [[row.get(layer, math.nan) for layer in layers] for row in rows.values()]
    return Heatmap(model, "layer", "", list(rows), [str(layer) for layer in layers], values, 0.0, 1.0)


def _trace_map(model: str, records: Sequence[Record]) -> Heatmap | None:
    """Return the causal trace of the first fact: how far its answer is restored, by token and layer."""
    trace = next((record["said"] for record in records if record["said"].startswith("{")), "")
    if not trace:
        return None
    rows = json.loads(trace)
    tokens = [token.strip() or repr(token) for token in rows.pop("tokens")]
    title = f"{model}: probability of the answer brought back"
    return Heatmap(title, "", "restored after", list(rows), tokens, list(rows.values()))
