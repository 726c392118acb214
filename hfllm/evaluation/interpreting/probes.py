"""Linear probes: can a straight line through hidden states tell two kinds of prompts apart?

A probe that can may have learned the task itself. Two controls bound that: labels by chance, one per entity, so that a
probe could only memorize (Hewitt and Liang 2019, arXiv:1909.03368), and the same probe on a model of random weights,
which sees the same tokens. No entity, such as an animal, is in what a probe learns from and in what it is tested on.
"""

import random
from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch

from hfllm.errors import InputError
from hfllm.evaluation.interpreting.hooks import Parts, recorded
from hfllm.evaluation.interpreting.prompts import FactPrompt, batch_of

FOLDS = 5
# Entities of a kind in a half.
FEWEST = 3
# Of each of the labels by chance, over which the control is averaged.
SHUFFLES = 8
# The penalty on squared weights, for standardized features: the mean of these squares counts as much as this share.
RIDGE = 1.0


@dataclass(frozen=True)
class Probed:
    """How well probes tell the two kinds apart: the share of rows of the other kind that each row is told from.

    Its mean over rows is the area under the ROC curve: 0.5 is chance, 1 is always right.

    Args:
        right: (layers, rows), of rows that the probe has not learned from.
        shuffled: (layers, rows), of probes of labels by chance, as those labels have it.
    """

    right: torch.Tensor
    shuffled: torch.Tensor


def last_states(parts: Parts, prompts: Sequence[FactPrompt], batch_size: int = 32) -> torch.Tensor:
    """Return the hidden states (layers, rows, E) in 32 bits after each layer at each prompt's last place."""
    found = []
    for first in range(0, len(prompts), batch_size):
        ids, last = batch_of(prompts[first : first + batch_size], parts.model.device)
        rows = torch.arange(len(last), device=ids.device)
        _, states = recorded(parts, ids, last, parts.layers)
        found.append(torch.stack([each[rows, last].float().cpu() for each in states]))
    return torch.cat(found, dim=1)


def entity_folds(entities: Sequence[str], labels: Sequence[int], folds: int = FOLDS, seed: int = 0) -> torch.Tensor:
    """Return a fold for each row, (1, rows), the same for all rows of an entity; each kind's are spread over all.

    Raises:
        InputError: when a kind has fewer entities than there are folds.
    """
    fold_of: dict[str, int] = {}
    for label in (0, 1):
        own = sorted({entity for entity, each in zip(entities, labels, strict=True) if each == label})
        if len(own) < folds:
            raise InputError(f"a probe needs at least {folds} subjects of each kind, and one has {len(own)}")
        random.Random(f"folds-{seed}-{label}").shuffle(own)
        fold_of |= {entity: place % folds for place, entity in enumerate(own)}
    return torch.tensor([[fold_of[entity] for entity in entities]])


def token_halves(
    tokens: Sequence[Set[int]], entities: Sequence[str], labels: Sequence[int], splits: int
) -> torch.Tensor:
    """Return ways to part rows into two halves that share no token of an entity, (splits, rows); -1 is in neither.

    Names that are put together from the same pieces are known by their pieces, also to a model of random weights.
    What both kinds have is no sign of either, and may be in both halves. Ways with fewer than `FEWEST` entities of a
    kind in a half are left out.

    Args:
        tokens: of each row those of its entity.
    """
    of_kind = [
        set().union(*(each for each, kind in zip(tokens, labels, strict=True) if kind == label)) for label in (0, 1)
    ]
    telling = [sorted(set(each) - (of_kind[0] & of_kind[1])) for each in tokens]
    found = []
    for split in range(splits):
        dealt = sorted({(label, token) for own, label in zip(telling, labels, strict=True) for token in own})
        random.Random(f"halves-{split}").shuffle(dealt)
        # Each kind's tokens in turn, so that both halves have as many.
        side = {token: place % 2 for label in (0, 1) for place, (_, token) in enumerate(_of(dealt, label))}
        halves = [{side[token] for token in own} for own in telling]
        folds = [each.pop() if len(each) == 1 else -1 for each in halves]
        counts = [
            len({entity for entity, kind, fold in zip(entities, labels, folds, strict=True) if (kind, fold) == cell})
            for cell in ((0, 0), (0, 1), (1, 0), (1, 1))
        ]
        if min(counts) >= FEWEST:
            found.append(folds)
    return torch.tensor(found, dtype=torch.long).reshape(len(found), len(tokens))


