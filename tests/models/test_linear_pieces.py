"""Linear attention read in pieces: gradients by hand, and what a layer keeps, against formulas under autograd."""

import contextlib

import pytest
import torch
from torch.func import functional_call, grad, vmap

import hfllm
from hfllm.models.family import delta_rule_hfllm, linear_attention_hfllm
from hfllm.models.family.delta_rule_hfllm import (
    DeltaPiece,
    first_state,
    gated_delta_chunks,
    gated_delta_rule,
    rule_of_piece,
    sequences_in_chunks,
)

SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}


@pytest.fixture
def short_pieces(monkeypatch):
    """Pieces of two chunks of 8 tokens, so that short texts have many."""
    monkeypatch.setattr(delta_rule_hfllm, "piece_length", lambda chunk, rows: 2 * chunk)
    monkeypatch.setattr(linear_attention_hfllm, "piece_length", lambda chunk, rows: 2 * chunk)
    monkeypatch.setattr(linear_attention_hfllm, "chunk_length", lambda chunk, key: 8)


@pytest.fixture
def by_formulas(monkeypatch):
    """A context in which layers of linear attention leave all to autograd."""

    @contextlib.contextmanager
    def turn_off():
        with monkeypatch.context() as patch:
            patch.setattr(linear_attention_hfllm, "needs_autograd", lambda: True)
            patch.setattr(delta_rule_hfllm, "needs_autograd", lambda: True)
            yield

    return turn_off


@pytest.fixture
def ids():
    return torch.randint(10, 300, (2, 45), generator=torch.Generator().manual_seed(0))


