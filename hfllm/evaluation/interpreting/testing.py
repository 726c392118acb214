"""Plants in a model, and which methods find them: the test of each method that names a layer or a token."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hfllm.evaluation.interpreting.attribution import GRADIENT_X_INPUT, INTEGRATED_GRADIENTS
from hfllm.evaluation.interpreting.hooks import COMPONENTS, Parts
from hfllm.evaluation.interpreting.locating import (
    by_attribution,
    by_causal_trace,
    by_lens,
    by_restored_component,
    by_restored_stream,
)
from hfllm.evaluation.interpreting.patching import last_logits_of, subject_spread
from hfllm.evaluation.interpreting.planted import Plant, make_plant
from hfllm.evaluation.interpreting.prompts import FactPrompt, batch_of

# Where plants are, as shares of the depth; and facts about others that an edit leaves alone, at most.
DEPTHS = {"first": 0.0, "middle": 0.5, "last": 1.0}
MOST_OTHERS = 24


@dataclass(frozen=True)
class Tested:
    """What became of a plant.

    Args:
        plant: the edit; its `layer` is what methods are to find.
        found: for each method whether it has found it; empty when the edit did not take.
    """

    plant: Plant
    found: Mapping[str, bool]


def plant_names() -> list[tuple[str, str]]:
    """Return the component and the depth of each plant."""
    return [(component, depth) for component in COMPONENTS for depth in DEPTHS]


def locators(parts: Parts, prompts: Sequence[FactPrompt]) -> dict[str, Callable[[Plant], bool]]:
    """Return all methods that name a layer or a token, each as whether it finds a plant."""
    spread = subject_spread(parts, prompts)
    return {
        "restored stream": lambda plant: by_restored_stream(parts, plant) == plant.layer,
        "restored component": lambda plant: by_restored_component(parts, plant) == plant.layer,
        "lens": lambda plant: by_lens(parts, plant) == plant.layer,
        "causal tracing": lambda plant: by_causal_trace(parts, plant, spread) == plant.layer,
        GRADIENT_X_INPUT: lambda plant: by_attribution(parts, plant, GRADIENT_X_INPUT),
        INTEGRATED_GRADIENTS: lambda plant: by_attribution(parts, plant, INTEGRATED_GRADIENTS),
    }


def tested_plants(parts: Parts, prompts: Sequence[FactPrompt]) -> Iterator[Tested]:
    """Yield the plants of `plant_names`, each about another subject, and which methods find it.

    Args:
        prompts: facts with at least one other value each.
    """
    finders, names = locators(parts, prompts), plant_names()
    for number, (component, depth) in enumerate(names):
        prompt = prompts[number * len(prompts) // len(names)]
        ids, last = batch_of([prompt], parts.model.device)
        said = int(last_logits_of(parts, ids, last).argmax())
        wanted = next(each for each in (*prompt.others, prompt.value) if each != said)
        same = [each for each in prompts if each.fact.subject != prompt.fact.subject]
        # Of questions of the same kind: these are what an edit would change by mistake.
        same.sort(key=lambda each: set(each.others) | {each.value} != set(prompt.others) | {prompt.value})
        layer = round(DEPTHS[depth] * (len(parts.layers) - 1))
        plant = make_plant(parts, prompt, wanted, layer, component, same[:MOST_OTHERS])
        yield Tested(plant, {name: find(plant) for name, find in finders.items()} if plant.has_taken else {})
