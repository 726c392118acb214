"""`hfllm convert`: both directions, checked by logits, refusing clearly and leaving nothing behind."""

import json

import convert
import pytest
import torch
import transformers

import hfllm
from hfllm.errors import InputError


@pytest.fixture
def int8(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "hfllm_int8"}}))
    return saved


@pytest.fixture
def llama(tokenizer, tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def run(*argv):
    return convert.main(*convert.parse([str(word) for word in argv]))


def test_there_and_back(llama, tmp_path, capsys):
    ours, back = tmp_path / "ours", tmp_path / "back"
    metrics = run("--model_name_or_path", llama, "--output_dir", ours)
    assert metrics["max_logit_difference"] < 1e-5
    model = transformers.AutoModelForCausalLM.from_pretrained(ours)
    assert type(model) is hfllm.HfllmForCausalLM
    assert transformers.AutoTokenizer.from_pretrained(ours).chat_template
    run("--model_name_or_path", ours, "--output_dir", back, "--native_type", "llama")
    assert (back / "model.safetensors").read_bytes() == (llama / "model.safetensors").read_bytes()
    report = json.loads((back / "report.json").read_text())
    assert (report["stage"], report["metrics"]["parameters"]) == ("convert", model.num_parameters())
    capsys.readouterr()
    run("--model_name_or_path", ours, "--output_dir", back, "--native_type", "llama")
    assert "already done" in capsys.readouterr().out


@pytest.mark.parametrize("head", ["Model", "ForTokenClassification"])
def test_other_heads_are_compared_too(tmp_path, head):
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, num_labels=3)
    getattr(transformers, f"GPT2{head}")(config).save_pretrained(tmp_path / "native")
    ours, back = tmp_path / "ours", tmp_path / "back"
    metrics = run("--model_name_or_path", tmp_path / "native", "--output_dir", ours)
    assert metrics["max_logit_difference"] < 1e-5
    run("--model_name_or_path", ours, "--output_dir", back)
    assert (back / "model.safetensors").read_bytes() == (tmp_path / "native" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_the_worlds_base_model_becomes_a_llama(tiny, tmp_path):
    metrics = run("--output_dir", tmp_path / "out", "--pretrain_config", tiny["pretrain"])
    assert metrics["max_logit_difference"] < 1e-5
    native = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "native")
    assert type(native) is transformers.LlamaForCausalLM
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["artifacts"] == {"model": "native"}
    # What the base model was made with decides the result too.
    assert report["arguments"]["pretrain.max_steps"] == 6


@pytest.mark.parametrize("word", ["--no_verify", "--no-verify", "--verify=false"])
def test_outputs_are_not_compared_if_not_wanted(llama, tmp_path, word, monkeypatch):
    monkeypatch.setattr("hfllm.stages.convert.logit_difference", None)
    metrics = run("--model_name_or_path", llama, "--output_dir", tmp_path / "ours", word)
    assert metrics.keys() == {"parameters", "tensors"}
    assert (tmp_path / "ours" / "experts_hfllm.py").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_name_or_path", "no/such/folder"], "no/such/folder"),
        (["--model_name_or_path", "{llama}", "--native_type", "llama"], "is native and becomes hfllm"),
        (["--model_name_or_path", "{int8}"], "is quantized already (hfllm_int8): name the model in full precision"),
        (["--model_name_or_path", "{llama}", "--nativ_type", "x"], "did you mean 'native_type'"),
    ],
)
def test_bad_input(llama, int8, tmp_path, flags, message):
    flags = [flag.format(llama=llama, int8=int8) for flag in flags]
    with pytest.raises(InputError) as error:
        run(*flags, "--output_dir", tmp_path / "out")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_gguf_file_without_its_library_says_what_to_install(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(hfllm.models.conversion.convert, "is_gguf_available", lambda: False)
    with pytest.raises(InputError, match=r"gguf_file 'model\.gguf' needs gguf: pip install 'gguf>=0\.10'$"):
        run("--model_name_or_path", llama, "--gguf_file", "model.gguf", "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_converted_model_that_differs_is_not_called_done(llama, tmp_path, monkeypatch):
    def scrambled(state, rules):
        return {name: tensor.flip(-1) if "q_proj" in name else tensor for name, tensor in state.items()}

    monkeypatch.setattr("hfllm.models.conversion.tensor_layouts.to_ours", scrambled)
    with pytest.raises(InputError, match="outputs differ"):
        run("--model_name_or_path", llama, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()