def gradients(model):
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def learned(model, ids, **given):
    """Loss and gradients of a step."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False, **given).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def draws(length, dtype=torch.float64):
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, length, 2, 6, dtype=dtype)
    value, state = torch.randn(2, length, 4, 5, dtype=dtype), torch.randn(2, 4, 6, 5, dtype=dtype)
    g, beta = -torch.rand(2, length, 4, dtype=dtype), 2 * torch.rand(2, length, 4, dtype=dtype)
    return [each.requires_grad_() for each in (query, key, value, g, beta, state)]


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("normalizes", [False, True])
def test_gradients_by_hand_are_those_of_autograd(short_pieces, is_packed, normalizes):
    *inputs, state = draws(45)
    packed = (torch.arange(45)[None] // 11) if is_packed else None
    results = []
    for whole in (False, True):
        if whole:
            before = None if packed is None else torch.cat((packed[:, :1], packed), 1)
            first = first_state(state, *inputs[:3])
            output, last = rule_of_piece(*inputs, first, before, 8, normalizes)
            last = last.unflatten(0, (2, 4))
        else:
            settings = {"chunk_size": 8, "initial_state": state, "output_final_state": True, "packed": packed}
            output, last = gated_delta_rule(*inputs, use_qk_l2norm_in_kernel=normalizes, **settings)
            assert "InPieces" in type(output.grad_fn).__name__
        loss = (output * torch.arange(5.0)).sum() + last.square().sum()
        results.append([output, last, *torch.autograd.grad(loss, (*inputs, state))])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-11, rtol=1e-9)


def test_memory_that_is_used_again_leaves_nothing_behind():
    torch.manual_seed(0)
    piece, rows = DeltaPiece(), 3
    for chunks, packed in ((4, None), (4, torch.arange(33)[None] // 5), (2, None), (4, None)):
        shapes = ((8, 6), (8, 6), (8, 5), (8,), (8, 1))
        inputs = [torch.rand(chunks * rows, *shape, dtype=torch.float64) / 2 for shape in shapes]
        inputs = [*inputs[:3], -inputs[3], inputs[4], torch.randn(rows, 6, 5, dtype=torch.float64)]
        inputs = [each.requires_grad_() for each in inputs]
        sequences = None if packed is None else sequences_in_chunks(packed, 1, rows, 8)
        expected = gated_delta_chunks(*inputs, sequences)
        outer = [torch.randn_like(each) for each in expected]
        with torch.no_grad():
            got = [each.clone() for each in piece.forward(*inputs, sequences)]
            grads = piece.backward(*outer)
        torch.testing.assert_close(got, list(expected))
        torch.testing.assert_close(list(grads), list(torch.autograd.grad(expected, inputs, outer)))


def test_derivatives_of_derivatives(short_pieces):
    inputs = [each.detach()[:1, :17].requires_grad_() for each in draws(17)[:5]]
    assert torch.autograd.gradgradcheck(
        lambda *each: gated_delta_rule(*each, chunk_size=4, use_qk_l2norm_in_kernel=True)[0], inputs, fast_mode=True
    )


def test_derivatives_of_a_layers_derivatives(make_model, short_pieces, by_formulas):
    layer = make_model(**LINEAR).model.layers[0].linear_attn
    states = torch.randn(2, 21, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def twice():
        inner = torch.autograd.grad(layer(states).sin().sum(), states, create_graph=True)[0]
        return [inner, *torch.autograd.grad(inner.square().sum(), (states, *layer.parameters()))]

    got = twice()
    with by_formulas():
        expected = twice()
    for mine, theirs in zip(got, expected, strict=True):
        scale = theirs.abs().max()
        torch.testing.assert_close(mine / scale, theirs / scale, atol=1e-5, rtol=1e-3)


def test_it_runs_on_no_device(make_model, ids):
    with torch.device("meta"):
        model = hfllm.HfllmForCausalLM(make_model(**LINEAR).config)
    assert model(ids.to("meta"), use_cache=False).logits.shape[:2] == (2, 45)


@pytest.mark.parametrize("form", ["plain", "padded", "packed", "one tap", "heads", "checkpointing", "hook", "frozen"])
def test_a_layer_in_pieces_learns_what_autograd_learns(make_model, ids, short_pieces, by_formulas, form):
    more = {"linear_num_key_heads": 2, "linear_num_value_heads": 4} if form == "heads" else {}
    more |= {"linear_conv_kernel_dim": 1} if form == "one tap" else {}
    model, given = make_model(**LINEAR, **more).train(), {}
    layer = model.model.layers[0].linear_attn
    if form == "frozen":
        layer.conv1d.requires_grad_(False)
        layer.o_norm.requires_grad_(False)
        layer.g_proj.requires_grad_(False)
    if form == "padded":
        given = {"attention_mask": (torch.arange(45) >= torch.tensor([0, 13])[:, None]).long()}
    if form in ("packed", "one tap"):
        given = {"position_ids": torch.cat([torch.arange(length) for length in (20, 3, 22)])[None].expand(2, -1)}
    with by_formulas():
        expected = learned(model, ids, **given)
    if form == "checkpointing":
        model.gradient_checkpointing_enable()
    seen = []
    if form == "hook":
        layer.o_norm.register_forward_hook(lambda *each: seen.append(each[2].shape))
    got = learned(model, ids, **given)
    assert seen == ([(2, 45, 4, 12)] if form == "hook" else [])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_two_losses_of_one_pass_and_of_two_passes(make_model, ids, short_pieces):
    model = make_model(**LINEAR).train()
    logits = model(ids, use_cache=False).logits
    losses = logits.square().mean(), logits.sin().mean()
    torch.stack(losses).sum().backward()
    expected = gradients(model)
    model.zero_grad()
    logits = model(ids, use_cache=False).logits
    logits.square().mean().backward(retain_graph=True)
    logits.sin().mean().backward()
    torch.testing.assert_close(gradients(model), expected, atol=1e-6, rtol=1e-4)
    model.zero_grad()
    outputs = [model(ids, use_cache=False).logits for _ in range(2)]
    (outputs[0].square().mean() + outputs[1].sin().mean()).backward()
    torch.testing.assert_close(gradients(model), expected, atol=1e-6, rtol=1e-4)


def test_gradients_of_each_example(make_model, ids, short_pieces):
    model = make_model(**LINEAR)
    weights = {name: each.detach() for name, each in model.named_parameters()}

    def loss(weights, row):
        return functional_call(model, weights, (row[None],), {"labels": row[None], "use_cache": False}).loss

    each = vmap(grad(loss), in_dims=(None, 0), randomness="different")(weights, ids)
    expected = learned(model, ids)
    expected.pop("loss")
    torch.testing.assert_close({name: each[name].mean(0) for name in expected}, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_low_precision_is_rounded_as_by_formulas(make_model, ids, short_pieces, by_formulas, precision):
    model = make_model(**LINEAR).to(torch.bfloat16 if precision == "bf16" else torch.float32).train()
    autocast = precision == "autocast"
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got = learned(model, ids)
        with by_formulas():
            expected = learned(model, ids)
    for name in expected:
        scale = expected[name].abs().max() + 1e-6
        torch.testing.assert_close(got[name] / scale, expected[name] / scale, atol=0.03, rtol=0)


@pytest.mark.slow
def test_a_layer_keeps_no_more_than_half_again_of_full_attention():
    """By all tensors that autograd keeps at 1,024 tokens, with sizes of OLMo Hybrid."""

    def kept(kinds):
        torch.manual_seed(0)
        config = hfllm.HfllmConfig(**{**SIZES, "hidden_size": 128, "num_hidden_layers": len(kinds)}, layer_types=kinds)
        model = hfllm.HfllmModel(config).train()
        own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
        found, alive = {}, []

        def pack(tensor):
            alive.append(tensor)
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            alive.append(model(torch.zeros(1, 1024, dtype=torch.long), use_cache=False))
        return sum(size for place, size in found.items() if place not in own)

    full, linear = "full_attention", "linear_attention"
    both = kept([linear, full])
    assert kept([linear, linear, full]) - both < 1.25 * (kept([linear, full, full]) - both)
