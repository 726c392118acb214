"""Put parts of one run into another and see what the model says then: activation patching and causal tracing.

    interchange     a run about one subject gets states of a run about another (Geiger et al. 2021, arXiv:2106.02997):
                    which share of the difference between both answers moves?
    causal tracing  a run whose subject is hidden by noise gets states of the clean run back (Meng et al. 2022,
                    arXiv:2202.05262, section 2.1): how much of the answer's probability comes back?

A share is 0 where nothing changes and 1 where the patched run says what the donor says. It proves nothing alone: at
the last place after a layer it is near 1 for any model, trained or not, since what follows sees little else.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from hfllm.evaluation.interpreting.hooks import Parts, hooked, last_logits, recorded, with_outputs
from hfllm.evaluation.interpreting.prompts import FactPrompt, batch_of, mask_of

# Shares beyond these are cut: they come from runs whose answers hardly differ, by which they are divided.
LOWEST, HIGHEST = -1.0, 2.0
# Noise on the subject's vectors, in standard deviations of the vectors of subjects (Meng et al. 2022, appendix B.1).
NOISE = 3.0


def moved_share(changed: torch.Tensor, before: torch.Tensor, donor: torch.Tensor) -> torch.Tensor:
    """Return `(changed - before) / (donor - before)`, between `LOWEST` and `HIGHEST`; 0 where the runs agree."""
    whole = donor - before
    share = torch.where(whole == 0, 0.0, (changed - before) / torch.where(whole == 0, 1.0, whole))
    return share.clamp(LOWEST, HIGHEST)


def margins(logits: torch.Tensor, wanted: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the logit (B,) of one token above that of another in each row of (B, V)."""
    return (logits.gather(1, wanted[:, None]) - logits.gather(1, other[:, None]))[:, 0]


def interchange(
    parts: Parts,
    pairs: Sequence[tuple[FactPrompt, FactPrompt]],
    places: Sequence[Sequence[int]],
    sites: Mapping[str, nn.Module],
    batch_size: int = 32,
) -> dict[str, torch.Tensor]:
    """Return for each site the share (pairs,) of the answers' difference that moves with its output at some places.

    Args:
        pairs: the run that is patched, and the donor; their prompts have as many tokens, and other values.
        places: for each pair those that are patched.
        sites: modules by name, such as a layer (the residual stream after it), its MLP or the embeddings.

    Raises:
        ValueError: when the prompts of a pair differ in length.
    """
    if any(len(one.ids) != len(other.ids) for one, other in pairs):
        raise ValueError("both prompts of a pair need as many tokens")
    found: dict[str, list[torch.Tensor]] = {name: [] for name in sites}
    for first in range(0, len(pairs), batch_size):
        some, at = pairs[first : first + batch_size], places[first : first + batch_size]
        receivers, donors = [one for one, _ in some], [other for _, other in some]
        ids, last = batch_of(receivers, parts.model.device)
        given, _ = batch_of(donors, parts.model.device)
        wanted = torch.tensor([each.value for each in donors], device=ids.device)
        other = torch.tensor([each.value for each in receivers], device=ids.device)
        mask = mask_of(at, ids.shape[1], ids.device)
        before, _ = recorded(parts, ids, last, ())
        full, states = recorded(parts, given, last, list(sites.values()))
        ends = [margins(each, wanted, other) for each in (before, full)]
        for (name, module), values in zip(sites.items(), states, strict=True):
            changed = with_outputs(parts, ids, last, {module: (mask, values)})
            found[name].append(moved_share(margins(changed, wanted, other), *ends).cpu())
    return {name: torch.cat(shares) for name, shares in found.items()}


