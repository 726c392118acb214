"""Teach a model to answer from passages, to cite them, and to say what it does not know.

    hfllm ground                                                # the embedded world, from nothing
    accelerate launch recipes/ground.py --seed 4

A base model reads texts in which people answer from passages. It is fine-tuned on questions with passages, some of
which are about something else, contradict each other or hold instructions, and, as a control, on questions without.
Both are asked about animals that no text names, with the passages given, found by BM25, and behind a gate; how sure
they are, and whether a check against passages finds what is made up, is measured too. docs/guides/grounding.md tells
more.
"""

from collections.abc import Sequence
from functools import partial

from hfllm.runs.command_line import parse_recipe, run
from hfllm.runs.lock import releases_folders
from hfllm.runs.recipes import Recipe, settings_file
from hfllm.stages.ground.flags import GroundArguments

RECIPE = Recipe(makes="a model that answers from passages", runs_own_chain=True)


def parse(argv: Sequence[str]) -> tuple[GroundArguments]:
    """Read the flags; the defaults are the embedded world's settings."""
    return parse_recipe(argv, __doc__, GroundArguments, settings=lambda flags: [settings_file("ground/world.yaml")])


@releases_folders
def main(script_args: GroundArguments) -> dict[str, float]:
    """Pretrain, fine-tune with passages and without, ask, report. Return the metrics."""
    from hfllm.data.world.passages import ONE, passage_tasks
    from hfllm.data.world.world import World
    from hfllm.outputs.card import chat_lines
    from hfllm.runs.command_line import main_process
    from hfllm.runs.stage import Stage
    from hfllm.stages.courses import check_runs
    from hfllm.stages.ground.build import compare_models, rows_of
    from hfllm.stages.ground.flags import GROUNDED, MODELS, check, course_of

    # Refuse what cannot work before anything is trained.
    check(script_args)
    course = course_of(script_args)
    stage = Stage("ground", script_args, before=course.runs, is_spread=True)
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    check_runs(course)
    stage.announce()

    world, seed = World(script_args.world_seed), script_args.seed
    size = script_args.num_examples, script_args.grounded_fraction
    course.run_all({name: partial(rows_of, world, *size, seed, has_passages=name == GROUNDED) for name in MODELS})
    if not main_process():
        return {}

    result = compare_models(course, world, script_args.num_questions, script_args.num_samples, seed)
    return stage.finish(
        result.metrics,
        summary=result.summary,
        tables=result.tables,
        curves=result.plots,
        promises=result.promises,
        artifacts={name: name for name in course.runs},
        next_steps=chat_lines(course.folder(GROUNDED), passage_tasks(world.facts, ONE, 1)[0].prompt),
        final_model=course.folder(GROUNDED),
    )


if __name__ == "__main__":
    run(main, parse)
