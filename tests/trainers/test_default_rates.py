"""Learning rates that the user leaves open."""

import pytest
import torch
from peft import LoraConfig

import hfllm
from hfllm.trainers.ppo.config import HEAD_RATE, default_learning_rate, size_of


@pytest.mark.parametrize(
    ("size", "rate", "adapter_rate"),
    [
        (260_000, 3e-4, 3e-3),
        (10**6, 3e-4, 3e-3),
        (10**8, 3e-5, 9.5e-4),
        (134_515_008, 2.6e-5, 8.8e-4),
        (7 * 10**9, 3.6e-6, 3.3e-4),
    ],
)
def test_the_rate_falls_with_the_size(size, rate, adapter_rate):
    assert default_learning_rate(size) == pytest.approx(rate)
    assert default_learning_rate(size, has_adapter=True) == pytest.approx(adapter_rate)


@pytest.mark.slow
def test_open_rates_are_filled_and_given_ones_kept(make_trainer, make_model):
    def rates(**kwargs):
        args = make_trainer(**kwargs).args
        return args.learning_rate, args.value_learning_rate

    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    assert rates(learning_rate=None) == (3e-4, HEAD_RATE)
    assert rates(learning_rate=None, peft_config=lora) == (3e-3, HEAD_RATE)
    assert rates(learning_rate=1e-5) == (1e-5, HEAD_RATE)
    assert rates(learning_rate=1e-5, value_learning_rate=1e-6) == (1e-5, 1e-6)
    critic = make_model(seed=5, model_class=hfllm.HfllmForSequenceClassification, num_labels=1)
    assert rates(learning_rate=1e-5, value_model=critic) == (1e-5, 3e-4)


def test_the_optimizer_gets_them(make_trainer):
    trainer = make_trainer(learning_rate=None, max_steps=1)
    trainer.train()
    head = id(trainer.actor.value_head.weight)
    groups = {id(each): group["initial_lr"] for group in trainer.optimizer.param_groups for each in group["params"]}
    assert groups.pop(head) == HEAD_RATE and set(groups.values()) == {3e-4}


def test_quantized_and_split_weights_count_as_whole(make_model):
    model = make_model()
    assert size_of(model) == model.num_parameters()

    class Params4bit(torch.nn.Parameter):
        pass

    weight = model.model.layers[0].mlp.down_proj.weight
    packed = Params4bit(torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    model.model.layers[0].mlp.down_proj.weight = packed
    assert size_of(model) == make_model().num_parameters()
    split = torch.nn.Parameter(torch.zeros(0))
    split.ds_numel = weight.numel()
    model.model.layers[0].mlp.down_proj.weight = split
    assert size_of(model) == make_model().num_parameters()
