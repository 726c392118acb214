"""Where a model keeps its answers, by methods first tested on the model, and the report of it.

Each method gives one figure per item and stands next to two controls: the same model with random weights, and edits
planted in known layers. A method without all plants found, or with a score on random weights of at least half of the
model's, is left out: its items state the reason, with its figures.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from hfllm.data.world.world import World
from hfllm.errors import InputError
from hfllm.evaluation.interpreting.hooks import (
    ATTENTION,
    MLP,
    FactPrompt,
    Parts,
    batch_of,
    evaluated,
    mask_of,
    parts_of,
)
from hfllm.evaluation.interpreting.material import (
    FACTS,
    PAIR_UNITS,
    SOME_UNITS,
    SUBJECTS,
    TOLD,
    Material,
    Prompts,
    encode_material,
    file_material,
    names_of,
    world_material,
)
from hfllm.evaluation.interpreting.measures import (
    GRADIENT_X_INPUT,
    INTEGRATED_GRADIENTS,
    attention_weights,
    attribute,
    causal_trace,
    decided_at,
    interchange,
    last_logits_of,
    last_states,
    looked_at,
    probe,
    strongest,
    subject_spread,
    value_ranks,
)
from hfllm.evaluation.interpreting.planted import Verdict, plant_names, random_parts, tested_plants
from hfllm.evaluation.suites.base import TOO_LONG, Item, Record, Subject, Suite
from hfllm.models.loading.saved import max_length_of
from hfllm.outputs.intervals import standard_error
from hfllm.outputs.report import Found, Heatmap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# ---- the methods: one figure per item, for a model and its controls alike ----
#
# `METHODS` lists them by the names of a report's rows. A method returns a `Measured`: a score per item, and figures by
# layer where it has them. `hfllm.evaluation.interpreting.planted` defines the controls for its mean.

# Draws of the noise of causal tracing.
SAMPLES = 4
# Layers with a column, evenly spaced.
MOST_LAYERS = 8


@dataclass(frozen=True)
class Measured:
    """The result of a method.

    Args:
        score: (items,), its one figure.
        layers: by inspected part, figures (layers, items); a slow method has only the layers of `shown_layers`.
        chance: (items,), the score of a method without information.
        shuffled: (items,), its score with random labels; `None` for a method without labels.
        more: other figures (items,) by name, not a number for an item without.
    """

    score: torch.Tensor
    layers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    chance: torch.Tensor | float = 0.0
    shuffled: torch.Tensor | None = None
    more: Mapping[str, torch.Tensor] = field(default_factory=dict)


def by_lens(parts: Parts, prompts: Prompts, batch_size: int) -> Measured:
    """Is the right value first after every layer? The score is the last layer's."""
    right = (value_ranks(parts, prompts.facts, batch_size) == 0).double()
    chance = torch.tensor([1 / (1 + len(prompt.others)) for prompt in prompts.facts])
    decided = [decided_at(column) or torch.nan for column in right.bool().T.tolist()]
    return Measured(right[-1], {"": right}, chance, more={"decided_after_layer": torch.tensor(decided)})


