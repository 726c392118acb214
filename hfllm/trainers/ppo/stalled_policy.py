"""Warn of PPO that learns nothing: a reward that is constant, or a policy that does not move."""

import warnings
from collections.abc import Mapping

from transformers import TrainerCallback, TrainerControl, TrainerState

from hfllm.trainers.ppo.config import PPOConfig

# Rollouts after which a policy that learns has left its reference by this much (nats per response), or has had this
# share of its ratios clipped.
WATCHED_ROLLOUTS, LEAST_KL, LEAST_CLIPPED = 10, 0.05, 0.002


class StalledPolicy(TrainerCallback):
    """Callback that warns once when PPO's reward is constant, and once when after some rollouts nothing has moved."""

    def __init__(self):
        self._first: Mapping[str, float] | None = None
        self._begin, self._has_warned_of_reward, self._has_judged = 0, False, False

    def on_train_begin(self, args: PPOConfig, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        self._first, self._has_warned_of_reward, self._has_judged = None, False, False
        # A resumed run is judged by its own rollouts.
        self._begin = state.global_step

    def on_log(
        self,
        args: PPOConfig,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if not logs or "reward_std" not in logs or not state.is_world_process_zero:
            return
        if logs["reward_std"] == 0 and not self._has_warned_of_reward:
            self._has_warned_of_reward = True
            warnings.warn(
                f"every response of a rollout got the reward {logs['reward']:.4g}, so there is nothing to learn from. "
                "With prompts that are messages a completion is a list of messages as well: a reward function reads "
                "its text by hfllm.rewards.completion_text",
                stacklevel=2,
            )
        self._first = self._first or logs
        if not self._has_judged and state.global_step - self._begin >= WATCHED_ROLLOUTS * args.steps_per_rollout:
            self._has_judged = True
            if reason := unmoved(self._first, logs, args):
                warnings.warn(reason, stacklevel=2)


def unmoved(first: Mapping[str, float], last: Mapping[str, float], args: PPOConfig) -> str | None:
    """Return a warning if reward, KL and clip fraction say that the policy is where it began, else `None`.

    Args:
        first, last: log entries of PPO at the beginning and now.
        args: with the size of a rollout, and the learning rate unless the optimizer is the caller's.
    """
    error = last["reward_std"] / (args.local_rollout_batch_size * args.world_size) ** 0.5
    rise = last["reward"] - first["reward"]
    kl = last.get("kl", last.get("approx_kl", 0.0))
    has_moved = abs(rise) > 2 * 2**0.5 * error or kl > LEAST_KL or last.get("clip_fraction", 0.0) > LEAST_CLIPPED
    if has_moved or last["reward_std"] == 0:
        return None
    rate = "the learning rate" if args.learning_rate is None else f"--learning_rate {args.learning_rate:g}"
    return (
        f"after {last['episode']:.0f} episodes nothing has moved: reward {first['reward']:.3g} to "
        f"{last['reward']:.3g} (± {error:.2g}), KL {kl:.2g} nats per response, clip fraction "
        f"{last.get('clip_fraction', 0.0):.2g}. {rate} may be too low (docs/ppo.md)"
    )
