"""Teach a small model to see from nothing, on drawn pictures; or fine-tune a vision-language model on your own rows.

    hfllm vision                                                          # the drawn world
    hfllm vision --dataset_name digits                                    # scanned digits, two side by side
    hfllm vision --model_name_or_path NAME --dataset_name rows.jsonl --freeze_vision
    accelerate launch recipes/vision.py --model_name_or_path NAME --dataset_name rows.jsonl --use_peft

From nothing: captions first, then questions about colors, shapes, counts, places, relations, written words, and what
is not in the picture. Rows of your own have pictures in a column `image` or `images`, and a question with its answer
in any format of `hfllm sft`. The report compares answers with those to other rows' pictures. docs/guides/vision.md
tells more.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hfllm.runs.command_line import parse_recipe, run
from hfllm.runs.flags import trusts_code_if_asked
from hfllm.runs.lock import releases_folders
from hfllm.stages.vision.flags import LIBRARY, VisionArguments, default_settings

if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig


def parse(argv: Sequence[str]) -> tuple[VisionArguments, "SFTConfig", "ModelConfig"]:
    """Read the flags; the defaults depend on the pictures, and on whether a model is named."""
    return parse_recipe(argv, __doc__, VisionArguments, LIBRARY, "outputs/vision", default_settings)


@releases_folders
@trusts_code_if_asked
def main(script_args: VisionArguments, training_args: "SFTConfig", model_args: "ModelConfig") -> dict[str, float]:
    """Train, judge, save, write the report. Return the metrics."""
    from hfllm.data.images.rows import words_of_places
    from hfllm.outputs.pictures import picture_lines
    from hfllm.runs.models import check_trainable
    from hfllm.runs.stage import Stage
    from hfllm.stages import shared
    from hfllm.stages.vision import build as vision
    from hfllm.stages.vision import flags as vision_flags
    from hfllm.stages.vision.report import evaluate
    from hfllm.trainers.callbacks import use_plain_lines
    from hfllm.trainers.mixins import train
    from hfllm.trainers.run_record import final_train_loss

    vision_flags.check(script_args, training_args, model_args)
    files = shared.files_changed(script_args, [model_args.model_name_or_path], model_args.model_revision)
    stage = Stage("vision", script_args, training_args, model_args, also=files)
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    check_trainable(model_args)
    seed, is_drawn = training_args.seed, script_args.dataset_name in vision_flags.DRAWN
    rows, parts = [], vision.eval_parts(script_args) if is_drawn else {}
    if not is_drawn:
        tokens = words_of_places(vision.load_processor(model_args))
        rows, held_out = vision.own_rows(script_args, seed, tokens)
        parts = vision.parts_of(held_out)
    elif model_args.model_name_or_path:
        rows = vision.drawn_rows(script_args, seed)

    stage.announce()
    if model_args.model_name_or_path:
        trainer, processor = vision.own_trainer(script_args, stage.training_args, model_args, rows)
    else:
        trainer, processor = vision.new_trainer(script_args, stage.training_args, seed)
    use_plain_lines(trainer)
    train(trainer, stage.checkpoint, stage.identity)
    trainer.save_model()
    model = trainer.accelerator.unwrap_model(trainer.model)

    result = evaluate(script_args, model, processor, parts, vision.prior_of(script_args))
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
        before = vision.sampled_gold(script_args, model, processor, first)
        policy_trainer = vision.policy_trainer(script_args, stage.training_args, processor)
        use_plain_lines(policy_trainer)
        train(policy_trainer)
        policy_trainer.save_model()
        policy = policy_trainer.policy
        policy_found = evaluate(script_args, policy, processor, parts, vision.prior_of(script_args))
        metrics |= {f"rl_{name}": value for name, value in policy_found.metrics.items()}
        metrics |= vision.gain(before, vision.sampled_gold(script_args, policy, processor, first))
        tables["Right answers after PPO"] = policy_found.tables["Right answers"]
        summary += f"; after PPO: {policy_found.summary}"
    lines = picture_lines(training_args.output_dir, model_args.use_peft)
    report_args = {"next_steps": lines, "too_wide": ["Samples"], "promises": result.promises}
    return stage.finish(metrics, trainer, summary, tables, plots, **report_args)


if __name__ == "__main__":
    run(main, parse)
