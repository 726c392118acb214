"""Every scheme: quantized layers against the reference, saved and reloaded, with an adapter, and refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, SiglipVisionConfig

import hfllm
from hfllm.compression import int8, schemes
from hfllm.compression.int8 import METHOD, DynamicInt8Linear
from hfllm.errors import InputError

# Quantized scales change the numbers of a layer, which other tests compare, and not how it is kept or learned on.
ONE_OF_4_BITS = [
    pytest.param(name, marks=pytest.mark.slow) if name == "nf4_double" else name for name in schemes.SCHEMES
]
IDS = torch.arange(2, 34).reshape(2, 16)


@pytest.fixture
def folder(make_model, tmp_path):
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "full")
    return tmp_path / "full"


def load(name, folder):
    pytest.importorskip("bitsandbytes")
    return schemes.get_scheme(name).load(str(folder))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", schemes.SCHEMES)
def test_a_saved_model_reloads_to_the_same_numbers(name, folder, tmp_path):
    full = AutoModelForCausalLM.from_pretrained(folder)
    model = load(name, folder)
    # Before it runs: bitsandbytes lays 4-bit weights out anew then, and scales lose what they were stored as.
    model.save_pretrained(tmp_path / "quantized")
    before = logits(model)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized").eval()
    assert again.config.quantization_config.quant_method
    assert torch.equal(logits(again), before)
    relative = (before - logits(full)).norm() / logits(full).norm()
    assert 0 < relative < (0.6 if name.startswith("nf4") else 0.06)
    names = schemes.linear_names(full)
    assert len(names) == 14
    assert all(type(model.get_submodule(layer)) is not torch.nn.Linear for layer in names)
    assert type(model.lm_head) is torch.nn.Linear
    share = schemes.linear_bytes(model, names) / schemes.linear_bytes(full, names)
    assert share < 0.3
    saved = sum(path.stat().st_size for path in (tmp_path / "quantized").glob("*.safetensors"))
    assert saved == pytest.approx(schemes.stored_bytes(model), rel=0.25)


@pytest.mark.parametrize("name", schemes.SCHEMES)
def test_one_layer_converts_to_what_a_whole_model_gets(name, folder):
    layer = "model.layers.1.mlp.down_proj"
    full = AutoModelForCausalLM.from_pretrained(folder).eval()
    model = load(name, folder)
    inputs = torch.randn(5, full.get_submodule(layer).in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        converted = schemes.get_scheme(name).convert(full.get_submodule(layer))(inputs)
        assert torch.equal(converted, model.get_submodule(layer)(inputs))


@pytest.mark.parametrize("name", ONE_OF_4_BITS)
def test_skipped_layers_stay_as_they_were_also_after_reloading(name, folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    full = AutoModelForCausalLM.from_pretrained(folder)
    scheme = schemes.get_scheme(name, ["v_proj", "model.layers.1"])
    scheme.load(str(folder)).save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    kept = {layer for layer in schemes.linear_names(full) if type(again.get_submodule(layer)) is torch.nn.Linear}
    assert kept == {layer for layer in schemes.linear_names(full) if "v_proj" in layer or "layers.1." in layer}
    assert kept == set(scheme.left(full))
    for layer in kept:
        assert torch.equal(again.get_submodule(layer).weight, full.get_submodule(layer).weight)


@pytest.mark.parametrize(
    ("skipped", "message"),
    [
        (["v_proj", "w_proj"], "'w_proj' names none of down_proj, gate_proj"),
        (["model.layers"], "nothing is left to quantize"),
    ],
)
def test_skipped_layers_must_exist_and_leave_some(skipped, message, make_model):
    with pytest.raises(InputError, match=message):
        schemes.get_scheme("dynamic", skipped).left(make_model())


def test_a_lower_threshold_rounds_less_of_the_input_and_stores_the_same(folder):
    pytest.importorskip("bitsandbytes")
    full = AutoModelForCausalLM.from_pretrained(folder).eval()
    errors, sizes = [], []
    for threshold in (0.0, 1.0, 0.01):
        model = schemes.get_scheme("int8", llm_int8_threshold=threshold).load(str(folder))
        assert model.config.quantization_config.llm_int8_threshold == threshold
        errors.append((logits(model) - logits(full)).norm().item())
        sizes.append(schemes.stored_bytes(model))
    # What is left at the end is the rounding of the weights.
    assert errors[0] > errors[1] > errors[2] > 0
    assert len(set(sizes)) == 1
    with pytest.raises(InputError, match="llm_int8_threshold=-1: expected a number of at least 0"):
        schemes.get_scheme("int8", llm_int8_threshold=-1)


@pytest.mark.parametrize("bias", [True, False])
def test_the_dynamic_layer_is_the_reference(bias):
    torch.manual_seed(0)
    linear = torch.nn.Linear(48, 24, bias=bias).eval()
    tokens = torch.randn(2, 7, 48) * torch.logspace(-2, 2, 7)[:, None]
    tokens[1, 3] = 0
    layer = DynamicInt8Linear.from_linear(linear)
    with torch.no_grad():
        output = layer(tokens)
    assert schemes.stored_bytes(layer) == int8.quantize(linear.weight.detach()).nbytes + 24 * 4 * bias
    expected = int8.vectorwise_linear(tokens.reshape(14, 48), linear.weight, linear.bias, threshold=0)
    torch.testing.assert_close(output, expected.detach().reshape(2, 7, 24), rtol=1e-5, atol=1e-5)


def test_the_dynamic_layer_multiplies_integers():
    """Weights and tokens that are int8 already, with sums that a product in float32 would round on the way."""
    generator = torch.Generator().manual_seed(0)
    weight, tokens = (torch.randint(90, 128, (16, 8192), generator=generator).float() for _ in range(2))
    # Each row's largest is 127: its scale is 1, and nothing is rounded before the product.
    weight[:, 0], tokens[:, 1] = 127, 127
    linear = torch.nn.Linear(8192, 16, bias=False).eval()
    linear.weight = torch.nn.Parameter(weight)
    exact = (tokens.long().unsqueeze(1) * weight.long()).sum(-1)
    assert exact.min() > 2**25
    with torch.no_grad():
        assert torch.equal(DynamicInt8Linear.from_linear(linear)(tokens), exact.float())


def test_the_dynamic_layer_lets_gradients_through_and_says_so_in_training():
    torch.manual_seed(0)
    linear = torch.nn.Linear(16, 8).eval()
    layer = DynamicInt8Linear.from_linear(linear)
    inputs = torch.randn(3, 16, requires_grad=True)
    layer(inputs).sum().backward()
    read_back = int8.quantize(linear.weight.detach()).dequantize()
    torch.testing.assert_close(inputs.grad, read_back.sum(0).expand(3, 16))
    trained = layer.train()(inputs.detach())
    torch.testing.assert_close(trained, torch.nn.functional.linear(inputs, read_back, linear.bias))


def test_scales_stay_in_float32_when_the_rest_is_in_bfloat16(folder, tmp_path):
    model = schemes.get_scheme("dynamic").load(str(folder), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    layer = again.model.layers[0].mlp.up_proj
    assert (layer.scale.dtype, layer.weight.dtype, again.lm_head.weight.dtype) == (
        torch.float32,
        torch.int8,
        torch.bfloat16,
    )
    assert torch.equal(logits(again.eval()), logits(model))


def test_importing_hfllm_is_enough_to_reload(folder, tmp_path, processes):
    schemes.get_scheme("dynamic").load(str(folder)).save_pretrained(tmp_path / "quantized")
    script = tmp_path / "reload.py"
    script.write_text(
        "import hfllm; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'quantized')!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)"
    )
    assert processes.run(script).strip().endswith("DynamicInt8Linear")


def test_a_program_without_hfllm_stops_rather_than_read_integers_as_weights(tmp_path, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.quantizers import auto

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).save_pretrained(tmp_path / "full")
    schemes.get_scheme("dynamic").load(str(tmp_path / "full")).save_pretrained(tmp_path / "quantized")
    AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    # All that such a program lacks.
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, METHOD)
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, METHOD)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")


@pytest.mark.parametrize("name", ONE_OF_4_BITS)
def test_an_adapter_learns_on_a_reloaded_model(name, folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    load(name, folder).save_pretrained(tmp_path / "quantized")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    frozen = {key: value.clone() for key, value in base.state_dict().items()}
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.01
    after = {key.replace(".base_layer", ""): value for key, value in base.state_dict().items()}
    assert all(torch.equal(after[key], value) for key, value in frozen.items())


def test_layers_that_a_library_cannot_run_are_left_as_they_are(make_model, tmp_path):
    make_model(hidden_size=64, intermediate_size=176, tie_word_embeddings=True).save_pretrained(tmp_path / "full")
    model = load("nf4", tmp_path / "full")
    model.save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized").eval()
    assert torch.equal(logits(again), logits(model))
    kinds = {name: type(module).__name__ for name, module in again.model.layers[0].named_modules()}
    assert {kinds[f"mlp.{name}_proj"] for name in ("up", "gate", "down")} == {"Linear"}
    assert {kinds[f"self_attn.{name}_proj"] for name in "qkvo"} == {"Linear4bit"}
    assert type(again.lm_head) is torch.nn.Linear
    make_model(hidden_size=32).save_pretrained(tmp_path / "narrow")
    with pytest.raises(InputError, match="needs layers with a multiple of 64 inputs and 32 outputs on a CPU"):
        load("nf4", tmp_path / "narrow")


def test_adapters_are_not_merged_into_integers(folder):
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    with pytest.raises(RuntimeError, match="can't be cast"):
        get_peft_model(load("dynamic", folder), adapter).merge_and_unload()


def test_the_code_of_the_page_runs(saved, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    page = (Path(__file__).parents[2] / "docs" / "guides" / "quantization.md").read_text()
    monkeypatch.chdir(tmp_path)
    names = {"name": str(saved), "loss_of": lambda model: model(input_ids=IDS, labels=IDS).loss.item()}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, names)
    assert torch.equal(logits(names["again"].eval()), logits(names["model"]))
    assert {"part", "loss_change"} <= set(names["rows"][0])


# ---- refusals ----


def test_a_quantized_model_is_refused(folder, tmp_path):
    load("dynamic", folder).save_pretrained(tmp_path / "quantized")
    for name, method in (("dynamic", "hfllm_int8"), ("int8", "hfllm_int8")):
        with pytest.raises(InputError, match=rf"is quantized already \({method}\): name the model in full precision"):
            load(name, tmp_path / "quantized")
    load("int8", folder).save_pretrained(tmp_path / "int8")
    with pytest.raises(InputError, match=r"is quantized already \(bitsandbytes\)"):
        load("nf4", tmp_path / "int8")


def test_schemes_that_cannot_run_here(monkeypatch):
    with pytest.raises(InputError, match="scheme 'int9' is not one of int8, nf4, nf4_double, dynamic"):
        schemes.get_scheme("int9")
    with pytest.raises(InputError, match="'dynamic' runs on cpu, not on cuda; on cuda: int8, nf4, nf4_double"):
        schemes.get_scheme("dynamic").check("cuda")
    with pytest.raises(InputError, match=r"'int8' runs on cpu, cuda, xpu, hpu, not on mps$"):
        schemes.get_scheme("int8").check("mps")
    monkeypatch.setattr(schemes, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"'int8' needs bitsandbytes: pip install 'hfllm\[int8\]'"):
        schemes.get_scheme("int8").check("cpu")
    schemes.get_scheme("dynamic").check("cpu")


def test_models_that_cannot_be_quantized(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(InputError, match="could not be loaded as dynamic"):
        schemes.get_scheme("dynamic").load(str(tmp_path / "none"))
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16))
    with pytest.raises(InputError, match=r"a GPT2LMHeadModel has no linear layers to quantize; hfllm convert"):
        schemes.linear_names(gpt2)


def test_a_config_says_what_was_done(folder, tmp_path):
    load("nf4_double", folder).save_pretrained(tmp_path / "quantized")
    written = json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization_config"]
    assert (written["bnb_4bit_quant_type"], written["bnb_4bit_use_double_quant"]) == ("nf4", True)


@pytest.mark.parametrize("name", ["int8", "dynamic"])
def test_a_model_that_sees_is_quantized_but_for_what_attention_reads_itself(name, make_model, tmp_path):
    """SigLIP's pooling head gives weights to torch's attention, which cannot read integers."""
    if name == "int8":
        pytest.importorskip("bitsandbytes")
    tower = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    hfllm.with_vision(make_model(), tower, image_token_id=300).save_pretrained(tmp_path / "full")
    full = AutoModelForImageTextToText.from_pretrained(tmp_path / "full").eval()
    model = schemes.get_scheme(name).load(str(tmp_path / "full"))
    ids = torch.tensor([[5, 300, 300, 300, 300, 7, 9]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    with torch.inference_mode():
        expected, found = full(**inputs).logits, model(**inputs).logits
    assert (expected - found).abs().max() < 0.1 * expected.abs().max()
    assert model.model.vision_tower.head.attention.out_proj.weight.dtype == torch.float32
    assert model.model.vision_tower.head.mlp.fc1.weight.dtype == torch.int8
    assert model.model.multi_modal_projector.linear_1.weight.dtype == torch.int8
