"""Write the checksums of each checkpoint when all processes have saved their parts of it."""

from pathlib import Path

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hfllm.outputs.checkpoints import write_checksums


class Checksums(TrainerCallback):
    """Callback that writes a checkpoint's checksums once it is whole; see `hfllm.outputs.checkpoints`."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        # Each process has written its own random state, and its part of the optimizer.
        self.trainer.accelerator.wait_for_everyone()
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and folder.is_dir():
            write_checksums(folder)
        # None begins the next checkpoint, or ends, before.
        self.trainer.accelerator.wait_for_everyone()
