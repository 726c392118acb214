"""A policy whose adapter is trained further is compared with that adapter as it was."""

import json

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

from hfllm.errors import InputError
from hfllm.trainers.ppo.setup import as_reference, keep_starting_adapter

IDS = torch.tensor([[5, 9, 40, 41, 60, 17, 33]])
LORA = {"r": 2, "task_type": "CAUSAL_LM", "init_lora_weights": False}
KINDS = {
    "lora": LoraConfig(**LORA, target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "dora": LoraConfig(**LORA, target_modules=["q_proj"], use_dora=True),
    "copied head": LoraConfig(**LORA, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "tokens": LoraConfig(**LORA, target_modules=["q_proj"], trainable_token_indices=[5, 9]),
    "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def move(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def trained(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_stays_what_the_policy_was(make_model, kind):
    torch.manual_seed(0)
    policy = get_peft_model(make_model(), KINDS[kind])
    move(policy)
    start, names, state = logits(policy), trained(policy), torch.get_rng_state()
    keep_starting_adapter(policy)
    assert torch.equal(torch.get_rng_state(), state)
    assert trained(policy) == names and torch.equal(logits(policy), start)
    move(policy)
    with as_reference(policy):
        assert torch.equal(logits(policy), start)
    assert trained(policy) == names and (logits(policy) - start).abs().max() > 0.01


def test_one_that_allows_no_second_is_refused(make_model):
    policy = get_peft_model(make_model(), LoraConfig(**LORA, target_modules=["q_proj"], bias="lora_only"))
    with pytest.raises(InputError, match=r"cannot be kept as the reference beside itself \(LoraModel supports only 1"):
        keep_starting_adapter(policy)


@pytest.mark.slow
def test_a_run_from_an_adapter_saves_and_resumes_that_adapter_alone(make_trainer, make_model, tmp_path):
    def policy():
        torch.manual_seed(0)
        return get_peft_model(make_model(), LoraConfig(**LORA, target_modules=["q_proj", "v_proj"]))

    start, options = logits(policy()), {"learning_rate": 5e-2, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(model=policy(), max_steps=4, output_dir=str(tmp_path / "run"), **options)
    trainer.train()
    assert abs(trainer.state.log_history[0]["kl"]) < 1e-5
    with as_reference(trainer.policy):
        assert torch.allclose(logits(trainer.policy), start, atol=1e-6)
    trainer.save_model(str(tmp_path / "saved"))
    saved = PeftModel.from_pretrained(make_model(), tmp_path / "saved")
    assert torch.allclose(logits(saved), logits(trainer.policy), atol=1e-6)
    assert (logits(saved) - start).abs().max() > 1e-3
    assert not list((tmp_path / "saved").rglob("ref*"))
    again = make_trainer(model=policy(), max_steps=4, output_dir=str(tmp_path / "again"), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(logits(again.policy), logits(trainer.policy))
    with as_reference(again.policy):
        assert torch.allclose(logits(again.policy), start, atol=1e-6)
    assert "ref" not in json.loads((tmp_path / "saved" / "adapter_config.json").read_text())


@pytest.mark.slow
def test_an_adapter_that_its_user_has_named_is_resumed(make_trainer, make_model, tmp_path):
    def policy():
        torch.manual_seed(0)
        return get_peft_model(make_model(), LoraConfig(**LORA, target_modules=["q_proj"]), adapter_name="mine")

    options = {"learning_rate": 5e-2, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(model=policy(), output_dir=str(tmp_path / "run"), **options)
    trainer.train()
    again = make_trainer(model=policy(), output_dir=str(tmp_path / "again"), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(logits(again.policy), logits(trainer.policy))


@pytest.mark.slow
@pytest.mark.parametrize("kl_coef", [0.05, 0.0])
def test_an_adapter_that_is_loaded_frozen_is_trained(make_trainer, make_model, tmp_path, kl_coef):
    get_peft_model(make_model(), LoraConfig(**LORA, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    policy = PeftModel.from_pretrained(make_model(), tmp_path / "adapter")
    assert not trained(policy)
    start = logits(policy)
    trainer = make_trainer(model=policy, kl_coef=kl_coef, learning_rate=5e-2, max_steps=2)
    trainer.train()
    assert (logits(trainer.policy) - start).abs().max() > 1e-3


@pytest.mark.slow
def test_an_adapter_is_pushed_with_its_card(make_trainer, make_model, hub, tmp_path):
    config = LoraConfig(**LORA, target_modules=["q_proj"])
    model = make_model()
    model.config._name_or_path = model.name_or_path = "me/base"
    trainer = make_trainer(model=model, peft_config=config, max_steps=2, push_to_hub=True, hub_model_id="me/adapter")
    trainer.train()
    trainer.push_to_hub()
    hub.repos["me/adapter"].download(tmp_path / "pushed")
    assert "library_name: peft" in (tmp_path / "pushed" / "README.md").read_text()
    assert (tmp_path / "pushed" / "adapter_model.safetensors").is_file()
