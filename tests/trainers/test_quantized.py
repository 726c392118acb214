"""An adapter on an int8 or 4-bit base model is trained against that model without it."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_lora_on_a_quantized_policy(make_model, make_trainer, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig

    # Widths that the 4-bit CPU kernel takes.
    make_model(hidden_size=256, intermediate_size=512).save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=BitsAndBytesConfig(**{bits: True}), dtype=torch.float32
    )
    adapter = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(model=model, peft_config=adapter, learning_rate=1e-2, max_steps=4)
    assert trainer.reference is None
    trainer.train()
    kls = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kls[0] == pytest.approx(0, abs=1e-5)
    assert abs(kls[-1]) > 1e-3
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
