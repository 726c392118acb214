"""Constitutional AI: a model criticizes and revises its own answers, and learns from its own judgement.

    hfllm constitution                                                   # the embedded world, from nothing
    hfllm constitution --model_name_or_path NAME --dataset_name red_team.csv
    hfllm constitution --model_name_or_path NAME --dataset_name red_team.csv --constitution mine.yaml --last_stage sl
    accelerate launch recipes/constitution.py --model_name_or_path NAME --dataset_name red_team.csv

In three steps, after Bai et al. 2022 (arXiv:2212.08073): revisions of answers to red-team prompts, by principles drawn
from the constitution; fine-tuning on them (SL-CAI); PPO against a preference model that is trained on the judgement of
the model itself (RL-CAI). Without `--model_name_or_path` a model that complies with harm is made first, and arms that
must not gain run at the end. docs/guides/constitution.md tells more.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hfllm.flags import check_flags
from hfllm.runs.command_line import parse_recipe, run, world_settings
from hfllm.runs.flags import trusts_code_if_asked
from hfllm.runs.lock import releases_folders
from hfllm.runs.recipes import Recipe
from hfllm.stages.constitution.flags import ConstitutionArguments

if TYPE_CHECKING:
    from trl import ModelConfig

RECIPE = Recipe(makes="a model aligned by a constitution", runs_own_chain=True)


def parse(argv: Sequence[str]) -> tuple[ConstitutionArguments, "ModelConfig"]:
    """Read the flags; without your own model the defaults are the embedded world's settings."""
    settings = world_settings("constitution")
    return parse_recipe(argv, __doc__, ConstitutionArguments, ("trl.ModelConfig",), settings=settings)


@releases_folders
@trusts_code_if_asked
def main(script_args: ConstitutionArguments, model_args: "ModelConfig") -> dict[str, float]:
    """Make what is missing, revise, tune, align, run the controls, report. Return the metrics."""
    from hfllm.outputs.card import chat_lines
    from hfllm.runs.command_line import main_process
    from hfllm.runs.stage import Stage
    from hfllm.stages.constitution import flags as constitution_flags
    from hfllm.stages.constitution.build import Steps, own_report, world_report
    from hfllm.stages.constitution.flags import check_before, course_of

    # Refuse what cannot work before anything is trained.
    check_flags(script_args, model_args)
    principles = constitution_flags.constitution_of(script_args.constitution, script_args.is_world)
    course = course_of(script_args, model_args)
    stage = Stage(
        *("constitution", script_args, model_args),
        before=course.runs,
        also={"principles": principles.as_dict()},
        is_spread=True,
    )
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    check_before(script_args, model_args, principles, course)
    steps = Steps(script_args, model_args, principles, course)
    stage.announce()

    course.announce()
    steps.helpful_only()
    steps.revise()
    steps.judge_revisions()
    if script_args.last_stage != constitution_flags.REVISIONS and not steps.worse:
        steps.supervised()
        steps.reinforced()
        steps.controls()
    course.end()
    if not main_process():
        return {}

    result = world_report(steps) if script_args.is_world else own_report(steps)
    last = course.folder(steps.last) if steps.last in course.runs else None
    question = steps.prompts.harmful[0]
    return stage.finish(
        result.metrics,
        summary=result.summary,
        tables=result.tables,
        curves=result.plots,
        promises=result.promises,
        claims=result.claims,
        artifacts=steps.artifacts,
        next_steps=chat_lines(last, question) if last else (),
        final_model=last,
        models={"model": course.named},
    )


if __name__ == "__main__":
    run(main, parse)