def _of(dealt: Sequence[tuple[int, int]], label: int) -> list[tuple[int, int]]:
    return [each for each in dealt if each[0] == label]


def shuffled_labels(
    entities: Sequence[str], labels: Sequence[int], folds: torch.Tensor, seed: int | str
) -> torch.Tensor:
    """Return labels (rows,) by chance, one per entity; in each fold as many entities have each label as before.

    Args:
        folds: (rows,).
    """
    rng, chance = random.Random(f"labels-{seed}"), {}
    for fold in folds.unique().tolist():
        inside = [place for place, each in enumerate(folds.tolist()) if each == fold]
        of_entity = {entities[place]: labels[place] for place in inside}
        dealt = list(of_entity.values())
        rng.shuffle(dealt)
        chance |= dict(zip(of_entity, dealt, strict=True))
    return torch.tensor([chance[entity] for entity in entities])


def held_out_scores(features: torch.Tensor, labels: torch.Tensor, folds: torch.Tensor) -> torch.Tensor:
    """Return each row's score (rows, K) by a probe of the other folds, for K labels of each row.

    A probe is ridge regression of the label, balanced between both kinds, on standardized features, in closed form:
    `w = (X^T D X + n RIDGE I)^-1 X^T D y` with y of -1 and 1 and weights D that give each kind half of the sum.

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
    """Return of each row the share of rows of the other kind in its fold that are on the right side of it, (rows,).

    A tie is half. The mean over the rows of either kind is the area under the ROC curve (Mann and Whitney 1947).
    """
    above = torch.where(labels.bool()[:, None], scores[:, None] - scores, scores - scores[:, None])
    is_other = (labels[:, None] != labels) & (folds[:, None] == folds)
    share = (above > 0).double() + 0.5 * (above == 0).double()
    return (share * is_other).sum(1) / is_other.sum(1)


def probe(
    states: torch.Tensor, entities: Sequence[str], labels: Sequence[int], splits: torch.Tensor, seed: int = 0
) -> Probed:
    """Return how well probes of each layer tell two kinds apart, and probes of labels by chance.

    Args:
        states: (layers, rows, E), such as of `last_states`.
        entities: what each row is about: the rows of one are learned from together, or tested on.
        labels: 0 or 1 for each row, the same for all rows of an entity.
        splits: (splits, rows), the fold of each row in each split, such as of `token_halves` or `entity_folds`; -1
            leaves a row out. Each row is in at least one; what is returned is the mean over those that it is in.
        seed: of the labels by chance.
    """
    truth = torch.tensor(list(labels))
    sums = torch.zeros(2, len(states), len(truth), dtype=torch.double)
    for number, folds in enumerate(splits):
        kept = (folds >= 0).nonzero()[:, 0]
        inside, own = folds[kept], [entities[place] for place in kept.tolist()]
        real = truth[kept].tolist()
        seeds = [f"{seed}-{number}-{each}" for each in range(max(SHUFFLES // len(splits), 2))]
        columns = torch.stack([truth[kept], *(shuffled_labels(own, real, inside, each) for each in seeds)], dim=1)
        for layer, each in enumerate(states):
            scores = held_out_scores(each[kept], columns, inside)
            told = [told_apart(scores[:, place], columns[:, place], inside) for place in range(columns.shape[1])]
            sums[0, layer, kept] += told[0]
            sums[1, layer, kept] += torch.stack(told[1:]).mean(0)
    right, shuffled = sums / (splits >= 0).sum(0)
    return Probed(right, shuffled)
