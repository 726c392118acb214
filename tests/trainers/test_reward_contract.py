"""The trainer and reward functions by TRL's contract: async, abstaining, with what they log."""

import asyncio
import math
import threading
import warnings

import pytest
import torch


@pytest.fixture
def rollout_rows():
    return [{"prompt": text} for text in ("Say red.", "The fox", "Go", "A blue hat")]


def test_async_rewards_go_on_while_the_models_read(make_trainer, rollout_rows, monkeypatch):
    has_read = threading.Event()

    async def waits(completions, **columns):
        assert await asyncio.to_thread(has_read.wait, 20.0)
        return [1.0] * len(completions)

    trainer = make_trainer(reward_funcs=waits)
    evaluate = trainer.evaluate_tokens

    def evaluate_tokens(batch):
        tokens = evaluate(batch)
        has_read.set()
        return tokens

    monkeypatch.setattr(trainer, "evaluate_tokens", evaluate_tokens)
    trainer.collect_rollout(rollout_rows)
    assert [row["reward"] for row in trainer.completions] == [1.0] * 4


def test_what_no_reward_judges_earns_nothing_and_is_counted(make_trainer, rollout_rows):
    def some(completions, **columns):
        return [1.0, None, 3.0, None]

    def others(completions, log_extra, log_metric, **columns):
        log_extra("letters", [len(each) for each in completions])
        log_metric("letters", 5)
        return [None, 2.0, 1.0, None]

    trainer = make_trainer(reward_funcs=[some, others], kl_coef=0.0, max_steps=2, logging_steps=2)
    batch = trainer.sample(rollout_rows)
    with pytest.warns(UserWarning, match=r"no reward function judges completion 3 \("):
        scores = trainer.score(rollout_rows, batch)
    torch.testing.assert_close(scores.total, torch.tensor([1.0, 2.0, 4.0, 0.0]))
    assert [row["some"] for row in scores.completions] == [1.0, None, 3.0, None]
    assert all(row["letters"] == len(row["completion"]) for row in scores.completions)
    trainer._logged.clear()
    trainer._metrics.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
        found = trainer.evaluate(rows_to_ask(trainer))
    (logged,) = [row for row in trainer.state.log_history if "rewards/some" in row]
    assert (logged["rewards/some"], logged["rewards/others"]) == (2.0, 1.5)
    assert (logged["judged/some"], logged["judged/others"], logged["letters"]) == (0.5, 0.5, 5.0)
    assert found["eval_letters"] == 5.0 and found["eval_judged/some"] == 0.5
    assert not any(isinstance(value, float) and math.isnan(value) for value in found.values())


def rows_to_ask(trainer):
    return trainer.train_dataset.select(range(4))
