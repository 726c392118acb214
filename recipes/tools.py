"""Teach a model when and how to call tools, by demonstrations and then by PPO on right answers.

    hfllm tools                                                          # the embedded world, from nothing
    hfllm tools --model_name_or_path NAME --dataset_name prompts.jsonl --tools my.py:find --reward_funcs my.py:score
    accelerate launch recipes/tools.py --model_name_or_path NAME --dataset_name prompts.jsonl ...

On the embedded world a model is pretrained, learns from people who call tools half of the time, and finds by PPO that
calls pay: for animals that no text knows, facts that have changed and large sums, and for nothing else. Arms that must
not gain run at the end. With `--model_name_or_path` yours is aligned by PPO with your tools and rewards, after
fine-tuning on `--demonstrations_dataset_name` if that is given. docs/guides/tools.md tells more.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hfllm.flags import check_flags
from hfllm.runs.command_line import parse_recipe, run, world_settings
from hfllm.runs.flags import trusts_code_if_asked
from hfllm.runs.lock import releases_folders
from hfllm.runs.recipes import Recipe
from hfllm.stages.tools.flags import ToolsArguments

if TYPE_CHECKING:
    from trl import ModelConfig

RECIPE = Recipe(makes="a model that calls tools", runs_own_chain=True)


def parse(argv: Sequence[str]) -> tuple[ToolsArguments, "ModelConfig"]:
    """Read the flags; without your own model the defaults are the embedded world's settings."""
    settings = world_settings("tools")
    return parse_recipe(argv, __doc__, ToolsArguments, ("trl.ModelConfig",), settings=settings)


@releases_folders
@trusts_code_if_asked
def main(script_args: ToolsArguments, model_args: "ModelConfig") -> dict[str, float]:
    """Make what is missing, show, reinforce, run the controls, report. Return the metrics."""
    from hfllm.data.world.world import World
    from hfllm.outputs.card import chat_lines
    from hfllm.outputs.report import Found
    from hfllm.runs.command_line import main_process
    from hfllm.runs.models import named_model
    from hfllm.runs.stage import Stage
    from hfllm.stages.tools.build import ask_models, report, rows_by_run
    from hfllm.stages.tools.flags import PRETRAIN, RL, course_of

    # Refuse what cannot work before anything is trained.
    check_flags(script_args, model_args)
    course = course_of(script_args, model_args)
    stage = Stage("tools", script_args, model_args, before=course.runs, is_spread=True)
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    stage.announce()

    world, seed, output_dir = World(script_args.world_seed), script_args.seed, script_args.output_dir
    counts = script_args.num_demonstrations, script_args.num_prompts
    rows = rows_by_run(world, *counts, seed, output_dir) if script_args.is_world else {}
    metrics = course.run_all(rows)
    if not main_process():
        return {}

    if script_args.is_world:
        like = named_model(model_args)
        answers = ask_models(course, like, world, script_args.num_eval_prompts, seed)
        result = report(answers, course.folder(PRETRAIN))
    else:
        # The user's model is measured by PPO itself.
        result = Found(metrics[RL], "", {}, {})
    return stage.finish(
        result.metrics,
        summary=result.summary,
        tables=result.tables,
        curves=result.plots,
        promises=result.promises,
        claims=result.claims,
        artifacts={name: name for name in course.runs},
        too_wide=("Conversations",),
        next_steps=chat_lines(course.folder(RL), [{"role": "user", "content": "Hello!"}]),
        final_model=course.folder(RL),
        models={"model": course.named},
    )


if __name__ == "__main__":
    run(main, parse)
