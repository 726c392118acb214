"""PPO's options, by purpose. No torch here, so that `hfllm rlhf --help` is fast.

They are not frozen, since `PPOConfig` also inherits from transformers' `TrainingArguments`, not frozen either.
"""

from dataclasses import dataclass
from typing import Any

from hfllm.flags import NOT_NEGATIVE, POSITIVE, SHARE, Range, at_least, flag

# See hfllm/trainers/ppo/formulas.py.
KL_ESTIMATORS = ("k1", "k2", "k3")
KL_PLACES = ("reward", "loss")
LEVELS = ("token", "sequence")
BASELINES = ("critic", "group", "both")
VLLM_MODES = ("colocate", "server")
# Seconds for the rewards of a batch: as long as other processes wait for this one.
REWARD_TIMEOUT = 1800.0


@dataclass
class RolloutOptions:
    """Rollouts, and the passes over each."""

    total_episodes: int | None = flag(
        None, "Total number of responses to sample; sets `max_steps` when given.", takes=at_least(1)
    )
    num_ppo_epochs: int = flag(2, "Passes over each rollout.", takes=at_least(1))
    num_mini_batches: int = flag(4, "Optimizer steps in each pass over a rollout.", takes=at_least(1))
    num_generations: int = flag(1, "Responses sampled for each prompt of a rollout.", takes=at_least(1))
    disable_dropout: bool = flag(True, "Switch dropout off, so that the ratio is 1 before the first update.")
    local_rollout_forward_batch_size: int = flag(
        64, "Sequences per forward pass without gradient, on each process.", takes=at_least(1)
    )
    length_bucket_size: int | None = flag(
        None,
        "Split micro-batches into passes so that no sequence is padded by this many tokens or more. By default "
        "8 on a CPU and 256 elsewhere; with DeepSpeed micro-batches stay whole.",
        takes=at_least(1),
    )
    max_tokens_per_pass: int | None = flag(
        None,
        "Most tokens of one forward and backward pass; larger micro-batches are split. By default 768 on "
        "a CPU, where larger passes cost memory and save no time (fewer with vocabularies above 5,000); elsewhere "
        "the logits of a pass take an eighth of the device's memory at most.",
        takes=at_least(1),
    )


@dataclass
class SamplingOptions:
    """Sampling."""

    response_length: int = flag(
        53, "Longest response to sample, in tokens, with the results of tools.", takes=at_least(1)
    )
    temperature: float = flag(1.0, "Sampling temperature.", takes=POSITIVE)
    generation_kwargs: dict[str, Any] | str | None = flag(
        None, "More arguments for `GenerationConfig`, such as top_k, top_p or stop_strings."
    )
    log_completions: bool = flag(
        False, "Keep prompts, completions and rewards as parquet, one file per rollout and process."
    )


@dataclass
class ToolOptions:
    """Tools that the policy may call, which are the trainer's argument `tools`."""

    max_tool_calling_iterations: int | None = flag(
        None,
        "Turns with calls of tools that are answered; by default as many as the response has room for.",
        takes=at_least(1),
    )
    tool_timeout: float = flag(10.0, "Seconds after which a call of a tool is given up.", takes=POSITIVE)
    episode_timeout: float | None = flag(
        None,
        "Seconds that all calls of an episode may take together; by default as many as they need.",
        takes=POSITIVE,
    )
    max_tool_result_length: int = flag(1000, "Characters beyond which the result of a tool is cut.", takes=at_least(1))


@dataclass
class RewardOptions:
    """Rewards and advantages."""

    reward_weights: list[float] | None = flag(
        None, "One weight for each reward function; 0 logs a reward without training on it."
    )
    reward_timeout: float = flag(
        REWARD_TIMEOUT,
        "Seconds after which a reward function is given up, and the run with it; 0: none.",
        takes=NOT_NEGATIVE,
    )
    missing_eos_penalty: float | None = flag(
        None, "Subtracted from the score of a response that was cut off at `response_length`."
    )
    normalize_rewards: bool = flag(False, "Divide scores by the running standard deviation, less the running mean.")
    reward_clip: float | None = flag(None, "Clip scores to this size, after normalization.", takes=POSITIVE)
    whiten_rewards: bool = flag(False, "Scale rewards to unit variance.")
    whiten_advantages: bool = flag(True, "Scale advantages to zero mean, unit variance.")
    advantage_clip: float | None = flag(None, "Clip advantages to this size, after whitening.", takes=POSITIVE)
    gamma: float = flag(1.0, "Discount factor.", takes=SHARE)
    lam: float | None = flag(
        None,
        "Lambda of generalized advantage estimation; by default 0.95, or 1 - 20 / tokens^2 for more than 20 tokens.",
        takes=SHARE,
    )
    value_lam: float | None = flag(
        None, "Lambda of the critic's returns; by default that of the advantages (arXiv:2503.01491).", takes=SHARE
    )
    lam_alpha: float | None = flag(
        None,
        "Lambda of each response by its tokens, 1 - 1 / (lam_alpha * tokens), however few (arXiv:2504.05118).",
        takes=POSITIVE,
    )
    baseline: str = flag(
        "critic",
        "What an answer is compared with: the critic's values, the mean reward of the other answers to its prompt "
        "(`num_generations`, arXiv:2402.14740), or both: the mean is subtracted first, and the critic learns what "
        "remains.",
        choices=list(BASELINES),
    )
    dynamic_sampling_rounds: int = flag(
        0,
        "Times that prompts whose answers all earn the same are replaced by others (arXiv:2503.14476); needs "
        "`num_generations`.",
        takes=NOT_NEGATIVE,
    )
    importance_sampling_cap: float | None = flag(
        2.0,
        "Upper limit of the ratio of the trained policy to what sampled the responses, where the log-probabilities of "
        "that are known (vLLM, a `rollout_func`); None for no correction.",
        takes=POSITIVE,
    )
    importance_sampling_level: str = flag(
        "token", "Use the ratio of each token, or of the whole response.", choices=list(LEVELS)
    )


