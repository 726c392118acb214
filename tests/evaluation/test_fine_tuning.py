"""A model before and after fine-tuning, on the same rows, without a trace in the random state."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset

from hfllm.evaluation.before_after import (
    SAMPLES,
    TunedEvaluation,
    evaluate_tuned,
    tuning_metrics,
    tuning_summary,
    tuning_tables,
)

TEXTS = ["Say red.", "What is 1 plus 2? Please tell me.", "Go home now.", "Is the fox red or blue?"]


def trainer(model, tokenizer, **changes):
    """What is used of a trainer of TRL: rows of token ids whose first two have no loss."""

    def collate(rows):
        batch = tokenizer.pad({"input_ids": [row["input_ids"] for row in rows]}, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, :2] = -100
        return {**batch, "labels": labels}

    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS]
    values = {
        "args": SimpleNamespace(world_size=1, per_device_eval_batch_size=3),
        "accelerator": SimpleNamespace(autocast=nullcontext),
        "model": model,
        "eval_dataset": Dataset.from_list(rows),
        "data_collator": collate,
        "processing_class": tokenizer,
        "is_deepspeed_enabled": False,
        "is_fsdp_enabled": False,
    }
    return SimpleNamespace(**{**values, **changes})


def test_losses_are_those_of_the_rows_and_nothing_else_changes(make_model, tokenizer):
    model = make_model().train()
    state = torch.get_rng_state()
    held_out = [{"prompt": [{"role": "user", "content": text}]} for text in TEXTS]
    found = evaluate_tuned(trainer(model, tokenizer), held_out)
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert len(found.answers) == len(found.prompts) == 4
    model.eval()
    for (nats, count), text in zip(found.rows, TEXTS, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, 1:-1], ids[0, 2:])
        assert count == ids.shape[1] - 2
        assert nats / count == pytest.approx(loss.item(), rel=1e-5)


def test_where_rows_are_spread_nothing_is_measured(make_model, tokenizer):
    several = trainer(make_model(), tokenizer, args=SimpleNamespace(world_size=2))
    sharded = trainer(make_model(), tokenizer, is_fsdp_enabled=True)
    streamed = trainer(make_model(), tokenizer, eval_dataset=iter([]))
    for each in (several, sharded, streamed):
        assert evaluate_tuned(each, []) is None
    assert tuning_metrics(None, None) == tuning_tables(None, None) == {} and tuning_summary({}) == ""


def test_errors_are_those_of_rows_of_their_lengths():
    generator = np.random.default_rng(0)
    counts = generator.integers(1, 40, 50)
    early = counts * generator.normal(3.0, 0.5, 50)
    late = early - counts * generator.normal(0.2, 0.1, 50)
    sides = [list(zip(nats, counts.tolist(), strict=True)) for nats in (early, late)]
    before, after = (TunedEvaluation(rows, ["p"], ["a"]) for rows in sides)
    metrics = tuning_metrics(before, after)
    assert metrics["held_out_loss_after"] == pytest.approx(late.sum() / counts.sum())
    assert metrics["held_out_loss_change"] == pytest.approx((late - early).sum() / counts.sum())
    drawn = [generator.integers(0, 50, 50) for _ in range(3000)]
    for name, sums in (("after_se", late), ("change_se", late - early)):
        resampled = [sums[rows].sum() / counts[rows].sum() for rows in drawn]
        assert metrics[f"held_out_loss_{name}"] == pytest.approx(np.std(resampled), rel=0.1)
    assert tuning_summary(metrics).startswith("held-out loss fell from ")
    assert tuning_summary(tuning_metrics(before, before)).startswith("held-out loss not changed beyond noise")
    one, other = (TunedEvaluation(rows[:1], [], []) for rows in sides)
    assert tuning_summary(tuning_metrics(one, other)).endswith("on 1 held-out row: too few to tell")
    assert tuning_tables(before, after)[SAMPLES] == [{"prompt": "p", "before": "a", "after": "a"}]
