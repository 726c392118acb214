"""Rows that begin alike share the states there: logits and gradients are those of all rows computed."""

import pytest
import torch

from hfllm.models.family import layers_hfllm, modeling_hfllm, real_tokens_hfllm
from hfllm.models.family.real_tokens_hfllm import Copies, RealTokens

LENGTHS = [[16], [12], [6], [15], [9], [9], [7], [1]]


@pytest.fixture
def rows():
    """Some rows with one beginning, some with a longer one, two equal ones, and one apart."""
    ids = torch.randint(1, 40, (8, 16), generator=torch.Generator().manual_seed(1))
    ids[:7, :4], ids[3:7, :7], ids[5] = ids[0, :4].clone(), ids[3, :7].clone(), ids[4]
    mask = (torch.arange(16) < torch.tensor(LENGTHS)).long()
    is_read = (mask > 0) & (torch.rand(8, 16, generator=torch.Generator().manual_seed(2)) < 0.4)
    is_read[5] = is_read[4] = mask[4] > 0
    return {"input_ids": ids * mask, "attention_mask": mask, "is_read": is_read, "use_cache": False}


def results(model, rows):
    """The logits that are read, and the gradients of the weights."""
    model.zero_grad()
    logits = model(**rows).logits[rows["is_read"]]
    logits.backward(torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape))
    return logits.detach(), [parameter.grad.clone() for parameter in model.parameters()]


KINDS = {
    "plain": {},
    "post": {"norm_placement": "post"},
    "parallel": {"parallel_block": True},
    "learned": {"position_embedding_type": "learned"},
    "windows": {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_rows_share_is_computed_once_and_changes_nothing(kind, make_model, rows, monkeypatch):
    monkeypatch.setattr(real_tokens_hfllm, "LEAST_GAP", 1)
    model, counts = make_model(num_hidden_layers=2, **KINDS[kind]).double().train(), []
    find = modeling_hfllm.real_tokens

    def counted(*given):
        mask, tokens = find(*given)
        counts.append(len(tokens.places))
        return mask, tokens

    monkeypatch.setattr(modeling_hfllm, "real_tokens", counted)
    # Where windows are masked all rows attend at once.
    monkeypatch.setattr(real_tokens_hfllm, "_shares_beginnings", lambda trunk: True)
    shared = results(model, rows)
    monkeypatch.setattr(real_tokens_hfllm, "_shares_beginnings", lambda trunk: False)
    torch.testing.assert_close(shared, results(model, rows))
    beginnings = {
        tuple(row[: at + 1]) for row, n in zip(rows["input_ids"].tolist(), LENGTHS, strict=True) for at in range(*n)
    }
    assert counts == [len(beginnings), int(rows["attention_mask"].sum())]


def test_tokens_that_agree_again_after_a_difference_are_not_shared():
    ids = torch.tensor([[1, 2, 3, 4], [5, 2, 3, 4], [1, 2, 6, 4]])
    first = real_tokens_hfllm._first_cells(ids, torch.ones_like(ids, dtype=torch.bool))
    assert first.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 10, 11]]


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("multiple", [5, 8, 32])
def test_products_of_more_rows_change_nothing(multiple, shares, make_model, rows, monkeypatch):
    monkeypatch.setattr(real_tokens_hfllm, "_shares_beginnings", lambda trunk: shares)
    model = make_model(num_hidden_layers=2).double().train()
    exact = results(model, rows)
    asked = []
    monkeypatch.setattr(
        real_tokens_hfllm, "missing_rows", lambda count, device: asked.append(count) or -count % multiple
    )
    torch.testing.assert_close(results(model, rows), exact)
    assert any(count % multiple for count in asked)


def test_what_differs_between_rows_is_not_shared(make_model, rows):
    """Windows, dropout, noise that a hook adds to embeddings, positions of their own."""

    def count(**axes):
        trunk = make_model(num_hidden_layers=2, **axes).train().model
        given = trunk, rows["attention_mask"], rows["is_read"], rows["input_ids"]
        return trunk, given, len(real_tokens_hfllm.real_tokens(*given)[1].places)

    trunk, given, few = count()
    everything = int(rows["attention_mask"].sum())
    assert few < everything
    assert len(real_tokens_hfllm.real_tokens(*given[:3], None)[1].places) == everything
    for axes in (KINDS["windows"], {"hidden_dropout": 0.1}, {"attention_dropout": 0.1}):
        assert count(**axes)[2] == everything, axes
    trunk.embed_tokens.register_forward_hook(lambda module, args, states: states + torch.rand_like(states))
    assert len(real_tokens_hfllm.real_tokens(*given)[1].places) == everything


def test_rows_with_positions_of_their_own_share_nothing(make_model, rows, monkeypatch):
    model, seen = make_model().train(), []
    forward = layers_hfllm.HfllmMLP.forward
    monkeypatch.setattr(
        layers_hfllm.HfllmMLP, "forward", lambda self, states: seen.append(states.shape[1]) or forward(self, states)
    )
    model(**rows)
    model(**rows, position_ids=torch.arange(16).expand(8, -1) + 1)
    assert seen[0] < seen[-2] == int(rows["attention_mask"].sum())


def test_few_equal_tokens_are_not_worth_it():
    ids = torch.arange(64).view(4, 16)
    ids[:, 0] = 0
    mask = torch.ones_like(ids)
    tokens = RealTokens.of(mask, mask > 0, True, ids)
    assert tokens.copies is None and len(tokens.places) == 64


def test_gradients_of_copies_are_added_up():
    tokens = torch.randn(3, 2, dtype=torch.double, requires_grad=True)
    copies = Copies.of(torch.tensor([2, 0, 2, 1, 2]), 3, torch.tensor([True, True, True, True, False]))
    rows = real_tokens_hfllm._Copy.apply(tokens, *copies)
    rows.backward(torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0]], dtype=torch.double).expand(5, 2))
    assert tokens.grad[:, 0].tolist() == [2.0, 8.0, 5.0]
