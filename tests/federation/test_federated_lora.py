"""Averages of adapters against dense products, PEFT and numpy."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from learners import BASE
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from hfllm.errors import InputError
from hfllm.federation.lora import compress, factors_error, freeze_a, pairs, products, stacked
from hfllm.federation.rounds import weighted_average
from hfllm.federation.updates import Expected, Update, changes

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"


def adapter(seed, rank=2, tokens=1, name=None):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    tensors = {A: draw(rank, 6), B: draw(5, rank), "tokens": draw(3)}
    return Update(name or f"org{seed}", tensors, tokens, 1, BASE)


UPDATES = [adapter(1, 2, 10), adapter(2, 3, 30), adapter(3, 1, 60)]


def mean_product(updates, scalings=None):
    total = sum(each.num_tokens for each in updates)
    return sum(
        each.num_tokens
        / total
        * (scalings or {}).get(each.organisation, 1)
        * each.tensors[B].double()
        @ each.tensors[A].double()
        for each in updates
    )


def test_stacked_is_the_exact_mean_of_any_ranks():
    scalings = {"org1": 2.0, "org3": 0.5}
    for scale in (None, scalings):
        whole = stacked(UPDATES, scale)
        assert whole[A].shape == (6, 6) and whole[B].shape == (5, 6)
        torch.testing.assert_close(products(whole)[LAYER], mean_product(UPDATES, scale), rtol=0, atol=1e-6)
    in_double = [replace(each, tensors={n: v.double() for n, v in each.tensors.items()}) for each in UPDATES]
    torch.testing.assert_close(products(stacked(in_double))[LAYER], mean_product(UPDATES), rtol=0, atol=1e-15)
    mean = sum(each.num_tokens / 100 * each.tensors["tokens"].double() for each in UPDATES)
    torch.testing.assert_close(whole["tokens"], mean)


def test_compression_is_numpy_s_best_of_its_rank():
    whole = {name: value.double() for name, value in stacked(UPDATES).items()}
    u, values, vt = np.linalg.svd(products(whole)[LAYER].numpy())
    for rank in (1, 2, 4):
        small, error = compress(whole, rank)
        assert error == pytest.approx(math.sqrt((values[rank:] ** 2).sum() / (values**2).sum()), rel=1e-9)
        np.testing.assert_allclose(products(small)[LAYER], (u[:, :rank] * values[:rank]) @ vt[:rank], atol=1e-12)
        assert small[A].shape == (rank, 6) and torch.equal(small["tokens"], whole["tokens"])
    # Products of these shapes have rank 5 at most: more is filled up.
    filled, error = compress(whole, 8)
    assert filled[A].shape == (8, 6) and filled[B].shape == (5, 8) and error < 1e-12
    torch.testing.assert_close(products(filled)[LAYER], products(whole)[LAYER])
    with pytest.raises(InputError, match="rank of a compressed adapter is 0"):
        compress(whole, 0)


def test_frozen_a_is_exact_and_factors_apart_are_not():
    received = {A: adapter(9).tensors[A], B: torch.randn(5, 2)}
    both = [replace(each, tensors={A: each.tensors[A], B: each.tensors[B]}) for each in map(adapter, (1, 2, 3))]
    b_alone = [replace(each, tensors={A: torch.zeros(2, 6), B: each.tensors[B]}) for each in both]
    assert factors_error(received, b_alone) < 1e-6
    assert factors_error(received, both) > 0.1


def local_steps(model, rows, names, steps):
    """Train by AdamW, and return the changes of these parameters, which are restored."""
    parameters = {name: value for name, value in model.named_parameters() if name in names}
    received = {name: value.detach().clone() for name, value in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        optimizer.step()
    moved = changes(parameters, received)
    with torch.no_grad():
        for name, value in received.items():
            parameters[name].copy_(value)
    return moved


@pytest.fixture
def adapted(make_model):
    torch.manual_seed(0)
    return get_peft_model(
        make_model(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )


@pytest.mark.slow
def test_trained_adapters_on_a_model(adapted):
    """Local AdamW steps at two organisations: the mean adapter against the mean of merged weights."""
    rows = [torch.randint(5, 300, (2, 12), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    adapter_names = [name for name, value in adapted.named_parameters() if value.requires_grad]
    received = {name: value.detach().clone() for name, value in adapted.named_parameters() if name in adapter_names}

    def errors(names):
        updates = [
            Update(
                str(n),
                {m: torch.zeros_like(v) for m, v in received.items()} | local_steps(adapted, batch, names, 4),
                22,
                2,
                BASE,
            )
            for n, batch in enumerate(rows)
        ]
        return factors_error(received, updates)

    assert errors(adapter_names) > 0.01
    trained = freeze_a(adapted)
    assert trained and not any("lora_A" in name for name in trained) and len(trained) * 2 == len(adapter_names)
    assert errors(trained) < 1e-6


def test_a_stacked_adapter_loads_into_peft(adapted, make_model):
    """Its logits are those of the base whose weights moved by the mean of products."""
    generator = torch.Generator().manual_seed(5)
    state = get_peft_model_state_dict(adapted)
    drawn = [{name: torch.randn(v.shape, generator=generator) * 0.1 for name, v in state.items()} for _ in range(2)]
    updates = [Update(str(n), each, 3 - n, 1, BASE) for n, each in enumerate(drawn)]
    whole = stacked(updates, {"0": 2.0, "1": 2.0})
    settings = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    loaded = get_peft_model(make_model(), settings)
    result = set_peft_model_state_dict(loaded, whole)
    assert not result.unexpected_keys
    plain = make_model()
    with torch.no_grad():
        for layer, change in products(whole).items():
            plain.get_parameter(layer.removeprefix("base_model.model.") + ".weight").add_(change.float())
        ids = torch.arange(5, 15)[None]
        torch.testing.assert_close(loaded(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
        assert (loaded(ids).logits - make_model()(ids).logits).abs().max() > 0.01


def test_other_ranks_are_refused_by_name_unless_stacked():
    small, large = adapter(1, 2), adapter(2, 4, name="bank")
    expected = Expected.of(small.tensors, BASE)
    with pytest.raises(
        InputError, match="'bank' sent an adapter of rank 4; expected rank 2, or the average 'stacked'"
    ):
        weighted_average([small, large], expected)
    replace(expected, any_rank=True).check(large)
    narrow = replace(large, tensors={**large.tensors, A: torch.zeros(4, 7)})
    for check in (replace(expected, any_rank=True).check, lambda each: stacked([small, each])):
        with pytest.raises(InputError, match=r"'bank' sent .*lora_A\.weight"):
            check(narrow)
    with pytest.raises(InputError, match="no pair of factors"):
        stacked([small, replace(large, tensors={**large.tensors, B: torch.zeros(5, 3)})])
    with pytest.raises(InputError, match=r"'bank' sent .*NaN"):
        stacked([small, replace(large, tensors={**large.tensors, B: torch.full((5, 4), math.nan)})])
    with pytest.raises(InputError, match="at least 1"):
        stacked([])


def test_a_model_without_adapters_and_half_a_pair_are_refused(make_model):
    with pytest.raises(InputError, match="the model has none"):
        freeze_a(make_model())
    with pytest.raises(InputError, match="one LoRA factor"):
        pairs({A: torch.zeros(1)})
