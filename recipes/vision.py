"""Teach a small model to see from nothing, on drawn pictures; or fine-tune a vision-language model on your own rows.

    hfllm vision                                                          # the drawn world
    hfllm vision --dataset_name digits                                    # scanned digits, two side by side
    hfllm vision --model_name_or_path NAME --dataset_name rows.jsonl --freeze_vision
    accelerate launch recipes/vision.py --model_name_or_path NAME --dataset_name rows.jsonl --use_peft

From nothing: first what is in each patch, then captions, then questions about colors, shapes, counts, places,
relations, written words, and what is not in the picture. Rows of your own have pictures in a column `image` or
`images`, and a question with its answer in any format of `hfllm sft`. The report compares answers with those to other
rows' pictures. docs/guides/vision.md tells more.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hfllm.runs.command_line import parse_recipe, run
from hfllm.runs.flags import trusts_code_if_asked
from hfllm.runs.lock import releases_folders
from hfllm.runs.recipes import Recipe
from hfllm.stages.vision.flags import LIBRARY, VisionArguments, default_settings

if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig

RECIPE = Recipe(makes="a vision-language model", settings="vision/pictures.yaml", runs_own_chain=True)


def parse(argv: Sequence[str]) -> tuple[VisionArguments, "SFTConfig", "ModelConfig"]:
    """Read the flags; the defaults depend on the pictures, and on whether a model is named."""
    return parse_recipe(argv, __doc__, VisionArguments, LIBRARY, "outputs/vision", default_settings)


@releases_folders
@trusts_code_if_asked
def main(script_args: VisionArguments, training_args: "SFTConfig", model_args: "ModelConfig") -> dict[str, float]:
    """Train, judge, save, write the report. Return the metrics."""
    from hfllm.data.images.rows import as_dataset, words_of_places
    from hfllm.multimodal.composed import freeze
    from hfllm.outputs.card import picture_lines
    from hfllm.outputs.figures import change_of
    from hfllm.runs.models import check_trainable, named_model, peft_config
    from hfllm.runs.stage import Stage
    from hfllm.stages import shared
    from hfllm.stages.vision import build as vision
    from hfllm.stages.vision import flags as vision_flags
    from hfllm.stages.vision.build import judge_answers
    from hfllm.trainers.callbacks import use_plain_lines
    from hfllm.trainers.engines import shards_parameters
    from hfllm.trainers.mixins import train
    from hfllm.trainers.run_record import final_train_loss
    from hfllm.trainers.trl_trainers import SFTTrainer

    vision_flags.check(script_args, training_args, model_args)
    name, revision = model_args.model_name_or_path, model_args.model_revision
    files = shared.files_changed(script_args, [name], revision)
    stage = Stage("vision", script_args, training_args, model_args, also=files)
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    check_trainable(model_args)
    seed, dataset_name, count = training_args.seed, script_args.dataset_name, script_args.num_eval_examples
    if dataset_name in vision_flags.DRAWN:
        parts = vision.eval_parts(dataset_name, count)
        mix = (script_args.num_examples, script_args.questions_per_picture, script_args.share_absent)
        questions = vision.question_rows(dataset_name, seed, *mix)
        rows = vision.drawn_rows(questions) if name else questions
    else:
        reading = script_args.image_reading(words_of_places(shared.picture_processor(name, revision)))
        rows, held_out = vision.own_rows(script_args.row_sources, reading, seed, script_args.max_eval_samples)
        parts = vision.parts_of(held_out)
    if name and shards_parameters(training_args):
        shared.refuse_mixed(rows)

    stage.announce()
    frozen = (script_args.freeze_vision, script_args.freeze_text)
    if name:
        model, processor = shared.load_picture_model(named_model(model_args), *frozen)
        trainer = SFTTrainer(
            model=model,
            args=shared.picture_args(stage.training_args, rows),
            train_dataset=as_dataset(rows, script_args.max_pixels),
            processing_class=processor,
            peft_config=peft_config(model_args),
        )
        shared.warn_of_frozen_projector(trainer.model, model_args.use_peft, "vision")
    else:
        captions = vision.caption_rows(dataset_name, seed, script_args.num_captions)
        model, processor = vision.new_model(
            script_args.model_sizes, dataset_name, [*captions.texts(), *questions.texts()], seed
        )
        patches = vision.patch_rows(dataset_name, seed, script_args.num_patch_pictures)
        rows = vision.JoinedRows(patches, captions, questions)
        is_named = script_args.num_patch_pictures > 0
        trainer = vision.new_trainer(model, processor, rows, stage.training_args, script_args.use_muon, is_named)
    use_plain_lines(trainer)
    train(trainer, stage.checkpoint, stage.identity)
    trainer.save_model()
    model = trainer.accelerator.unwrap_model(trainer.model)

    most, prior = script_args.max_new_tokens, vision.prior_of(dataset_name, count)
    styles = vision.style_parts(dataset_name, count)
    result = judge_answers(model, processor, parts, prior, most, styles)
    summary, tables, plots = result.summary, dict(result.tables), dict(result.plots)
    metrics = {
        **result.metrics,
        "train_loss": final_train_loss(trainer),
        "train_rows": len(trainer.train_dataset),
        "parameters": model.num_parameters(),
    }
    if script_args.num_rl_prompts:
        # On pictures that fine-tuning has not seen.
        first = next(iter(parts.values()))
        before = vision.sampled_gold(model, processor, first, most)
        policy_trainer = vision.policy_trainer(
            training_args.output_dir,
            processor,
            vision.prompt_rows(dataset_name, script_args.num_rl_prompts, seed),
            script_args.rl_learning_rate,
            script_args.kl_coef,
            **{flag: getattr(stage.training_args, flag) for flag in vision.SHARED},
        )
        policy = policy_trainer.policy
        freeze(policy, *frozen)
        use_plain_lines(policy_trainer)
        train(policy_trainer)
        policy_trainer.save_model()
        aligned = judge_answers(policy, processor, parts, prior, most, styles)
        metrics |= {f"rl_{metric}": value for metric, value in aligned.metrics.items()}
        metrics |= change_of("sampled_gold", before, vision.sampled_gold(policy, processor, first, most))
        tables["Right answers after PPO"] = aligned.tables["Right answers"]
        summary += f"; after PPO: {aligned.summary}"
    lines = picture_lines(training_args.output_dir, model_args.use_peft)
    report_args = {"next_steps": lines, "too_wide": ["Samples"], "promises": result.promises}
    return stage.finish(metrics, trainer, summary, tables, plots, **report_args)


if __name__ == "__main__":
    run(main, parse)
