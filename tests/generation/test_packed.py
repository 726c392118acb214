"""The packed form of a model says what the model says, and follows its weights."""

import copy
import gc
import weakref

import pytest
import torch
from families import FAMILIES, MIXED_LAYERS
from torch import nn

from hfllm.errors import InputError
from hfllm.generation.packed import model as projections
from hfllm.generation.packed.model import PackedModel, has_int8, joined, packed_model, packs, unsupported_reason
from hfllm.generation.packed.ragged_model import RaggedModel

needs_int8 = pytest.mark.skipif(not has_int8(torch.float32, torch.device("cpu")), reason="no fbgemm here")


# The others are refused by name.
UNPACKED = ("gemma3", "olmo-hybrid", "deepseek", "llama4-chunks")
PACKED = {kind: axes for kind, axes in FAMILIES.items() if kind not in UNPACKED}
PACKED["mixed-layers"] = {**MIXED_LAYERS, "num_hidden_layers": 2}


def ragged_logits(model, forward, ids, mask):
    """Logits behind prompts (B, 1, V), and of three further tokens of each row, (B, 3, V)."""
    lengths, runner = mask.sum(1), RaggedModel(model, 24, forward)
    right = torch.zeros_like(ids)
    for row, length in enumerate(lengths.tolist()):
        right[row, :length] = ids[row, -length:]
    last = lengths + 10
    with torch.no_grad():
        first = runner.prefill(right, lengths, last, lengths.tolist())
        tokens = torch.tensor([[5, 6, 7]]).expand(len(ids), -1)
        columns = lengths.unsqueeze(1) + torch.arange(3)
        return first, runner(tokens, columns, last, int(lengths.max()) + 3)