@dataclass
class ReferenceOptions:
    """The reference model, near which the policy is kept."""

    kl_coef: float = flag(0.05, "Weight of the KL penalty to the reference; 0 keeps no reference.", takes=NOT_NEGATIVE)
    kl_estimator: str = flag(
        "k1", "Estimator of the per-token KL; 'full' sums over the vocabulary.", choices=[*KL_ESTIMATORS, "full"]
    )
    kl_penalty: str = flag("reward", "Where the KL is penalized.", choices=list(KL_PLACES))
    kl_target: float | None = flag(
        None,
        "Steer `kl_coef` towards this KL, in nats per response (Ziegler et al. 2019, section 2.2).",
        takes=POSITIVE,
    )
    kl_horizon: int = flag(10_000, "Episodes over which a steered `kl_coef` may change by a fifth.", takes=at_least(1))
    sync_ref_model: bool = flag(False, "Move the reference towards the policy at intervals.")
    ref_model_sync_steps: int = flag(512, "Optimizer steps between two such moves.", takes=at_least(1))
    ref_model_mixup_alpha: float = flag(0.6, "Share of the policy in such a move; 1 copies it.", takes=SHARE)


@dataclass
class LossOptions:
    """The loss."""

    cliprange: float = flag(0.2, "Clip range of the policy's probability ratio.", takes=NOT_NEGATIVE)
    cliprange_high: float | None = flag(
        None, "Upper clip range of the ratio; by default the same (arXiv:2503.14476).", takes=NOT_NEGATIVE
    )
    dual_clip: float | None = flag(
        None,
        "Bound, above 1, on the ratio's effect where the advantage is negative (arXiv:1912.09729).",
        takes=Range("a number above 1", lambda value: value > 1, "be above 1"),
    )
    loss_aggregation: str = flag(
        "token", "Average the loss over all tokens, or first within each response.", choices=list(LEVELS)
    )
    positive_lm_coef: float = flag(
        0.0,
        "Weight of a language-modeling loss on answers that earn `positive_lm_min_reward` (arXiv:2504.05118).",
        takes=NOT_NEGATIVE,
    )
    positive_lm_min_reward: float = flag(1.0, "Least reward of an answer for `positive_lm_coef`.")
    target_kl: float | None = flag(
        None,
        "Skip the rest of a rollout's optimizer steps once the KL to its sampling policy, per token, exceeds this.",
        takes=POSITIVE,
    )
    entropy_coef: float = flag(0.0, "Weight of an entropy bonus, per token.", takes=NOT_NEGATIVE)
    ptx_coef: float = flag(
        0.0, "Weight of the language-modeling loss on the trainer's `ptx_dataset`.", takes=NOT_NEGATIVE
    )
    vf_coef: float = flag(0.1, "Weight of the value loss.", takes=NOT_NEGATIVE)
    cliprange_value: float | None = flag(0.2, "Clip range of the values; None for no clipping.", takes=NOT_NEGATIVE)
    value_learning_rate: float | None = flag(
        None,
        "Learning rate of the critic's own weights; by default that of a new head, or of all weights "
        "(docs/guides/ppo.md).",
        takes=POSITIVE,
    )
    critic_warmup_steps: int = flag(
        0, "Optimizer steps at the beginning that train only the critic.", takes=NOT_NEGATIVE
    )
    critic_warmup_lam: float | None = flag(
        None,
        "Lambda of the critic's returns during these steps; with 1 it learns what the policy as it was earns (value "
        "pretraining, arXiv:2503.01491).",
        takes=SHARE,
    )


@dataclass
class ModelOptions:
    """Models in memory."""

    shared_base: bool = flag(
        False,
        "Keep one base model in memory, of which policy, critic and reward models are adapters, and the reference is "
        "the base itself; needs a policy with an adapter.",
    )


@dataclass
class VllmOptions:
    """Sampling by vLLM."""

    use_vllm: bool = flag(False, "Sample by vLLM, through TRL's back end; needs `pip install 'trl[vllm]'`.")
    vllm_mode: str = flag(
        "colocate", "vLLM in this process, or a server started by `vllm serve`.", choices=list(VLLM_MODES)
    )
    vllm_model_impl: str = flag("vllm", "Whose model code vLLM runs: 'vllm' or 'transformers'.")
    vllm_enable_sleep_mode: bool = flag(False, "Let vLLM free the accelerator's memory during the updates.")
    vllm_server_base_url: str | None = flag(None, "URL of the server, in place of host and port.")
    vllm_server_host: str = flag("0.0.0.0", "Host of the server.")
    vllm_server_port: int = flag(8000, "Port of the server.")
    vllm_server_timeout: float = flag(240.0, "Seconds to wait for the server.")
    vllm_group_port: int = flag(51216, "Port for sending the weights to the server.")
    vllm_gpu_memory_utilization: float = flag(0.3, "Share of the accelerator's memory for vLLM in this process.")
    vllm_max_model_length: int | None = flag(None, "Longest prompt and response; by default the model's context.")
    vllm_tensor_parallel_size: int = flag(1, "Accelerators that share one vLLM in this process.")


@dataclass
class PPOOptions(
    RolloutOptions,
    SamplingOptions,
    ToolOptions,
    RewardOptions,
    ReferenceOptions,
    LossOptions,
    ModelOptions,
    VllmOptions,
):
    """All PPO options."""
