"""Latent attention: one small vector per token in the place of all heads' keys and values."""

import copy

import pytest
import torch
import transformers
from transformers import StaticCache
from transformers.cache_utils import DynamicCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale

import hfllm
from hfllm.errors import InputError
from hfllm.generation.caches import bytes_per_token, cache_bytes, make_cache
from hfllm.generation.packed.model import packed_model
from hfllm.generation.speculative.speculative import fast_generate
from hfllm.models.family.attention_hfllm import HfllmLatentAttention, yarn_factor
from hfllm.scaling.shapes import Shape
from hfllm.trainers.distillation.students import smaller_student

LATENT = {
    **{"kv_lora_rank": 16, "q_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6},
    "num_key_value_heads": 4,
}
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 16}
AXES = {
    "deepseek": {"rope_interleave": True},
    "no-query-latent": {"q_lora_rank": None, "attention_bias": True},
    "wide-values": {"v_head_dim": 20, "norm_placement": "both", "norm_unit_offset": True},
    "mixed": {"layer_types": [SLIDING, FULL], "sliding_window": 5, "no_rope_layers": [1, 0]},
    "hybrid": {"layer_types": [LINEAR, FULL]},
    "scaled": {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}},
    "no-positions": {"position_embedding_type": "none", "parallel_block": True},
    "softcap": {"attn_logit_softcapping": 5.0},
    "experts": {"num_local_experts": 4},
}


@pytest.fixture(params=AXES, ids=list(AXES))
def latent(make_model, request):
    return make_model(**LATENT | AXES[request.param])


@pytest.fixture
def ids():
    return torch.randint(10, 300, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def ways(monkeypatch):
    """How often keys and values were spread, and how often latents were looked at."""
    counts = {"_spread": 0, "_attend_to_latents": 0}

    def count(name, function):
        def counted(self, *args):
            counts[name] += 1
            return function(self, *args)

        monkeypatch.setattr(HfllmLatentAttention, name, counted)

    for name in counts:
        count(name, getattr(HfllmLatentAttention, name))
    return counts


def read(model, ids, sizes, cache, mask=None):
    """The logits of pieces of these sizes, over and over."""
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    at, pieces = 0, []
    with torch.no_grad():
        while at < ids.shape[1]:
            end = min(at + sizes[len(pieces) % len(sizes)], ids.shape[1])
            more = {} if mask is None else {"attention_mask": mask[:, :end], "position_ids": positions[:, at:end]}
            pieces.append(model(ids[:, at:end], cache=cache, **more).logits)
            at = end
    return torch.cat(pieces, 1)


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_tokens_one_by_one_and_in_pieces_equal_the_plain_pass(latent, ids, attention, kind):
    if attention == "sdpa" and latent.config.attn_logit_softcapping:
        pytest.skip("sdpa has no softcap")
    latent.set_attn_implementation(attention)
    expected = latent(ids).logits
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    padded = latent(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    for sizes in ([1, 24, *[1] * 15], [9, 1, 3, 17]):
        assert_near(read(latent, ids, sizes, make_cache(latent, kind, 48)), expected)
    got = read(latent, ids, [9, 1, 3, 17], make_cache(latent, kind, 48), mask)
    assert_near(got[mask.bool()], padded[mask.bool()])


def test_a_cache_holds_latents_and_is_looked_at_as_it_is(make_model, ids, ways):
    model = make_model(**LATENT)
    cache = DynamicCache(config=model.config)
    read(model, ids, [39, 1], cache)
    assert ways == {"_spread": 2, "_attend_to_latents": 2}
    assert [tuple(part.shape) for part in (cache.layers[0].keys, cache.layers[0].values)] == [
        (2, 1, 40, 16),
        (2, 1, 40, 4),
    ]
    held = 2 * 40 * bytes_per_token(model.config, torch.float32)
    shape = Shape.from_config(model.config.to_dict())
    assert cache_bytes(cache) == held == 2 * shape.cache_bytes(40, 4)
    full = make_model(num_key_value_heads=4)
    assert bytes_per_token(full.config, torch.float32) == 64 / 20 * bytes_per_token(model.config, torch.float32)


def test_the_planner_counts_its_weights(latent):
    count = sum(parameter.numel() for parameter in latent.parameters())
    assert latent.config.num_parameters() == count
    assert Shape.from_config(latent.config.to_dict()).num_parameters() == count


@pytest.mark.parametrize("changed", ["hook", "adapter", "switch", "training", "subclass"])
def test_what_would_be_passed_over_is_asked(make_model, ids, ways, changed):
    """Hooks and adapters on `kv_b_proj` see every token again; the result is that of a whole pass."""
    model, called = make_model(**LATENT), []
    outer = model
    for attention in (layer.self_attn for layer in model.model.layers):
        if changed == "hook":
            attention.kv_b_proj.register_forward_hook(lambda *arguments: called.append(1))
        if changed == "switch":
            attention.absorb = False
        if changed == "subclass":
            attention.kv_b_proj.__class__ = type("Linear8bit", (torch.nn.Linear,), {})
    if changed == "adapter":
        from peft import LoraConfig, get_peft_model

        outer = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False)).eval()
        names = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in outer.named_modules() if "lora_A" in name}
        assert names == {"q_b_proj", "kv_b_proj"}
    if changed == "training":
        model.train()
    expected = outer(ids).logits
    called.clear()
    assert_near(read(outer, ids, [39, 1], DynamicCache(config=model.config)), expected)
    assert ways["_attend_to_latents"] == 0 and len(called) == (4 if changed == "hook" else 0)


