"""Probes: equal to an independent solution, right on a planted direction, at chance where nothing is there."""

import pytest
import torch

from hfllm.errors import InputError
from hfllm.evaluation.interpreting.measures import (
    entity_folds,
    held_out_scores,
    probe,
    shuffled_labels,
    token_halves,
    told_apart,
)


@pytest.fixture
def rows():
    """Twelve entities of each kind with five rows each, and states of three layers: a direction from the second on."""
    generator = torch.Generator().manual_seed(0)
    entities = [f"{kind}-{number}" for kind in (0, 1) for number in range(12) for _ in range(5)]
    labels = [int(entity[0]) for entity in entities]
    of_entity = torch.randn(24, 16, generator=generator).repeat_interleave(5, 0)
    states = torch.stack([of_entity + torch.randn(120, 16, generator=generator) for _ in range(3)])
    states[1:, :, 3] += 6.0 * torch.tensor(labels)
    return states, entities, labels


def test_a_planted_direction_is_found_from_its_layer_on(rows):
    states, entities, labels = rows
    found = probe(states, entities, labels, entity_folds(entities, labels))
    auc, shuffled = found.right.mean(1), found.shuffled.mean(1)
    assert auc[0] < 0.7 and auc[1:].min() > 0.95
    assert (shuffled - 0.5).abs().max() < 0.15


def test_scores_equal_least_squares_with_rows_for_the_penalty(rows):
    """Independently: ridge is least squares with a row for each weight that wants it to be 0."""
    states, entities, labels = rows
    folds, truth = entity_folds(entities, labels)[0], torch.tensor(labels)
    scores = held_out_scores(states[1], truth[:, None], folds)[:, 0]
    train, test = folds != 2, folds == 2
    features = states[1].double()
    features = (features - features[train].mean(0)) / features[train].std(0)
    root = (0.5 / truth[train].bincount()[truth[train]].double()).sqrt()[:, None]
    ones = torch.ones(120, 1, dtype=torch.double)
    left = torch.cat([root * torch.cat([features, ones], 1)[train], torch.eye(17, dtype=torch.double)[:16]])
    right = torch.cat([root * (2.0 * truth[train] - 1)[:, None], torch.zeros(16, 1, dtype=torch.double)])
    solution = torch.linalg.lstsq(left, right).solution[:, 0]
    # The bias, which is at the mean of both kinds, where their labels cancel out.
    expected = torch.cat([features, ones], 1)[test] @ solution
    torch.testing.assert_close(scores[test], expected, atol=1e-8, rtol=1e-8)


def test_told_apart_is_the_share_of_pairs_in_the_right_order():
    generator = torch.Generator().manual_seed(1)
    scores, labels = torch.randint(0, 6, (60,), generator=generator).double(), torch.arange(60) % 3 == 0
    share = told_apart(scores, labels.long(), torch.zeros(60, dtype=torch.long))
    pairs = [(one > other) + 0.5 * (one == other) for one in scores[labels] for other in scores[~labels]]
    area = float(sum(pairs)) / len(pairs)
    assert float(share[labels].mean()) == pytest.approx(area) == pytest.approx(float(share[~labels].mean()))
    # Rows of other folds do not count.
    alone = told_apart(torch.tensor([1.0, 0.0, 2.0, 3.0]), torch.tensor([1, 0, 1, 0]), torch.tensor([0, 0, 1, 1]))
    assert alone.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_no_entity_is_on_both_sides(rows):
    _, entities, labels = rows
    for folds in (entity_folds(entities, labels)[0], torch.tensor([place // 60 for place in range(120)])):
        for entity in set(entities):
            assert len({int(fold) for fold, each in zip(folds, entities, strict=True) if each == entity}) == 1
    shuffled = shuffled_labels(entities, labels, entity_folds(entities, labels)[0], 3)
    assert shuffled.tolist() != labels and sum(shuffled.tolist()) == sum(labels)
    assert all(
        len({int(s) for s, e in zip(shuffled, entities, strict=True) if e == entity}) == 1 for entity in entities
    )
    with pytest.raises(InputError, match="at least 5 subjects of each kind, and one has 2"):
        entity_folds(["a", "b", "c"], [0, 0, 1])


def test_halves_share_no_token_of_an_entity():
    names = [(first, second) for first in range(8) for second in range(8, 16)]
    tokens = [*({each, 99} for each in range(100, 112)), *({*name, 99} for name in names)]
    labels = [1] * 12 + [0] * len(names)
    splits = token_halves(tokens, [str(each) for each in tokens], labels, 4)
    assert len(splits) == 4
    for folds in splits.tolist():
        sides = [
            set().union(*(each for each, fold in zip(tokens, folds, strict=True) if fold == half)) for half in (0, 1)
        ]
        # Both kinds have the token 99, which tells nothing.
        assert sides[0] & sides[1] == {99} and -1 in folds
    assert not len(token_halves(tokens[:2], ["a", "b"], [1, 0], 4))
