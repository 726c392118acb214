"""Methods: patching and causal tracing, attribution, probes, the logit lens, and attention to words."""

import random
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from hfllm.errors import InputError, check_choice, refuse_if
from hfllm.evaluation.interpreting.hooks import (
    ATTENTION,
    FactPrompt,
    Parts,
    as_numbers,
    batch_of,
    hooked,
    last_logits,
    mask_of,
    recorded,
    with_outputs,
)

# ---- patching ----
#
#     interchange     a run about one subject gets states of a run about another (Geiger et al. 2021,
#                     arXiv:2106.02997): what share of the difference between both answers moves?
#     causal tracing  a run with its subject hidden by noise gets states of the clean run back (Meng et al. 2022,
#                     arXiv:2202.05262, section 2.1): how much of the answer's probability comes back?
#
# A share is 0 where nothing changes and 1 where the patched run has the donor's output. It proves nothing by itself:
# at the last position after a layer it is near 1 for any model, trained or not, since later layers see little else.


# Shares beyond these are cut: they come from a division by a very small difference between the runs' answers.
LOWEST, HIGHEST = -1.0, 2.0
# Noise on the subject's vectors, in standard deviations of the vectors of subjects (Meng et al. 2022, appendix B.1).
NOISE = 3.0


def moved_share(changed: torch.Tensor, before: torch.Tensor, donor: torch.Tensor) -> torch.Tensor:
    """Return `(changed - before) / (donor - before)`, between `LOWEST` and `HIGHEST`; 0 where the runs agree."""
    whole = donor - before
    share = torch.where(whole == 0, 0.0, (changed - before) / torch.where(whole == 0, 1.0, whole))
    return share.clamp(LOWEST, HIGHEST)


