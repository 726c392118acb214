"""Train a reward model on comparisons (TRL's RewardTrainer; Bradley-Terry, Ouyang et al. 2022, equation 1).

    hfllm reward                                                         # the embedded world, from nothing
    hfllm reward --model_name_or_path NAME --dataset_name pairs.jsonl
    hfllm reward --task process --model_name_or_path NAME --dataset_name steps.jsonl
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

from hfllm.runs.command_line import parse_recipe, run
from hfllm.runs.flags import trusts_code_if_asked
from hfllm.runs.lock import releases_folders
from hfllm.runs.recipes import Recipe
from hfllm.stages.reward.build import PROCESS, RewardArguments, default_settings

if TYPE_CHECKING:
    from trl import ModelConfig, RewardConfig

RECIPE = Recipe(makes="a reward model", needs={"model_name_or_path": "sft"}, minutes=0.8)


def parse(argv: Sequence[str]) -> tuple[RewardArguments, "RewardConfig", "ModelConfig"]:
    """Read the flags; without your own model the defaults are the embedded world's settings."""
    library = ("trl.RewardConfig", "trl.ModelConfig")
    return parse_recipe(argv, __doc__, RewardArguments, library, "outputs/reward", default_settings)


@releases_folders
@trusts_code_if_asked
def main(script_args: RewardArguments, training_args: "RewardConfig", model_args: "ModelConfig") -> dict[str, float]:
    """Train, save, write the report. Return the metrics."""
    if script_args.task == PROCESS:
        from hfllm.stages.reward.process import train_on_steps

        return train_on_steps(script_args, training_args, model_args)
    from transformers import set_seed

    from hfllm.data.images.rows import words_of_places
    from hfllm.data.sources import WORLD
    from hfllm.flags import check_flags
    from hfllm.multimodal.composed import freeze
    from hfllm.multimodal.processors import check_template
    from hfllm.outputs.figures import share_of, shown
    from hfllm.runs.models import (
        check_trainable,
        load_policy,
        load_scorer_to_train,
        load_tokenizer,
        named_model,
        peft_config,
    )
    from hfllm.runs.pipeline import chain_before
    from hfllm.runs.stage import Stage
    from hfllm.stages import shared
    from hfllm.stages.pretrain.flags import check_adapter
    from hfllm.stages.reward import build as reward
    from hfllm.trainers.callbacks import use_plain_lines
    from hfllm.trainers.learning_rate import global_batch_size, scaled_learning_rate
    from hfllm.trainers.mixins import train
    from hfllm.trainers.monitors import StalledWeights
    from hfllm.trainers.precision import with_fast_products
    from hfllm.trainers.pretraining.muon import check_muon

    check_flags(script_args, model_args)
    check_muon(script_args.use_muon, training_args, model_args.use_peft)
    files = shared.files_changed(script_args, [model_args.model_name_or_path], model_args.model_revision)
    stage = Stage("reward", script_args, training_args, model_args, also=files)
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    check_trainable(model_args)
    trainer_args, scaled = scaled_learning_rate(script_args, stage.training_args)
    seed, revision = training_args.seed, model_args.model_revision
    processor = reward.scoring_processor(model_args.model_name_or_path, revision)
    sees, rows = processor is not None, None
    if script_args.dataset_name != WORLD:
        reading = script_args.image_reading(words_of_places(processor)) if sees else None
        rows = reward.user_comparisons(script_args.row_sources, reading, script_args.augment, seed)
    if shared.check_rows(script_args, training_args, model_args, rows or ((), ()), sees):
        check_template(processor, model_args.model_name_or_path)
    before = chain_before(
        "reward",
        training_args.output_dir,
        seed,
        script_args.world_seed,
        given_models={"sft": model_args.model_name_or_path},
        configs={"pretrain": script_args.pretrain_config, "sft": script_args.sft_config},
        over_world=True,
    )
    check_adapter(model_args, before, "SEQ_CLS")

    stage.announce()
    before.run()
    name = before.model("sft") or model_args.model_name_or_path
    base = replace(named_model(model_args), name=name)
    tokenizer = processor.tokenizer if sees else load_tokenizer(name, revision)
    train_rows, test_rows = rows or reward.world_comparisons(
        script_args.world,
        *load_policy(base),
        script_args.comparison_settings(seed),
        training_args.device,
    )
    if rows is None and training_args.train_sampling_strategy == "sequential":
        train_rows = reward.in_batches_of_like_length(train_rows, global_batch_size(stage.training_args), seed)
    # The head is new, and so are the weights of an adapter.
    set_seed(seed)
    model = load_scorer_to_train(base, training_args.output_dir)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    freeze(model, script_args.freeze_vision, script_args.freeze_text)
    trainer = reward.comparison_trainer(
        model,
        with_fast_products(trainer_args, model, stage.checkpoint),
        (train_rows, test_rows),
        processor or tokenizer,
        script_args.max_pixels,
        peft_config(model_args, "SEQ_CLS"),
        script_args.use_muon,
    )
    counts = reward.count_comparisons(trainer, train_rows, test_rows, script_args.dataset_name)
    use_plain_lines(trainer)
    trainer.add_callback(StalledWeights())
    train(trainer, stage.checkpoint, stage.identity, rows_are_sampled=rows is None)
    evaluation = trainer.evaluate()
    control = reward.other_pictures_accuracy(trainer, test_rows, script_args.max_pixels)
    trainer.save_model()

    accuracy, count = evaluation["eval_accuracy"], counts["eval_comparisons"]
    accuracy_metrics = share_of("reward_model_accuracy", accuracy, count)
    metrics = {**accuracy_metrics, "eval_loss": evaluation["eval_loss"], **counts, **control, **scaled}
    labels = "" if script_args.world is None else " with noise-free labels"
    summary = f"accuracy {shown(metrics, 'reward_model_accuracy')} on {count:,} held-out comparisons{labels}"
    summary += reward.other_pictures_summary(metrics)
    return stage.finish(metrics, trainer, summary, models={"model": name}, claims=reward.CLAIMS)


if __name__ == "__main__":
    run(main, parse)
