"""Linear attention: the rule in chunks and token by token, and models whose layers mix it with others."""

from itertools import pairwise

import pytest
import torch
from families import FAMILIES
from transformers import DynamicCache

from hfllm import HfllmConfig
from hfllm.errors import InputError
from hfllm.generation.caches import bytes_per_token, cache_bytes, make_cache
from hfllm.generation.packed.model import packed_model
from hfllm.generation.speculative.speculative import fast_generate
from hfllm.models.family.delta_rule_hfllm import gated_delta_rule, recurrent_gated_delta_rule

LINEAR, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"
HYBRID = FAMILIES["olmo-hybrid"]
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}


def draws(length, batch=1):
    """Queries, keys, values, decays and strengths, two value heads for each key, and a first state."""
    torch.manual_seed(0)
    query, key = torch.randn(2, batch, length, 2, 8)
    value, state = torch.randn(batch, length, 4, 12), torch.randn(batch, 4, 8, 12)
    g, beta = -torch.rand(batch, length, 4), 2 * torch.rand(batch, length, 4)
    return [each.requires_grad_() for each in (query, key, value, g, beta, state)]


def run(rule, query, key, value, g, beta, state, **more):
    settings = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    return rule(query, key, value, g, beta, **settings, **more)


@pytest.fixture
def ids():
    return torch.randint(10, 300, (2, 90), generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
def test_recurrent_equals_chunked_at_1000_tokens():
    inputs, results = draws(1000), []
    for rule in (gated_delta_rule, recurrent_gated_delta_rule):
        output, state = run(rule, *inputs)
        loss = (output * torch.linspace(-1, 1, 12)).sum() + state.square().sum()
        results.append([output, state, *torch.autograd.grad(loss, inputs)])
    for place, (chunked, recurrent) in enumerate(zip(*results, strict=True)):
        scale = 1 if place < 2 else max(1, recurrent.abs().max())
        torch.testing.assert_close(chunked / scale, recurrent / scale, atol=2e-6, rtol=0)


def test_the_rule_is_that_of_the_paper():
    """S_t = S_{t-1} (a_t (I - b_t k_t k_t')) + b_t v_t k_t' (arXiv:2412.06464, equation 10), o_t = S_t q_t."""
    query, key, value, g, beta, _ = (each.detach().double() for each in draws(5))
    output, _ = gated_delta_rule(query, key, value, g, beta)
    for head in range(4):
        state = torch.zeros(12, 8, dtype=torch.float64)
        for t in range(5):
            k, v, q = key[0, t, head // 2], value[0, t, head], query[0, t, head // 2]
            a, b = g[0, t, head].exp(), beta[0, t, head]
            state = state @ (a * (torch.eye(8) - b * torch.outer(k, k))) + b * torch.outer(v, k)
            torch.testing.assert_close(output[0, t, head], state @ q / 8**0.5)


def test_derivatives_are_exact():
    inputs = [each.detach().double()[:, :6].requires_grad_() for each in draws(6)[:5]]
    assert torch.autograd.gradcheck(lambda *args: gated_delta_rule(*args, chunk_size=4)[0], inputs, fast_mode=True)


@pytest.mark.parametrize("cuts", [[0, 5, 6, 70, 71, 150], [0, 64, 128, 150], [0, 1, 2, 3, 150]])
def test_packed_sequences_are_apart_in_the_rule(cuts):
    query, key, value, g, beta, _ = (each.detach() for each in draws(150, batch=2))
    # Slow enough that much of a state would be left after the chunk in which its sequence ends.
    g = 0.01 * g
    packed = torch.zeros(1, 150, dtype=torch.long)
    packed[:, cuts[1:-1]] = 1
    normed = {"use_qk_l2norm_in_kernel": True}
    output, _ = gated_delta_rule(query, key, value, g, beta, packed=packed.cumsum(-1), **normed)
    for begin, end in pairwise(cuts):
        alone, _ = gated_delta_rule(*(each[:, begin:end] for each in (query, key, value, g, beta)), **normed)
        torch.testing.assert_close(output[:, begin:end], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kinds", [[LINEAR, FULL], [SLIDING, LINEAR]])
@pytest.mark.parametrize("cuts", [[0, 2, 70, 71, 90], list(range(91))], ids=["pieces", "tokens"])
def test_pieces_and_tokens_equal_the_whole(make_model, ids, kinds, cuts):
    model = make_model(layer_types=kinds, sliding_window=7 if SLIDING in kinds else None)
    cache, logits = None, []
    with torch.no_grad():
        for begin, end in pairwise(cuts):
            output = model(ids[:, begin:end], cache=cache, use_cache=True)
            cache = output.cache
            logits.append(output.logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits, atol=5e-5, rtol=0)


def test_padding_and_packing_with_padding(make_model, ids):
    """Longer than a chunk, with documents that end inside of chunks."""
    model, lengths = make_model(**HYBRID), (50, 3, 37)
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    with torch.no_grad():
        alone = torch.cat([model(part).logits for part in ids.split(lengths, dim=1)], dim=1)
        packed = model(ids, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(packed, alone, atol=5e-5, rtol=0)
        pad = torch.zeros(2, 9, dtype=torch.long)
        mask = torch.cat((pad, torch.ones_like(ids)), dim=1)
        padded = torch.cat((pad, ids), dim=1), torch.cat((pad[:1], positions), dim=1)
        got = model(padded[0], attention_mask=mask, position_ids=padded[1], use_cache=False).logits[:, 9:]
        torch.testing.assert_close(got, alone, atol=5e-5, rtol=0)
        got = model(padded[0], attention_mask=mask).logits[:, 9:]
        torch.testing.assert_close(got, model(ids).logits, atol=5e-5, rtol=0)


def test_every_kind_of_generation_gives_the_same(make_model, ids):
    model, ids = make_model(**HYBRID), ids[:, :12]
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 8, "eos_token_id": -1, "do_sample": False}
    expected = model.generate(ids, use_cache=False, **settings)
    for way in ({}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(model.generate(ids, **settings, **way), expected)
    beams = model.generate(ids, num_beams=3, **settings)
    assert torch.equal(beams, model.generate(ids, num_beams=3, use_cache=False, **settings))


def test_the_state_does_not_grow(make_model, ids):
    model = make_model(layer_types=[LINEAR, FULL])
    sizes = []
    with torch.no_grad():
        for length in (40, 80):
            cache = make_cache(model, "dynamic", 100)
            model(ids[:, :length], cache=cache)
            sizes.append(cache_bytes(cache))
    each = bytes_per_token(model.config, torch.float32)
    assert each == 2 * 2 * 8 * 4 and sizes[1] - sizes[0] == 2 * 40 * each
    with pytest.raises(InputError, match="quantizes no state of linear_attention"):
        make_cache(model, "fp8", 100)


@pytest.mark.parametrize("kinds", [[LINEAR, FULL], [SLIDING, LINEAR, FULL]])
@pytest.mark.parametrize("length", [1, 2, 12])
def test_undone_tokens_leave_no_trace(make_model, ids, kinds, length):
    sizes = {"layer_types": kinds, "num_hidden_layers": len(kinds), "initializer_range": 0.3}
    sizes |= {"sliding_window": 5} if SLIDING in kinds else {}
    model, draft = make_model(**sizes), make_model(**sizes)
    # A draft that is right about some tokens.
    with torch.no_grad():
        draft.lm_head.weight.add_(torch.randn_like(draft.lm_head.weight), alpha=0.1)
    # The prompt repeats, so that looking up in it drafts as well.
    prompt = ids[:1, :length].repeat(1, 2)
    settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(prompt, **settings)
    for drafts in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": draft}, {"assistant_model": model}):
        if hasattr(DynamicCache, "get_recurrent_states_to_keep"):
            assert torch.equal(model.generate(prompt, **settings, **drafts), expected)
        else:  # transformers before 5.25, whose caches keep no states to go back to
            with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
                model.generate(prompt, **settings, **drafts)


def test_decoders_that_keep_no_states_refuse_by_name(make_model, ids):
    model, ids = make_model(**HYBRID), ids[:1, :12]
    with pytest.raises(InputError, match="layers of type linear_attention: use its own generate"):
        model.generate(ids, custom_generate=fast_generate, max_new_tokens=3)
    with pytest.raises(InputError, match="it has layers of type linear_attention"):
        packed_model(model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer_types": [LINEAR, LINEAR]}, "layer_types has linear_attention alone: at least one layer must be"),
        ({"layer_types": [LINEAR, FULL], "is_causal": False}, "'linear_attention' needs is_causal=True"),
        ({"layer_types": [LINEAR, FULL], "parallel_block": True}, "needs parallel_block=False"),
        ({"layer_types": [LINEAR, FULL], "norm_placement": "post"}, "norm_placement='pre' or 'output', got .* 'post'"),
        ({"layer_types": [LINEAR, FULL], "linear_num_key_heads": 3}, "linear_num_key_heads=3 must divide"),
        ({"layer_types": [LINEAR, FULL], "linear_key_head_dim": 0}, "linear_key_head_dim must be at least 1, got 0"),
        ({"layer_types": [LINEAR, FULL], "linear_dt_min": 1.0}, "linear_dt_min=1.0 must lie between 0"),
        ({"layer_types": ["linear", FULL]}, "did you mean 'linear_attention'"),
    ],
)
def test_what_describes_no_model_is_refused(values, message):
    with pytest.raises(Exception, match=message):
        HfllmConfig(**SIZES | values)


def test_initial_decays_are_between_their_limits(make_model):
    layer = make_model(layer_types=[LINEAR, FULL], linear_a_log_min=1, linear_a_log_max=4).model.layers[0].linear_attn
    assert bool(((layer.A_log.exp() >= 1) & (layer.A_log.exp() <= 4)).all())
    steps = torch.nn.functional.softplus(layer.dt_bias)
    assert bool(((steps >= 0.00099) & (steps <= 0.101)).all())


@pytest.mark.slow
@pytest.mark.turn(2)
def test_training_compiles_as_one_graph(make_model, ids):
    model, results = make_model(**HYBRID), []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        loss = call(ids, labels=ids, use_cache=False).loss
        loss.backward()
        results.append([loss, *[parameter.grad.clone() for parameter in model.parameters()]])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