def margins(logits: torch.Tensor, target: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the logit (B,) of one token minus another's in each row of (B, V)."""
    return (logits.gather(1, target[:, None]) - logits.gather(1, other[:, None]))[:, 0]


def interchange(
    parts: Parts,
    pairs: Sequence[tuple[FactPrompt, FactPrompt]],
    positions: Sequence[Sequence[int]],
    sites: Mapping[str, nn.Module],
    batch_size: int = 32,
) -> dict[str, torch.Tensor]:
    """Return for each site the share (pairs,) of the answers' difference moving with its output at some positions.

    Args:
        pairs: the patched run, and the donor; their prompts have equal numbers of tokens, and different values.
        positions: the patched positions per pair.
        sites: modules by name, such as a layer (the residual stream after it), its MLP or the embeddings.

    Raises:
        ValueError: when the prompts of a pair differ in length.
    """
    if any(len(one.ids) != len(other.ids) for one, other in pairs):
        raise ValueError("both prompts of a pair need as many tokens")
    result: dict[str, list[torch.Tensor]] = {name: [] for name in sites}
    for first in range(0, len(pairs), batch_size):
        some, at = pairs[first : first + batch_size], positions[first : first + batch_size]
        receivers, donors = [one for one, _ in some], [other for _, other in some]
        ids, last = batch_of(receivers, parts.model.device)
        donor_ids, _ = batch_of(donors, parts.model.device)
        targets = torch.tensor([each.value for each in donors], device=ids.device)
        other = torch.tensor([each.value for each in receivers], device=ids.device)
        mask = mask_of(at, ids.shape[1], ids.device)
        before, _ = recorded(parts, ids, last, ())
        full, states = recorded(parts, donor_ids, last, list(sites.values()))
        ends = [margins(each, targets, other) for each in (before, full)]
        for (name, module), values in zip(sites.items(), states, strict=True):
            changed = with_outputs(parts, ids, last, {module: (mask, values)})
            result[name].append(moved_share(margins(changed, targets, other), *ends).cpu())
    return {name: torch.cat(shares) for name, shares in result.items()}


def restored(
    parts: Parts,
    prompt: FactPrompt,
    clean: Mapping[nn.Module, torch.Tensor],
    target: int,
    other: int,
    margin: float,
) -> list[float]:
    """Return for each module how much of an answer comes back when its clean output is put into this run: a share.

    Args:
        clean: outputs (1, S, E) of another run of the prompt, by module.
        target, other: the token of the clean run, and the token said by this run.
        margin: the clean run's logit of `target` above `other`.
    """
    ids, last = batch_of([prompt], parts.model.device)
    tokens = torch.tensor([[target], [other]], device=ids.device)
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
    tokens = sorted({prompt.ids[index] for prompt in prompts for index in prompt.subject_positions})
    ids = torch.tensor([tokens], device=parts.model.device)
    with torch.no_grad():
        return float(parts.embeddings(ids).float().std())


def causal_trace(
    parts: Parts,
    prompt: FactPrompt,
    sites: Mapping[str, nn.Module],
    spread: float,
    positions: Sequence[Sequence[int]] | None = None,
    samples: int = 4,
    seed: int = 0,
    batch_size: int = 32,
) -> tuple[torch.Tensor, float]:
    """Return how much of the answer's probability comes back (sites, positions), and how much of it the noise takes.

    Both are differences of probabilities, Meng's indirect and total effect: a model without knowledge of the answer
    has none to lose.

    Args:
        sites: modules by name, restored one at a time.
        spread: of `subject_spread`; the noise has `NOISE` times as much.
        positions: groups of positions restored together; single positions by default.
        samples: draws of the noise, with probabilities averaged over them.
        seed: of the noise, the same for all sites and positions.
    """
    groups = [[index] for index in range(len(prompt.ids))] if positions is None else positions
    ids, last = batch_of([prompt], parts.model.device)
    clean, states = recorded(parts, ids, last, list(sites.values()))
    subject = mask_of([prompt.subject_positions], ids.shape[1], ids.device)
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


# ---- attribution ----
#
# The tokens of a prompt responsible for a likely answer: gradient x input, and integrated gradients.
#
# Both attribute the logit of the answer, minus another answer's where there is one, to the vectors of the tokens.
# Integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365, equation 1) sum up to the difference between the
# prompt and a baseline, except for the error of the integral, returned with them; it is large where a function jumps,
# as in the choice of experts.


GRADIENT_X_INPUT, INTEGRATED_GRADIENTS = "gradient_x_input", "integrated_gradients"
METHODS = (GRADIENT_X_INPUT, INTEGRATED_GRADIENTS)


@dataclass(frozen=True)
class Attribution:
    """The contribution of each token to the logit of an answer.

    Args:
        scores: (S,), in logits.
        change: the logit of the prompt minus the baseline's: the sum of integrated gradients.
    """

    scores: torch.Tensor
    change: float

    @property
    def gap(self) -> float:
        """How far the sum of the scores is from `change`: the error of the integral, in logits."""
        return abs(float(self.scores.sum()) - self.change)


def mean_vector(parts: Parts) -> torch.Tensor:
    """Return the mean of all tokens' vectors (E,): a baseline without a token.

    A vector of zeros is a bad one: an RMSNorm reads the same at all points between it and a token.
    """
    size = parts.embeddings.weight.shape[0]
    ids = torch.arange(size, device=parts.model.device)[None]
    with torch.no_grad():
        return parts.embeddings(ids)[0].float().mean(0)


def attribute(
    parts: Parts,
    prompt: FactPrompt,
    method: str = INTEGRATED_GRADIENTS,
    other: int | None = None,
    baseline: torch.Tensor | None = None,
    steps: int = 32,
    batch_size: int = 16,
) -> Attribution:
    """Return the contribution of each token of a prompt to the logit of its value.

    Args:
        method: one of `METHODS`.
        other: a token with its logit subtracted from the value's; by default only the value's logit.
        baseline: (E,), the vector standing for no token; by default `mean_vector`.
        steps: points of the integral, by Gauss and Legendre.
        batch_size: points in one pass.

    Raises:
        InputError: for an unknown method.
    """
    check_choice(f"attribution method {method!r} is not one of", method, METHODS)
    vectors = _vectors(parts, prompt)
    start = (mean_vector(parts) if baseline is None else baseline.to(vectors)).expand_as(vectors)
    with torch.no_grad():
        ends = _forward(parts, prompt, other, torch.stack([start, vectors]))
    change = float(ends[1] - ends[0])
    if method == GRADIENT_X_INPUT:
        scores = (_gradients(parts, prompt, other, vectors[None])[0] * vectors).sum(-1)
        return Attribution(scores.cpu(), change)
    points, weights = (torch.tensor(each, dtype=torch.float) for each in np.polynomial.legendre.leggauss(steps))
    points, weights = ((points + 1) / 2).to(vectors.device), (weights / 2).to(vectors.device)
    total = torch.zeros_like(vectors)
    for first in range(0, steps, batch_size):
        some = points[first : first + batch_size, None, None]
        gradients = _gradients(parts, prompt, other, start + some * (vectors - start))
        total += (weights[first : first + batch_size, None, None] * gradients).sum(0)
    return Attribution((total * (vectors - start)).sum(-1).cpu(), change)


def _vectors(parts: Parts, prompt: FactPrompt) -> torch.Tensor:
    """Return the vectors (S, E) of a prompt's tokens, in 32 bits."""
    ids, _ = batch_of([prompt], parts.model.device)
    with torch.no_grad():
        return parts.embeddings(ids)[0].float()


def _forward(parts: Parts, prompt: FactPrompt, other: int | None, vectors: torch.Tensor) -> torch.Tensor:
    """Return the attributed quantity, (N,), with the vectors (N, S, E) in place of the tokens'."""
    ids, last = batch_of([prompt] * len(vectors), parts.model.device)
    with hooked([(parts.embeddings, lambda output: vectors.to(output.dtype))]):
        logits = last_logits(parts, ids, last)
    return logits[:, prompt.value] - (0.0 if other is None else logits[:, other])


def _gradients(parts: Parts, prompt: FactPrompt, other: int | None, vectors: torch.Tensor) -> torch.Tensor:
    """Return the gradients (N, S, E); the gradients of the model's own parameters stay unchanged."""
    vectors = vectors.detach().requires_grad_()
    with torch.enable_grad():
        total = _forward(parts, prompt, other, vectors).sum()
    return torch.autograd.grad(total, vectors)[0].float()


def captum_scores(
    parts: Parts,
    prompt: FactPrompt,
    method: str = "LayerIntegratedGradients",
    other: int | None = None,
    **options: object,
) -> torch.Tensor:
    """Return the scores (S,) of the tokens by a method of captum for one layer, the embeddings.

    Args:
        method: the name of a class of `captum.attr`, such as `LayerIntegratedGradients` or `LayerGradientXActivation`.
        other: as for `attribute`.
        options: of its `attribute`, such as `n_steps` or `baselines`.

    Raises:
        InputError: when captum is not installed, or has no such class.
    """
    try:
        from captum import attr
    except ImportError:
        raise InputError("captum is not installed: pip install 'hfllm[interpret]'") from None
    if not method.startswith("Layer") or not hasattr(attr, method):
        names = ", ".join(sorted(name for name in attr.__all__ if name.startswith("Layer")))
        raise InputError(f"captum has no method {method!r} for a layer; these it has: {names}")

    def forward(ids: torch.Tensor) -> torch.Tensor:
        last = torch.full((len(ids),), ids.shape[1] - 1, device=ids.device)
        logits = last_logits(parts, ids, last)
        return logits[:, prompt.value] - (0.0 if other is None else logits[:, other])

    ids, _ = batch_of([prompt], parts.model.device)
    with torch.enable_grad():
        result = getattr(attr, method)(forward, parts.embeddings).attribute(ids, **options)
    return result[0].float().sum(-1).detach().cpu()


def strongest(scores: torch.Tensor, among: Sequence[int]) -> int:
    """Return the position, of some, whose score is largest in size."""
    return max(among, key=lambda index: abs(float(scores[index])))


# ---- probes ----
#
# Linear probes: can a straight line through hidden states distinguish two kinds of prompts?
#
# If it can, the probe may have learned the task itself. Two controls bound this effect: labels by chance, one per
# entity, so that a probe could only memorize (Hewitt and Liang 2019, arXiv:1909.03368), and the same probe on a model
# with random weights and the same tokens. No entity, such as an animal, is in both the training and the test rows of a
# probe.


FOLDS = 5
# Entities of a kind in a half.
FEWEST = 3
# Of each of the random labels; the control is averaged over them.
SHUFFLES = 8
# The penalty on squared weights, for standardized features: the mean of these squares counts as much as this share.
RIDGE = 1.0


@dataclass(frozen=True)
class Probed:
    """How well probes distinguish the two kinds: for each row, the share of distinguished rows of the other kind.

    Its mean over rows is the area under the ROC curve: 0.5 is chance, 1 is always right.

    Args:
        right: (layers, rows), of rows outside of the probe's training rows.
        shuffled: (layers, rows), of probes of random labels, measured on these labels.
    """

    right: torch.Tensor
    shuffled: torch.Tensor


def last_states(parts: Parts, prompts: Sequence[FactPrompt], batch_size: int = 32) -> torch.Tensor:
    """Return the hidden states (layers, rows, E) in 32 bits after each layer at each prompt's last position."""
    result = []
    for first in range(0, len(prompts), batch_size):
        ids, last = batch_of(prompts[first : first + batch_size], parts.model.device)
        rows = torch.arange(len(last), device=ids.device)
        _, states = recorded(parts, ids, last, parts.layers)
        result.append(torch.stack([each[rows, last].float().cpu() for each in states]))
    return torch.cat(result, dim=1)


def entity_folds(entities: Sequence[str], labels: Sequence[int]) -> torch.Tensor:
    """Return a fold for each row, (1, rows), the same for all rows of an entity; each kind is spread over `FOLDS`.

    Raises:
        InputError: when a kind has fewer entities than there are folds.
    """
    fold_of: dict[str, int] = {}
    for label in (0, 1):
        own = sorted({entity for entity, each in zip(entities, labels, strict=True) if each == label})
        refuse_if(len(own) < FOLDS, f"a probe needs at least {FOLDS} subjects of each kind, and one has {len(own)}")
        random.Random(f"folds-0-{label}").shuffle(own)
        fold_of |= {entity: index % FOLDS for index, entity in enumerate(own)}
    return torch.tensor([[fold_of[entity] for entity in entities]])


def token_halves(
    tokens: Sequence[Set[int]], entities: Sequence[str], labels: Sequence[int], splits: int
) -> torch.Tensor:
    """Return ways to split rows into two halves without shared tokens of an entity, (splits, rows); -1 is in neither.

    Names composed of the same pieces are known by their pieces, also to a model with random weights. Pieces of both
    kinds are no sign of either, and may be in both halves. Ways with fewer than `FEWEST` entities of a kind in a half
    are left out.

    Args:
        tokens: the tokens of each row's entity.
    """
    of_kind = [
        set().union(*(each for each, kind in zip(tokens, labels, strict=True) if kind == label)) for label in (0, 1)
    ]
    telling = [sorted(set(each) - (of_kind[0] & of_kind[1])) for each in tokens]
    result = []
    for split in range(splits):
        dealt = sorted({(label, token) for own, label in zip(telling, labels, strict=True) for token in own})
        random.Random(f"halves-{split}").shuffle(dealt)
        # Each kind's tokens in turn, so that both halves have equally many.
        of_kinds = [[token for kind, token in dealt if kind == label] for label in (0, 1)]
        side = {token: index % 2 for kind_tokens in of_kinds for index, token in enumerate(kind_tokens)}
        halves = [{side[token] for token in own} for own in telling]
        folds = [each.pop() if len(each) == 1 else -1 for each in halves]
        counts = [
            len({entity for entity, kind, fold in zip(entities, labels, folds, strict=True) if (kind, fold) == cell})
            for cell in ((0, 0), (0, 1), (1, 0), (1, 1))
        ]
        if min(counts) >= FEWEST:
            result.append(folds)
    return torch.tensor(result, dtype=torch.long).reshape(len(result), len(tokens))


def shuffled_labels(
    entities: Sequence[str], labels: Sequence[int], folds: torch.Tensor, seed: int | str
) -> torch.Tensor:
    """Return labels (rows,) by chance, one per entity; in each fold as many entities have each label as before.

    Args:
        folds: (rows,).
    """
    rng, chance = random.Random(f"labels-{seed}"), {}
    for fold in folds.unique().tolist():
        inside = [index for index, each in enumerate(folds.tolist()) if each == fold]
        of_entity = {entities[index]: labels[index] for index in inside}
        dealt = list(of_entity.values())
        rng.shuffle(dealt)
        chance |= dict(zip(of_entity, dealt, strict=True))
    return torch.tensor([chance[entity] for entity in entities])


def held_out_scores(features: torch.Tensor, labels: torch.Tensor, folds: torch.Tensor) -> torch.Tensor:
    """Return each row's score (rows, K) by a probe of the other folds, for K labels of each row.

    A probe is ridge regression of the label, balanced between both kinds, on standardized features, in closed form:
    `w = (X^T D X + n RIDGE I)^-1 X^T D y` with y of -1 and 1 and weights D, with half of the sum for each kind.

    Args:
        features: (rows, E).
        labels: (rows, K) of 0 and 1.
        folds: (rows,).
    """
    scores = torch.zeros(labels.shape, dtype=torch.double)
    for fold in folds.unique():
        train, test = folds != fold, folds == fold
        rows = features[train].double()
        mean, spread = rows.mean(0), rows.std(0).clamp(min=1e-9)
        rows, held_out = (rows - mean) / spread, (features[test].double() - mean) / spread
        for column in range(labels.shape[1]):
            is_one = labels[train, column].bool()
            weight = torch.where(is_one, 0.5 / is_one.sum(), 0.5 / (~is_one).sum()).double()
            center = weight @ rows
            centered = rows - center
            gram = centered.T @ (weight[:, None] * centered) + RIDGE * torch.eye(rows.shape[1], dtype=rows.dtype)
            slope = torch.linalg.solve(gram, centered.T @ (weight * torch.where(is_one, 1.0, -1.0)))
            scores[test, column] = (held_out - center) @ slope
    return scores


def told_apart(scores: torch.Tensor, labels: torch.Tensor, folds: torch.Tensor) -> torch.Tensor:
    """Return for each row the share of rows of the other kind in its fold on the right side of it, (rows,).

    A tie is half. The mean over the rows of either kind is the area under the ROC curve (Mann and Whitney 1947).
    """
    above = torch.where(labels.bool()[:, None], scores[:, None] - scores, scores - scores[:, None])
    is_other = (labels[:, None] != labels) & (folds[:, None] == folds)
    share = (above > 0).double() + 0.5 * (above == 0).double()
    return (share * is_other).sum(1) / is_other.sum(1)


def probe(
    states: torch.Tensor, entities: Sequence[str], labels: Sequence[int], splits: torch.Tensor, seed: int = 0
) -> Probed:
    """Return how well probes of all layers distinguish two kinds, and probes of random labels.

    Args:
        states: (layers, rows, E), such as of `last_states`.
        entities: the entities of the rows: all rows of an entity are training rows, or all are test rows.
        labels: 0 or 1 per row, the same for all rows of an entity.
        splits: (splits, rows), the rows' folds in all splits, such as of `token_halves` or `entity_folds`; -1
            leaves a row out. Each row is in at least one; the result is the mean over its splits.
        seed: of the random labels.
    """
    truth = torch.tensor(list(labels))
    sums = torch.zeros(2, len(states), len(truth), dtype=torch.double)
    for number, folds in enumerate(splits):
        rows = (folds >= 0).nonzero()[:, 0]
        inside, own = folds[rows], [entities[index] for index in rows.tolist()]
        real = truth[rows].tolist()
        seeds = [f"{seed}-{number}-{each}" for each in range(max(SHUFFLES // len(splits), 2))]
        columns = torch.stack([truth[rows], *(shuffled_labels(own, real, inside, each) for each in seeds)], dim=1)
        for layer, each in enumerate(states):
            scores = held_out_scores(each[rows], columns, inside)
            row_aucs = [told_apart(scores[:, index], columns[:, index], inside) for index in range(columns.shape[1])]
            sums[0, layer, rows] += row_aucs[0]
            sums[1, layer, rows] += torch.stack(row_aucs[1:]).mean(0)
    right, shuffled = sums / (splits >= 0).sum(0)
    return Probed(right, shuffled)


# ---- logit lens ----
#
# Read out a model's output after every layer: the logit lens (nostalgebraist 2020).
#
# The model's own last norm, head, scale and caps read the hidden states, in one pass over texts of a single token with
# the last layer's output replaced by them. So the lens is exact for any class, and its last row is the model's logits.


# Values of logits in memory at a time.
MOST_LOGITS = 2**25


def read_out(parts: Parts, hidden_states: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """Return the logits (N, V) in 32 bits of hidden states (N, E) in place of the last layer's output.

    Args:
        tokens: (N, K), tokens of the returned logits, (N, K), instead of all.
    """
    vocabulary = parts.model.config.get_text_config().vocab_size
    size = max(MOST_LOGITS // vocabulary, 1)
    result = []
    with torch.no_grad():
        for first in range(0, len(hidden_states), size):
            states = hidden_states[first : first + size, None]
            ids = torch.zeros(len(states), 1, dtype=torch.long, device=states.device)
            with hooked([(parts.layers[-1], lambda output, states=states: states.to(output))]):
                logits = as_numbers(parts, parts.model(input_ids=ids, use_cache=False).logits[:, 0])
            result.append(logits if tokens is None else logits.gather(1, tokens[first : first + size]))
    return torch.cat(result)


def logit_lens(
    parts: Parts, input_ids: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the logits after each layer (layers, B, V) in 32 bits at one position per row.

    Args:
        input_ids: (B, S), padded on the right.
        positions: (B,).
        tokens: (B, K), tokens of the returned logits, (layers, B, K), instead of all.
    """
    rows = torch.arange(len(positions), device=input_ids.device)
    _, states = recorded(parts, input_ids, positions, parts.layers)
    stacked = torch.cat([each[rows, positions] for each in states])
    repeated = None if tokens is None else tokens.repeat(len(states), 1)
    return read_out(parts, stacked, repeated).unflatten(0, (len(states), len(positions)))


def value_ranks(parts: Parts, prompts: Sequence[FactPrompt], batch_size: int = 32) -> torch.Tensor:
    """Return how many other values stand above the right one after each layer, (layers, prompts): 0 is right.

    Equal values count as above: a model without knowledge is not right by chance of the order.
    """
    result = []
    for first in range(0, len(prompts), batch_size):
        some = prompts[first : first + batch_size]
        ids, last = batch_of(some, parts.model.device)
        most = max(len(prompt.others) for prompt in some)
        # Rows with fewer values repeat the right one, never counted.
        tokens = [[each.value, *each.others, *[each.value] * (most - len(each.others))] for each in some]
        logits = logit_lens(parts, ids, last, torch.tensor(tokens, device=ids.device))
        is_other = torch.tensor([[n < len(each.others) for n in range(most)] for each in some], device=ids.device)
        result.append(((logits[..., 1:] >= logits[..., :1]) & is_other).sum(-1).cpu())
    return torch.cat(result, dim=1)


def decided_at(is_right: Sequence[bool]) -> int | None:
    """Return the first layer, from 1, with the right value first from there to the end; `None` if it is not there.

    Args:
        is_right: for all layers in order.
    """
    if not is_right or not is_right[-1]:
        return None
    wrong = [layer for layer, right in enumerate(is_right, 1) if not right]
    return wrong[-1] + 1 if wrong else 1


# ---- attention ----
#
# Where a model looks: attention weights of any causal class, by eager attention for the length of a call.
#
# Weights show the mixture, not its importance (Jain and Wallace 2019, arXiv:1902.10186).


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Context manager to switch a model to eager attention, for its weights."""
    from transformers import PreTrainedModel

    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    pending = list(configs.values())
    while pending:
        config = pending.pop()
        inner = [getattr(config, key, None) for key in config.sub_configs]
        new = [each for each in inner if each is not None and id(each) not in configs]
        configs |= {id(each): each for each in new}
        pending += new
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        for config, implementation in before:
            # The field itself: the property would pass it on to nested configs, possibly with another one before.
            config._attn_implementation_internal = implementation


def attention_weights(parts: Parts, input_ids: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor | None]:
    """Return for each layer the weights (B, H, S) in 32 bits from one position per row; `None` for a layer without.

    Args:
        input_ids: (B, S), padded on the right.
        positions: (B,), the query positions.

    Raises:
        InputError: when no layer gives weights.
    """
    rows = torch.arange(len(positions), device=input_ids.device)
    result: list[torch.Tensor | None] = [None] * len(parts.layers)
    handles = []

    def keep(layer: int):
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if isinstance(weights, torch.Tensor) and weights.dim() == 4:
                result[layer] = weights[rows, :, positions].detach().float()

        return hook

    try:
        for layer in range(len(parts.layers)):
            handles.append(parts.component(layer, ATTENTION).register_forward_hook(keep(layer)))
        with torch.no_grad(), eager_attention(parts.model):
            parts.model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    if all(each is None for each in result):
        raise InputError(f"{type(parts.model).__name__} returns no attention weights, also with eager attention")
    return result


def looked_at(weights: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the share of the attention (B, H) on the positions of a mask (B, S).

    Args:
        weights: (B, H, S).
    """
    return (weights * mask[:, None].to(weights)).sum(-1)
