"""Teach a base model to follow instructions (TRL's SFTTrainer; loss on the responses only).

    accelerate launch recipes/sft.py                                     # the embedded world, from nothing
    accelerate launch recipes/sft.py --model_name_or_path NAME --dataset_name alpaca.json

Datasets may be in Alpaca, Dolly, FLAN, ShareGPT, `messages` or `prompt`/`completion` format. Without
`--model_name_or_path` a small base model is pretrained on the embedded world first, under the output folder.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfllm.data.loading import DataArguments
from hfllm.runs.command_line import parse_recipe, run
from hfllm.trainers.learning_rate import BatchArguments

CONFIG = Path(__file__).parent / "configs" / "sft" / "world.yaml"


@dataclass
class SftArguments(DataArguments, BatchArguments):
    """Instruction data."""

    num_examples: int = field(default=9600, metadata={"help": "Demonstrations of the embedded world to train on."})
    pretrain_config: str | None = field(
        default=None, metadata={"help": "YAML flags of the pretraining that makes the base model, if none is named."}
    )


def parse(argv: Sequence[str]) -> tuple:
    from trl import ModelConfig, SFTConfig

    return parse_recipe(
        (SftArguments, SFTConfig, ModelConfig), ["--output_dir", "outputs/sft", *argv], CONFIG, __doc__
    )


def main(script_args: SftArguments, training_args: Any, model_args: Any) -> dict[str, float]:
    """Fine-tune, save, write the report. Returns the metrics."""
    from hfllm.errors import refuse
    from hfllm.runs.chain import with_model_from
    from hfllm.runs.models import check_trainable, fitting_length, load_policy, peft_config
    from hfllm.runs.stage import Stage
    from hfllm.trainers.callbacks import use_plain_lines
    from hfllm.trainers.interruptions import train
    from hfllm.trainers.learning_rate import scale_learning_rate

    given = bool(script_args.pretrain_config and model_args.model_name_or_path)
    refuse(given, "--pretrain_config", "the model is named")
    stage = Stage("sft", script_args, training_args, model_args)
    if stage.report is not None:
        return stage.report["metrics"]
    check_trainable(model_args)
    used = scale_learning_rate(script_args, training_args)
    train_rows, test_rows = instruction_data(script_args, training_args.seed)
    if not model_args.model_name_or_path:
        import pretrain

        model_args = with_model_from(pretrain, script_args.pretrain_config, script_args, training_args, model_args)
    model, tokenizer = load_policy(model_args)
    training_args.max_length = fitting_length(training_args.max_length, model)

    from datasets import Dataset
    from trl import SFTTrainer

    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=Dataset.from_list(train_rows),
        eval_dataset=Dataset.from_list(test_rows),
        processing_class=tokenizer,
        peft_config=peft_config(model_args),
    )
    use_plain_lines(trainer)
    train(trainer, stage.checkpoint)
    losses = trainer.evaluate()
    trainer.save_model()
    metrics = {
        "train_loss": next(entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry),
        "eval_loss": losses["eval_loss"],
        "examples": len(train_rows),
        **used,
    }
    summary = f"{len(train_rows):,} responses, held-out loss {losses['eval_loss']:.3f} nats a token"
    return stage.finish(trainer, metrics, summary)


def world_model_stages(script_args: DataArguments, seed: int, folder: str) -> dict[str, tuple]:
    """The stages that make the embedded world's fine-tuned model for another recipe, each with its parsed flags.

    Args:
        script_args: with the YAML files `pretrain_config` and `sft_config`, if not the world's own.
        folder: of the other recipe; each stage has one in it.
    """
    import pretrain

    shared = ["--seed", str(seed), "--world_seed", str(script_args.world_seed)]
    base = ["--output_dir", f"{folder}/pretrain", "--config", script_args.pretrain_config or str(pretrain.CONFIG)]
    tuned = ["--output_dir", f"{folder}/sft", "--config", script_args.sft_config or str(CONFIG)]
    return {
        "pretrain": pretrain.parse([*shared, *base]),
        "sft": parse([*shared, *tuned, "--model_name_or_path", f"{folder}/pretrain"]),
    }


def instruction_data(script_args: SftArguments, seed: int) -> tuple[list[dict], list[dict]]:
    """Training and held-out rows with `prompt` and `completion` messages."""
    from hfllm.data import formats
    from hfllm.data.loading import load_rows, split_rows
    from hfllm.data.sources import WORLD, Source
    from hfllm.data.world.demonstrators import instruction_rows
    from hfllm.data.world.world import World

    if script_args.dataset_name != WORLD:
        return split_rows(load_rows(script_args, formats.to_sft), seed)
    rows = instruction_rows(World(script_args.world_seed), script_args.num_examples, seed)
    source = Source(rows, [f"world, row {number}" for number in range(1, len(rows) + 1)])
    return split_rows(formats.convert(source, formats.to_sft), seed)


if __name__ == "__main__":
    run(main, parse)
