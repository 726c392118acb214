"""Every tensor of a trainer is where the model is: on a device that is pretended, see pretend_gpu.py."""

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from pretend_gpu import MixedDevicesError, pretend_gpu

import hfllm
from hfllm.models import devices


@pytest.fixture
def gpu(monkeypatch):
    """The pretended device, which has a mebibyte, and a function that sends trainers there by their arguments."""
    with pretend_gpu() as device:
        monkeypatch.setattr(devices, "device_memory", lambda where: None if where.type == "cpu" else 2**20)
        yield device
    AcceleratorState._reset_state(reset_partial_state=True)


def send(args, device):
    """Let a trainer of these arguments believe that it has the device."""
    args.__dict__["_setup_devices"] = device
    PartialState._shared_state["device"] = device
    return args


def test_the_pretended_gpu_notices_a_tensor_of_the_cpu(gpu):
    weight = torch.nn.Linear(3, 2).to(gpu)
    inputs = torch.ones(4, 3, device=gpu)
    weight(inputs).sum().backward()
    assert weight.weight.device == weight.weight.grad.device == weight(inputs).device == gpu
    assert weight.weight.grad.tolist() == [[4.0] * 3] * 2 and (inputs * torch.tensor(2.0)).sum().item() == 24
    with pytest.raises(MixedDevicesError, match=r"aten.addmm.default: \(4, 3\) is on the CPU"):
        weight(inputs.cpu())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kl_estimator": "full", "kl_penalty": "loss", "entropy_coef": 0.1, "num_mini_batches": 2},
        {"generation_kwargs": {"stop_strings": ["."]}, "value_model": True, "target_kl": 1.0, "vf_coef": 1.0},
        {"whiten_rewards": True, "normalize_rewards": True, "reward_clip": 1.0, "missing_eos_penalty": 1.0},
        {"sync_ref_model": True, "ref_model_sync_steps": 1, "advantage_clip": 1.0, "critic_warmup_steps": 1},
    ],
    ids=lambda options: next(iter(options), "default"),
)
def test_ppo(options, gpu, make_trainer, make_model, tokenizer, prompts, monkeypatch):
    eager = {"attn_implementation": "eager"}
    reward = make_model(4, hfllm.HfllmForSequenceClassification, num_labels=1, **eager)
    if "value_model" in options:
        value = make_model(5, hfllm.HfllmForTokenClassification, num_labels=1, **eager)
        options = {**options, "value_model": value}
    made = hfllm.PPOConfig.__post_init__
    monkeypatch.setattr(hfllm.PPOConfig, "__post_init__", lambda self: made(self) or (send(self, gpu) and None))
    trainer = make_trainer(
        make_model(**eager), reward, reward_processing_classes=tokenizer, eval_dataset=prompts, max_steps=4, **options
    )
    trainer.train()
    assert trainer.policy.device == gpu and trainer.state.global_step == 4
    assert trainer.evaluate()["eval_response_length"] > 0
    assert {parameter.device for parameter in trainer.actor.parameters()} == {gpu}
