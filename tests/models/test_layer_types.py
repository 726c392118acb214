"""Layers that differ: windows, positions and rotations by layer."""

import json

import pytest
import torch
from families import FAMILIES, MIXED_LAYERS
from transformers import AutoConfig
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticCache, StaticSlidingWindowLayer

import hfllm
from hfllm import HfllmConfig
from hfllm.errors import InputError
from hfllm.generation.packed.model import packed_model
from hfllm.generation.packed.ragged_model import ragged_model
from hfllm.generation.speculative.speculative import fast_generate

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}


@pytest.fixture
def ids():
    return torch.randint(10, 300, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("window", "expected"), [(None, FULL), (5, SLIDING)])
def test_the_list_is_always_filled(window, expected, tmp_path):
    config = HfllmConfig(**SIZES, sliding_window=window)
    assert config.layer_types == [expected] * 2
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved.pop("layer_types") == [expected] * 2
    # As configs were saved before they had the field.
    del saved["no_rope_layers"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert AutoConfig.from_pretrained(tmp_path).layer_types == [expected] * 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer_types": [FULL]}, "layer_types names 1 layers, and num_hidden_layers=2"),
        ({"layer_types": [FULL, "slidding"]}, "'slidding' is not one of .*did you mean 'sliding_attention'"),
        ({"layer_types": [FULL, SLIDING]}, "'sliding_attention' needs sliding_window, got None"),
        ({"layer_types": [FULL, SLIDING], "sliding_window": 0}, "sliding_window must be at least 1 or None, got 0"),
        ({"layer_types": [FULL, FULL], "sliding_window": 4}, "sliding_window=4 needs a 'sliding_attention'"),
        ({"layer_types": [SLIDING, FULL], "sliding_window": 4, "is_causal": False}, "needs is_causal=True"),
        ({"layer_types": [CHUNKED, FULL]}, "'chunked_attention' needs attention_chunk_size, got None"),
        (
            {"layer_types": [FULL, FULL], "attention_chunk_size": 4},
            "attention_chunk_size=4 needs a 'chunked_attention'",
        ),
        ({"attention_chunk_size": 0}, "attention_chunk_size must be at least 1 or None, got 0"),
        ({"attention_chunk_size": 4, "is_causal": False}, "attention_chunk_size=4 needs is_causal=True"),
        (
            {"layer_types": [SLIDING, CHUNKED], "attention_chunk_size": 4, "sliding_window": 4},
            "layer_types has sliding_attention and chunked_attention: ",
        ),
        ({"lm_head_bias": True, "logit_scale": 0.5}, "lm_head_bias=True needs logit_scale=1, got 0.5"),
        ({"no_rope_layers": [1]}, r"no_rope_layers=\[1\] must be one 0 .* or 1 for each of num_hidden_layers=2"),
        ({"no_rope_layers": [1, 2]}, r"no_rope_layers=\[1, 2\]"),
        ({"no_rope_layers": [1, 0], "position_embedding_type": "none"}, "needs position_embedding_type='rope'"),
        (
            {"layer_types": [SLIDING, FULL], "sliding_window": 4, "rope_parameters": {FULL: {"rope_theta": 1e4}}},
            "dictionaries for full_attention, and none for sliding_attention",
        ),
        (
            {"rope_parameters": {FULL: {"rope_theta": 1e4, "rope_type": "foo"}}},
            "rope_type='foo'",
        ),
    ],
)
def test_what_describes_no_model_is_refused_in_one_line(values, message):
    with pytest.raises(Exception, match=message) as error:
        HfllmConfig(**SIZES | values)
    assert len(str(error.value).splitlines()) <= 2  # the first is the strict dataclass's own


def test_layers_set_later_are_checked_when_a_model_is_built():
    config = HfllmConfig(**SIZES, vocab_size=50, sliding_window=4, layer_types=[FULL, SLIDING])
    config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="layer_types names 2 layers"):
        hfllm.HfllmForCausalLM(config)


