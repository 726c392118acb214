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
from hfllm.runs.recipes import Recipe
from hfllm.stages.pretrain.flags import LIBRARY, PretrainArguments, default_settings

if TYPE_CHECKING:
    from transformers import TrainingArguments
    from trl import ModelConfig

RECIPE = Recipe(makes="a base model", minutes=0.8, unfinished="prepared")


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
    from hfllm.data.packing import Prepared
    from hfllm.outputs.figures import shown
    from hfllm.outputs.report import by_contents
    from hfllm.runs.models import fitting_length
    from hfllm.runs.stage import Stage
    from hfllm.stages.pretrain import build as pretrain
    from hfllm.stages.pretrain.flags import check
    from hfllm.stages.shared import say_receipts
    from hfllm.trainers.callbacks import use_plain_lines
    from hfllm.trainers.engines import gather_parameters
    from hfllm.trainers.learning_rate import scaled_learning_rate
    from hfllm.trainers.mixins import train
    from hfllm.trainers.precision import with_fast_products
    from hfllm.trainers.run_record import final_train_loss

    check(script_args, training_args, model_args)
    stage = Stage("pretrain", script_args, training_args, model_args)
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    trainer_args, scaled = scaled_learning_rate(script_args, stage.training_args)
    stage.announce()

    # Texts, and the model with its tokenizer: new ones are trained on those texts.
    seed, weights = training_args.seed, script_args.mixture_weights
    set_seed(seed)
    with training_args.main_process_first(desc="reading texts"):
        prepared = Prepared(Path(training_args.output_dir) / "prepared", by_contents(stage.arguments))
        sources, train_texts, test_texts = load_sources(script_args.text_sources, weights, seed, prepared)
    say_receipts(stage.arguments)
    model, tokenizer = pretrain.load_or_make_base(script_args, model_args, train_texts)
    trainer_args = with_fast_products(trainer_args, model, stage.checkpoint)
    length, is_masked = fitting_length(script_args.max_length, model), script_args.objective == "masked"
    fitted_args = replace(script_args, max_length=length)

    # Packed rows in planned batches, or padded documents.
    if script_args.packing:
        infilling_seed = seed if script_args.objective == "infilling" else None
        with training_args.main_process_first(desc="packing"):
            rows = pretrain.packed_rows(sources.values(), tokenizer, length, prepared, infilling_seed)
    # The trainer counts the model's parameters and checks that it separates packed documents.
    with gather_parameters(model):
        if script_args.packing:
            trainer = pretrain.trainer_of_rows(fitted_args, trainer_args, model, tokenizer, rows, test_texts)
        else:
            settings = (length, script_args.loss_chunk_size, script_args.use_muon)
            trainer = pretrain.padded_trainer(trainer_args, model, tokenizer, train_texts[:], test_texts, *settings)
    use_plain_lines(trainer)
    token_size = None if is_masked else pretrain.bytes_per_token(train_texts, tokenizer)
    throughput = pretrain.monitor(trainer, length, script_args.loss_spikes, script_args.peak_flops, token_size)
    sample_steps = 0 if is_masked else script_args.sample_steps
    samples = pretrain.add_samples(trainer, tokenizer, test_texts, sample_steps, throughput)
    probes = pretrain.add_probes(trainer, tokenizer, None if is_masked else script_args.world_texts, throughput)
    train(trainer, stage.checkpoint, stage.identity)
    pretrain.stop_if_broken(trainer)
    held_out_loss = trainer.evaluate()["eval_loss"]
    trainer.save_model()

    metrics = {
        "train_loss": final_train_loss(trainer),
        "eval_loss": held_out_loss,
        **({} if is_masked else pretrain.held_out_metrics(trainer.model, tokenizer, train_texts, test_texts, length)),
        **pretrain.probe_metrics(probes, trainer.model),
        "parameters": model.num_parameters(),
        "documents": len(train_texts),
        "tokens_per_second": pretrain.mean_speed(trainer.state.log_history),
        **scaled,
    }
    summary = f"{metrics['parameters']:,} parameters, held-out loss {held_out_loss:.3f} nats per token"
    if "bits_per_byte" in metrics:
        summary += f", {shown(metrics, 'bits_per_byte')} bits per byte"
    shares = pretrain.source_table(sources, trainer.plan) if script_args.packing else []
    tables = {title: rows for title, rows in {"Sources": shares, "Samples": samples()}.items() if rows}
    curves = pretrain.probe_curves(trainer.state.log_history, metrics)
    promised = {"promises": pretrain.PROMISES, "claims": pretrain.CLAIMS}
    metrics = stage.finish(metrics, trainer, summary, tables, curves, too_wide=[*tables], **promised)
    if trainer.is_local_process_zero():
        prepared.remove()
    return metrics


if __name__ == "__main__":
    run(main, parse)
