"""Thoughts before answers: what they gain where a direct answer cannot do, and how PPO on the outcome spreads them.

    hfllm reason                                                # the embedded world, from nothing
    accelerate launch recipes/reason.py --seed 4

A base model reads texts in which people think. It is fine-tuned on questions of several steps with thoughts, and, as a
control, on the same answers without. A third model thinks in 30% of its answers: PPO on right answers alone must make
it think more, and PPO on the same rewards dealt out by chance must not. docs/guides/reasoning.md tells more.
"""

from collections.abc import Sequence

from hfllm.runs.command_line import parse_recipe, run
from hfllm.runs.lock import releases_folders
from hfllm.runs.recipes import settings_file
from hfllm.stages.reason.flags import ReasonArguments


def parse(argv: Sequence[str]) -> tuple[ReasonArguments]:
    """Read the flags; the defaults are the embedded world's settings."""
    return parse_recipe(argv, __doc__, ReasonArguments, settings=lambda flags: [settings_file("reason/world.yaml")])


@releases_folders
def main(script_args: ReasonArguments) -> dict[str, float]:
    """Pretrain, fine-tune with thoughts and without, run PPO and its control, report. Return the metrics."""
    from hfllm.outputs.card import chat_lines
    from hfllm.runs.command_line import main_process
    from hfllm.runs.stage import Stage
    from hfllm.stages.constitution.flags import check_runs
    from hfllm.stages.reason import build as reason
    from hfllm.stages.reason import flags as reason_flags
    from hfllm.stages.reason.build import evaluate

    # Refuse what cannot work before anything is trained.
    reason_flags.check(script_args)
    course = reason_flags.course_of(script_args)
    stage = Stage("reason", script_args, before=course.runs, is_spread=True)
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    check_runs(course)
    stage.announce()

    course.announce()
    course.run(reason_flags.PRETRAIN)
    for name in course.models:
        reason.write(script_args, name)
        course.run(name)
    course.end()
    if not main_process():
        return {}

    result = evaluate(script_args, course)
    question = reason.rows_of(script_args, reason_flags.RL)[0]["prompt"]
    return stage.finish(
        result.metrics,
        summary=result.summary,
        tables=result.tables,
        curves=result.plots,
        promises=result.promises,
        artifacts={name: name for name in course.runs},
        next_steps=chat_lines(course.folder(reason_flags.RL), question),
    )


if __name__ == "__main__":
    run(main, parse)