@pytest.mark.slow
def test_layers_of_one_kind_follow_what_is_set_when_a_model_is_loaded(make_model, tmp_path, ids):
    """What people do with any model of transformers: take its first layers, take its window away, give it one."""
    model = make_model(num_hidden_layers=3)
    model.save_pretrained(tmp_path)
    fewer = hfllm.HfllmForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2)
    assert fewer.config.layer_types == [FULL] * 2 and len(fewer.model.layers) == 2
    model.model.layers = model.model.layers[:2]
    torch.testing.assert_close(fewer(ids).logits, model(ids).logits)
    windowed = hfllm.HfllmForCausalLM.from_pretrained(tmp_path, sliding_window=3)
    assert windowed.config.layer_types == [SLIDING] * 3
    windowed.save_pretrained(tmp_path / "windowed")
    whole = hfllm.HfllmForCausalLM.from_pretrained(tmp_path / "windowed", sliding_window=None)
    assert whole.config.layer_types == [FULL] * 3
    plain = hfllm.HfllmForCausalLM.from_pretrained(tmp_path)(ids).logits
    torch.testing.assert_close(whole(ids).logits, plain)
    assert (windowed(ids).logits - plain).abs().max() > 1e-3


def test_layers_beside_linear_ones_follow_the_window(make_model, tmp_path, ids):
    model = make_model(layer_types=["linear_attention", FULL])
    model.save_pretrained(tmp_path)
    windowed = hfllm.HfllmForCausalLM.from_pretrained(tmp_path, sliding_window=3)
    assert windowed.config.layer_types == ["linear_attention", SLIDING]
    assert (windowed(ids).logits - model(ids).logits).abs().max() > 1e-3
    windowed.config.sliding_window = None
    windowed.config.save_pretrained(tmp_path)
    whole = hfllm.HfllmForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(whole(ids).logits, model(ids).logits, atol=0, rtol=0)


def test_what_is_filled_in_follows_a_config_that_is_edited_and_saved(tmp_path):
    config = HfllmConfig(**SIZES, vocab_size=50, sliding_window=4, no_rope_layers=[0, 0])
    config.num_hidden_layers, config.sliding_window = 3, None
    config.save_pretrained(tmp_path)
    saved = HfllmConfig.from_pretrained(tmp_path)
    assert saved.layer_types == [FULL] * 3 and saved.no_rope_layers == [0] * 3
    config.layer_types = None
    assert len(hfllm.HfllmForCausalLM(config).model.layers) == 3 and config.layer_types == [FULL] * 3
    config.layer_types = ["linear_attention", FULL, FULL]
    hfllm.HfllmForCausalLM(config)
    assert config.linear_num_key_heads == config.num_attention_heads


def test_linear_layers_refuse_masks_that_they_cannot_follow(make_model, ids):
    model = make_model(num_hidden_layers=2, layer_types=["linear_attention", FULL])
    with pytest.raises(ValueError, match="linear attention takes an attention_mask of two dimensions"):
        model(ids, attention_mask=torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril())


def test_only_layers_with_a_window_forget(make_model, ids):
    """What a token more than a window back holds reaches the last one through the full layer alone."""
    values = {"num_hidden_layers": 1, "sliding_window": 3}
    other = ids.clone()
    other[:, 5] = 7
    for kind, forgets in ((SLIDING, True), (FULL, False)):
        more = values if forgets else {"num_hidden_layers": 1}
        model = make_model(**more, layer_types=[kind])
        assert torch.equal(model(ids).logits[:, -1], model(other).logits[:, -1]) == forgets


def test_a_layer_without_positions_is_a_model_without_them(make_model, ids):
    one = make_model(no_rope_layers=[0, 0])
    plain = make_model(position_embedding_type="none")
    plain.load_state_dict(one.state_dict())
    torch.testing.assert_close(one(ids).logits, plain(ids).logits, atol=0, rtol=0)
    assert make_model(no_rope_layers=[1, 1]).config.no_rope_layers is None


def test_each_type_turns_by_its_own_parameters(make_model, ids):
    """The layers of a model with two rotations are those of two models with one each."""
    both = make_model(**FAMILIES["gemma3"])
    states = both.model.embed_tokens(ids)
    rope = both.config.rope_parameters
    for kind, rotary in both.model.rotary_emb.items():
        alone = make_model(rope_parameters=rope[kind]).model.rotary_emb
        positions = torch.arange(12).unsqueeze(0)
        for got, expected in zip(rotary(states, positions), alone(states, positions), strict=True):
            assert torch.equal(got, expected)


def test_rotations_are_rebuilt_from_the_meta_device(make_model, ids, tmp_path):
    model = make_model(**FAMILIES["gemma3"])
    model.save_pretrained(tmp_path)
    again = hfllm.HfllmForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_caches_follow_the_layers(make_model):
    model = make_model(**MIXED_LAYERS)
    # Flash kernels take no mask, but this.
    assert [layer.self_attn.sliding_window for layer in model.model.layers] == [5, None]
    cache = model(torch.arange(10, 20).unsqueeze(0), use_cache=True).cache
    assert [type(layer) is DynamicSlidingWindowLayer for layer in cache.layers] == [True, False]
    assert [layer.keys.shape[2] for layer in cache.layers] == [4, 10]
    static = StaticCache(model.config, max_cache_len=20)
    assert [type(layer) is StaticSlidingWindowLayer for layer in static.layers] == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("axes", [MIXED_LAYERS, FAMILIES["gemma3"]], ids=["mixed", "gemma3"])