def by_probe(parts: Parts, prompts: Prompts, batch_size: int) -> Measured:
    """Does a straight line tell known subjects from others? The score is the layer's in the middle, chosen beforehand.

    An item is a subject: the mean over its questions.
    """
    states = last_states(parts, prompts.subjects, batch_size)
    entities = [prompt.fact.subject for prompt in prompts.subjects]
    probed = probe(states, entities, prompts.labels, prompts.splits)
    index = {entity: number for number, entity in enumerate(dict.fromkeys(entities))}
    rows = torch.tensor([index[entity] for entity in entities])

    def by_entity(figures: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros(len(figures), len(index), dtype=torch.double).index_add_(1, rows, figures)
        return sums / rows.bincount()

    right, shuffled, middle = by_entity(probed.right), by_entity(probed.shuffled), len(parts.layers) // 2
    return Measured(right[middle], {"": right}, 0.5, shuffled[middle])


def by_causal_trace(parts: Parts, prompts: Prompts, batch_size: int) -> Measured:
    """How much of the right answer's probability does noise on the subject remove, and which part restores it?"""
    spread, total_effects, back = subject_spread(parts, prompts.facts), [], []
    layer_indices = shown_layers(len(parts.layers))
    sites = {(layer, name): parts.component(layer, name) for name in (MLP, ATTENTION) for layer in layer_indices}
    for index in prompts.some:
        prompt = prompts.facts[index]
        effects, whole = causal_trace(
            parts, prompt, sites, spread, [[len(prompt.ids) - 1]], SAMPLES, batch_size=batch_size
        )
        total_effects.append(whole)
        back.append(effects[:, 0].unflatten(0, (2, -1)))
    both = torch.stack(back, dim=-1).double()
    layers = {name: _at_layers(each, layer_indices, parts) for name, each in zip((MLP, ATTENTION), both, strict=True)}
    return Measured(torch.tensor(total_effects, dtype=torch.double), layers)


def by_interchange_last(parts: Parts, prompts: Prompts, batch_size: int) -> Measured:
    """How much of the difference between two subjects' answers moves with the last position's state after a layer?"""
    return _exchanged(parts, prompts, batch_size, lambda prompt: [len(prompt.ids) - 1])


def by_interchange_subject(parts: Parts, prompts: Prompts, batch_size: int) -> Measured:
    """How much of it moves with the subject's states after a layer?"""
    return _exchanged(parts, prompts, batch_size, lambda prompt: prompt.subject_positions)


def by_interchange_component(parts: Parts, prompts: Prompts, batch_size: int) -> Measured:
    """How much of it moves with the output of one MLP or attention at the last position?"""
    return _exchanged(parts, prompts, batch_size, lambda prompt: [len(prompt.ids) - 1], (MLP, ATTENTION))


def _exchanged(
    parts: Parts,
    prompts: Prompts,
    batch_size: int,
    positions: Callable[[FactPrompt], list[int]],
    names: Sequence[str] = ("",),
) -> Measured:
    pairs = [(prompts.facts[one], prompts.facts[other]) for one, other in prompts.pairs]
    layer_indices = shown_layers(len(parts.layers))
    sites = {
        f"{name} {layer}": parts.component(layer, name) if name else parts.layers[layer]
        for name in names
        for layer in layer_indices
    }
    result = interchange(parts, pairs, [positions(one) for one, _ in pairs], sites, batch_size)
    every = {name: torch.stack([result[f"{name} {layer}"] for layer in layer_indices]).double() for name in names}
    rows = torch.cat(list(every.values()))
    layers = {name: _at_layers(each, layer_indices, parts) for name, each in every.items()}
    return Measured(rows[rows.mean(1).argmax()], layers)


def by_attention(parts: Parts, prompts: Prompts, batch_size: int) -> Measured:
    """How much of the strongest head's attention goes to the values told in a passage?

    The head is chosen on the other half of the items. Chance is the share of the tokens.
    """
    shares, chance = [], []
    for first in range(0, len(prompts.passage_facts), batch_size):
        some = prompts.passage_facts[first : first + batch_size]
        ids, last = batch_of(some, parts.model.device)
        mask = mask_of([_value_positions(prompt) for prompt in some], ids.shape[1], ids.device)
        weights = [each for each in attention_weights(parts, ids, last) if each is not None]
        shares.append(torch.stack([looked_at(each, mask) for each in weights]).cpu())
        chance.append((mask.sum(1) / (last + 1)).cpu())
    heads = torch.cat(shares, dim=1).permute(0, 2, 1).double()
    half = torch.arange(heads.shape[-1]) % 2
    by_layer = torch.zeros(len(heads), heads.shape[-1], dtype=torch.double)
    score = torch.zeros(heads.shape[-1], dtype=torch.double)
    for side in (0, 1):
        means = heads[..., half != side].mean(-1)
        best = means.argmax(1)
        for layer, head in enumerate(best.tolist()):
            by_layer[layer, half == side] = heads[layer, head, half == side]
        score[half == side] = by_layer[int(means.amax(1).argmax()), half == side]
    return Measured(score, {"": by_layer}, torch.cat(chance).double())


def _value_positions(prompt: FactPrompt) -> list[int]:
    """Return the positions of all values told in a passage: of the first tokens of these values."""
    values = {prompt.value, *prompt.others}
    positions = [index for index, token in enumerate(prompt.ids) if token in values]
    return positions or prompt.subject_positions


def by_gradient_x_input(parts: Parts, prompts: Prompts, batch_size: int) -> Measured:
    """Is the subject the token to which most is attributed?"""
    return _attributed(parts, prompts, batch_size, GRADIENT_X_INPUT)


def by_integrated_gradients(parts: Parts, prompts: Prompts, batch_size: int) -> Measured:
    """Is the subject the token to which most is attributed?"""
    return _attributed(parts, prompts, batch_size, INTEGRATED_GRADIENTS)


def _attributed(parts: Parts, prompts: Prompts, batch_size: int, method: str) -> Measured:
    some = [prompts.facts[index] for index in prompts.some]
    right = []
    for prompt in some:
        ids, last = batch_of([prompt], parts.model.device)
        logits = last_logits_of(parts, ids, last)[0]
        other = max(prompt.others, key=lambda token: float(logits[token]), default=None)
        scores = attribute(parts, prompt, method, other, batch_size=batch_size).scores
        right.append(float(strongest(scores, range(len(prompt.ids))) in prompt.subject_positions))
    chance = torch.tensor([len(prompt.subject_positions) / len(prompt.ids) for prompt in some])
    return Measured(torch.tensor(right, dtype=torch.double), {}, chance)


def shown_layers(count: int) -> list[int]:
    """Return the layers with a column: all, or `MOST_LAYERS` evenly spaced with the first and the last."""
    if count <= MOST_LAYERS:
        return list(range(count))
    return [round(index * (count - 1) / (MOST_LAYERS - 1)) for index in range(MOST_LAYERS)]


def _at_layers(figures: torch.Tensor, layer_indices: Sequence[int], parts: Parts) -> torch.Tensor:
    """Return figures of some layers (shown, items) as (layers, items), not a number for the others."""
    every = torch.full((len(parts.layers), figures.shape[1]), torch.nan, dtype=figures.dtype)
    every[list(layer_indices)] = figures
    return every


@dataclass(frozen=True)
class Method:
    """A method as a row of a report.

    Args:
        measure: from a model, prompts and the rows of a pass to its figures.
        items: the unit of its figures, one of `hfllm.evaluation.interpreting.material.UNITS`.
        score: the name of its figure.
        locator: of `hfllm.evaluation.interpreting.planted`, to find plants with; empty where it names no layer and no
            token.
    """

    measure: Callable[[Parts, Prompts, int], Measured]
    items: str
    score: str
    locator: str = ""


METHODS: Mapping[str, Method] = {
    "probe of known subjects": Method(by_probe, SUBJECTS, "auc"),
    "logit lens": Method(by_lens, FACTS, "right", "lens"),
    "causal tracing": Method(by_causal_trace, SOME_UNITS, "effect", "causal tracing"),
    "patching, last place": Method(by_interchange_last, PAIR_UNITS, "share", "restored stream"),
    "patching, subject": Method(by_interchange_subject, PAIR_UNITS, "share", "restored stream"),
    "patching, MLP or attention": Method(by_interchange_component, PAIR_UNITS, "share", "restored component"),
    "attention to the passage": Method(by_attention, TOLD, "share"),
    "gradient x input": Method(by_gradient_x_input, SOME_UNITS, "subject_first", GRADIENT_X_INPUT),
    "integrated gradients": Method(by_integrated_gradients, SOME_UNITS, "subject_first", INTEGRATED_GRADIENTS),
}


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
