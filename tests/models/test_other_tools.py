"""Tools that point at a model of transformers find in ours what they find there: adapters, hooks, `torch.func`."""

import pytest
import torch
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jvp, vmap
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama import modeling_llama

import hfllm
from hfllm.models.family import layers_hfllm
from hfllm.models.family.attention_hfllm import HfllmRotaryEmbedding, apply_rotary_pos_emb
from hfllm.models.family.layers_hfllm import HfllmMLP, HfllmRMSNorm, rms_norm


@pytest.fixture
def ids():
    return torch.randint(10, 300, (2, 12), generator=torch.Generator().manual_seed(0))


def llama_of(model, folder):
    return AutoModelForCausalLM.from_pretrained(hfllm.to_native(model, folder, "llama"), dtype=torch.float32).eval()


class TestAdaptersOnScaledEmbeddings:
    def test_untrained_tokens_change_nothing(self, make_model, ids):
        model = make_model(**FAMILIES["gemma"])
        expected = model(ids).logits
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 20]))
        torch.testing.assert_close(adapted.eval()(input_ids=ids).logits, expected)

    def test_merged_equals_adapted(self, make_model, ids):
        config = LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False)
        adapted = get_peft_model(make_model(**{**FAMILIES["gemma"], "tie_word_embeddings": False}), config).eval()
        expected = adapted(input_ids=ids).logits
        torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, expected, atol=1e-5, rtol=1e-5)

    def test_the_factor_is_rounded_as_in_gemma(self, make_model, ids):
        model = make_model(**FAMILIES["gemma"]).to(torch.bfloat16)
        table = model.model.embed_tokens
        expected = table.weight[ids] * torch.tensor(32**0.5, dtype=torch.bfloat16)
        assert torch.equal(table(ids), expected)


LLAMAS_ARGUMENTS = {
    *("hidden_states", "attention_mask", "position_ids", "cache", "use_cache", "position_embeddings"),
}


class TestHooks:
    @pytest.mark.parametrize("act", ["silu", "linear"])
    def test_what_a_hook_keeps_stays_as_it_was(self, make_model, ids, act):
        # So wide that without hooks the product is made in place.
        model, kept, ids = make_model(hidden_act=act, intermediate_size=1024), {}, ids.repeat(1, 8)
        mlp = model.model.layers[0].mlp
        for name in ("gate_proj", "act_fn"):

            def keep(module, args, output, name=name):
                kept[name] = output, output.clone()

            getattr(mlp, name).register_forward_hook(keep)
        with torch.no_grad():
            model(ids)
        assert kept["act_fn"][0].numel() > 2**16
        for now, then in kept.values():
            assert torch.equal(now, then)
        torch.testing.assert_close(kept["act_fn"][0], mlp.act_fn(kept["gate_proj"][0]))

    def test_what_a_hook_keeps_of_an_identity_stays_as_it_was(self, make_model, ids):
        model, kept = make_model(hidden_act="linear", intermediate_size=1024), []
        gate = model.model.layers[0].mlp.gate_proj
        gate.register_forward_hook(lambda module, args, output: kept.extend((output, output.clone())))
        with torch.no_grad():
            model(ids.repeat(1, 8))
        assert torch.equal(*kept)

    @pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
    @pytest.mark.parametrize("name", ["act_fn", "down_proj"])
    def test_they_run_once_in_training(self, make_model, ids, name, kind):
        model, calls = make_model().train(), []
        module = getattr(model.model.layers[0].mlp, name)
        getattr(module, f"register_{kind}_hook")(lambda *_: calls.append(1))
        model(ids, labels=ids).loss.backward()
        assert calls == [1]

    def test_hooks_on_all_modules_run_once_in_training(self, make_model, ids):
        model, calls = make_model().train(), []
        handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(module))
        try:
            model(ids, labels=ids).loss.backward()
        finally:
            handle.remove()
        assert calls.count(model.model.layers[0].mlp.act_fn) == 1

    def test_a_hook_on_the_head_sees_the_chunked_loss(self, make_model, ids):
        model, seen = make_model().train(), []
        expected = model(ids, labels=ids, loss_chunk_size=5).loss
        model.lm_head.register_forward_hook(lambda _, given, logits: seen.append(len(logits)))
        loss = model(ids, labels=ids, loss_chunk_size=5).loss
        loss.backward()
        torch.testing.assert_close(loss, expected)
        assert sum(seen) == ids.numel()

    def test_attention_is_called_by_llamas_names(self, make_model, ids, tmp_path):
        ours, seen = make_model(), []
        more = {"is_causal"}  # which Llama's config does not have
        for model in (ours, llama_of(ours, tmp_path / "native")):

            def look(module, args, kwargs):
                cos, sin = kwargs["position_embeddings"]
                seen.append((args, kwargs["hidden_states"], cos, sin))
                assert kwargs.keys() - more == LLAMAS_ARGUMENTS

            model.model.layers[1].self_attn.register_forward_pre_hook(look, with_kwargs=True)
            model(ids)
        torch.testing.assert_close(*seen)

    def test_a_hook_may_change_what_attention_gets(self, make_model, ids):
        model = make_model()
        expected = model(ids, position_ids=torch.arange(12)[None] * 0 + 5).logits

        def at_five(module, args, kwargs):
            cos, sin = kwargs["position_embeddings"]
            kwargs["position_embeddings"] = tuple(part[:, 5:6].expand_as(part) for part in (cos, sin))
            return args, kwargs

        for layer in model.model.layers:
            layer.self_attn.register_forward_pre_hook(at_five, with_kwargs=True)
        torch.testing.assert_close(model(ids).logits, expected)


