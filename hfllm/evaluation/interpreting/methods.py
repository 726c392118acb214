"""Each method as one figure per item, for a model and its controls alike.

`METHODS` lists them by the names of a report's rows. A method returns a `Measured`: a score per item, and figures
by layer where it has them. `hfllm.evaluation.interpreting.planted` defines the controls for its mean.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from hfllm.evaluation.interpreting.hooks import ATTENTION, MLP, FactPrompt, Parts, batch_of, mask_of
from hfllm.evaluation.interpreting.material import FACTS, PAIR_UNITS, SOME_UNITS, SUBJECTS, TOLD, Prompts
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


# ---- the methods ----


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
