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
from hfllm.runs.recipes import Recipe
from hfllm.stages.sft.flags import SftArguments, default_settings

if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig

RECIPE = Recipe(makes="a model that answers", needs={"model_name_or_path": "pretrain"}, minutes=0.5)


def parse(argv: Sequence[str]) -> tuple[SftArguments, "SFTConfig", "ModelConfig"]:
    """Read the flags; the defaults depend on whether a model is named, and whether an adapter is trained."""
    library = ("trl.SFTConfig", "trl.ModelConfig")
    return parse_recipe(argv, __doc__, SftArguments, library, "outputs/sft", default_settings)


@releases_folders
@trusts_code_if_asked
def main(script_args: SftArguments, training_args: "SFTConfig", model_args: "ModelConfig") -> dict[str, float]:
    """Fine-tune, save, write the report. Return the metrics."""
    from hfllm.data.images.rows import as_dataset, by_turns
    from hfllm.evaluation import before_after
    from hfllm.flags import changed
    from hfllm.runs.models import check_trainable, fitting_length, load_config, named_model, peft_config
    from hfllm.runs.pipeline import chain_before
    from hfllm.runs.stage import Stage
    from hfllm.stages import shared
    from hfllm.stages.pretrain.flags import check_adapter
    from hfllm.stages.sft import build as sft
    from hfllm.stages.sft import flags as sft_flags
    from hfllm.trainers.callbacks import use_plain_lines
    from hfllm.trainers.learning_rate import scaled_learning_rate
    from hfllm.trainers.mixins import train
    from hfllm.trainers.monitors import StalledWeights
    from hfllm.trainers.precision import with_fast_products
    from hfllm.trainers.pretraining.trainer import optimizer_of
    from hfllm.trainers.run_record import final_train_loss
    from hfllm.trainers.trl_trainers import SFTTrainer

    sft_flags.check(script_args, training_args, model_args)
    files = shared.files_changed(script_args, [model_args.model_name_or_path], model_args.model_revision)
    also = {**sft.passage_contents(script_args.retrieval_dataset_name), **files}
    stage = Stage("sft", script_args, training_args, model_args, also=also)
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    check_trainable(model_args)
    trainer_args, scaled = scaled_learning_rate(script_args, stage.training_args)
    seed, name = training_args.seed, model_args.model_name_or_path
    processor = shared.processor_of(name, model_args.model_revision)
    rows = sft.instruction_data(script_args, script_args.num_examples, seed, name, processor)
    shows = shared.check_rows(script_args, training_args, model_args, rows, sees=processor is not None)
    train_rows, test_rows = sft.augmented(rows[0], script_args.augment, seed, script_args.dataset_name), rows[1]
    before = chain_before(
        "sft",
        training_args.output_dir,
        seed,
        script_args.world_seed,
        given_models={"pretrain": name},
        configs={"pretrain": script_args.pretrain_config},
    )
    check_adapter(model_args, before)

    stage.announce()
    before.run()
    base = replace(named_model(model_args), name=before.model("pretrain") or name)
    config = load_config(base.name, base.revision)
    grounded, dropped = {}, 0
    if shows:
        # A row for each answer, read by the processor when a batch needs it.
        train_rows, test_rows = ([turn for row in part for turn in by_turns(row)] for part in (train_rows, test_rows))
        frozen = (script_args.freeze_vision, script_args.freeze_text)
        model, processing_class = shared.load_picture_model(base, *frozen)
        train_dataset, eval_dataset = (as_dataset(part, script_args.max_pixels) for part in (train_rows, test_rows))
        trainer_args = shared.picture_args(trainer_args, train_rows)
    else:
        model, processing_class = shared.load_policy(base, config, training_args.output_dir)
        template = (training_args.chat_template_path, training_args.eos_token, script_args.added_tokens)
        model, tokenizer = sft.with_template(model, processing_class, *template)
        sft.check_head(model)
        trainer_args = changed(trainer_args, max_length=fitting_length(training_args.max_length, model))
        train_rows, test_rows, grounded = sft.with_passages(train_rows, test_rows, script_args, tokenizer, seed)
        tokenization, of_eval = (sft.tokenization_of(trainer_args, is_eval) for is_eval in (False, True))
        train_dataset, dropped = sft.examples(train_rows, tokenizer, tokenization, "training rows")
        eval_dataset, _ = sft.examples(test_rows, tokenizer, of_eval, "held-out rows")
        trainer_args = sft.as_tokenized(trainer_args)
    trainer = SFTTrainer(
        model=model,
        args=with_fast_products(trainer_args, model, stage.checkpoint),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processing_class,
        peft_config=peft_config(model_args),
        optimizer_cls_and_kwargs=optimizer_of(script_args.use_muon, trainer_args),
    )
    if shows:
        shared.warn_of_frozen_projector(trainer.model, model_args.use_peft, "sft")
    joins_rows = trainer_args.packing or trainer_args.eval_packing or trainer_args.padding_free
    tokenized = eval_dataset if joins_rows else None
    answer = partial(sft.answers_about_pictures, processing_class) if shows else None
    evaluate = partial(before_after.evaluate_tuned, trainer, test_rows, tokenized, answer=answer)
    use_plain_lines(trainer)
    trainer.add_callback(StalledWeights())
    untuned = evaluate()
    train(trainer, stage.checkpoint, stage.identity)
    held_out_loss = trainer.evaluate()["eval_loss"]
    tuned = evaluate()
    control = sft.other_pictures_loss(trainer, test_rows, script_args.max_pixels)
    trainer.save_model()

    metrics = {
        "train_loss": final_train_loss(trainer),
        "eval_loss": held_out_loss,
        "examples": len(train_dataset),
        "eval_examples": len(eval_dataset),
        **({"dropped_rows": dropped} if dropped else {}),
        **grounded,
        **before_after.tuning_metrics(untuned, tuned),
        **control,
        **scaled,
    }
    result = before_after.tuning_summary(metrics) or f"held-out loss {held_out_loss:.3f} nats per token"
    summary = f"{metrics['examples']:,} responses, {result}{sft.other_pictures_summary(metrics)}"
    tables, greeting = before_after.tuning_tables(untuned, tuned), [{"role": "user", "content": "Hello!"}]
    lines = shared.next_lines(training_args.output_dir, greeting, config, model_args.use_peft)
    models = {"model": base.name}
    return stage.finish(metrics, trainer, summary, tables, next_steps=lines, models=models)


if __name__ == "__main__":
    run(main, parse)
