"""Thoughts before answers: what they gain where a direct answer cannot do, and how PPO on the outcome spreads them.

    hfllm reason                                                # the embedded world, from nothing
    accelerate launch recipes/reason.py --seed 4

A base model reads texts in which people think. It is fine-tuned on questions of several steps with thoughts, and, as a
control, on the same answers without. A third model thinks in 30% of its answers: PPO on right answers alone must make
it think more, and PPO on the same rewards dealt out by chance must not. docs/guides/reasoning.md tells more.
"""

from collections.abc import Sequence

from hfllm.flags import check_flags
from hfllm.runs.command_line import parse_recipe, run
from hfllm.runs.lock import releases_folders
from hfllm.runs.recipes import Recipe, settings_file
from hfllm.stages.reason.flags import ReasonArguments

RECIPE = Recipe(makes="models that think", runs_own_chain=True)


def parse(argv: Sequence[str]) -> tuple[ReasonArguments]:
    """Read the flags; the defaults are the embedded world's settings."""
    return parse_recipe(argv, __doc__, ReasonArguments, settings=lambda flags: [settings_file("reason/world.yaml")])


@releases_folders
def main(script_args: ReasonArguments) -> dict[str, float]:
    """Pretrain, fine-tune with thoughts and without, run PPO and its control, report. Return the metrics."""
    from hfllm.data.world.world import World
    from hfllm.outputs.card import chat_lines
    from hfllm.runs.command_line import main_process
    from hfllm.runs.stage import Stage
    from hfllm.stages.courses import check_runs
    from hfllm.stages.reason import flags as reason_flags
    from hfllm.stages.reason.build import course_report, mixed_rows, prompt_rows, tuning_rows
    from hfllm.stages.reason.flags import DIRECT, MIXED, RL, SHUFFLED, THOUGHTS

    # Refuse what cannot work before anything is trained.
    check_flags(script_args)
    course = reason_flags.course_of(script_args)
    stage = Stage("reason", script_args, before=course.runs, is_spread=True)
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    check_runs(course)
    stage.announce()

    world, seed = World(script_args.world_seed), script_args.seed
    rows = {
        THOUGHTS: lambda: tuning_rows(world, script_args.num_examples, seed, has_thoughts=True),
        DIRECT: lambda: tuning_rows(world, script_args.num_examples, seed, has_thoughts=False),
        MIXED: lambda: mixed_rows(world, script_args.num_mixed_examples, seed, script_args.share_of_thoughts),
        **dict.fromkeys((RL, SHUFFLED), lambda: prompt_rows(world, script_args.num_prompts, seed)),
    }
    course.run_all(rows)
    if not main_process():
        return {}

    result = course_report(course, world, script_args.num_problems, seed)
    return stage.finish(
        result.metrics,
        summary=result.summary,
        tables=result.tables,
        curves=result.plots,
        promises=result.promises,
        artifacts=course.artifacts,
        next_steps=chat_lines(course.folder(RL), rows[RL]()[0]["prompt"]),
        final_model=course.folder(RL),
    )


if __name__ == "__main__":
    run(main, parse)