def test_attention_functions_agree(make_model, ids):
    """Those with kernels of one size get padded heads."""
    for size in (6, 20):
        model = make_model(**LATENT | {"v_head_dim": size, "sliding_window": 5})
        model.set_attn_implementation("eager")
        expected = model(ids).logits
        for name in ("sdpa", "banded"):
            model.set_attn_implementation(name)
            assert_near(model(ids).logits, expected)
        whole = make_model(**LATENT | {"v_head_dim": size})
        expected = whole(ids).logits
        whole.config.sparse_block_size, whole.config.sparse_num_blocks = 4, 10
        whole.set_attn_implementation("sparse")
        assert_near(whole(ids).logits, expected)
        whole.config.sparse_num_blocks = 3
        chosen = whole(ids).logits
        assert (chosen - expected).abs().max() > 1e-3
        assert_near(read(whole, ids, [9, 1, 3, 17], DynamicCache(config=whole.config)), chosen)


@pytest.mark.slow
@pytest.mark.turn(2)
@torch.no_grad()
def test_flex_attention_agrees(make_model, ids):
    """Without a window: the kernel that torch 2.13 makes of one for a CPU is no valid C++ for some lengths."""
    for size in (6, 20):
        model = make_model(**LATENT | {"v_head_dim": size})
        expected = model(ids).logits
        model.set_attn_implementation("flex_attention")
        assert_near(model(ids).logits, expected)
        assert_near(read(model, ids, [39, 1], DynamicCache(config=model.config)), expected)


def test_a_window_in_blocks(make_model):
    model = make_model(**LATENT | {"sliding_window": 8})
    ids = torch.randint(10, 300, (1, 300), generator=torch.Generator().manual_seed(0))
    got = model(ids).logits
    model.set_attn_implementation("eager")
    assert_near(got, model(ids).logits)


class Stored(torch.Tensor):
    """Stands for another tensor and can only be multiplied, as torchao's quantized weights."""

    @staticmethod
    def __new__(cls, kept):
        return torch.Tensor._make_wrapper_subclass(cls, kept.shape, dtype=kept.dtype)

    def __init__(self, kept):
        self.kept = kept

    def __tensor_flatten__(self):
        return ["kept"], None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            return function(args[0], args[1].kept, *args[2:], **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].kept)
        raise NotImplementedError(function)


