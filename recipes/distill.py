"""Distill a language model into a smaller one. With no flags: from nothing to a student of the world's model.

    hfllm distill
    hfllm distill --teacher_model_name_or_path NAME --dataset_name alpaca.json --student_layers_every 3
    hfllm distill --teacher_model_name_or_path NAME --model_name_or_path STUDENT --dataset_name alpaca.json \\
        --sequence_level
    accelerate launch recipes/distill.py --teacher_model_name_or_path NAME --dataset_name alpaca.json

The student is `--model_name_or_path`, or every n-th layer of the teacher, or a new model of the given sizes. It learns
from the teacher's distributions, on the data's answers or on the teacher's own (`--answers sampled`), or with
`--sequence_level` from such answers only, so that the two need no common vocabulary. Without
`--teacher_model_name_or_path` the embedded world's aligned model is made first, by `hfllm rlhf`, under the output
folder.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hfllm.flags import check_flags
from hfllm.runs.command_line import given_values, parse_recipe, run
from hfllm.runs.flags import trusts_code_if_asked
from hfllm.runs.lock import releases_folders
from hfllm.runs.recipes import Recipe
from hfllm.stages.distill import OF_ANSWERS, DistillArguments, world_settings
from hfllm.trainers.distillation.options import DistillationOptions

if TYPE_CHECKING:
    from trl import ModelConfig

    from hfllm.trainers.distillation.config import DistillationConfig

RECIPE = Recipe(makes="a student", needs={"teacher_model_name_or_path": "rlhf"}, minutes=15)


def parse(argv: Sequence[str]) -> tuple[DistillArguments, "DistillationConfig", "ModelConfig"]:
    """Read the flags; without your own student or teacher the defaults are the embedded world's settings.

    The user's flags override settings that contradict them; two contradictory flags of the user are refused.
    """
    library = ("hfllm.trainers.distillation.config.DistillationConfig", "trl.ModelConfig")
    script_args, training_args, model_args = parse_recipe(
        *(argv, __doc__, DistillArguments, library, "outputs/distill", world_settings), shown=(DistillationOptions,)
    )
    # User flags without effect are refused here, before any training of a recipe with distillation at its end.
    check_flags(script_args, training_args, names=OF_ANSWERS)
    defaults, given = DistillArguments(), given_values(argv)
    idle = {name: getattr(defaults, name) for name in script_args.idle if name not in given}
    return replace(script_args, **idle), training_args, model_args


@releases_folders
@trusts_code_if_asked
def main(
    script_args: DistillArguments, training_args: "DistillationConfig", model_args: "ModelConfig"
) -> dict[str, float]:
    """Make what is missing, distill, compare, save, report. Return the metrics."""
    from hfllm.evaluation.before_after import distillation_plots, distillation_summary, gold_tables
    from hfllm.flags import changed
    from hfllm.outputs.card import chat_lines
    from hfllm.runs.models import named_model, peft_config
    from hfllm.runs.stage import Stage
    from hfllm.stages import distill
    from hfllm.trainers.learning_rate import scaled_learning_rate
    from hfllm.trainers.mixins import train

    # Refuse what cannot work before anything is trained.
    check_flags(script_args, training_args, model_args)
    output_dir, seed, shape = training_args.output_dir, training_args.seed, script_args.student_shape
    teacher_name, configs = training_args.teacher_model_name_or_path, script_args.teacher_configs
    before = distill.stages_before(teacher_name, output_dir, seed, script_args.world_seed, configs)
    stage = Stage("distill", script_args, training_args, model_args, before=before.parsed)
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    distill.check_student(shape, model_args, before)
    scaled_args, scaled = scaled_learning_rate(script_args, stage.training_args)
    data_rows, eval_rows = distill.rows_to_learn(
        script_args, script_args.num_examples, script_args.num_documents, seed
    )

    # The stages before: a teacher, which may write the answers.
    stage.announce()
    before.run()
    teacher_name = before.model("rlhf") or teacher_name
    trainer_args = changed(scaled_args, teacher_model_name_or_path=teacher_name)
    # The settings may have a token, and are in none of the arguments that are saved.
    teacher = distill.load_teacher(teacher_name, training_args.teacher_settings, trainer_args.device)
    answers, max_new_tokens = script_args.answer_source, script_args.longest_answer
    train_rows = distill.rows_to_teach(teacher, data_rows, answers, script_args.mixed_prompts, max_new_tokens, seed)

    # The student.
    student_args = trainer_args.without_teacher() if script_args.sequence_level else trainer_args
    student = named_model(model_args) if model_args.model_name_or_path else shape
    adapter = peft_config(model_args)
    trainer = distill.student_trainer(student_args, student, adapter, teacher, train_rows, eval_rows)
    train(trainer, stage.checkpoint, stage.identity, rows_are_sampled=train_rows is not data_rows)
    trainer.save_model()
    trainers = {"student": trainer}

    # The same student without the teacher. Rows may have been left out above, so the same epochs would be more steps.
    if script_args.train_baseline:
        folder, steps = f"{output_dir}/alone", trainer.state.max_steps
        alone_args = changed(trainer_args.without_teacher(), output_dir=folder, max_steps=steps)
        adapter = peft_config(model_args)
        alone = distill.student_trainer(alone_args, student, adapter, teacher, data_rows, eval_rows)
        train(alone)
        alone.save_model()
        trainers["student_alone"] = alone

    world = script_args.world
    sizes = (script_args.num_eval_prompts, max_new_tokens, script_args.num_samples)
    judged, metrics = distill.compare_students(teacher, trainers, world, *sizes)
    question = "Hello!" if world is None else "What colour is the fox?"
    return stage.finish(
        {**metrics, **scaled},
        trainer,
        distillation_summary(metrics, judged),
        tables=gold_tables(judged) if judged else None,
        curves=distillation_plots({name: each.state.log_history for name, each in trainers.items()}, metrics),
        next_steps=chat_lines(output_dir, [{"role": "user", "content": question}]),
        models={"teacher": teacher_name},
        claims=distill.claims_of(metrics),
    )


if __name__ == "__main__":
    run(main, parse)
