"""The learning rate follows the global batch, however that is made up."""

from types import SimpleNamespace

import pytest

from hfllm.errors import InputError
from hfllm.trainers.learning_rate import RULES, global_batch_size, scaled_learning_rate


def scaled(rule="sqrt", base=32, batch=(4, 2, 16), **arguments):
    rows, steps, processes = batch
    args = SimpleNamespace(
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=steps,
        world_size=processes,
        **{"learning_rate": 1e-3, **arguments},
    )
    script_args = SimpleNamespace(lr_scaling_rule=rule, lr_scaling_base_batch_size=base)
    used, shown = scaled_learning_rate(script_args, args)
    assert args.learning_rate == arguments.get("learning_rate", 1e-3)  # what was parsed stays
    return shown, used


def test_the_rules():
    # 128 sequences, four times those that the rate is for.
    assert scaled("sqrt")[0] == {"learning_rate": pytest.approx(2e-3), "global_batch_size": 128}
    assert scaled("linear")[1].learning_rate == pytest.approx(4e-3)
    # A smaller batch has a smaller rate.
    assert scaled("sqrt", batch=(8, 1, 1))[1].learning_rate == pytest.approx(5e-4)
    shown, args = scaled("none", base=None)
    assert shown == {} and args.learning_rate == 1e-3


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "none"])
def test_what_counts_is_the_global_batch(rule):
    batches = [(4, 2, 16), (128, 1, 1), (1, 128, 1), (2, 8, 8)]
    assert len({scaled(rule, batch=batch)[1].learning_rate for batch in batches}) == 1
    # The batch that the rate is for leaves it alone.
    assert scaled(rule, base=128)[1].learning_rate == 1e-3
    # Two changes of the batch are as good as one.
    half = scaled(rule, base=32, batch=(64, 1, 1))[1].learning_rate
    rest = scaled(rule, base=64, batch=(128, 1, 1))[1].learning_rate
    assert half * rest / 1e-3 == pytest.approx(scaled(rule, base=32, batch=(128, 1, 1))[1].learning_rate)


def test_a_critic_with_a_rate_of_its_own_follows():
    assert scaled("linear", value_learning_rate=1e-2)[1].value_learning_rate == pytest.approx(4e-2)
    assert scaled("linear", value_learning_rate=None)[1].value_learning_rate is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "sqrt", "base": None}, "--lr_scaling_rule sqrt needs --lr_scaling_base_batch_size"),
        ({"rule": "linear", "base": 0}, "--lr_scaling_base_batch_size 0: expected at least 1"),
        ({"rule": "none", "base": 32}, "--lr_scaling_base_batch_size 32 needs --lr_scaling_rule"),
        ({"rule": "cubic"}, "--lr_scaling_rule 'cubic' is not one of none, sqrt, linear"),
        ({"learning_rate": None}, "--lr_scaling_rule sqrt needs --learning_rate"),
        ({"deepspeed_plugin": SimpleNamespace(deepspeed_config={"optimizer": {}})}, "has an optimizer section, which"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=message):
        scaled(**arguments)


def test_trainers_see_the_same_batch(make_args):
    # As PPO counts its optimizer steps: a rollout is num_mini_batches of them.
    args = make_args(num_mini_batches=3)
    assert global_batch_size(args) * args.num_mini_batches == args.local_rollout_batch_size * args.world_size