def test_weights_that_cannot_be_cut_are_multiplied(make_model, ids, ways):
    model = make_model(**LATENT | AXES["deepseek"])
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **settings)
    assert ways["_attend_to_latents"]
    ways["_attend_to_latents"] = 0
    for layer in model.model.layers:
        weight = Stored(layer.self_attn.kv_b_proj.weight.detach())
        layer.self_attn.kv_b_proj.weight = torch.nn.Parameter(weight, requires_grad=False)
    assert torch.equal(model.generate(ids, **settings), expected) and not ways["_attend_to_latents"]


def test_losses_and_gradients_are_those_of_the_native_class(make_model, ids, tmp_path):
    """In one row of two packed documents too, which the native class reads one after the other."""
    model = make_model(**LATENT, rope_interleave=True, rope_parameters=AXES["scaled"]["rope_parameters"])
    hfllm.to_native(model, tmp_path / "native", "deepseek_v3")
    native = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    packed = torch.cat((torch.arange(15), torch.arange(25)))[None]
    for labels, positions in ((ids, None), (ids[:1], packed)):
        for each in (model, native):
            each.zero_grad()
        model(labels, labels=labels, position_ids=positions).loss.backward()
        parts = [labels] if positions is None else labels.split((15, 25), dim=1)
        targets = sum(part[:, 1:].numel() for part in parts)
        if positions is not None:
            labels = labels.clone()
            labels[0, 15] = -100
            model.zero_grad()
            model(ids[:1], labels=labels, position_ids=positions).loss.backward()
        for part in parts:
            (native(part, labels=part).loss * part[:, 1:].numel() / targets).backward()
        theirs = dict(native.named_parameters())
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.turn(2)
def test_it_compiles_as_one_graph(make_model, ids, ways):
    model = make_model(**LATENT, rope_interleave=True)
    expected, cache = model(ids).logits, StaticCache(config=model.config, max_cache_len=48)
    with torch.no_grad():
        model(ids[:, :30], cache=cache)
        compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        for name in ways:
            ways[name] = 0
        for at in range(30, 33):
            got = compiled(ids[:, at : at + 1], cache=cache, position_ids=torch.tensor([[at]])).logits
            assert_near(got[:, 0], expected[:, at])
    # In the graph too.
    assert ways["_spread"] == 0 and ways["_attend_to_latents"] > 0


def test_generation_in_every_way(make_model, ids):
    model = make_model(**LATENT, rope_interleave=True)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    model.generation_config.eos_token_id = None
    expected = model.generate(ids, use_cache=False, **settings)
    for way in (
        {},
        {"cache_implementation": "static", "disable_compile": True},
        {"custom_generate": fast_generate},
    ):
        assert torch.equal(model.generate(ids, **settings, **way), expected), way
    beams = [model.generate(ids, num_beams=3, use_cache=cached, **settings) for cached in (True, False)]
    assert torch.equal(*beams)
    settings["attention_mask"] = mask[1:]
    assisted = model.generate(ids[1:], prompt_lookup_num_tokens=3, **settings)
    assert torch.equal(assisted, model.generate(ids[1:], **settings))


@pytest.mark.parametrize("mscale", [0, 0.7, 1.0])
def test_scaled_positions_scale_the_scores_as_in_deepseek(make_model, mscale):
    rope = {**YARN, "mscale": 1.0, "mscale_all_dim": mscale}
    one = make_model(**LATENT, rope_parameters=copy.deepcopy(rope))
    scaling = one.model.layers[0].self_attn.scaling
    assert scaling == pytest.approx(yarn_apply_mscale(rope, 12**-0.5), rel=1e-12)
    assert (yarn_factor(one.config, 0) > 1) == (mscale > 0)
    mixed = {"layer_types": [SLIDING, FULL], "sliding_window": 5}
    plain = {"rope_type": "default", "rope_theta": 1e4}
    both = make_model(**LATENT, **mixed, rope_parameters={SLIDING: plain, FULL: copy.deepcopy(rope)})
    scalings = [layer.self_attn.scaling for layer in both.model.layers]
    assert scalings == pytest.approx([12**-0.5, scaling], rel=1e-12)


