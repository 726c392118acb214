"""PPO runs small enough for a test."""

import pytest
from datasets import Dataset

from hfllm.trainers.ppo.config import PPOConfig
from hfllm.trainers.ppo.trainer import PPOTrainer


def letters(prompts, completions, **columns):
    """A reward that depends on the text alone."""
    return [sum(text.count(letter) for letter in "aeiou") / 10 - len(text) / 50 for text in map(str, completions)]


@pytest.fixture
def prompts():
    texts = ["Say red.", "What is 1 plus 2?", "The fox", "Tell me where the owl lives, please.", "Go", "A blue hat"]
    return Dataset.from_dict({"prompt": texts * 2})


@pytest.fixture
def make_args(tmp_path):
    def make(**overrides):
        values = {
            "output_dir": str(tmp_path / "ppo"),
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "report_to": "none",
            "save_strategy": "no",
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "num_mini_batches": 1,
            "num_ppo_epochs": 2,
            "response_length": 6,
            "learning_rate": 1e-3,
            "max_steps": 4,
            "logging_steps": 1,
            "seed": 3,
        }
        return PPOConfig(**{**values, **overrides})

    return make


@pytest.fixture
def make_trainer(make_model, make_args, tokenizer, prompts):
    def make(model=None, reward_funcs=letters, train_dataset=prompts, trainer_class=PPOTrainer, **kwargs):
        names = {"value_model", "eval_dataset", "reward_processing_classes", "callbacks", "peft_config", "ptx_dataset"}
        names |= {"rollout_func", "tools", "environment_factory"}
        return trainer_class(
            model=model or make_model(),
            reward_funcs=reward_funcs,
            args=make_args(**{name: value for name, value in kwargs.items() if name not in names}),
            train_dataset=train_dataset,
            processing_class=tokenizer,
            **{name: value for name, value in kwargs.items() if name in names},
        )

    return make
