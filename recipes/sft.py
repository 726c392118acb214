"""Teach a base model to follow instructions (TRL's SFTTrainer; loss on the responses only).

    hfllm sft                                                            # the embedded world, from nothing
    hfllm sft --model_name_or_path NAME --dataset_name alpaca.json
    accelerate launch recipes/sft.py --model_name_or_path NAME --dataset_name alpaca.json

Datasets may be in Alpaca, Dolly, FLAN, ShareGPT, `messages` or `prompt`/`completion` format. Without
`--model_name_or_path` a small base model is pretrained on the embedded world first, under the output folder.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hfllm.runs.command_line import parse_recipe, run, world_settings
from hfllm.runs.lock import releases_folders
from hfllm.stages.sft import SftArguments

if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig


def parse(argv: Sequence[str]) -> tuple[SftArguments, "SFTConfig", "ModelConfig"]:
    """Read the flags; without your own model the defaults are the embedded world's settings."""
    library = ("trl.SFTConfig", "trl.ModelConfig")
    return parse_recipe(argv, __doc__, SftArguments, library, "outputs/sft", world_settings("sft"))


@releases_folders
def main(script_args: SftArguments, training_args: "SFTConfig", model_args: "ModelConfig") -> dict[str, float]:
    """Fine-tune, save, write the report. Return the metrics."""
    from datasets import Dataset
    from trl import SFTTrainer

    from hfllm.runs.adapters import load_to_train
    from hfllm.runs.arguments import changed
    from hfllm.runs.models import check_trainable, fitting_length, peft_config
    from hfllm.runs.stage import Stage
    from hfllm.stages.architecture import check_adapter
    from hfllm.stages.sft import check, check_head, instruction_data, stages_before
    from hfllm.trainers.callbacks import use_plain_lines
    from hfllm.trainers.interruptions import train
    from hfllm.trainers.learning_rate import scaled_learning_rate
    from hfllm.trainers.run_record import final_train_loss

    check(script_args, model_args)
    stage = Stage("sft", script_args, training_args, model_args)
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    check_trainable(model_args)
    trainer_args, scaled = scaled_learning_rate(script_args, stage.training_args)
    train_rows, test_rows = instruction_data(script_args, script_args.num_examples, training_args.seed)
    before = stages_before(script_args, training_args, model_args)
    check_adapter(model_args, before)

    stage.announce()
    before.run()
    base_args = replace(model_args, model_name_or_path=before.model("pretrain") or model_args.model_name_or_path)
    model, tokenizer = load_to_train(base_args, training_args.output_dir)
    check_head(model)

    trainer = SFTTrainer(
        model=model,
        args=changed(trainer_args, max_length=fitting_length(training_args.max_length, model)),
        train_dataset=Dataset.from_list(train_rows),
        eval_dataset=Dataset.from_list(test_rows),
        processing_class=tokenizer,
        peft_config=peft_config(model_args),
    )
    use_plain_lines(trainer)
    train(trainer, stage.checkpoint, stage.identity)
    held_out_loss = trainer.evaluate()["eval_loss"]
    trainer.save_model()

    metrics = {
        "train_loss": final_train_loss(trainer),
        "eval_loss": held_out_loss,
        "examples": len(train_rows),
        **scaled,
    }
    summary = f"{len(train_rows):,} responses, held-out loss {held_out_loss:.3f} nats per token"
    return stage.finish(metrics, trainer, summary)


if __name__ == "__main__":
    run(main, parse)
