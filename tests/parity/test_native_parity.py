"""Converted models compute what the native classes of transformers compute, and convert back to the same bits."""

import re

import pytest
import torch
import transformers
from natives import NATIVES, build
from safetensors import safe_open

import hfllm

TOLERANCE = {"atol": 1e-5, "rtol": 0}


# One of each kind of layer, attention, position and tensor layout; the others differ from one of them in some fields.
FAST = {
    *("llama-biases", "llama-yarn", "mistral", "mixtral", "qwen3-moe", "gpt2", "neox", "falcon-40b", "bigcode"),
    *("phi3", "stablelm-parallel", "gemma3", "gptj", "llama4", "deepseek-v3-experts", "olmo-hybrid", "exaone4"),
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in NATIVES],
)
def pair(request, tmp_path_factory):
    """A native model and ours, converted from its folder."""
    native = build(request.param)
    folder = tmp_path_factory.mktemp("native")
    native.save_pretrained(folder)
    return native, hfllm.from_native(folder), folder


@pytest.fixture
def ids():
    return torch.randint(10, 320, (2, 24), generator=torch.Generator().manual_seed(0))


def uses_cache(model):
    return hasattr(model.config, "use_cache") and model.config.model_type != "openai-gpt"


def check_same_files(folder, other):
    """Check that two folders hold the same weights, byte by byte, in files of the same names."""
    weights, others = (
        {path.name: path.read_bytes() for path in each.glob("*.safetensors*")} for each in (folder, other)
    )
    for name in weights.keys() - {"model.safetensors.index.json"}:
        with safe_open(folder / name, "pt") as one, safe_open(other / name, "pt") as two:
            assert list(one.keys()) == list(two.keys()), name
    assert weights == others


def test_logits(pair, ids):
    native, ours, _ = pair
    torch.testing.assert_close(ours(ids).logits, native(ids).logits, **TOLERANCE)


def test_logits_with_left_and_right_padding(pair, ids):
    native, ours, _ = pair
    left = torch.ones_like(ids)
    left[0, :7] = 0
    right = torch.ones_like(ids)
    right[1, -7:] = 0
    for mask in (left, right):
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        got, expected = ours(ids, **inputs).logits, native(ids, **inputs).logits
        torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **TOLERANCE)


def test_logits_with_a_cache(pair, ids):
    native, ours, _ = pair
    if not uses_cache(native):
        pytest.skip("the native class has no cache")
    ours_first, native_first = ours(ids[:, :16], use_cache=True), native(ids[:, :16], use_cache=True)
    got = ours(ids[:, 16:], cache=ours_first.cache).logits
    # Some native classes call the argument by its old name.
    expected = native(ids[:, 16:], past_key_values=native_first.past_key_values).logits
    torch.testing.assert_close(got, expected, **TOLERANCE)


def test_hidden_states(pair, ids):
    native, ours, _ = pair
    got, expected = (model(ids, output_hidden_states=True).hidden_states for model in (ours, native))
    torch.testing.assert_close(got[1], expected[1], **TOLERANCE)


# With 12 more, 36 tokens are more than every window, and than every context that rotations are scaled from.
def test_greedy_generation(pair, ids):
    native, ours, _ = pair
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    inputs = {"attention_mask": mask}
    if native.config.model_type == "openai-gpt":
        # Its generate passes no positions for padded rows.
        inputs = {}
    assert torch.equal(ours.generate(ids, **inputs, **settings), native.generate(ids, **inputs, **settings))


# Where a window or a chunk is full (5 and 20 tokens), and rotations change (16 and 32).
@pytest.mark.turn(6)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "phi3-long" else pytest.mark.slow) for name in NATIVES]
)
def test_greedy_generation_across_every_switch(name, tmp_path):
    """With a cache in both, the same tokens before and after; phi3's class reads the text again at its switch."""
    native = build(name)
    native.save_pretrained(tmp_path)
    ours, settings = hfllm.from_native(tmp_path), {"do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    for length in (12, 16) if name == "phi3-long" else (4, 14, 16, 19, 31):
        ids = torch.randint(10, 320, (2, length), generator=torch.Generator().manual_seed(length))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 12, **settings}
        got = ours.generate(**inputs)
        assert torch.equal(got, native.generate(**inputs)), length
        if "dynamic" not in name:
            assert torch.equal(got, ours.generate(**inputs, use_cache=False)), length


def test_a_round_trip_gives_the_same_bits(pair, tmp_path):
    native, ours, folder = pair
    hfllm.to_native(ours, tmp_path / "back", native_type=native.config.model_type)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(back) is type(native)
    expected = native.state_dict()
    assert list(back.state_dict()) == list(expected)
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    # What was written: the names, layouts, dtypes and bytes that other programs know of the native class.
    check_same_files(folder, tmp_path / "back")
    again = hfllm.from_native(tmp_path / "back")
    assert again.config.to_dict() == ours.config.to_dict()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "olmo-hybrid", "deepseek-v3-experts"])
def test_shards_and_parts_of_an_export_are_those_of_the_native_class(name, tmp_path):
    for auto_class in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        build(name, auto_class).save_pretrained(tmp_path / "fp32")
        # In half precision some weights stay in fp32.
        native = auto_class.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16)
        folders = [tmp_path / f"{kind}-{auto_class.__name__}" for kind in ("native", "ours")]
        native.save_pretrained(folders[0], max_shard_size="9KB")
        hfllm.to_native(hfllm.from_native(folders[0]), folders[1], max_shard_size="9KB")
        assert len(list(folders[0].glob("*.safetensors"))) > 2
        check_same_files(*folders)


# By our names of native models: the architecture in GGUF.
GGUF = {
    **{"mixtral": "LLAMA", "qwen2-moe": "QWEN2MOE", "qwen3-moe": "QWEN3MOE", "olmoe": "OLMOE", "dots1": "DOTS1"},
    **{"glm4-moe": "GLM4_MOE", "deepseek-v3-experts": "DEEPSEEK2", "deepseek-v2-experts": "DEEPSEEK2"},
}


@pytest.mark.parametrize("name", GGUF)
def test_gguf_knows_every_tensor_of_exported_experts(name, tmp_path):
    """By llama.cpp's own table of names, as its converter asks it: there experts are numbered and stacked."""
    gguf = pytest.importorskip("gguf")
    native = build(name)
    native.save_pretrained(tmp_path / "native")
    hfllm.to_native(hfllm.from_native(tmp_path / "native"), tmp_path / "back", native.config.model_type)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[GGUF[name]], native.config.num_hidden_layers)
    with safe_open(tmp_path / "back" / "model.safetensors", "pt") as file:
        names = list(file.keys())
    stacked = [re.sub(r"\.experts\.\d+\.", ".experts.", each) for each in names]
    assert len(stacked) > len(set(stacked))
    # The converter splits this one, and gives that one another ending, before it looks them up.
    left = {each for each in stacked if not each.endswith(("kv_b_proj.weight", "e_score_correction_bias"))}
    assert not [each for each in left if table.get_name(each, try_suffixes=(".weight", ".bias")) is None]
