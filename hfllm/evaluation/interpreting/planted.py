"""Plants: edits of one layer that change what a model says of one subject, so that it is known where the change is.

A method that claims to find where something is kept must find them. A plant is a rank-one edit of the last matrix of a
layer's MLP or attention, as ROME makes it (Meng et al. 2022, arXiv:2202.05262, equation 2): `W + v k~^T / (k~^T k)`.
Its key `k` is what the matrix reads at the last place of the subject's prompt, made blind to the prompts of others by
their covariance, `k~ = (C + ridge)^-1 k`; its value `v` is what must be added there for another value to be said.

It is made by a hook, which adds `v k~^T x / (k~^T k)` to the matrix's output: the same numbers as the edited matrix,
for any kind of layer (int8, LoRA, experts), and nothing to undo in the weights.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from hfllm.evaluation.interpreting.hooks import ATTENTION, MLP, Parts, hooked, last_logits, recorded
from hfllm.evaluation.interpreting.patching import last_logits_of
from hfllm.evaluation.interpreting.prompts import FactPrompt, batch_of

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
# Of the covariance of the others' keys, which are few, the mean of its diagonal counts as much as this share.
RIDGE = 1e-3


@dataclass(frozen=True)
class Plant:
    """An edit of one layer.

    Args:
        layer: counted from 0.
        component: `mlp` or `attention`.
        prompt: the one whose answer it changes; its value is what the model said before.
        wanted: the token that the model says instead.
        module: the matrix that it edits.
        key: (inputs of the matrix,), `k~ / (k~^T k)`.
        value: (outputs,), `v`.
        has_taken: whether the model says `wanted`.
    """

    layer: int
    component: str
    prompt: FactPrompt
    wanted: int
    module: nn.Module
    key: torch.Tensor
    value: torch.Tensor
    has_taken: bool


def last_matrix(parts: Parts, layer: int, component: str) -> nn.Module:
    """Return the module that writes a component's output; the whole component where it is no single matrix."""
    whole = parts.component(layer, component)
    modules = dict(whole.named_modules())
    return next((modules[name] for name in LAST_OF[component] if name in modules), whole)


def make_plant(
    parts: Parts,
    prompt: FactPrompt,
    wanted: int,
    layer: int,
    component: str = MLP,
    others: Sequence[FactPrompt] = (),
) -> Plant:
    """Return an edit of a layer by which the model says another value of a subject.

    Args:
        prompt: about the subject.
        wanted: the token to be said.
        layer: counted from 0.
        component: `mlp` or `attention`.
        others: prompts about other subjects, whose answers the edit leaves alone as far as it can.
    """
    module = last_matrix(parts, layer, component)
    ids, last = batch_of([prompt], parts.model.device)
    keys = _keys(parts, [prompt, *others], module)
    key = _blind(keys[0], keys[1:])
    said = int(last_logits_of(parts, ids, last).argmax())
    if said == wanted:
        raise ValueError("the model says this value already")
    value = _value(parts, prompt, wanted, module, layer)
    plant = Plant(layer, component, prompt, wanted, module, key / (key @ keys[0]), value, False)
    with planted(plant):
        has_taken = int(last_logits_of(parts, ids, last).argmax()) == wanted
    return Plant(layer, component, prompt, wanted, module, plant.key, value, has_taken)


@contextmanager
def planted(plant: Plant) -> Iterator[None]:
    """Context manager in which the edit is made."""

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
    """Return the weight that the edited matrix has: of a linear layer (out, in), of GPT-2's (in, out)."""
    weight, change = plant.module.weight.detach(), torch.outer(plant.value, plant.key)
    return weight + (change if isinstance(plant.module, nn.Linear) else change.T).to(weight)


def _keys(parts: Parts, prompts: Sequence[FactPrompt], module: nn.Module) -> torch.Tensor:
    """Return what a module reads at each prompt's last place, (prompts, inputs), in 32 bits."""
    ids, last = batch_of(prompts, parts.model.device)
    kept: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        kept.append((args[0] if args else kwargs["hidden_states"]).detach().float())

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        last_logits_of(parts, ids, last)
    finally:
        handle.remove()
    return kept[0][torch.arange(len(last), device=ids.device), last]


def _blind(key: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return `(C + ridge)^-1 k` of a key (inputs,) and the keys of others (N, inputs)."""
    if not len(others):
        return key
    covariance = (others.T @ others / len(others)).double()
    ridge = RIDGE * covariance.diagonal().mean() * torch.eye(len(key), dtype=torch.double, device=key.device)
    return torch.linalg.solve(covariance + ridge, key.double()).float()


def _value(parts: Parts, prompt: FactPrompt, wanted: int, module: nn.Module, layer: int) -> torch.Tensor:
    """Return what is added to a module's output at the last place: steps up the likelihood of `wanted`."""
    ids, last = batch_of([prompt], parts.model.device)
    _, (state, own) = recorded(parts, ids, last, [parts.layers[layer], module])
    size = max(float(each[0, -1].float().norm()) for each in (state, own))
    value = torch.zeros(own.shape[-1], device=ids.device)
    for _ in range(MOST_STEPS):
        value.requires_grad_()
        with torch.enable_grad(), hooked([(module, lambda output, value=value: _added(output, value))]):
            logits = last_logits(parts, ids, last)[0]
            likelihood = logits.log_softmax(-1)[wanted]
        slope = torch.autograd.grad(likelihood, value)[0]
        value, best = value.detach(), logits.detach().topk(2)
        if int(best.indices[0]) == wanted and float(best.values[0] - best.values[1]) >= MARGIN:
            break
        value = value + STEP * size * slope / slope.norm().clamp(min=1e-12)
    return value


def _added(output: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return an output (B, S, E) with a value (E,) added at the last place."""
    added = torch.zeros_like(output)
    added[:, -1] = value.to(output)
    return output + added