@pytest.mark.parametrize("kind", list(PACKED))
def test_every_axis_in_fp64(kind, make_target, prompts):
    model = make_target(**PACKED[kind])
    wanted = ragged_logits(model, None, *prompts(4))
    torch.testing.assert_close(ragged_logits(model, PackedModel(model), *prompts(4)), wanted, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", list(PACKED))
def test_rows_of_one_length_in_fp32(kind, make_target, prompts):
    """Without a mask, against the whole sequence at once; norms have a formula of their own in this type."""
    model = make_target(**PACKED[kind]).float()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    ids = prompts(1, length=12)[0].expand(3, -1) + torch.arange(3).unsqueeze(1)
    runner, last = RaggedModel(model, 12, PackedModel(model)), torch.full((3,), 11)
    with torch.no_grad():
        runner.prefill(ids[:, :9], torch.full((3,), 9), last, [9, 9, 9])
        columns = [torch.full((3, 1), column) for column in range(9, 12)]
        found = [runner(ids[:, at : at + 1], columns[at - 9], last, at + 1, level=True) for at in range(9, 12)]
        wanted = model(input_ids=ids).logits[:, 9:]
    torch.testing.assert_close(torch.cat(found, dim=1), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights(dtype, rows, make_target, prompts, monkeypatch):
    monkeypatch.setattr(projections, "PACKED_FROM", 0)
    if not packs(dtype):
        pytest.skip(f"oneDNN packs no {dtype} here")
    model = make_target(num_key_value_heads=2, attention_bias=True, mlp_bias=True).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    wanted = ragged_logits(model, None, *prompts(rows))
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
    torch.testing.assert_close(ragged_logits(model, packed_model(model), *prompts(rows)), wanted, **tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_as_the_model_does(dtype, make_target, prompts):
    model = make_target(initializer_range=0.3).to(dtype)
    wanted = ragged_logits(model, None, *prompts(4))
    found = ragged_logits(model, PackedModel(model), *prompts(4))
    assert all(map(torch.equal, found, wanted))


@needs_int8
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kernel", ["fbgemm", "int_mm", "half of the range"])
def test_int8_is_off_by_half_a_step_at_most(kernel, bias, monkeypatch):
    """Rows a thousand times apart keep their own scale; a row of zeros stays zero."""
    largest = projections.largest_weight() if kernel == "fbgemm" else 127
    if kernel == "int_mm":
        monkeypatch.setattr(projections, "FBGEMM", "kernels that torch has removed")
    if kernel == "half of the range":
        monkeypatch.setattr(projections, "largest_weight", lambda: 63)
        largest = 63
    torch.manual_seed(0)
    first, second = nn.Linear(64, 8, bias=bias), nn.Linear(64, 5, bias=False)
    first.weight.data *= torch.logspace(-2, 1, 8).unsqueeze(1)
    first.weight.data[3] = 0
    states = torch.randn(6, 64)
    with torch.no_grad():
        wanted = torch.cat((first(states), second(states)), dim=-1)
        found = joined([first, second], int8=True)(states)
        # Half a step of each weight, and a quarter of a percent of the inputs' range each.
        weights = torch.cat((first.weight, second.weight)).abs()
        steps = weights.amax(1) / (2 * largest)
        bound = steps * states.abs().sum(1, keepdim=True) + states.abs().max() / 127 * weights.sum(1)
    assert ((found - wanted).abs() <= bound + 1e-6).all()
    assert (found - wanted).norm() < 2.5 / largest * wanted.norm()


@needs_int8
def test_sums_of_the_fast_kernels_do_not_overflow():
    """All weights and inputs are large and of one sign, as no model has them."""
    linear = nn.Linear(256, 16, bias=False)
    nn.init.uniform_(linear.weight, 0.9, 1.0, generator=torch.Generator().manual_seed(0))
    states = torch.full((3, 256), 2.0)
    torch.testing.assert_close(joined([linear], int8=True)(states), linear(states).detach(), atol=0, rtol=0.01)


def test_the_plain_int8_product_is_of_integers(monkeypatch):
    """Weights and states that are int8 already, with sums that a product in float32 would round on the way."""
    monkeypatch.setattr(projections, "FBGEMM", "kernels that torch has removed")
    generator = torch.Generator().manual_seed(0)
    weight, states = (torch.randint(90, 128, (16, 8192), generator=generator).float() for _ in range(2))
    # Each row's largest is 127: its scale is 1, and nothing is rounded before the product.
    weight[:, 0], states[:, 1] = 127, 127
    linear = nn.Linear(8192, 16, bias=False)
    linear.weight = nn.Parameter(weight)
    exact = (states.long().unsqueeze(1) * weight.long()).sum(-1)
    assert exact.min() > 2**25
    assert torch.equal(joined([linear], int8=True)(states), exact.float())


def changed_in_place(model):
    with torch.no_grad():
        model.lm_head.weight.neg_()


def changed_behind_the_back(model):
    model.model.layers[0].mlp.down_proj.weight.data.neg_()


def loaded(model):
    model.load_state_dict({name: -tensor for name, tensor in model.state_dict().items()})


def replaced(model):
    model.model.layers[1].self_attn.q_proj.weight = nn.Parameter(-model.model.layers[1].self_attn.q_proj.weight)


@pytest.mark.parametrize("change", [changed_in_place, changed_behind_the_back, loaded, replaced])
def test_new_weights_are_copied_again(change, make_target, prompts):
    model = make_target(tie_word_embeddings=False)
    before = packed_model(model)
    assert packed_model(model) is before
    change(model)
    assert packed_model(model) is not before
    wanted = ragged_logits(model, None, *prompts(2))
    torch.testing.assert_close(ragged_logits(model, packed_model(model), *prompts(2)), wanted, atol=1e-9, rtol=1e-9)


def test_copies_go_with_their_model(make_target):
    model = make_target().float()
    packed_model(model)
    twin = copy.deepcopy(model)
    assert packed_model(twin) is not packed_model(model)
    seen = weakref.ref(packed_model(model))
    del model
    gc.collect()
    assert seen() is None


def test_reasons_against_it(make_target):
    assert unsupported_reason(make_target()) is None
    assert "Linear is not of the family" in unsupported_reason(nn.Linear(2, 2))
    assert "training mode" in unsupported_reason(make_target().train())
    eager = make_target()
    eager.set_attn_implementation("eager")
    assert "not 'sdpa'" in unsupported_reason(eager)
    hooked = make_target()
    hooked.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert "model.layers.0.mlp has hooks" in unsupported_reason(hooked)
    wrapped = make_target()
    wrapped.model.layers[0].mlp.down_proj = nn.Sequential(wrapped.model.layers[0].mlp.down_proj)
    assert "down_proj is a Sequential" in unsupported_reason(wrapped)
    # Also under a second name nearer to the root.
    wrapped.watched = wrapped.model.layers[0].mlp.down_proj
    assert "down_proj is a Sequential" in unsupported_reason(wrapped)
    with pytest.raises(InputError, match=r"cannot decode over packed weights: .*Sequential"):
        packed_model(wrapped)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in unsupported_reason(make_target())
    offloaded = make_target()
    offloaded.model.layers[1].to("meta")
    assert "offloaded" in unsupported_reason(offloaded)


def test_int8_needs_fp32(make_target):
    with pytest.raises(InputError, match="int8 drafts need a float32 model"):
        packed_model(make_target(), "int8")


def test_a_table_of_angles_grows_with_the_text(make_target, prompts):
    """Positions beyond the context that the config names go on as the model's own do."""
    model = make_target(max_position_embeddings=8)
    packed = PackedModel(model)
    for rows in (1, 4):
        wanted = ragged_logits(model, None, *prompts(rows, length=6))
        torch.testing.assert_close(
            ragged_logits(model, packed, *prompts(rows, length=6)), wanted, atol=1e-9, rtol=1e-9
        )
