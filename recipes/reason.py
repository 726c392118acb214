"""Thoughts before answers: what they gain where a direct answer cannot do, and how PPO on the outcome spreads them.

    hfllm reason                                                # the embedded world, from nothing
    accelerate launch recipes/reason.py --seed 4
    hfllm reason --model_name_or_path NAME --dataset_name gsm8k.jsonl --column_mapping prompt=question --use_peft

A base model reads texts in which people think. It is fine-tuned on questions of several steps with thoughts, and, as a
control, on the same answers without. A third model thinks in 30% of its answers: PPO on right answers alone must make
it think more, and PPO on the same rewards dealt out by chance must not. A model of yours is fine-tuned on the
solutions of your rows, and, as a control, on their answers alone; PPO on exact match follows.
docs/guides/reasoning.md tells more.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hfllm.flags import check_flags
from hfllm.runs.command_line import parse_recipe, run, world_settings
from hfllm.runs.flags import trusts_code_if_asked
from hfllm.runs.lock import releases_folders
from hfllm.runs.recipes import Recipe
from hfllm.stages.reason.flags import ReasonArguments

if TYPE_CHECKING:
    from trl import ModelConfig

RECIPE = Recipe(makes="models that think", runs_own_chain=True)


def parse(argv: Sequence[str]) -> tuple[ReasonArguments, "ModelConfig"]:
    """Read the flags; without your own model the defaults are the embedded world's settings."""
    return parse_recipe(argv, __doc__, ReasonArguments, ("trl.ModelConfig",), settings=world_settings("reason"))


@releases_folders
@trusts_code_if_asked
def main(script_args: ReasonArguments, model_args: "ModelConfig") -> dict[str, float]:
    """Fine-tune with thoughts and without, run PPO and its control, report. Return the metrics."""
    from hfllm.data.world.world import World
    from hfllm.outputs.card import chat_lines
    from hfllm.runs.command_line import main_process
    from hfllm.runs.models import named_model
    from hfllm.runs.stage import Stage
    from hfllm.stages.courses import check_runs
    from hfllm.stages.reason import build, own
    from hfllm.stages.reason import flags as reason_flags
    from hfllm.stages.reason.flags import RL

    # Refuse what cannot work before anything is trained.
    check_flags(script_args, model_args)
    course = reason_flags.course_of(script_args, model_args)
    stage = Stage("reason", script_args, model_args, before=course.runs, is_spread=True)
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    check_runs(course)
    world, seed, like = World(script_args.world_seed), script_args.seed, named_model(model_args)
    problems, held_out = own.read_problems(script_args, course, like) if course.named else ([], [])
    stage.announce()

    rows = own.rows_by_run(problems) if course.named else build.rows_by_run(script_args, world)
    course.run_all(rows)
    if not main_process():
        return {}

    if course.named:
        result = own.report(course, own.ask(course, like, held_out, script_args.response_length))
    else:
        result = build.course_report(course, world, script_args.num_problems, seed)
    return stage.finish(
        result.metrics,
        summary=result.summary,
        tables=result.tables,
        curves=result.plots,
        promises=result.promises,
        claims=result.claims,
        artifacts=course.artifacts,
        next_steps=chat_lines(course.folder(RL), rows[RL]()[0]["prompt"]),
        final_model=course.folder(RL),
        models={"model": course.named},
    )


if __name__ == "__main__":
    run(main, parse)
