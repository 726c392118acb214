"""An adapter on an int8 base model is trained against that model without it; 4-bit ones cannot learn on a CPU."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hfllm.errors import InputError


def trainer_on(bits, make_model, make_trainer, folder):
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig

    make_model(hidden_size=64).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**{bits: True}), dtype=torch.float32
    )
    adapter = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return make_trainer(model=model, peft_config=adapter, learning_rate=1e-2, max_steps=4)


@pytest.mark.slow
def test_lora_on_an_int8_policy(make_model, make_trainer, tmp_path):
    trainer = trainer_on("load_in_8bit", make_model, make_trainer, tmp_path / "model")
    assert trainer.reference is None
    trainer.train()
    kls = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kls[0] == pytest.approx(0, abs=1e-5)
    assert abs(kls[-1]) > 1e-3
    assert all(p.abs().max() > 0 for name, p in trainer.policy.named_parameters() if "lora_B" in name)
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_a_4bit_policy_is_refused_on_a_cpu(make_model, make_trainer, tmp_path):
    with pytest.raises(InputError, match="load_in_4bit"):
        trainer_on("load_in_4bit", make_model, make_trainer, tmp_path / "model")
