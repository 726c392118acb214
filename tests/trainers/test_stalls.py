"""Training that changes nothing says so, and training that does stays quiet."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hfllm.trainers.monitors import WATCHED_ROLLOUTS, StalledPolicy, StalledWeights, unmoved


def train_one_layer(dtype, rate, steps=10, warmup=0, begin=0):
    """Train a linear layer by plain sign descent under the callback, from step `begin` on; return its warnings."""
    model = nn.Linear(64, 64, bias=False, dtype=dtype)
    callback, state = StalledWeights(), SimpleNamespace(global_step=begin, max_steps=steps, is_world_process_zero=True)
    args = SimpleNamespace(get_warmup_steps=lambda total: warmup)
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        callback.on_train_begin(args, state, None, model=model)
        for state.global_step in range(begin + 1, steps + 1):
            if state.global_step > warmup:
                with torch.no_grad():
                    model.weight -= rate * model.weight.sign()
            callback.on_step_end(args, state, None, model=model)
    return [str(each.message) for each in seen]


def test_updates_that_bf16_rounds_away_are_reported_once():
    (message,) = train_one_layer(torch.bfloat16, rate=1e-5)
    assert message.startswith("weight: ") and "in 8 steps" in message and "--dtype float32 --bf16" in message


@pytest.mark.parametrize(("dtype", "rate"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_weights_that_change_are_not_reported(dtype, rate):
    assert train_one_layer(dtype, rate) == []


def test_a_warm_up_does_not_count():
    assert train_one_layer(torch.bfloat16, rate=1e-2, steps=20, warmup=9) == []
    (message,) = train_one_layer(torch.bfloat16, rate=1e-5, steps=20, warmup=9)
    assert "in 17 steps" in message
    (message,) = train_one_layer(torch.bfloat16, rate=1e-5, steps=40, begin=30)
    assert "in 8 steps" in message


@pytest.mark.slow
@pytest.mark.parametrize("quiet", [True, False])
def test_ppo_in_bf16_reports_it(make_trainer, make_model, quiet):
    model = make_model() if quiet else make_model().to(torch.bfloat16)
    trainer = make_trainer(model=model, learning_rate=1e-5, max_steps=8)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer.train()
    assert any("rounds small updates away" in str(each.message) for each in seen) != quiet


def constant_on_messages(prompts, completions, **columns):
    return [float(len(completion)) for completion in completions]


@pytest.mark.parametrize("logging_steps", [1, pytest.param(100, marks=pytest.mark.slow)])
def test_a_constant_reward_is_reported_once(make_trainer, prompts, logging_steps):
    """Also where the run ends before its first log."""
    rows = prompts.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    trainer = make_trainer(reward_funcs=constant_on_messages, train_dataset=rows, logging_steps=logging_steps)
    with pytest.warns(UserWarning, match="got the reward 1, so there is nothing to learn from") as seen:
        trainer.train()
    assert sum("nothing to learn from" in str(each.message) for each in seen) == 1


def test_a_run_without_a_log_is_judged_at_its_end(make_args):
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)

    def warned(end, *logs):
        callback = StalledPolicy(lambda: end)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            callback.on_train_begin(make_args(), state, None)
            for each in logs:
                callback.on_log(make_args(), state, None, logs=each)
            callback.on_train_end(make_args(), state, None)
        return len(seen)

    constant = {**STILL, "reward_std": 0.0}
    assert warned(constant) == warned(constant, constant) == warned({}, constant) == 1
    # After other rewards a last rollout of one reward is no sign: the policy may have learned it.
    assert warned({}) == warned(STILL) == warned(constant, STILL) == 0


@pytest.mark.slow
def test_a_policy_that_stays_where_it_is_is_reported(make_trainer):
    trainer = make_trainer(learning_rate=1e-9, value_learning_rate=1e-9, max_steps=22)
    with pytest.warns(UserWarning, match="nothing has moved: reward .* --learning_rate 1e-09 may be too low"):
        trainer.train()


@pytest.mark.slow
def test_a_policy_that_moves_is_not_reported(make_trainer):
    trainer = make_trainer(learning_rate=1e-2, max_steps=22)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*nothing has moved.*")
        trainer.train()


STILL = {"reward": 0.5, "reward_std": 0.2, "kl": 0.01, "clip_fraction": 0.0, "episode": 40}


def test_a_resumed_run_is_judged_by_its_own_rollouts(make_args):
    args, callback = make_args(learning_rate=1e-6), StalledPolicy()
    state = SimpleNamespace(global_step=1000, is_world_process_zero=True)
    callback.on_train_begin(args, state, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for state.global_step in range(1001, 1000 + WATCHED_ROLLOUTS * args.steps_per_rollout):
            callback.on_log(args, state, None, logs=STILL)
    state.global_step += 1
    with pytest.warns(UserWarning, match="nothing has moved"):
        callback.on_log(args, state, None, logs=STILL)


def test_each_sign_of_movement_counts(make_args):
    args = make_args(learning_rate=1e-6)  # rollouts of 4 episodes
    still = STILL
    # With an optimizer of the caller's the arguments may have no rate.
    assert "the learning rate may be too low" in unmoved(still, still, make_args(learning_rate=None))
    assert "reward 0.5 to 0.51 (± 0.1)" in unmoved(still, {**still, "reward": 0.51}, args)
    for moved in ({"reward": 0.8}, {"reward": 0.2}, {"kl": 0.06}, {"clip_fraction": 0.01}, {"reward_std": 0.0}):
        assert unmoved(still, {**still, **moved}, args) is None
    without_reference = {name: value for name, value in still.items() if name != "kl"}
    assert unmoved(without_reference, {**without_reference, "approx_kl": 0.001}, args) is not None
    assert unmoved(without_reference, {**without_reference, "approx_kl": 0.2}, args) is None
