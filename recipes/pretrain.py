"""Pretrain a language model from nothing, or continue with an existing model.

    hfllm pretrain                                # the embedded world
    hfllm pretrain --dataset_name my_texts.jsonl  # a small model on your own text
    hfllm pretrain --dataset_name pydoc           # on the documentation of this Python
    hfllm pretrain --dataset_mixture wiki.txt:0.7 books/:0.3 --total_tokens chinchilla
    hfllm pretrain --model_name_or_path NAME --dataset_name my_texts.jsonl
    accelerate launch recipes/pretrain.py --dataset_name my_texts.jsonl

Without `--model_name_or_path` a new tokenizer and model of the hfllm family are made, with the architecture that the
flags describe; the default settings are recipes/configs/pretrain/world.yaml for the embedded world and text.yaml for
your own text. The report compares the model with a 5-gram and gzip, in bits per byte of held-out documents.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hfllm.runs.command_line import parse_recipe, run
from hfllm.runs.flags import trusts_code_if_asked
from hfllm.runs.lock import releases_folders
from hfllm.stages.pretrain.flags import LIBRARY, PretrainArguments, default_settings

if TYPE_CHECKING:
    from transformers import TrainingArguments
    from trl import ModelConfig


def parse(argv: Sequence[str]) -> tuple[PretrainArguments, "TrainingArguments", "ModelConfig"]:
    """Read the flags, with the small model's settings for the data as defaults."""
    return parse_recipe(argv, __doc__, PretrainArguments, LIBRARY, "outputs/pretrain", default_settings)


@releases_folders
@trusts_code_if_asked
def main(
    script_args: PretrainArguments, training_args: "TrainingArguments", model_args: "ModelConfig"
) -> dict[str, float]:
    """Pretrain, save model and tokenizer, write the report. Return the metrics."""
    from pathlib import Path

    from transformers import set_seed

    from hfllm.data.loading import load_sources
    from hfllm.data.prepared import Prepared
    from hfllm.outputs.report import by_contents, plus_minus
    from hfllm.runs.models import fitting_length
    from hfllm.runs.stage import Stage
    from hfllm.stages.pretrain import build as pretrain
    from hfllm.stages.pretrain.build import load_or_make_base
    from hfllm.stages.pretrain.flags import check
    from hfllm.trainers.callbacks import use_plain_lines
    from hfllm.trainers.engines import gather_parameters
    from hfllm.trainers.learning_rate import scaled_learning_rate
    from hfllm.trainers.mixins import train
    from hfllm.trainers.run_record import final_train_loss

    check(script_args, training_args, model_args)
    stage = Stage("pretrain", script_args, training_args, model_args)
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    trainer_args, scaled = scaled_learning_rate(script_args, stage.training_args)
    stage.announce()

    # Texts, and the model with its tokenizer: new ones are trained on those texts.
    set_seed(training_args.seed)
    with training_args.main_process_first(desc="reading texts"):
        prepared = Prepared(Path(training_args.output_dir) / "prepared", by_contents(stage.arguments))
        sources, train_texts, test_texts = load_sources(script_args, training_args.seed, prepared)
    model, tokenizer = load_or_make_base(script_args, model_args, train_texts)
    fitted_args = replace(script_args, max_length=fitting_length(script_args.max_length, model))

    # Packed rows in planned batches, or padded documents.
    build = pretrain.packed_trainer if script_args.packing else pretrain.padded_trainer
    # The trainer counts the model's parameters and checks that it separates packed documents.
    with gather_parameters(model):
        trainer, mixed = build(fitted_args, trainer_args, model, tokenizer, sources, test_texts, prepared)
    use_plain_lines(trainer)
    samples = pretrain.watch(trainer, fitted_args, tokenizer, train_texts, test_texts)
    train(trainer, stage.checkpoint, stage.identity)
    pretrain.stop_if_broken(trainer)
    held_out_loss = trainer.evaluate()["eval_loss"]
    trainer.save_model()

    metrics = {
        "train_loss": final_train_loss(trainer),
        "eval_loss": held_out_loss,
        **pretrain.held_out_metrics(fitted_args, trainer.model, tokenizer, train_texts, test_texts),
        "parameters": model.num_parameters(),
        "documents": len(train_texts),
        "tokens_per_second": pretrain.mean_speed(trainer.state.log_history),
        **scaled,
    }
    summary = f"{metrics['parameters']:,} parameters, held-out loss {held_out_loss:.3f} nats per token"
    if "bits_per_byte" in metrics:
        summary += f", {plus_minus(metrics['bits_per_byte'], metrics.get('bits_per_byte_se'))} bits per byte"
    tables = {title: rows for title, rows in {"Sources": mixed, "Samples": samples()}.items() if rows}
    metrics = stage.finish(metrics, trainer, summary, tables, too_wide=[*tables])
    if trainer.is_local_process_zero():
        prepared.remove()
    return metrics


if __name__ == "__main__":
    run(main, parse)
