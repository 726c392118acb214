"""Monitor a run: its speed, whether its loss has diverged, and whether its weights or policy stand still.

    throughput = ThroughputCallback(tokens_per_step=65536, bytes_per_token=4.1)
    add_to_logs(trainer, throughput)
    trainer.add_callback(LossSpikeGuard())

For samples of the model during training see `callbacks.SampleCallback`.
"""

import math
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback

from hfllm.errors import InputError, refuse_if
from hfllm.trainers.ppo.config import PPOConfig

# ---- speed and divergence ----


# Fewer losses do not give a useful median.
FEWEST_LOSSES = 10
# The median absolute deviation of a normal distribution times this is its standard deviation.
MAD_TO_DEVIATION = 1.4826


def add_to_logs(trainer: Trainer, callback: TrainerCallback) -> None:
    """Add a callback whose `on_log` adds to the logs, before callbacks that report, print or store them.

    `trainer.add_callback` and `Trainer(callbacks=...)` put it after the ones of `report_to`, and these would not see
    its additions. It comes after the callback that decides whether a step is logged, evaluated or saved.
    """
    callbacks = trainer.callback_handler.callbacks
    deciding = [index for index, each in enumerate(callbacks) if isinstance(each, DefaultFlowCallback)]
    callbacks.insert(deciding[0] + 1 if deciding else 0, callback)


