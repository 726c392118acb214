"""Arguments of `PPOTrainer`, and its default learning rates."""

import difflib
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, TrainingArguments

from hfllm.flags import NOT_NEGATIVE, POSITIVE, at_least, changed, check_arguments, flag
from hfllm.trainers.ppo.formulas import LAM
from hfllm.trainers.ppo.options import PPOOptions
from hfllm.trainers.ppo.shared_base import AdapterScorer

# ---- arguments ----


@dataclass
class PPOConfig(PPOOptions, TrainingArguments):
    """`transformers.TrainingArguments` plus PPO's options, named as in TRL's last `PPOConfig` where it has them.

    PPO's options are in `hfllm/trainers/ppo/options.py`. One rollout holds `per_device_train_batch_size *
    gradient_accumulation_steps * num_mini_batches` episodes per process and gives exactly `num_ppo_epochs *
    num_mini_batches` optimizer steps. `max_steps`, `logging_steps`, `save_steps`, `eval_steps` and the learning-rate
    schedule count optimizer steps, as everywhere in transformers.
    """

    learning_rate: float | None = flag(
        None,
        "Initial learning rate; by default from the model's size, higher for an adapter (docs/guides/ppo.md).",
        takes=NOT_NEGATIVE,
    )
    per_device_train_batch_size: int = flag(16, "Episodes of an optimizer step on each device.", takes=at_least(1))
    logging_steps: float = flag(10, "Log every X optimizer steps; below 1, a share of all steps.", takes=POSITIVE)
    remove_unused_columns: bool | None = flag(
        False, "Keep False: reward functions receive the dataset's extra columns."
    )
    model_init_kwargs: dict[str, Any] | str | None = flag(
        None, "Keyword arguments of `from_pretrained` when the model is given by name."
    )

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "generation_kwargs"]

    def __post_init__(self):
        super().__post_init__()
        check_arguments(self, PPOOptions)
        self._check_generation_kwargs()
        if self.total_episodes is not None and self.max_steps > 0:
            raise ValueError(f"total_episodes={self.total_episodes} and max_steps={self.max_steps}: give one of them")
        if self.kl_penalty == "loss" and self.kl_estimator == "k1":
            raise ValueError("kl_estimator='k1' has no gradient on average: kl_penalty='loss' takes k2, k3 or full")
        if self.local_rollout_batch_size % self.num_generations:
            raise ValueError(
                f"num_generations={self.num_generations} must divide the {self.local_rollout_batch_size} episodes "
                "that a process samples for a rollout"
            )
        if self.lam_alpha is not None and self.lam not in (None, LAM):
            raise ValueError(f"lam_alpha={self.lam_alpha} takes lambda from the length: leave out lam={self.lam}")
        self._check_groups()
        if self.positive_lm_coef == 0 and self.positive_lm_min_reward != 1:
            raise ValueError(
                f"positive_lm_min_reward={self.positive_lm_min_reward} is for positive_lm_coef, which is 0"
            )
        if self.importance_sampling_cap is None and self.importance_sampling_level != "token":
            raise ValueError("importance_sampling_level='sequence' is for importance_sampling_cap, which is None")
        if self.critic_warmup_lam is not None and self.critic_warmup_steps == 0:
            raise ValueError(f"critic_warmup_lam={self.critic_warmup_lam} is for critic_warmup_steps, which is 0")
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError(f"kl_target={self.kl_target} steers kl_coef, which is 0: give it a value to start from")
        if self.target_kl is not None and self.fp16:
            raise ValueError("target_kl skips steps, which the loss scaling of fp16 does not allow: use bf16")
        if self.use_cpu and self.fp16:
            raise ValueError("fp16 does nothing on a CPU: use --bf16 or neither")

    def _check_generation_kwargs(self) -> None:
        options = GenerationConfig().to_dict()
        for name in self.generation_kwargs or {}:
            if name not in options:
                # A GenerationConfig takes any name, and ignores it.
                (nearest,) = difflib.get_close_matches(name, options, n=1, cutoff=0.0)
                raise ValueError(f"generation_kwargs has an unknown {name!r}; did you mean {nearest!r}?")

    def _check_groups(self) -> None:
        """Refuse what compares the answers to a prompt where there is one, and lambdas that nothing reads."""
        needs = {"baseline": self.baseline != "critic", "dynamic_sampling_rounds": self.dynamic_sampling_rounds > 0}
        for name in [name for name, is_on in needs.items() if is_on and self.num_generations < 2]:
            value = getattr(self, name)
            raise ValueError(f"{name}={value!r} compares the answers to a prompt: num_generations must be at least 2")
        unread = {"lam": LAM, "lam_alpha": None, "value_lam": None, "critic_warmup_steps": 0}
        for name, default in unread.items() if self.baseline == "group" else ():
            if getattr(self, name) not in (None, default):
                raise ValueError(
                    f"baseline='group' has no use of {name}={getattr(self, name)}: the critic decides none"
                )

    @property
    def steps_per_rollout(self) -> int:
        """Return the number of optimizer steps per rollout."""
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def local_rollout_batch_size(self) -> int:
        """Return the number of episodes of one rollout per process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_mini_batches


# ---- default rates ----
#
# Learning rates of PPO for a model of any size, where the user gives none.
#
# The highest rate at which PPO improves the reward steadily falls with the size of a model. It is higher for an
# adapter than for all weights, and a new value head, which begins at zero, needs a high one whatever the size of its
# trunk. The numbers were measured by `benchmarks/learning_rates.py` on models of 0.26M to 135M parameters
# (benchmarks/results/learning_rates.md). Beyond that the rule extrapolates, to 3.6e-6 for all weights of a 7B model.


# The rate of models of BASE_SIZE parameters and smaller ones. Above, it falls with the square root of the size; that
# of an adapter, whose own size hardly grows, with the fourth root.
BASE_SIZE, FULL_RATE, ADAPTER_RATE = 1e6, 3e-4, 3e-3
HEAD_RATE = 3e-3


def default_learning_rate(num_parameters: int, has_adapter: bool = False) -> float:
    """Return the policy's learning rate, rounded to two digits.

    Args:
        num_parameters: of the whole model, frozen ones included.
        has_adapter: whether an adapter is trained instead of all weights.
    """
    shrinks = min(1.0, BASE_SIZE / max(num_parameters, 1))
    return float(f"{ADAPTER_RATE * shrinks**0.25 if has_adapter else FULL_RATE * shrinks**0.5:.1e}")


def with_default_rates(args: PPOConfig, policy: PreTrainedModel, value_model: PreTrainedModel | None) -> PPOConfig:
    """Return the arguments with the rates left open by the user, for the policy and for the critic's own weights.

    Args:
        value_model: the critic, if it is a model of its own: its rate is the one for all weights of its size.
    """
    rate, value_rate = args.learning_rate, args.value_learning_rate
    if rate is None:
        rate = default_learning_rate(size_of(policy), hasattr(policy, "peft_config"))
    if value_rate is None and isinstance(value_model, AdapterScorer):
        value_rate = default_learning_rate(size_of(policy), has_adapter=True)
    elif value_rate is None:
        value_rate = HEAD_RATE if value_model is None else default_learning_rate(size_of(value_model))
    return changed(args, learning_rate=rate, value_learning_rate=value_rate)


def size_of(model: PreTrainedModel) -> int:
    """Return the number of a model's parameters, also where they are quantized or split over processes."""
    # bitsandbytes stores two weights of 4 bits in a byte; ZeRO-3 leaves an empty tensor and the number of elements.
    packed = {id(each): 2 for each in model.parameters() if type(each).__name__ == "Params4bit"}
    return sum(getattr(each, "ds_numel", each.numel()) * packed.get(id(each), 1) for each in model.parameters())
