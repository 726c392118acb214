"""Arguments of `PPOTrainer`."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from hfllm.trainers.advantages import KL_ESTIMATORS


@dataclass
class PPOConfig(TrainingArguments):
    """`transformers.TrainingArguments` plus PPO's own, named as in TRL's last `PPOConfig` where they mean the same.

    One rollout holds `per_device_train_batch_size * gradient_accumulation_steps * num_mini_batches` episodes on each
    process and gives exactly `num_ppo_epochs * num_mini_batches` optimiser steps. `max_steps`, `logging_steps`,
    `save_steps`, `eval_steps` and the learning-rate schedule count optimiser steps, as everywhere in transformers.
    """

    learning_rate: float = field(default=3e-6, metadata={"help": "Initial learning rate of the optimizer."})
    logging_steps: float = field(
        default=10, metadata={"help": "Log every X optimizer steps; below 1, a share of all steps."}
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Keep False: reward functions receive the dataset's extra columns."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments of `from_pretrained` when the model is given by name."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Switch dropout off, so that the ratio is 1 before the first update."}
    )
    total_episodes: int | None = field(
        default=None, metadata={"help": "Number of responses to sample in all; sets `max_steps` when given."}
    )
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over each rollout."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimizer steps in each pass over a rollout."})
    local_rollout_forward_batch_size: int = field(
        default=64, metadata={"help": "Sequences a forward pass without gradient takes at once, on each process."}
    )
    response_length: int = field(default=53, metadata={"help": "Longest response to sample, in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "More arguments for `GenerationConfig`, such as top_k or top_p."}
    )
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtracted from the score of a response without an end token."}
    )
    reward_weights: list[float] | None = field(
        default=None,
        metadata={"help": "One weight for each reward function; 0 logs a reward without training on it."},
    )
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale rewards to unit variance."})
    whiten_advantages: bool = field(default=True, metadata={"help": "Scale advantages to zero mean, unit variance."})
    kl_coef: float = field(default=0.05, metadata={"help": "Weight of the KL penalty to the reference."})
    kl_estimator: str = field(
        default="k1", metadata={"help": "Estimator of the per-token KL.", "choices": list(KL_ESTIMATORS)}
    )
    cliprange: float = field(default=0.2, metadata={"help": "Clip range of the policy's probability ratio."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Clip range of the values."})
    gamma: float = field(default=1.0, metadata={"help": "Discount factor."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalized advantage estimation."})

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "generation_kwargs"]

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_ppo_epochs", "num_mini_batches", "local_rollout_forward_batch_size", "response_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.total_episodes is not None and self.max_steps > 0:
            raise ValueError(f"total_episodes={self.total_episodes} and max_steps={self.max_steps}: give one of them")
        if self.total_episodes is not None and self.total_episodes < 1:
            raise ValueError(f"total_episodes must be at least 1, got {self.total_episodes}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.kl_estimator not in KL_ESTIMATORS:
            raise ValueError(f"kl_estimator={self.kl_estimator!r} is not one of {', '.join(KL_ESTIMATORS)}")
        if self.use_cpu and self.fp16:
            raise ValueError("fp16 does nothing on a CPU: use --bf16 or neither")

    @property
    def steps_per_rollout(self) -> int:
        """Optimiser steps taken on each rollout."""
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def local_rollout_batch_size(self) -> int:
        """Episodes of one rollout on each process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_mini_batches
