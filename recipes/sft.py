"""Teach a base model to follow instructions (TRL's SFTTrainer; loss on the responses only).

    hfllm sft                                                            # the embedded world, from nothing
    hfllm sft --model_name_or_path NAME --dataset_name alpaca.json
    accelerate launch recipes/sft.py --model_name_or_path NAME --dataset_name alpaca.json

Datasets may be in Alpaca, Dolly, FLAN, ShareGPT, `messages` or `prompt`/`completion` format; every answer of a
conversation is learned (`--loss_on`). docs/guides/data.md lists formats and flags. A vision-language model also
learns of rows with a column `image` or `images` (docs/guides/vision.md). Without `--model_name_or_path` a small base
model is pretrained on the embedded world first, under the output folder.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from hfllm.runs.command_line import parse_recipe, run
from hfllm.runs.flags import trusts_code_if_asked
from hfllm.runs.lock import releases_folders
from hfllm.stages.sft.flags import SftArguments, default_settings

if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig


def parse(argv: Sequence[str]) -> tuple[SftArguments, "SFTConfig", "ModelConfig"]:
    """Read the flags; the defaults depend on whether a model is named, and whether an adapter is trained."""
    library = ("trl.SFTConfig", "trl.ModelConfig")
    return parse_recipe(argv, __doc__, SftArguments, library, "outputs/sft", default_settings)


@releases_folders
@trusts_code_if_asked
def main(script_args: SftArguments, training_args: "SFTConfig", model_args: "ModelConfig") -> dict[str, float]:
    """Fine-tune, save, write the report. Return the metrics."""
    from hfllm.evaluation import before_after
    from hfllm.runs.arguments import changed
    from hfllm.runs.models import check_trainable, fitting_length, load_config, peft_config
    from hfllm.runs.stage import Stage
    from hfllm.stages import shared
    from hfllm.stages.pretrain.flags import check_adapter
    from hfllm.stages.rlhf import build as rlhf
    from hfllm.stages.sft import build as sft
    from hfllm.stages.sft import flags as sft_flags
    from hfllm.trainers.callbacks import use_plain_lines
    from hfllm.trainers.learning_rate import scaled_learning_rate
    from hfllm.trainers.mixins import train
    from hfllm.trainers.monitors import StalledWeights
    from hfllm.trainers.run_record import final_train_loss
    from hfllm.trainers.trl_trainers import SFTTrainer

    sft_flags.check(script_args, training_args, model_args)
    files = shared.files_changed(script_args, [model_args.model_name_or_path], model_args.model_revision)
    also = {**sft.contents(script_args), **files}
    stage = Stage("sft", script_args, training_args, model_args, also=also)
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    check_trainable(model_args)
    trainer_args, scaled = scaled_learning_rate(script_args, stage.training_args)
    processor, seed, named = sft.processor_of(model_args), training_args.seed, model_args.model_name_or_path
    train_rows, test_rows = sft.picture_instructions(script_args, seed, processor, named)
    shows = sft.check_pictures(script_args, training_args, model_args, train_rows, test_rows)
    train_rows = sft.augmented(script_args, train_rows, training_args.seed)
    before = sft.stages_before(script_args, training_args, model_args)
    check_adapter(model_args, before)

    stage.announce()
    before.run()
    base_args = replace(model_args, model_name_or_path=before.model("pretrain") or model_args.model_name_or_path)
    config = load_config(base_args.model_name_or_path, base_args.model_revision)
    grounded, dropped = {}, 0
    if shows:
        trainer, held_out = sft.trainer_of(script_args, trainer_args, base_args, train_rows, test_rows)
        evaluate, counts = (
            partial(sft.evaluate, trainer, held_out),
            (len(trainer.train_dataset), len(held_out)),
        )
    else:
        model, tokenizer, processing_class = sft.load_policy(script_args, training_args, base_args, config)
        sft.check_head(model)
        trainer_args = changed(trainer_args, max_length=fitting_length(training_args.max_length, model))
        results = sft.with_passages(train_rows, test_rows, script_args, tokenizer, seed)
        train_rows, test_rows, grounded = results
        train_dataset, dropped = sft.examples(train_rows, tokenizer, trainer_args, "training rows")
        eval_dataset, _ = sft.examples(test_rows, tokenizer, trainer_args, "held-out rows", is_eval=True)
        counts = train_dataset.num_rows, eval_dataset.num_rows
        trainer = SFTTrainer(
            model=model,
            args=changed(trainer_args, **sft.trained_as_they_are(trainer_args)),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config(model_args),
        )
        tokenized = eval_dataset if sft.joins_rows(trainer_args) else None
        evaluate = partial(before_after.evaluate_tuned, trainer, test_rows, tokenized)
    use_plain_lines(trainer)
    trainer.add_callback(StalledWeights())
    untuned = evaluate()
    train(trainer, stage.checkpoint, stage.identity)
    held_out_loss = trainer.evaluate()["eval_loss"]
    tuned = evaluate()
    control_metrics = sft.control(script_args, trainer, held_out) if shows else {}
    trainer.save_model()

    metrics = {
        "train_loss": final_train_loss(trainer),
        "eval_loss": held_out_loss,
        **dict(zip(("examples", "eval_examples"), counts, strict=True)),
        **({"dropped_rows": dropped} if dropped else {}),
        **grounded,
        **before_after.tuning_metrics(untuned, tuned),
        **control_metrics,
        **scaled,
    }
    result = before_after.tuning_summary(metrics) or f"held-out loss {held_out_loss:.3f} nats per token"
    summary = f"{metrics['examples']:,} responses, {result}{sft.control_summary(metrics)}"
    tables, greeting = before_after.tuning_tables(untuned, tuned), [{"role": "user", "content": "Hello!"}]
    lines = rlhf.next_lines(training_args.output_dir, greeting, config, model_args.use_peft)
    models = {"model": base_args.model_name_or_path}
    return stage.finish(metrics, trainer, summary, tables, next_steps=lines, models=models)


if __name__ == "__main__":
    run(main, parse)
