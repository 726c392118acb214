"""Arguments of `PPOTrainer`."""

import difflib
from dataclasses import dataclass, field
from typing import Any

from transformers import GenerationConfig, TrainingArguments

from hfllm.trainers.ppo.formulas import KL_ESTIMATORS

KL_PLACES = ("reward", "loss")
VLLM_MODES = ("colocate", "server")
AT_LEAST_ONE = (
    *("num_ppo_epochs", "num_mini_batches", "local_rollout_forward_batch_size", "response_length", "num_generations"),
    *("length_bucket_size", "max_tokens_per_pass", "ref_model_sync_steps", "kl_horizon"),
)
ABOVE_ZERO = ("temperature", "kl_target", "target_kl", "reward_clip", "advantage_clip", "value_learning_rate")
NOT_NEGATIVE = (
    "kl_coef",
    "vf_coef",
    "entropy_coef",
    "ptx_coef",
    "critic_warmup_steps",
    "cliprange",
    "cliprange_value",
)
SHARES = ("gamma", "lam", "ref_model_mixup_alpha")


def _option(default: Any, text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class PPOConfig(TrainingArguments):
    """`transformers.TrainingArguments` plus PPO's own, named as in TRL's last `PPOConfig` where they mean the same.

    One rollout holds `per_device_train_batch_size * gradient_accumulation_steps * num_mini_batches` episodes on each
    process and gives exactly `num_ppo_epochs * num_mini_batches` optimiser steps. `max_steps`, `logging_steps`,
    `save_steps`, `eval_steps` and the learning-rate schedule count optimiser steps, as everywhere in transformers.
    """

    learning_rate: float = _option(3e-6, "Initial learning rate of the optimizer.")
    logging_steps: float = _option(10, "Log every X optimizer steps; below 1, a share of all steps.")
    remove_unused_columns: bool | None = _option(
        False, "Keep False: reward functions receive the dataset's extra columns."
    )
    model_init_kwargs: dict[str, Any] | str | None = _option(
        None, "Keyword arguments of `from_pretrained` when the model is given by name."
    )
    disable_dropout: bool = _option(True, "Switch dropout off, so that the ratio is 1 before the first update.")

    # Rollouts
    total_episodes: int | None = _option(None, "Number of responses to sample in all; sets `max_steps` when given.")
    num_ppo_epochs: int = _option(4, "Passes over each rollout.")
    num_mini_batches: int = _option(1, "Optimizer steps in each pass over a rollout.")
    num_generations: int = _option(1, "Responses sampled to each prompt of a rollout.")
    local_rollout_forward_batch_size: int = _option(
        64, "Sequences a forward pass without gradient takes at once, on each process."
    )
    length_bucket_size: int | None = _option(
        None,
        "No sequence is padded by this many tokens or more: the passes of a micro-batch are split. By default "
        "8 on a CPU and 256 elsewhere; with DeepSpeed micro-batches stay whole.",
    )
    max_tokens_per_pass: int | None = _option(
        None,
        "Tokens that one forward and backward pass takes at most; larger micro-batches are split. By default 768 on "
        "a CPU, where larger passes take memory and save no time (fewer with vocabularies above 5,000), and no "
        "bound elsewhere.",
    )

    # Sampling
    response_length: int = _option(53, "Longest response to sample, in tokens.")
    temperature: float = _option(1.0, "Sampling temperature.")
    generation_kwargs: dict[str, Any] | str | None = _option(
        None, "More arguments for `GenerationConfig`, such as top_k, top_p or stop_strings."
    )

    use_vllm: bool = _option(False, "Sample by vLLM, through TRL's back end; needs `pip install 'trl[vllm]'`.")
    vllm_mode: str = _option(
        "colocate", "vLLM in this process, or a server started by `vllm serve`.", choices=list(VLLM_MODES)
    )
    vllm_model_impl: str = _option("vllm", "Whose model code vLLM runs: 'vllm' or 'transformers'.")
    vllm_enable_sleep_mode: bool = _option(False, "Let vLLM leave the accelerator's memory during the updates.")
    vllm_server_base_url: str | None = _option(None, "URL of the server, in place of host and port.")
    vllm_server_host: str = _option("0.0.0.0", "Host of the server.")
    vllm_server_port: int = _option(8000, "Port of the server.")
    vllm_server_timeout: float = _option(240.0, "Seconds to wait for the server.")
    vllm_group_port: int = _option(51216, "Port that weights are handed to the server over.")
    vllm_gpu_memory_utilization: float = _option(0.3, "Share of the accelerator's memory for vLLM in this process.")
    vllm_max_model_length: int | None = _option(None, "Longest prompt and response; by default the model's context.")
    vllm_tensor_parallel_size: int = _option(1, "Accelerators that one vLLM in this process is spread over.")

    # Rewards
    reward_weights: list[float] | None = _option(
        None, "One weight for each reward function; 0 logs a reward without training on it."
    )
    missing_eos_penalty: float | None = _option(
        None, "Subtracted from the score of a response that was cut off at `response_length`."
    )
    normalize_rewards: bool = _option(False, "Divide scores by the running standard deviation, less the running mean.")
    reward_clip: float | None = _option(None, "Clip scores to this size, after normalisation.")
    whiten_rewards: bool = _option(False, "Scale rewards to unit variance.")
    whiten_advantages: bool = _option(True, "Scale advantages to zero mean, unit variance.")
    advantage_clip: float | None = _option(None, "Clip advantages to this size, after whitening.")
    gamma: float = _option(1.0, "Discount factor.")
    lam: float = _option(0.95, "Lambda of generalized advantage estimation.")

    # The reference
    kl_coef: float = _option(0.05, "Weight of the KL penalty to the reference; 0 keeps no reference at all.")
    kl_estimator: str = _option(
        "k1", "Estimator of the per-token KL; 'full' sums over the vocabulary.", choices=[*KL_ESTIMATORS, "full"]
    )
    kl_penalty: str = _option("reward", "Where the KL is penalised.", choices=list(KL_PLACES))
    kl_target: float | None = _option(
        None, "Steer `kl_coef` towards this KL, in nats a response (Ziegler et al. 2019, section 2.2)."
    )
    kl_horizon: int = _option(10_000, "Episodes over which a steered `kl_coef` may change by a fifth.")
    sync_ref_model: bool = _option(False, "Move the reference towards the policy now and then.")
    ref_model_sync_steps: int = _option(512, "Optimizer steps between two such moves.")
    ref_model_mixup_alpha: float = _option(0.6, "Share of the policy in such a move; 1 copies it.")

    # The loss
    cliprange: float = _option(0.2, "Clip range of the policy's probability ratio.")
    dual_clip: float | None = _option(
        None, "Bound, above 1, on the ratio's effect where the advantage is negative (arXiv:1912.09729)."
    )
    target_kl: float | None = _option(
        None, "Skip the rest of a rollout's optimizer steps once the KL to its sampling policy, a token, exceeds this."
    )
    entropy_coef: float = _option(0.0, "Weight of an entropy bonus, a token.")
    ptx_coef: float = _option(0.0, "Weight of the language-modelling loss on the trainer's `ptx_dataset`.")
    vf_coef: float = _option(0.1, "Weight of the value loss.")
    cliprange_value: float | None = _option(0.2, "Clip range of the values; None for no clipping.")
    value_learning_rate: float | None = _option(None, "Learning rate of the critic's own weights.")
    critic_warmup_steps: int = _option(0, "Optimizer steps at the beginning that train the critic alone.")

    # Tracking
    log_completions: bool = _option(
        False, "Keep prompts, completions and rewards as parquet, a file for each rollout and process."
    )

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "generation_kwargs"]

    def __post_init__(self):
        super().__post_init__()
        self._check_ranges()
        self._check_generation_kwargs()
        if self.total_episodes is not None and self.max_steps > 0:
            raise ValueError(f"total_episodes={self.total_episodes} and max_steps={self.max_steps}: give one of them")
        if self.total_episodes is not None and self.total_episodes < 1:
            raise ValueError(f"total_episodes must be at least 1, got {self.total_episodes}")
        for name, allowed in (
            ("kl_estimator", (*KL_ESTIMATORS, "full")),
            ("kl_penalty", KL_PLACES),
            ("vllm_mode", VLLM_MODES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if self.kl_penalty == "loss" and self.kl_estimator == "k1":
            raise ValueError("kl_estimator='k1' has no gradient on average: kl_penalty='loss' takes k2, k3 or full")
        if self.local_rollout_batch_size % self.num_generations:
            raise ValueError(
                f"num_generations={self.num_generations} must divide the {self.local_rollout_batch_size} episodes "
                "that a process samples for a rollout"
            )
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError(f"kl_target={self.kl_target} steers kl_coef, which is 0: give it a value to start from")
        if self.target_kl is not None and self.fp16:
            raise ValueError("target_kl skips steps, which the loss scaling of fp16 does not allow: use bf16")
        if self.use_cpu and self.fp16:
            raise ValueError("fp16 does nothing on a CPU: use --bf16 or neither")

    def _check_ranges(self) -> None:
        for names, is_good, accepted in (
            (AT_LEAST_ONE, lambda value: value >= 1, "be at least 1"),
            (ABOVE_ZERO, lambda value: value > 0, "be above 0"),
            (NOT_NEGATIVE, lambda value: value >= 0, "not be negative"),
            (SHARES, lambda value: 0 <= value <= 1, "lie in [0, 1]"),
            (("dual_clip",), lambda value: value > 1, "be above 1"),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None and not is_good(value):
                    raise ValueError(f"{name} must {accepted}, got {value}")

    def _check_generation_kwargs(self) -> None:
        known = GenerationConfig().to_dict()
        for name in self.generation_kwargs or {}:
            if name not in known:
                # A GenerationConfig takes any name, and ignores it.
                (nearest,) = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
                raise ValueError(f"generation_kwargs has an unknown {name!r}; did you mean {nearest!r}?")

    @property
    def steps_per_rollout(self) -> int:
        """Optimiser steps taken on each rollout."""
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def local_rollout_batch_size(self) -> int:
        """Episodes of one rollout on each process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_mini_batches