class ThroughputCallback(TrainerCallback):
    """Callback that adds to each training log, since the one before: `tokens_per_second`, `mfu` and `bits_per_byte`.

    Only training is timed, including waiting for data; evaluation, saving, logging and anything inside `paused()`
    are not, nor anything before the first step. Add it by `add_to_logs`; otherwise its values are in
    `trainer.state.log_history`, but do not reach the integrations of `report_to`.

    Args:
        tokens_per_step: tokens per optimizer step over all processes, or a function from the
            number of the step, from 1, to them. By default the trainer counts them; this needs
            `include_num_input_tokens_seen` (`non_padding` to exclude padding).
        flops_per_token: for example `hfllm.scaling.speed.palm_flops_per_token(...)`. With `peak_flops` it gives `mfu`,
            the share of the peak reached by training.
        peak_flops: peak FLOP/s of one device.
        bytes_per_token: UTF-8 bytes of training text per predicted token; gives `bits_per_byte`, from `loss`.
        eval_bytes_per_token: of the held-out text; gives `eval_bits_per_byte` in the evaluation's logs and metrics.
        clock: function returning the time in seconds.

    Raises:
        InputError: when only one of `flops_per_token` and `peak_flops` is given, a number is not positive, or
            training begins without a way to count tokens.
    """

    def __init__(
        self,
        tokens_per_step: int | Callable[[int], int] | None = None,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        bytes_per_token: float | None = None,
        eval_bytes_per_token: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        refuse_if((flops_per_token is None) != (peak_flops is None), "mfu needs both flops_per_token and peak_flops")
        numbers = {
            "tokens_per_step": None if callable(tokens_per_step) else tokens_per_step,
            **{"flops_per_token": flops_per_token, "peak_flops": peak_flops},
            **{"bytes_per_token": bytes_per_token, "eval_bytes_per_token": eval_bytes_per_token},
        }
        for name, value in numbers.items():
            refuse_if(value is not None and value <= 0, f"{name} is {value}; expected a positive number")
        self.tokens_per_step, self.flops_per_token, self.peak_flops = tokens_per_step, flops_per_token, peak_flops
        self.bytes_per_token = {"": bytes_per_token, "eval_": eval_bytes_per_token}
        self.clock = clock
        self._device = torch.device("cpu")
        self._begin(0)

    def _begin(self, tokens: int) -> None:
        # Start of the timed interval, or `None` before the first step: a resumed run first skips used data.
        self._since: float | None = None
        self._seconds, self._tokens, self._seen = 0.0, 0, tokens

    def _count_time(self, wait: bool) -> None:
        """Count the time until now; with `wait`, after the device has finished its work."""
        accelerator = torch.accelerator.current_accelerator() if wait and self._device.type != "cpu" else None
        if accelerator is not None and accelerator.type == self._device.type:
            torch.accelerator.synchronize(self._device)
        now = self.clock()
        if self._since is not None:
            self._seconds += now - self._since
            self._since = now

    def _leave_out_time(self) -> None:
        if self._since is not None:
            self._since = self.clock()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time within this context as training."""
        self._count_time(wait=True)
        try:
            yield
        finally:
            self._leave_out_time()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.tokens_per_step is None and args.include_num_input_tokens_seen == "no":
            raise InputError(
                "tokens cannot be counted: set include_num_input_tokens_seen to 'all' or 'non_padding', or give "
                "ThroughputCallback tokens_per_step"
            )
        self._device = args.device
        self._begin(state.num_input_tokens_seen)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self._since is None:
            self._since = self.clock()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if callable(self.tokens_per_step):
            self._tokens += self.tokens_per_step(state.global_step)
        else:
            self._tokens += self.tokens_per_step or state.num_input_tokens_seen - self._seen
        self._seen = state.num_input_tokens_seen
        # Wait for the device only if something untimed follows the step.
        self._count_time(wait=control.should_log or control.should_evaluate or control.should_save)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        added = {
            f"{split}bits_per_byte": logs[f"{split}loss"] / math.log(2) / size
            for split, size in self.bytes_per_token.items()
            if size is not None and f"{split}loss" in logs
        }
        if "loss" in logs and self._seconds > 0:
            rate = self._tokens / self._seconds
            added["tokens_per_second"] = rate
            if self.flops_per_token is not None:
                added["mfu"] = rate * self.flops_per_token / (self.peak_flops * args.world_size)
            self._seconds, self._tokens = 0.0, 0
        # By now the trainer has put a copy of the logs into the history.
        for entry in (logs, state.log_history[-1]):
            entry.update(added)
        self._leave_out_time()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._leave_out_time()

    on_save = on_evaluate


class LossSpikeGuard(TrainerCallback):
    """Callback for stopping a run, or warning, when its logged loss is far above the running median or not finite.

    A loss is too high if it exceeds the median of the last `window` losses by more than `threshold` robust deviations
    (1.4826 times the median absolute deviation, at least a hundredth of the median). Low losses never count.
    Its state comes from `state.log_history`, kept in all checkpoints, so a resumed run stops where an
    uninterrupted one would. While the loss is too high no checkpoint is saved; one from between the last
    good log and the first bad one may hold the broken model.

    It turns off `logging_nan_inf_filter`, since it would replace non-finite losses by earlier ones.

    Args:
        window: logged losses to compare with, at least 10; until there are 10, none is too high.
        threshold: limit in robust deviations.
        patience: consecutive losses above the limit before it acts. A single non-finite one is enough.
        action: `stop` or `warn`; both warn, with `warnings`.

    Attributes:
        message: its last finding, or `None`.

    Raises:
        InputError: when an argument is out of its range.
    """

    def __init__(self, window: int = 50, threshold: float = 6.0, patience: int = 3, action: str = "stop"):
        for name, value, least in (("window", window, FEWEST_LOSSES), ("patience", patience, 1)):
            refuse_if(value < least, f"{name} is {value}; expected at least {least}")
        refuse_if(not threshold > 0, f"threshold is {threshold}; expected a positive number of deviations")
        refuse_if(action not in ("stop", "warn"), f"action is {action!r}; expected 'stop' or 'warn'")
        self.threshold, self.patience, self.action = threshold, patience, action
        self._losses: deque[float] = deque(maxlen=window)
        self._begin()

    def _begin(self) -> None:
        self._losses.clear()
        self._too_high, self._has_stopped = 0, False
        self.message: str | None = None

    def _judge(self, loss: float) -> str | None:
        """Record a loss; return its problem if the guard must act, else `None`."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        complaint = None
        if len(self._losses) >= FEWEST_LOSSES:
            median = statistics.median(self._losses)
            spread = MAD_TO_DEVIATION * statistics.median(abs(each - median) for each in self._losses)
            deviation = max(spread, 0.01 * abs(median))
            self._too_high = self._too_high + 1 if loss > median + self.threshold * deviation else 0
            # Warn once per spike; a run resumed within a spike stops again.
            if self._too_high == self.patience or (self.action == "stop" and self._too_high > self.patience):
                complaint = (
                    f"the loss is {loss:.4g}, and for {self._too_high} log(s) in a row has been more than "
                    f"{self.threshold:g} robust deviations of {deviation:.3g} above its median, which is {median:.4g} "
                    f"over the last {len(self._losses)} logs"
                )
        self._losses.append(loss)
        return complaint

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        args.logging_nan_inf_filter = False
        self._begin()
        for entry in state.log_history:
            if "loss" in entry:
                self._judge(entry["loss"])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        complaint = self._judge(logs["loss"]) if "loss" in logs else None
        if self._too_high and self.action == "stop":
            control.should_save = False
        if complaint is None:
            return
        self.message = f"step {state.global_step}: {complaint}"
        if self.action == "stop":
            self.message += ". Training stops; resume from an earlier checkpoint with a lower learning rate"
            self._has_stopped = control.should_training_stop = True
            control.should_save = False
        if state.is_world_process_zero:
            warnings.warn(self.message, stacklevel=2)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self._has_stopped:
            control.should_save = False


# ---- stalled weights ----
#
# Warn of weights unchanged by training, because their precision rounds the updates away.


# Steps after the warm-up in which weights may change.
WATCHED_STEPS = 8
# In fp32 all of them do; in bf16, four in a hundred at a usual learning rate.
LEAST_CHANGED = 0.5


class StalledWeights(TrainerCallback):
    """Callback for warning once if most weights of a layer in half precision are the same after several steps.

    Numbers in bf16 have 8 bits: an update of less than 1/512 of a weight is rounded away. In fp32 under bf16 autocast
    (`--dtype float32 --bf16`) the forward pass is as fast and no update is lost.
    """

    def __init__(self):
        self._name, self._before, self._begin, self._due = "", None, 0, 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        self._before = None
        watched = _half_precision_weight(model)
        if watched is not None:
            self._name, weight = watched
            self._before = weight.detach().clone()
            self._begin = state.global_step
            self._due = max(state.global_step, args.get_warmup_steps(state.max_steps)) + WATCHED_STEPS

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        if self._before is None or state.global_step < self._due:
            return
        weight = model.get_parameter(self._name).detach()
        changed = (weight != self._before).float().mean().item()
        self._before = None
        if changed < LEAST_CHANGED and state.is_world_process_zero:
            kind, steps = str(weight.dtype).removeprefix("torch."), state.global_step - self._begin
            warnings.warn(
                f"{self._name}: {changed:.0%} of the weights changed in {steps} steps, since {kind} "
                "rounds small updates away: load the model in float32 and compute in bfloat16 "
                "(--dtype float32 --bf16), or train an adapter (--use_peft)",
                stacklevel=2,
            )


def _half_precision_weight(model: nn.Module | None) -> tuple[str, nn.Parameter] | None:
    """Return the first trained weight of a linear layer in half precision, with its name."""
    for name, parameter in model.named_parameters() if model is not None else ():
        is_linear = parameter.dim() == 2 and "embed" not in name
        # ZeRO-3 and FSDP split weights, and keep fp32 copies of their own.
        is_split = hasattr(parameter, "ds_id") or hasattr(parameter, "device_mesh")
        if is_linear and parameter.requires_grad and not is_split and parameter.dtype in (torch.bfloat16, torch.half):
            return name, parameter
    return None


# ---- stalled policy ----
#
# Warn of PPO without learning: a constant reward, or an unchanged policy.


# Rollouts after which a learning policy has left its reference by this much (nats per response), or has had this
# share of its ratios clipped.
WATCHED_ROLLOUTS, LEAST_KL, LEAST_CLIPPED = 10, 0.05, 0.002


class StalledPolicy(TrainerCallback):
    """Callback that warns once when PPO's reward is constant, and once when after some rollouts nothing has moved.

    Args:
        unlogged: returns `reward` and `reward_std` of the rollouts since the last log; all processes call it at the
            end of training, for runs without any log.
    """

    def __init__(self, unlogged: Callable[[], Mapping[str, float]] = dict):
        self._unlogged = unlogged
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
        self._judge_reward(logs)
        self._first = self._first or logs
        if not self._has_judged and state.global_step - self._begin >= WATCHED_ROLLOUTS * args.steps_per_rollout:
            self._has_judged = True
            if reason := unmoved(self._first, logs, args):
                warnings.warn(reason, stacklevel=2)

    def on_train_end(self, args: PPOConfig, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        rest = self._unlogged()
        if self._first is None and "reward_std" in rest and state.is_world_process_zero:
            self._judge_reward(rest)

    def _judge_reward(self, logs: Mapping[str, float]) -> None:
        """Warn of a constant reward, once."""
        if logs["reward_std"] == 0 and not self._has_warned_of_reward:
            self._has_warned_of_reward = True
            warnings.warn(
                f"every response of a rollout got the reward {logs['reward']:.4g}, so there is nothing to learn from. "
                "With prompts that are messages a completion is a list of messages as well: a reward function reads "
                "its text by hfllm.rewards.completion_text",
                stacklevel=3,
            )


def unmoved(first: Mapping[str, float], last: Mapping[str, float], args: PPOConfig) -> str | None:
    """Return a warning if reward, KL and clip fraction indicate an unchanged policy, else `None`.

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
        f"{last.get('clip_fraction', 0.0):.2g}. {rate} may be too low (docs/guides/ppo.md)"
    )
