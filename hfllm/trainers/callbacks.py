"""Callbacks of our trainers and recipes."""

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

SHOWN = {
    "loss": "loss",
    "eval_loss": "held-out loss",
    "soft_loss": "divergence",
    "hard_loss": "cross-entropy",
    "bits_per_byte": "bits/byte",
    "tokens_per_second": "tokens/s",
    "mfu": "mfu",
    "learning_rate": "lr",
    "accuracy": "accuracy",
    "reward": "reward",
    "rewards/gold_reward": "gold",
    "kl": "kl",
    "entropy": "entropy",
    "clip_fraction": "clipped",
    "explained_variance": "value ev",
    "response_length": "length",
}


def plain_line(state: TrainerState, logs: dict[str, float]) -> str | None:
    """The metrics that matter of one log entry as a line, or `None` if it holds none of them."""
    shown = [f"{label} {float(logs[name]):.3g}" for name, label in SHOWN.items() if name in logs]
    return f"step {state.global_step}/{state.max_steps}  {'  '.join(shown)}" if shown else None


class PlainPrinter(TrainerCallback):
    """Print one plain line at each logging step."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if state.is_world_process_zero and logs and (line := plain_line(state, logs)):
            print(line, flush=True)


class PlainProgress(ProgressCallback):
    """The stock progress bar, with a plain line at each logging step instead of the whole dictionary."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if self.training_bar is not None and logs and (line := plain_line(state, logs)):
            self.training_bar.write(line)


def use_plain_lines(trainer: Trainer) -> None:
    """Replace the stock printing of whole log dictionaries in any `Trainer`."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(PlainPrinter() if trainer.args.disable_tqdm else PlainProgress())
