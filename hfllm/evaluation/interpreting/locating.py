"""Do methods find plants? Each is asked in which layer an edit is, without being told."""

from dataclasses import replace

import torch

from hfllm.evaluation.interpreting.attribution import attribute, strongest
from hfllm.evaluation.interpreting.hooks import COMPONENTS, Parts, recorded
from hfllm.evaluation.interpreting.logit_lens import logit_lens
from hfllm.evaluation.interpreting.patching import causal_trace, margins, restored
from hfllm.evaluation.interpreting.planted import Plant, planted
from hfllm.evaluation.interpreting.prompts import batch_of

# After the layer of a plant the clean state brings at least this share of the old answer back.
UNDONE = 0.5
# A lens has departed when two tokens' logits differ by this much more than their own rounding.
DEPARTED = 1e-3
NEARLY = 0.85


def by_restored_stream(parts: Parts, plant: Plant) -> int:
    """Return the first layer after which the clean run's residual stream undoes an edit."""
    shares = _restored(parts, plant, "layers")
    return next((layer for layer, share in enumerate(shares) if share >= UNDONE), len(shares) - 1)


def by_restored_component(parts: Parts, plant: Plant) -> int:
    """Return the layer whose clean MLP or attention, put back alone, undoes most of an edit."""
    shares = {(layer, name): share for name in COMPONENTS for layer, share in enumerate(_restored(parts, plant, name))}
    return max(shares, key=shares.get)[0]


def by_lens(parts: Parts, plant: Plant) -> int:
    """Return the first layer after which the logit lens reads another thing from the edited model."""
    ids, last = batch_of([plant.prompt], parts.model.device)
    tokens = torch.tensor([[plant.wanted, plant.prompt.value]], device=ids.device)
    clean = logit_lens(parts, ids, last, tokens)
    with planted(plant):
        edited = logit_lens(parts, ids, last, tokens)
    change = (edited - clean).abs().amax((1, 2))
    scale = DEPARTED * max(float(clean.abs().max()), 1.0)
    return next((layer for layer, each in enumerate(change.tolist()) if each > scale), len(change) - 1)


def by_causal_trace(parts: Parts, plant: Plant, spread: float, samples: int = 8) -> int:
    """Return the last layer whose MLP or attention alone brings the planted answer back when noise hides the subject.

    Only the edited model is looked at, as where nobody knows what it said before. What brings the subject back in an
    earlier layer brings the answer back too, through the edit; so the last one counts that brings back `NEARLY` as
    much as any.
    """
    prompt = replace(plant.prompt, value=plant.wanted)
    sites = {(layer, name): parts.component(layer, name) for name in COMPONENTS for layer in range(len(parts.layers))}
    with planted(plant):
        effects, _ = causal_trace(parts, prompt, sites, spread, [[len(prompt.ids) - 1]], samples)
    back = dict(zip(sites, effects[:, 0].tolist(), strict=True))
    return max(layer for (layer, _), effect in back.items() if effect >= NEARLY * max(back.values()))


def by_attribution(parts: Parts, plant: Plant, method: str) -> bool:
    """Return whether the subject is the token to which most of the planted answer is attributed."""
    prompt = replace(plant.prompt, value=plant.wanted)
    with planted(plant):
        scores = attribute(parts, prompt, method, other=plant.prompt.value).scores
    return strongest(scores, range(len(prompt.ids))) in prompt.subject_places


def _restored(parts: Parts, plant: Plant, what: str) -> list[float]:
    modules = parts.layers if what == "layers" else parts.components(what)
    ids, last = batch_of([plant.prompt], parts.model.device)
    clean, states = recorded(parts, ids, last, modules)
    said = int(clean.argmax())
    tokens = torch.tensor([[said], [plant.wanted]], device=ids.device)
    margin = float(margins(clean, *tokens)[0])
    with planted(plant):
        return restored(parts, plant.prompt, dict(zip(modules, states, strict=True)), said, plant.wanted, margin)