def restored(
    parts: Parts,
    prompt: FactPrompt,
    clean: Mapping[nn.Module, torch.Tensor],
    wanted: int,
    other: int,
    margin: float,
) -> list[float]:
    """Return for each module how much of an answer comes back when its clean output is put into this run: a share.

    Args:
        clean: outputs (1, S, E) of another run of the prompt, by module.
        wanted, other: the token of the clean run, and the one that this run says.
        margin: the clean run's logit of `wanted` above `other`.
    """
    ids, last = batch_of([prompt], parts.model.device)
    tokens = torch.tensor([[wanted], [other]], device=ids.device)
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    before = margins(last_logits_of(parts, ids, last), *tokens)
    shares = []
    for module, values in clean.items():
        changed = margins(with_outputs(parts, ids, last, {module: (everywhere, values)}), *tokens)
        shares.append(float(moved_share(changed, before, torch.full_like(before, margin))))
    return shares


def last_logits_of(parts: Parts, ids: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Return the logits (B, V) of a run as it is, without gradients."""
    with torch.no_grad():
        return last_logits(parts, ids, last)


def subject_spread(parts: Parts, prompts: Sequence[FactPrompt]) -> float:
    """Return the standard deviation of the vectors of the subjects' tokens, over all their values."""
    tokens = sorted({prompt.ids[place] for prompt in prompts for place in prompt.subject_places})
    ids = torch.tensor([tokens], device=parts.model.device)
    with torch.no_grad():
        return float(parts.embeddings(ids).float().std())


def causal_trace(
    parts: Parts,
    prompt: FactPrompt,
    sites: Mapping[str, nn.Module],
    spread: float,
    places: Sequence[Sequence[int]] | None = None,
    samples: int = 4,
    seed: int = 0,
    batch_size: int = 32,
) -> tuple[torch.Tensor, float]:
    """Return how much of the answer's probability comes back (sites, places), and how much of it the noise takes.

    Both are differences of probabilities, Meng's indirect and total effect: a model that does not know the answer has
    none to lose.

    Args:
        sites: modules by name, each restored alone.
        spread: of `subject_spread`; the noise has `NOISE` times as much.
        places: groups of places that are restored together; each place alone by default.
        samples: draws of the noise, over which probabilities are averaged.
        seed: of the noise, which is the same for all sites and places.
    """
    groups = [[place] for place in range(len(prompt.ids))] if places is None else places
    ids, last = batch_of([prompt], parts.model.device)
    clean, states = recorded(parts, ids, last, list(sites.values()))
    subject = mask_of([prompt.subject_places], ids.shape[1], ids.device)
    noise = torch.randn((samples, *ids.shape[1:], states[0].shape[-1]), generator=torch.Generator().manual_seed(seed))
    noise = (NOISE * spread * noise).to(ids.device)
    broken = float(_noisy(parts, prompt, noise, subject).mean())
    effects = torch.zeros(len(sites), len(groups))
    masks = mask_of(groups, ids.shape[1], ids.device)
    step = max(batch_size // samples, 1)
    for row, (module, values) in enumerate(zip(sites.values(), states, strict=True)):
        for first in range(0, len(groups), step):
            some = masks[first : first + step].repeat_interleave(samples, 0)
            got = _noisy(parts, prompt, noise.repeat(len(some) // samples, 1, 1), subject, (module, some, values))
            effects[row, first : first + step] = got.unflatten(0, (-1, samples)).mean(1).cpu() - broken
    return effects, float(clean.softmax(-1)[0, prompt.value]) - broken


def _noisy(
    parts: Parts,
    prompt: FactPrompt,
    noise: torch.Tensor,
    subject: torch.Tensor,
    patch: tuple[nn.Module, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return the probability (N,) of the value under each of the noises (N, S, E) on the subject's vectors."""
    ids, last = batch_of([prompt] * len(noise), parts.model.device)
    hooks = [(parts.embeddings, lambda output: output + (noise * subject[..., None]).to(output))]
    if patch is not None:
        module, mask, values = patch
        hooks.append((module, lambda output: torch.where(mask[..., None], values.to(output), output)))
    with hooked(hooks):
        return last_logits_of(parts, ids, last).softmax(-1)[:, prompt.value]
