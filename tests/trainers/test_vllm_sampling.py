"""Sampling by vLLM, with an engine in its place that has TRL's interface and runs the policy itself."""

import pytest
import torch
import trl.generation.vllm_generation as trl_generation
from trl import import_utils

from hfllm.errors import InputError


class Engine:
    """Greedy continuations by the policy's weights as they were last handed over."""

    def __init__(self, model, accelerator, processing_class, **settings):
        self.model, self.settings, self.syncs, self.weights = model, settings, 0, None

    def sync_weights(self):
        self.syncs += 1
        self.weights = {name: value.clone() for name, value in self.model.state_dict().items()}

    def generate(self, prompts, images, num_generations):
        now = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.weights)
        responses = []
        for row, ids in enumerate(prompts):
            # Responses of several lengths, the last one as long as allowed.
            longest = min(2 + row, self.settings["max_completion_length"])
            out = self.model.generate(torch.tensor([ids]), max_new_tokens=longest, do_sample=False, eos_token_id=None)
            responses.append(out[0, len(ids) :].tolist())
        self.model.load_state_dict(now)
        return prompts, responses, None, None


@pytest.fixture
def with_engine(monkeypatch):
    monkeypatch.setattr(import_utils, "is_vllm_available", lambda *args, **kwargs: True)
    monkeypatch.setattr(trl_generation, "VLLMGeneration", Engine)


@pytest.mark.slow
def test_it_trains_on_what_the_engine_samples(make_trainer, with_engine, tokenizer):
    trainer = make_trainer(
        use_vllm=True, vllm_mode="server", vllm_server_port=8123, temperature=0.7, response_length=5, max_steps=4
    )
    settings = trainer.vllm.engine.settings
    assert settings["mode"] == "server" and settings["server_port"] == 8123
    assert settings["temperature"] == 0.7 and settings["max_completion_length"] == 5 and settings["top_p"] == 1.0
    assert settings["generation_kwargs"]["stop_token_ids"] == [tokenizer.eos_token_id]
    assert settings["generation_kwargs"]["logit_bias"] == {tokenizer.pad_token_id: -100.0}
    trainer.train()
    # Once for each of the two rollouts, whose weights differ.
    assert trainer.vllm.engine.syncs == 2
    rows = [trainer.train_dataset[index] for index in range(4)]
    batch = trainer.sample(rows)
    assert trainer.vllm.engine.syncs == 3
    assert batch["response_mask"].sum(1).tolist() == [2, 3, 4, 5]
    assert batch["is_ended"].tolist() == [True, True, True, False]
    assert batch["witness"] is None
    trainer.sample(rows)
    assert trainer.vllm.engine.syncs == 3


def test_stop_strings_reach_the_engine_and_end_responses(make_trainer, with_engine, tokenizer):
    trainer = make_trainer(use_vllm=True, response_length=3, generation_kwargs={"stop_strings": ["."]})
    assert trainer.vllm.engine.settings["generation_kwargs"]["stop"] == ["."]
    full = tokenizer("x a .")["input_ids"][-3:]
    assert trainer.vllm._is_ended(full, 3) and not trainer.vllm._is_ended(full[:1] * 3, 3)
    assert trainer.vllm._is_ended([5, 6, tokenizer.eos_token_id], 3)


def test_a_response_that_the_engines_context_cuts_off_has_not_ended(make_trainer, with_engine):
    trainer = make_trainer(use_vllm=True, response_length=9, vllm_max_model_length=12)
    assert [trainer.vllm._room(range(length)) for length in (2, 3, 10)] == [9, 9, 2]
    assert trainer.vllm._is_ended([5], 2) and not trainer.vllm._is_ended([5, 5], 2)


@pytest.mark.slow
def test_what_vllm_does_not_know_is_refused(make_trainer, with_engine):
    for name, value in (
        ("renormalize_logits", True),
        ("do_sample", False),
        ("typical_p", 0.5),
        ("no_repeat_ngram_size", 2),
    ):
        with pytest.raises(InputError, match=f"use_vllm=True cannot be combined with {name} of generation_kwargs"):
            make_trainer(use_vllm=True, generation_kwargs={name: value, "top_p": 0.9})
    make_trainer(use_vllm=True, generation_kwargs={"do_sample": True, "typical_p": 1.0})


def test_without_vllm_it_says_how_to_install_it(make_trainer, monkeypatch):
    monkeypatch.setattr(import_utils, "is_vllm_available", lambda *args, **kwargs: False)
    with pytest.raises(InputError, match=r"use_vllm=True: vLLM is not installed; pip install 'trl\[vllm\]'"):
        make_trainer(use_vllm=True)