def test_sizes_follow_from_the_width(make_config):
    config = make_config(kv_lora_rank=16, hidden_size=64, num_key_value_heads=None)
    sizes = (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, config.head_dim)
    assert sizes == (16, 8, 16, 8) and config.num_key_value_heads == 4
    plain = make_config()
    assert not hasattr(plain, "qk_head_dim") and plain.kv_lora_rank is None
    shape = Shape.from_config(
        {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "kv_lora_rank": 16}
        | {"vocab_size": config.vocab_size, "max_position_embeddings": 256}
    )
    assert shape.num_parameters() == config.num_parameters()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kv_lora_rank": 0}, "kv_lora_rank must be at least 1, got 0"),
        ({"q_lora_rank": 0}, "q_lora_rank must be at least 1, got 0"),
        ({"qk_nope_head_dim": 0}, "qk_nope_head_dim must be at least 1, got 0"),
        ({"qk_rope_head_dim": 0}, "qk_rope_head_dim must be at least 1, got 0"),
        ({"qk_rope_head_dim": 5}, "qk_rope_head_dim=5 must be even"),
        ({"v_head_dim": -1}, "v_head_dim must be at least 1, got -1"),
        ({"v_head_dim": "wide"}, "v_head_dim"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2 must be num_attention_heads=4 with kv_lora_rank"),
        ({"head_dim": 16}, "head_dim=16 must be qk_rope_head_dim=4 with kv_lora_rank, or None"),
        ({"qk_norm": True}, "qk_norm=True has no place with kv_lora_rank"),
        ({"kv_lora_rank": None}, "q_lora_rank=12 needs kv_lora_rank, got None"),
        ({**dict.fromkeys(LATENT), "rope_interleave": True}, "rope_interleave=True needs kv_lora_rank, got None"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5 has no place with kv_lora_rank: qk_rope_head_dim is what is rotated",
        ),
    ],
)
def test_what_describes_no_model_is_refused_in_one_line(make_config, values, message):
    with pytest.raises(Exception, match=message) as error:
        make_config(**LATENT | values)
    assert len(str(error.value).splitlines()) <= 2  # the first is the strict dataclass's own


def test_sizes_set_later_are_checked_when_a_model_is_built(make_config):
    config = make_config(**LATENT)
    config.qk_nope_head_dim = 16
    model = hfllm.HfllmForCausalLM(config)
    assert config.num_parameters() == sum(parameter.numel() for parameter in model.parameters())
    config.qk_rope_head_dim = 8
    with pytest.raises(ValueError, match="head_dim=4 must be qk_rope_head_dim=8"):
        hfllm.HfllmForCausalLM(config)


def test_what_is_refused_by_name(make_model, tmp_path):
    model = make_model(**LATENT)
    with pytest.raises(InputError, match=r"it has latent attention \(kv_lora_rank=16\)"):
        packed_model(model)
    with pytest.raises(ValueError, match=r"continuous batching has no pages for latent attention \(kv_lora_rank=16\)"):
        model.generate_batch([[10, 11, 12]])
    with pytest.raises(InputError, match="llama has no place for kv_lora_rank=16"):
        hfllm.to_native(model, tmp_path / "llama", "llama")
    with pytest.raises(InputError, match="deepseek_v3 refuses this model: kv_lora_rank=None"):
        hfllm.to_native(make_model(), tmp_path / "deepseek", "deepseek_v3")
    with pytest.raises(InputError, match="minicpm3 has no place for rope_interleave=True"):
        hfllm.to_native(make_model(**LATENT, rope_interleave=True), tmp_path / "minicpm3", "minicpm3")


def test_a_narrower_student_keeps_the_sizes_of_heads(make_model):
    student = smaller_student(make_model(**LATENT), hidden_size=16)
    assert student.config.hidden_size == 16 and student.config.v_head_dim == 6
    assert student(torch.arange(10, 20)[None]).logits.shape == (1, 10, student.config.vocab_size)
