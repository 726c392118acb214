"""Samples during training: there, repeatable, and without a trace in what is trained."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from hfllm.errors import InputError
from hfllm.trainers.callbacks import SampleCallback
from hfllm.trainers.monitors import ThroughputCallback


@pytest.fixture
def make_trainer(make_model, tokenizer, tmp_path):
    def make(callbacks=(), **options):
        values = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 5,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        ids = torch.randint(10, 300, (32, 8), generator=torch.Generator().manual_seed(0)).tolist()
        return Trainer(
            # Dropout draws from the random state in every step, where any trace would show.
            model=make_model(hidden_dropout=0.2, attention_dropout=0.1),
            args=TrainingArguments(**{**values, **options}),
            train_dataset=Dataset.from_dict({"input_ids": ids}),
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            callbacks=list(callbacks),
        )

    return make


@pytest.fixture
def make_callback(tokenizer, tmp_path):
    def make(**options):
        values = {"prompts": ["Say", "The owl"], "every_steps": 2, "max_new_tokens": 6, "temperature": 1.0}
        return SampleCallback(tokenizer, output_file=tmp_path / "kept" / "samples.jsonl", **{**values, **options})

    return make


def rows_of(callback):
    return [json.loads(line) for line in callback.output_file.read_text().splitlines()]


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_training_is_bit_identical_with_and_without_samples(make_trainer, make_callback, gradient_checkpointing):
    plain = make_trainer(gradient_checkpointing=gradient_checkpointing)
    plain.train()
    sampler = make_callback()
    sampled = make_trainer([sampler], gradient_checkpointing=gradient_checkpointing)
    before = sampled.model.config.to_dict()
    sampled.train()
    assert len(sampler.samples) == 6
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(weight, sampled.model.state_dict()[name]), name
    assert sampled.model.training
    assert sampled.model.is_gradient_checkpointing == gradient_checkpointing
    assert sampled.model.config.to_dict() == before


def test_flags_of_single_modules_come_back(make_trainer, make_callback):
    trainer = make_trainer()
    trainer.model.train()
    trainer.model.model.norm.eval()
    flags = [module.training for module in trainer.model.modules()]
    make_callback()._sample(trainer.model, 1)
    assert [module.training for module in trainer.model.modules()] == flags


def test_samples_come_when_due_and_at_the_end_and_lie_in_the_file(make_trainer, make_callback):
    sampler = make_callback()
    # What an earlier run has left is not this one's.
    sampler.output_file.parent.mkdir()
    sampler.output_file.write_text('{"step": 2, "prompt": "Say", "completion": "old"}\n')
    make_trainer([sampler]).train()
    assert [(row["step"], row["prompt"]) for row in sampler.samples] == [
        (step, prompt) for step in (2, 4, 5) for prompt in ("Say", "The owl")
    ]
    assert rows_of(sampler) == sampler.samples
    assert any(row["completion"] for row in sampler.samples)


def test_a_resumed_run_writes_what_an_uninterrupted_one_does(make_trainer, make_callback, tmp_path):
    whole = make_callback()
    make_trainer([whole], save_strategy="steps", save_steps=3).train()
    # As after a kill in the middle of the line for step 5.
    text = whole.output_file.read_text()
    whole.output_file.write_text(text[:-20])
    resumed = make_callback()
    make_trainer([resumed]).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert resumed.output_file.read_text() == text and resumed.samples == whole.samples


def test_greedy_samples_do_not_depend_on_the_seed(make_trainer, make_callback):
    model = make_trainer().model
    greedy = [make_callback(temperature=0.0, seed=seed)._sample(model, 1) for seed in (0, 1)]
    drawn = [make_callback(temperature=1.0, seed=seed)._sample(model, 1) for seed in (0, 0, 1)]
    assert greedy[0] == greedy[1] and drawn[0] == drawn[1] != drawn[2]


def test_completions_end_with_the_context(make_trainer, make_callback, monkeypatch):
    model, asked = make_trainer().model, []
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda *args, **kwargs: asked.append((args, kwargs)) or generate(*args, **kwargs)
    )
    make_callback(prompts=["owl " * 80, "owl"], max_new_tokens=100)._sample(model, 1)
    lengths = [args[0].shape[1] for args, _ in asked]
    assert lengths[0] > 156
    assert [kwargs["generation_config"].max_new_tokens for _, kwargs in asked] == [256 - lengths[0], 100]


def test_the_time_that_samples_take_is_not_trainings(make_trainer, make_callback, monkeypatch):
    now = [0.0]
    throughput = ThroughputCallback(tokens_per_step=10, clock=lambda: now[0])
    sampler = make_callback(throughput=throughput, every_steps=1)
    monkeypatch.setattr(sampler, "_sample", lambda model, step: now.__setitem__(0, now[0] + 100) or [])
    monkeypatch.setattr(sampler, "on_pre_optimizer_step", lambda *args, **kwargs: now.__setitem__(0, now[0] + 2))
    for callbacks in ([sampler, throughput], [throughput, sampler]):
        trainer = make_trainer(callbacks, logging_steps=3)
        trainer.train()
        assert [entry["tokens_per_second"] for entry in trainer.state.log_history if "loss" in entry] == [5.0]


@pytest.mark.parametrize("options", [{"every_steps": 0}, {"max_new_tokens": 0}, {"temperature": -1.0}])
def test_options_that_make_no_sense_are_refused(make_callback, options):
    with pytest.raises(InputError, match=next(iter(options))):
        make_callback(**options)


def test_a_prompt_that_fills_the_context_is_refused(make_trainer, make_callback):
    with pytest.raises(InputError, match="expected 1 to 255"):
        make_trainer([make_callback(prompts=["owl " * 400])]).train()


def test_a_file_of_something_else_is_not_overwritten(make_trainer, make_callback):
    sampler = make_callback()
    sampler.output_file.parent.mkdir()
    sampler.output_file.write_text('{"text": "precious"}\n')
    with pytest.raises(InputError, match=r"line 1: .*precious"):
        make_trainer([sampler]).train()
    assert "precious" in sampler.output_file.read_text()


def test_a_model_in_parts_is_refused(make_trainer, make_callback):
    trainer = make_trainer([make_callback()])
    # What DeepSpeed ZeRO-3 marks the parameters with that it has spread.
    next(trainer.model.parameters()).ds_id = 0
    with pytest.raises(InputError, match="whole model"):
        trainer.train()