def saved_bytes(model, ids):
    """Bytes that autograd keeps for the backward pass beside the weights, each storage once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids, labels=ids).loss.backward()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(size for storage, size in kept.items() if storage not in weights)


def test_recomputation_is_a_switch(make_model, ids, monkeypatch):
    """What it saves: for each layer the activation and its product, each (tokens, intermediate_size)."""
    model = make_model(intermediate_size=256).train()
    lean, gradients = saved_bytes(model, ids), [parameter.grad.clone() for parameter in model.parameters()]
    monkeypatch.setattr(HfllmMLP, "recompute", False)
    model.zero_grad()
    whole = saved_bytes(model, ids)
    assert whole - lean == pytest.approx(2 * 2 * ids.numel() * 256 * 4, rel=0.1)
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], gradients)


@pytest.mark.parametrize("bias", [False, True])
def test_the_gated_product_has_first_and_second_derivatives(bias):
    shapes = (2, 3, 4), (2, 3, 4), (5, 4), (5,)
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    given[3] = given[3] if bias else None
    product = layers_hfllm._GatedDown.apply
    torch.testing.assert_close(
        product(*given), nn.functional.linear(nn.functional.silu(given[1]) * given[0], *given[2:])
    )
    assert torch.autograd.gradcheck(product, given)
    assert torch.autograd.gradgradcheck(product, given)


@pytest.mark.parametrize("trained", ["up_proj", "down_proj"])
def test_the_gated_product_trains_what_is_trained(make_model, ids, trained, monkeypatch):
    """Adapters on any part, and frozen weights."""
    adapter = LoraConfig(target_modules=[trained], init_lora_weights=False)
    model = get_peft_model(make_model(), adapter).train()
    gradients = []
    for recomputes in (True, False):
        monkeypatch.setattr(HfllmMLP, "recompute", recomputes)
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    assert all(trained in name for name in gradients[0])
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("unit_offset", [False, True])
def test_the_norms_gradient_on_a_cpu(unit_offset):
    """By a kernel for layer norms: with states far from a mean of 0, and a gradient without memory of its own."""
    states, weight = torch.randn(7, 3, 32) + 2, torch.randn(32)
    gradients = []
    for norm in (layers_hfllm._RMSNorm.apply, rms_norm):
        given = [each.clone().requires_grad_() for each in (states, weight)]
        norm(*given, 1e-5, unit_offset).backward(torch.linspace(-1, 3, 32).expand(7, 3, 32))
        gradients.append([each.grad for each in given])
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


@pytest.fixture(params=["llama", "gemma", "gpt2", "chunked"])
def transformed(make_model, request, ids):
    """The loss as a function of weights and tokens, the weights, and the gradient by an ordinary backward pass."""
    axes = {"loss_chunk_size": 5} if request.param == "chunked" else FAMILIES[request.param]
    model = make_model(**axes).train()
    # The fused attention of a CPU has no forward-mode derivative.
    model.set_attn_implementation("eager")
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(weights, ids):
        return functional_call(model, weights, (ids,), {"labels": ids, "use_cache": False}).loss

    gradients = []
    for row in ids:
        model.zero_grad()
        model(row[None], labels=row[None]).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    return loss, weights, gradients


def test_gradients_of_each_example(transformed, ids):
    loss, weights, gradients = transformed
    each = vmap(grad(loss), in_dims=(None, 0))(weights, ids[:, None])
    for name in weights:
        expected = torch.stack([gradient[name] for gradient in gradients])
        torch.testing.assert_close(each[name], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (torch._C, "_are_functorch_transforms_active"),
        (forward_ad, "_current_level"),
        (torch.nn.modules.module, "_global_forward_hooks"),
    ],
)
def test_a_torch_without_its_private_names_takes_the_way_that_is_always_right(
    owner, name, make_model, ids, monkeypatch
):
    """It only saves more for the backward pass: gradients are the same."""

    class Without:
        def __init__(self, module):
            self.module = module

        def __getattr__(self, asked):
            if self.module is owner and asked == name:
                raise AttributeError(asked)
            value = getattr(self.module, asked)
            return Without(value) if value is owner else value

    model = make_model(intermediate_size=256, loss_chunk_size=5).train()
    lean, gradients = saved_bytes(model, ids), [parameter.grad.clone() for parameter in model.parameters()]
    for part in ("torch", "forward_ad", "every_module"):
        monkeypatch.setattr(layers_hfllm, part, Without(getattr(layers_hfllm, part)))
    model.zero_grad()
    assert saved_bytes(model, ids) > lean
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], gradients, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_forward_derivatives(transformed, ids):
    loss, weights, (gradient, _) = transformed
    ways = {name: torch.randn_like(weight) for name, weight in weights.items()}
    expected = sum((gradient[name] * ways[name]).sum() for name in weights)
    forward = jvp(lambda weights: loss(weights, ids[:1]), (weights,), (ways,))[1]
    torch.testing.assert_close(forward, expected, atol=1e-4, rtol=1e-4)
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(weight, ways[name]) for name, weight in weights.items()}
        forward = forward_ad.unpack_dual(loss(duals, ids[:1])).tangent
    torch.testing.assert_close(forward, expected, atol=1e-4, rtol=1e-4)


def test_jacobian_and_hessian_of_one_norm(make_model, ids):
    model = make_model(num_hidden_layers=1).train()
    model.set_attn_implementation("eager")
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    name = "model.layers.0.input_layernorm.weight"

    def loss(weight):
        return functional_call(model, {**weights, name: weight}, (ids,), {"labels": ids, "use_cache": False}).loss

    torch.testing.assert_close(jacfwd(loss)(weights[name]), grad(loss)(weights[name]), atol=1e-5, rtol=1e-4)
    second = hessian(loss)(weights[name])
    torch.testing.assert_close(second, second.T, atol=1e-5, rtol=1e-4)
    assert second.abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_is_llamas_in_every_precision(dtype):
    ours, theirs = HfllmRMSNorm(32, 1e-5), modeling_llama.LlamaRMSNorm(32, 1e-5)
    torch.manual_seed(0)
    with torch.no_grad():
        ours.weight.copy_(torch.randn(32))
        theirs.weight.copy_(ours.weight)
    ours, theirs, states = ours.to(dtype), theirs.to(dtype), torch.randn(3, 7, 32).to(dtype)
    results = []
    for norm in (ours, theirs):
        given = states.clone().requires_grad_()
        out = norm(given)
        out.backward(torch.ones_like(out))
        with torch.no_grad():
            assert torch.equal(norm(states), out)
        results.append((out, given.grad, norm.weight.grad))
    torch.testing.assert_close(results[0][0], results[1][0], atol=0, rtol=0)
    torch.testing.assert_close(
        results[0][1:], results[1][1:], atol=2e-2 if dtype != torch.float32 else 1e-5, rtol=2e-2
    )


def test_the_norm_of_several_weights_at_once():
    states, weights = torch.randn(3, 8), torch.randn(4, 8)
    with torch.no_grad():
        together = vmap(lambda weight: rms_norm(states, weight, 1e-5, False))(weights)
    torch.testing.assert_close(together, torch.stack([rms_norm(states, each, 1e-5, False) for each in weights]))


class TestRotary:
    def test_it_is_llamas(self, make_config):
        config = make_config(head_dim=16)
        names = ("hidden_size", "num_attention_heads", "head_dim", "max_position_embeddings", "rope_parameters")
        theirs = modeling_llama.LlamaRotaryEmbedding(LlamaConfig(**{name: getattr(config, name) for name in names}))
        states, positions = torch.randn(2, 9, 32), torch.arange(9).repeat(2, 1)
        cos, sin = HfllmRotaryEmbedding(config)(states, positions)
        assert cos.shape == (2, 9, 16)
        torch.testing.assert_close((cos, sin), theirs(states, positions), atol=0, rtol=0)
        query, key = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16)
        expected = modeling_llama.apply_rotary_pos_emb(query, key, cos, sin)
        torch.testing.assert_close(apply_rotary_pos_emb(query, key, cos, sin), expected)
        turned = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), cos, sin, unsqueeze_dim=2)
        torch.testing.assert_close(tuple(part.transpose(1, 2) for part in turned), expected)

    @pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
    def test_scaling_changes_the_frequencies_as_defined(self, make_config, kind):
        """Linear scaling divides positions; dynamic scaling begins beyond the context."""
        longest, factor = 96, 8
        plain = HfllmRotaryEmbedding(make_config(max_position_embeddings=64))
        rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": factor}
        scaled = HfllmRotaryEmbedding(make_config(max_position_embeddings=64, rope_parameters=rope))
        states = torch.randn(1, 1, 32)
        short, long = torch.arange(10)[None], torch.arange(longest)[None]
        before, after = plain(states, short)[0], scaled(states, short)[0]
        stretched = scaled(states, long)[0]
        if kind == "linear":
            torch.testing.assert_close(stretched[:, ::factor], plain(states, long)[0][:, : longest // factor])
        if kind == "dynamic":
            torch.testing.assert_close(after, before)
            assert (scaled.inv_freq <= plain.inv_freq).all() and (scaled.inv_freq < plain.inv_freq).any()
        else:
            assert not torch.allclose(after, before)
            torch.testing.assert_close(stretched[:, :10], after)
        assert not torch.allclose(stretched, plain(states, long)[0])


@pytest.mark.slow
@pytest.mark.turn(2)
@pytest.mark.parametrize("chunk", [0, 5])
def test_training_with_experts_compiles_as_one_graph(make_model, ids, chunk):
    model = make_model(num_hidden_layers=1, **FAMILIES["mixtral"]).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(input_ids=ids, labels=ids, use_cache=False, loss_chunk_size=chunk).loss
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    expected = model(input_ids=ids, labels=ids, use_cache=False).loss
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, [parameter.grad for parameter in model.parameters()], atol=1e-5, rtol=1e-4)
