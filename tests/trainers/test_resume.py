"""A run that was interrupted ends with the same bits as one that was not."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

import hfllm
from hfllm.trainers.mixins import train


@pytest.mark.slow
@pytest.mark.parametrize("separate_value_model", [False, True])
def test_resumed_equals_uninterrupted(make_trainer, make_model, tmp_path, separate_value_model):
    def trainer(**kwargs):
        value_model = None
        if separate_value_model:
            value_model = make_model(seed=5, model_class=hfllm.HfllmForSequenceClassification, num_labels=1)
        settings = {"max_steps": 9, "lr_scheduler_type": "cosine", "num_ppo_epochs": 2, "response_length": 5}
        # The first two cuts lie between two logs.
        settings |= {"logging_steps": 4}
        return make_trainer(value_model=value_model, **settings, **kwargs)

    whole = trainer(output_dir=str(tmp_path / "whole"))
    whole.train()
    expected = whole.model.state_dict()
    trainer(output_dir=str(tmp_path / "cut"), save_strategy="steps", save_steps=1).train()
    for interrupted_at in (2, 3, 6):  # between rollouts, within one, at the end of an epoch
        resumed = trainer(output_dir=str(tmp_path / "cut"))
        torch.manual_seed(12345)  # whatever state the new process starts in
        resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{interrupted_at}"))
        assert resumed.state.global_step == 9
        for name, value in resumed.model.state_dict().items():
            assert torch.equal(value, expected[name]), (interrupted_at, name)
        for one, other in zip(whole.optimizer.state.values(), resumed.optimizer.state.values(), strict=True):
            assert torch.equal(one["exp_avg_sq"], other["exp_avg_sq"])
        # What was measured since the last log before the cut is logged too.
        assert logged(resumed) == logged(whole), interrupted_at


def logged(trainer):
    """What a run has logged, without its times."""
    timed = ("runtime", "per_second", "total_flos")
    return [
        {name: value for name, value in line.items() if not any(word in name for word in timed)}
        for line in trainer.state.log_history
        if "train_runtime" not in line
    ]


def test_a_finished_run_is_not_trained_further(make_trainer, tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    whole = make_trainer(**settings)
    whole.train()
    again = make_trainer(**settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


class Line(torch.nn.Linear):
    """The smallest model that a Trainer takes."""

    def forward(self, inputs, labels):
        outputs = super().forward(inputs)
        return {"loss": (outputs - labels).square().mean(), "logits": outputs}


def test_training_from_a_checkpoint_of_the_last_step_changes_nothing(tmp_path):
    """Trainer itself takes a step more where the run has ended within an epoch, which here has four steps."""
    rows = [{"inputs": torch.tensor([float(x)]), "labels": torch.tensor([2.0 * x])} for x in range(8)]
    settings = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
    settings |= {"per_device_train_batch_size": 2, "learning_rate": 0.1, "lr_scheduler_type": "constant"}

    def trained(steps, checkpoint=None, **more):
        torch.manual_seed(0)
        args = TrainingArguments(str(tmp_path), max_steps=steps, **settings, **more)
        trainer = Trainer(model=Line(1, 1), args=args, train_dataset=rows)
        train(trainer, checkpoint)
        return trainer

    whole = trained(3, save_strategy="steps", save_steps=3)
    resumed = trained(3, str(tmp_path / "checkpoint-3"), save_strategy="no")
    assert resumed.state.global_step == 3
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


@pytest.mark.slow
def test_a_finished_run_ends_with_its_best_model_again(make_trainer, prompts):
    calls = []

    def worse_each_time(completions, **columns):
        calls.append(1)
        return [-float(len(calls))] * len(completions)

    settings = {
        **{"max_steps": 2, "response_length": 2},
        "kl_target": 0.1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "reward",
        **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
    }
    data = {"train_dataset": prompts.select(range(8)), "eval_dataset": prompts.select(range(2))}
    whole = make_trainer(reward_funcs=worse_each_time, **settings, **data)
    whole.train()
    again = make_trainer(reward_funcs=worse_each_time, **settings, **data)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2
    assert again.state.best_model_checkpoint.endswith("checkpoint-1")
    assert again.kl_controller == whole.kl_controller
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name
    assert not torch.equal(whole.policy.lm_head.weight, make_trainer().policy.lm_head.weight)


def test_a_second_call_of_train_begins_anew(make_trainer):
    trainer = make_trainer(gradient_accumulation_steps=2, max_steps=4)
    trainer._micro_step, trainer._skipped_from, trainer._synced_at = 1, 7, 9
    trainer.train()
    assert (trainer._micro_step, trainer._skipped_from, trainer._synced_at) == (0, None, 0)


def test_the_dataset_order_depends_on_seed_and_epoch_only():
    from hfllm.trainers.ppo.prompts import RolloutSampler

    def order(seed, epoch, size=10, rollout=4):
        return list(RolloutSampler(size, rollout, repeats=3, seed=seed, epoch=lambda: epoch))

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    indices = order(0, 0)
    assert len(indices) == 3 * 3 * 4
    blocks = [indices[start : start + 4] for start in range(0, 36, 4)]
    assert blocks[0] == blocks[1] == blocks[2] != blocks[3]
    assert set(indices) == set(range(10))
    assert len(order(0, 0, size=3)) == 12  # a dataset smaller than a rollout is repeated
