"""Methods tested where the truth is known: planted edits of one layer, controls, and whether they are located.

A method claiming to find where something is kept must find them. A plant is a rank-one edit of the last matrix of a
layer's MLP or attention, as ROME makes it (Meng et al. 2022, arXiv:2202.05262, equation 2): `W + v k~^T / (k~^T k)`.
Its key `k` is the matrix's input at the last position of the subject's prompt, made blind to the prompts of others by
their covariance, `k~ = (C + ridge)^-1 k`; its value `v` is the vector to add there for another value to be said.

It is made by a hook, adding `v k~^T x / (k~^T k)` to the matrix's output: the same numbers as the edited matrix,
for any kind of layer (int8, LoRA, experts), and nothing to undo in the weights.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from hfllm.evaluation.interpreting.hooks import (
    ATTENTION,
    COMPONENTS,
    MLP,
    FactPrompt,
    Parts,
    batch_of,
    hooked,
    last_logits,
    parts_of,
    recorded,
)
from hfllm.evaluation.interpreting.measures import (
    GRADIENT_X_INPUT,
    INTEGRATED_GRADIENTS,
    attribute,
    causal_trace,
    last_logits_of,
    logit_lens,
    margins,
    restored,
    strongest,
    subject_spread,
)
from hfllm.models.devices import forked_random
from hfllm.outputs.figures import NOISE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# ---- plants ----


# Names of the last matrix of an MLP and of attention in models of transformers.
LAST_OF = {
    MLP: ("down_proj", "c_proj", "dense_4h_to_h", "fc_out", "fc2", "w2", "output_linear"),
    ATTENTION: ("o_proj", "c_proj", "dense", "out_proj", "attention.dense"),
}
# A plant is strong enough when its value's logit is this much above all others.
MARGIN = 2.0
# Each step adds this share of the state's length.
STEP = 0.2
MOST_STEPS = 60
# Ridge on the covariance of the few keys of others, as this share of the mean of its diagonal.
RIDGE = 1e-3


@dataclass(frozen=True)
class Plant:
    """An edit of one layer.

    Args:
        layer: counted from 0.
        component: `mlp` or `attention`.
        prompt: the prompt with the changed answer; its value is the model's answer before.
        target: the token said by the model instead.
        module: the edited matrix.
        key: (inputs of the matrix,), `k~ / (k~^T k)`.
        value: (outputs,), `v`.
        has_taken: whether the model says `target`.
    """

    layer: int
    component: str
    prompt: FactPrompt
    target: int
    module: nn.Module
    key: torch.Tensor
    value: torch.Tensor
    has_taken: bool


def last_matrix(parts: Parts, layer: int, component: str) -> nn.Module:
    """Return the output module of a component; the whole component if this is not a single matrix."""
    whole = parts.component(layer, component)
    modules = dict(whole.named_modules())
    return next((modules[name] for name in LAST_OF[component] if name in modules), whole)


def make_plant(
    parts: Parts,
    prompt: FactPrompt,
    target: int,
    layer: int,
    component: str = MLP,
    others: Sequence[FactPrompt] = (),
) -> Plant:
    """Return an edit of a layer to make the model say another value of a subject.

    Args:
        prompt: about the subject.
        target: the token to be said.
        layer: counted from 0.
        component: `mlp` or `attention`.
        others: prompts about other subjects, whose answers the edit leaves alone as far as it can.
    """
    module = last_matrix(parts, layer, component)
    ids, last = batch_of([prompt], parts.model.device)
    keys = _keys(parts, [prompt, *others], module)
    key = _blind(keys[0], keys[1:])
    prediction = int(last_logits_of(parts, ids, last).argmax())
    if prediction == target:
        raise ValueError("the model says this value already")
    value = _value(parts, prompt, target, module, layer)
    plant = Plant(layer, component, prompt, target, module, key / (key @ keys[0]), value, False)
    with planted(plant):
        return replace(plant, has_taken=int(last_logits_of(parts, ids, last).argmax()) == target)


@contextmanager
def planted(plant: Plant) -> Iterator[None]:
    """Context manager to make the edit."""

    def edit(module: nn.Module, args: tuple, kwargs: dict, output: object) -> object:
        output_only = output[0] if isinstance(output, tuple) else output
        read = (args[0] if args else kwargs["hidden_states"]).float()
        changed = output_only + ((read @ plant.key)[..., None] * plant.value).to(output_only)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    # Before the hooks of whoever looks: they see the edited output, as of an edited matrix.
    handle = plant.module.register_forward_hook(edit, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def edited_weight(plant: Plant) -> torch.Tensor:
    """Return the weight of the edited matrix: of a linear layer (out, in), of GPT-2's (in, out)."""
    weight, change = plant.module.weight.detach(), torch.outer(plant.value, plant.key)
    return weight + (change if isinstance(plant.module, nn.Linear) else change.T).to(weight)


