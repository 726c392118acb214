"""Train a reward model on comparisons (TRL's RewardTrainer; Bradley-Terry, Ouyang et al. 2022, equation 1).

    hfllm reward                                                         # the embedded world, from nothing
    hfllm reward --model_name_or_path NAME --dataset_name pairs.jsonl
    accelerate launch recipes/reward.py --model_name_or_path NAME --dataset_name pairs.jsonl

Comparisons may be `prompt`/`chosen`/`rejected`, transcripts as in Anthropic's HH, labeled pairs (PandaLM, LLMBar) or
scored completions (UltraFeedback); docs/guides/data.md lists all. A vision-language model judges answers about
images, in rows with a column `image` or `images` (docs/guides/vision.md). On the embedded world two thirds of them are
between the model's own samples, judged by the gold rubric with label noise. Without `--model_name_or_path` the
stages before this one run first, under the output folder.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hfllm.runs.command_line import parse_recipe, run, world_settings
from hfllm.runs.flags import trusts_code_if_asked
from hfllm.runs.lock import releases_folders
from hfllm.stages.reward import RewardArguments

if TYPE_CHECKING:
    from trl import ModelConfig, RewardConfig


def parse(argv: Sequence[str]) -> tuple[RewardArguments, "RewardConfig", "ModelConfig"]:
    """Read the flags; without your own model the defaults are the embedded world's settings."""
    library = ("trl.RewardConfig", "trl.ModelConfig")
    return parse_recipe(argv, __doc__, RewardArguments, library, "outputs/reward", world_settings("reward"))


@releases_folders
@trusts_code_if_asked
def main(script_args: RewardArguments, training_args: "RewardConfig", model_args: "ModelConfig") -> dict[str, float]:
    """Train, save, write the report. Return the metrics."""
    from transformers import set_seed

    from hfllm.data.loading import world_of
    from hfllm.outputs.report import plus_minus, share_error, with_error
    from hfllm.runs.arguments import changed
    from hfllm.runs.models import check_trainable, fitting_length, load_scorer_to_train, load_tokenizer, peft_config
    from hfllm.runs.stage import Stage
    from hfllm.stages import reward, shared
    from hfllm.stages.pretrain.flags import check_adapter
    from hfllm.trainers.callbacks import use_plain_lines
    from hfllm.trainers.learning_rate import scaled_learning_rate
    from hfllm.trainers.mixins import train
    from hfllm.trainers.monitors import StalledWeights
    from hfllm.trainers.trl_trainers import RewardTrainer

    reward.check(script_args, model_args)
    files = shared.files_changed(script_args, [model_args.model_name_or_path], model_args.model_revision)
    stage = Stage("reward", script_args, training_args, model_args, also=files)
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    check_trainable(model_args)
    trainer_args, scaled = scaled_learning_rate(script_args, stage.training_args)
    processor = reward.processor_of(model_args)
    rows = reward.picture_comparisons(script_args, training_args.seed, processor)
    shows = reward.check_pictures(script_args, training_args, model_args, rows, processor)
    before = reward.stages_before(script_args, training_args, model_args)
    check_adapter(model_args, before, "SEQ_CLS")

    stage.announce()
    before.run()
    base_args = replace(model_args, model_name_or_path=before.model("sft") or model_args.model_name_or_path)
    name = base_args.model_name_or_path
    tokenizer = load_tokenizer(name, base_args.model_revision) if processor is None else processor.tokenizer
    if rows is None:
        train_rows, test_rows = reward.world_comparisons(script_args, training_args, base_args)
        if training_args.train_sampling_strategy == "sequential":
            train_rows = reward.in_batches_of_like_length(train_rows, training_args)
    else:
        train_rows, test_rows = rows
    # The head is new, and so are the weights of an adapter.
    set_seed(training_args.seed)
    model = load_scorer_to_train(base_args, training_args.output_dir)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id

    if shows:
        parts = (model, processor, train_rows, test_rows)
        trainer = reward.trainer_of(script_args, trainer_args, model_args, *parts)
    else:
        trainer = RewardTrainer(
            model=model,
            args=changed(trainer_args, max_length=fitting_length(training_args.max_length, model)),
            train_dataset=reward.comparisons_of(train_rows, tokenizer),
            eval_dataset=reward.comparisons_of(test_rows, tokenizer),
            processing_class=tokenizer,
            peft_config=peft_config(model_args, "SEQ_CLS"),
        )
        # A processor is saved with its tokenizer.
        trainer.processing_class = processor or trainer.processing_class
    counts = reward.kept_comparisons(script_args, trainer, train_rows, test_rows)
    use_plain_lines(trainer)
    trainer.add_callback(StalledWeights())
    train(trainer, stage.checkpoint, stage.identity, rows_are_sampled=rows is None)
    evaluation = trainer.evaluate()
    control_metrics = reward.control(script_args, trainer, test_rows) if shows else {}
    trainer.save_model()

    accuracy, count = evaluation["eval_accuracy"], counts["eval_comparisons"]
    error = share_error(accuracy, count)
    accuracy_metrics = {"reward_model_accuracy": accuracy, **with_error("reward_model_accuracy", error, count)}
    metrics = {**accuracy_metrics, "eval_loss": evaluation["eval_loss"], **counts, **control_metrics, **scaled}
    labels = "" if world_of(script_args) is None else " with noise-free labels"
    summary = f"accuracy {plus_minus(accuracy, error)} on {count:,} held-out comparisons{labels}"
    summary += reward.control_summary(metrics)
    return stage.finish(metrics, trainer, summary, models={"model": base_args.model_name_or_path})


if __name__ == "__main__":
    run(main, parse)