def test_generation_in_every_way(make_model, ids, axes):
    model = make_model(**axes)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 12, "eos_token_id": -1, "do_sample": False}
    expected = model.generate(ids, use_cache=False, **settings)
    ways = [{}, {"cache_implementation": "static", "disable_compile": True}, {"custom_generate": fast_generate}]
    for way in ways:
        assert torch.equal(model.generate(ids, **settings, **way), expected), way


def test_lean_decoding_masks_each_layer(make_model, ids):
    model = make_model(**MIXED_LAYERS)
    columns, last = torch.arange(12).expand(2, -1), torch.full((2,), 11)
    with torch.inference_mode():
        logits = ragged_model(model, 12, packed=True)(ids, columns, last, 12)
    torch.testing.assert_close(logits, model(ids).logits, atol=1e-5, rtol=0)


def test_a_packed_model_with_two_rotations_is_refused(make_model):
    with pytest.raises(InputError, match="rotary parameters of their own"):
        packed_model(make_model(**FAMILIES["gemma3"]))


def test_scores_are_capped_by_functions_that_can(make_model, ids):
    """Eager attention is the default then; a function that would ignore the limit is refused, however it is chosen."""
    model = make_model(attn_logit_softcapping=0.5)
    assert model.config._attn_implementation == "eager"
    free = make_model(attn_implementation="eager")
    free.load_state_dict(model.state_dict())
    assert not torch.allclose(model(ids).logits, free(ids).logits, atol=1e-4)
    with pytest.raises(ValueError, match="attn_implementation='sdpa' has no attn_logit_softcapping"):
        model.set_attn_implementation("sdpa")
    model.config._attn_implementation_internal = "sdpa"
    with pytest.raises(ValueError, match="attn_implementation='sdpa' has no attn_logit_softcapping"):
        model(ids)


def test_the_bias_of_a_head_is_in_every_form_of_it(make_model, ids):
    results = []
    for chunk in (0, 5):
        model = make_model(lm_head_bias=True)
        with torch.no_grad():
            model.lm_head.bias.normal_()
        loss = model.train()(ids, labels=ids, loss_chunk_size=chunk).loss
        loss.backward()
        results.append([loss, *[parameter.grad for parameter in model.parameters()]])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    assert model.num_parameters() == model.config.num_parameters()
    columns, last, model = torch.arange(12).expand(2, -1), torch.full((2,), 11), model.eval()
    with torch.inference_mode():
        logits = ragged_model(model, 12, packed=True)(ids, columns, last, 12)
    torch.testing.assert_close(logits, model(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("runs_once", [False, True])
def test_the_chunked_loss_caps_logits(make_model, ids, runs_once):
    results = []
    for chunk in (0, 5):
        model = make_model(final_logit_softcapping=0.5).train()
        if runs_once:
            model.lm_head.register_forward_hook(lambda module, args, output: None)
        loss = model(ids, labels=ids, loss_chunk_size=chunk).loss
        loss.backward()
        results.append([loss, *[parameter.grad for parameter in model.parameters()]])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"norm_placement": "both"}, "norm_placement='both'"),
        ({"norm_placement": "output"}, "norm_placement='output'"),
        ({"qk_norm": True, "qk_norm_scope": "all_heads"}, "qk_norm_scope='all_heads'"),
        ({"final_logit_softcapping": 3.0}, "final_logit_softcapping=3.0"),
        (FAMILIES["llama4-chunks"], "layers of type chunked_attention"),
    ],
)
def test_packed_models_name_what_they_lack(make_model, fields, reason):
    with pytest.raises(InputError, match=reason):
        packed_model(make_model(**fields))


@pytest.mark.parametrize(
    "values",
    [
        {"norm_placement": "both", "parallel_block": True},
        {"attn_logit_softcapping": 0},
        {"final_logit_softcapping": -1.0},
        {"query_pre_attn_scalar": 0},
        {"qk_norm_scope": "layer"},
    ],
)
def test_other_axes_are_checked(values):
    with pytest.raises(Exception, match=next(iter(values))):
        HfllmConfig(**SIZES | values)