def _keys(parts: Parts, prompts: Sequence[FactPrompt], module: nn.Module) -> torch.Tensor:
    """Return a module's input at each prompt's last position, (prompts, inputs), in 32 bits."""
    ids, last = batch_of(prompts, parts.model.device)
    inputs: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs.append((args[0] if args else kwargs["hidden_states"]).detach().float())

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        last_logits_of(parts, ids, last)
    finally:
        handle.remove()
    return inputs[0][torch.arange(len(last), device=ids.device), last]


def _blind(key: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return `(C + ridge)^-1 k` of a key (inputs,) and the keys of others (N, inputs)."""
    if not len(others):
        return key
    covariance = (others.T @ others / len(others)).double()
    ridge = RIDGE * covariance.diagonal().mean() * torch.eye(len(key), dtype=torch.double, device=key.device)
    return torch.linalg.solve(covariance + ridge, key.double()).float()


def _value(parts: Parts, prompt: FactPrompt, target: int, module: nn.Module, layer: int) -> torch.Tensor:
    """Return the vector added to a module's output at the last position: steps up the likelihood of `target`."""
    ids, last = batch_of([prompt], parts.model.device)
    _, (state, own) = recorded(parts, ids, last, [parts.layers[layer], module])
    size = max(float(each[0, -1].float().norm()) for each in (state, own))
    value = torch.zeros(own.shape[-1], device=ids.device)
    for _ in range(MOST_STEPS):
        value.requires_grad_()
        with torch.enable_grad(), hooked([(module, lambda output, value=value: _added(output, value))]):
            logits = last_logits(parts, ids, last)[0]
            likelihood = logits.log_softmax(-1)[target]
        slope = torch.autograd.grad(likelihood, value)[0]
        value, best = value.detach(), logits.detach().topk(2)
        if int(best.indices[0]) == target and float(best.values[0] - best.values[1]) >= MARGIN:
            break
        value = value + STEP * size * slope / slope.norm().clamp(min=1e-12)
    return value


def _added(output: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return an output (B, S, E) with a value (E,) added at the last position."""
    added = torch.zeros_like(output)
    added[:, -1] = value.to(output)
    return output + added


# ---- controls ----
#
# Controls that a method must beat to be shown: the same model with random weights, and plants in known layers.


# A method is left out if the score of random weights is at least this share of the model's, both above chance.
MOST_BY_CHANCE = 0.5
OWN_SEED = 7_000_000


def random_parts(parts: Parts, seed: int = 0) -> Parts:
    """Return the parts of an untrained model of the same class and config, on the same device."""
    config = copy.deepcopy(parts.model.config)
    if getattr(config, "quantization_config", None) is not None:
        # Of the stored weights; new ones are of full precision.
        del config.quantization_config
    with forked_random(torch.device("cpu")):
        # Not a likely seed of a user's own model.
        torch.manual_seed(OWN_SEED + seed)
        model: PreTrainedModel = type(parts.model)(config)
    return parts_of(model.to(parts.model.device, parts.model.dtype).eval())


@dataclass(frozen=True)
class Verdict:
    """Whether a method's figures reflect a model's training.

    Args:
        score, control: the mean of the method's score for the model, and for random weights.
        chance: the score of a method without information.
        hits, plants: how many planted edits it has found, and of how many; 0 of 0 for one without a layer or token.
        error: the standard error of `score`, which must be above chance by more than twice this.
    """

    score: float
    control: float
    chance: float = 0.0
    hits: int = 0
    plants: int = 0
    error: float = 0.0

    @property
    def left_out(self) -> str:
        """Why the method is not shown; empty where it is."""
        if self.hits < self.plants:
            return f"it finds {self.hits} of {self.plants} planted edits"
        above, by_chance = self.score - self.chance, self.control - self.chance
        if above <= NOISE * self.error or by_chance >= MOST_BY_CHANCE * above:
            return (
                f"it scores {self.control:.2f} on random weights and {self.score:.2f} on this model "
                f"(chance {self.chance:.2f}, error {self.error:.2f})"
            )
        return ""


# ---- locating ----
#
# Do methods find plants? They are asked for the layer of an edit, without being told.


# After the layer of a plant the clean state brings at least this share of the old answer back.
UNDONE = 0.5
# A lens has departed when two tokens' logits differ by this much more than their own rounding.
DEPARTED = 1e-3
NEARLY = 0.85


def by_restored_stream(parts: Parts, plant: Plant) -> int:
    """Return the first layer where the clean run's residual stream, put in after it, undoes an edit."""
    shares = _restored(parts, plant, "layers")
    return next((layer for layer, share in enumerate(shares) if share >= UNDONE), len(shares) - 1)


def by_restored_component(parts: Parts, plant: Plant) -> int:
    """Return the layer whose clean MLP or attention, put back alone, undoes most of an edit."""
    shares = {(layer, name): share for name in COMPONENTS for layer, share in enumerate(_restored(parts, plant, name))}
    return max(shares, key=shares.get)[0]


def by_lens(parts: Parts, plant: Plant) -> int:
    """Return the first layer after which the logit lens reads another thing from the edited model."""
    ids, last = batch_of([plant.prompt], parts.model.device)
    tokens = torch.tensor([[plant.target, plant.prompt.value]], device=ids.device)
    clean = logit_lens(parts, ids, last, tokens)
    with planted(plant):
        edited = logit_lens(parts, ids, last, tokens)
    change = (edited - clean).abs().amax((1, 2))
    scale = DEPARTED * max(float(clean.abs().max()), 1.0)
    return next((layer for layer, each in enumerate(change.tolist()) if each > scale), len(change) - 1)


def by_causal_trace(parts: Parts, plant: Plant, spread: float, samples: int = 8) -> int:
    """Return the last layer whose MLP or attention alone brings the planted answer back when noise hides the subject.

    Only the edited model is examined, as if its earlier answer were unknown. Restoring the subject in an earlier layer
    restores the answer too, through the edit; so the last layer with `NEARLY` the largest effect counts.
    """
    prompt = replace(plant.prompt, value=plant.target)
    sites = {(layer, name): parts.component(layer, name) for name in COMPONENTS for layer in range(len(parts.layers))}
    with planted(plant):
        effects, _ = causal_trace(parts, prompt, sites, spread, [[len(prompt.ids) - 1]], samples)
    back = dict(zip(sites, effects[:, 0].tolist(), strict=True))
    return max(layer for (layer, _), effect in back.items() if effect >= NEARLY * max(back.values()))


def by_attribution(parts: Parts, plant: Plant, method: str) -> bool:
    """Return whether the subject is the token with the largest attribution for the planted answer."""
    prompt = replace(plant.prompt, value=plant.target)
    with planted(plant):
        scores = attribute(parts, prompt, method, other=plant.prompt.value).scores
    return strongest(scores, range(len(prompt.ids))) in prompt.subject_positions


def _restored(parts: Parts, plant: Plant, what: str) -> list[float]:
    modules = parts.layers if what == "layers" else parts.components(what)
    ids, last = batch_of([plant.prompt], parts.model.device)
    clean, states = recorded(parts, ids, last, modules)
    prediction = int(clean.argmax())
    tokens = torch.tensor([[prediction], [plant.target]], device=ids.device)
    margin = float(margins(clean, *tokens)[0])
    with planted(plant):
        return restored(parts, plant.prompt, dict(zip(modules, states, strict=True)), prediction, plant.target, margin)


# ---- testing ----
#
# Plants in a model, and the methods to find them: the test of each method for a layer or a token.


# Where plants are, as shares of the depth; and facts about others to be left unchanged by an edit, at most.
DEPTHS = {"first": 0.0, "middle": 0.5, "last": 1.0}
MOST_OTHERS = 24


@dataclass(frozen=True)
class Tested:
    """The result of a plant.

    Args:
        plant: the edit; methods are to find its `layer`.
        hits: per method whether it has found it; empty when the edit did not take.
    """

    plant: Plant
    hits: Mapping[str, bool]


def plant_names() -> list[tuple[str, str]]:
    """Return the components and depths of the plants."""
    return [(component, depth) for component in COMPONENTS for depth in DEPTHS]


def locators(parts: Parts, prompts: Sequence[FactPrompt]) -> dict[str, Callable[[Plant], bool]]:
    """Return all methods for a layer or a token, with whether they find a plant."""
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
    """Yield the plants of `plant_names`, each about another subject, and the methods with success.

    Args:
        prompts: facts with at least one other value each.
    """
    finders, names = locators(parts, prompts), plant_names()
    for number, (component, depth) in enumerate(names):
        prompt = prompts[number * len(prompts) // len(names)]
        ids, last = batch_of([prompt], parts.model.device)
        prediction = int(last_logits_of(parts, ids, last).argmax())
        target = next(each for each in (*prompt.others, prompt.value) if each != prediction)
        same = [each for each in prompts if each.fact.subject != prompt.fact.subject]
        # Of questions of the same kind: an edit would change these by mistake.
        same.sort(key=lambda each: set(each.others) | {each.value} != set(prompt.others) | {prompt.value})
        layer = round(DEPTHS[depth] * (len(parts.layers) - 1))
        plant = make_plant(parts, prompt, target, layer, component, same[:MOST_OTHERS])
        yield Tested(plant, {name: find(plant) for name, find in finders.items()} if plant.has_taken else {})
