"""Teach a model to answer from passages, to cite them, and to say what it does not know.

    hfllm ground                                                # the embedded world, from nothing
    accelerate launch recipes/ground.py --seed 4
    hfllm ground --model_name_or_path NAME --dataset_name questions.jsonl --use_peft

A base model reads texts in which people answer from passages. It is fine-tuned on questions with passages, some of
which are about something else, contradict each other or hold instructions, and, as a control, on questions without.
Both are asked about animals that no text names, with the passages given, found by BM25, and behind a gate; how sure
they are, and whether a check against passages finds what is made up, is measured too. A model of yours learns the same
from your rows of a question, its answer and the passage that tells it. docs/guides/grounding.md tells more.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hfllm.runs.command_line import parse_recipe, run, world_settings
from hfllm.runs.flags import trusts_code_if_asked
from hfllm.runs.lock import releases_folders
from hfllm.runs.recipes import Recipe
from hfllm.stages.ground.flags import GroundArguments

if TYPE_CHECKING:
    from trl import ModelConfig

RECIPE = Recipe(makes="a model that answers from passages", runs_own_chain=True)


def parse(argv: Sequence[str]) -> tuple[GroundArguments, "ModelConfig"]:
    """Read the flags; without your own model the defaults are the embedded world's settings."""
    return parse_recipe(argv, __doc__, GroundArguments, ("trl.ModelConfig",), settings=world_settings("ground"))


@releases_folders
@trusts_code_if_asked
def main(script_args: GroundArguments, model_args: "ModelConfig") -> dict[str, float]:
    """Fine-tune with passages and without, ask, report. Return the metrics."""
    from hfllm.data.world.world import World
    from hfllm.outputs.card import chat_lines
    from hfllm.runs.command_line import main_process
    from hfllm.runs.models import named_model
    from hfllm.runs.stage import Stage
    from hfllm.stages.courses import check_runs
    from hfllm.stages.ground import build, own
    from hfllm.stages.ground.flags import GROUNDED, check, course_of

    # Refuse what cannot work before anything is trained.
    check(script_args, model_args)
    course = course_of(script_args, model_args)
    stage = Stage("ground", script_args, model_args, before=course.runs, is_spread=True)
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    check_runs(course)
    world, seed, like = World(script_args.world_seed), script_args.seed, named_model(model_args)
    questions = own.read_questions(script_args, course, like) if course.named else None
    stage.announce()

    course.run_all(questions.rows_by_run() if questions else build.rows_by_run(script_args, world))
    if not main_process():
        return {}

    if questions:
        prompt = questions.asked[own.ALONE][0].prompt()
        result = own.report(own.ask(course, like, questions.asked))
    else:
        prompt = build.example_prompt(world)
        result = build.compare_models(course, world, script_args.num_questions, script_args.num_samples, seed)
    return stage.finish(
        result.metrics,
        summary=result.summary,
        tables=result.tables,
        curves=result.plots,
        promises=result.promises,
        claims=result.claims,
        artifacts={name: name for name in course.runs},
        next_steps=chat_lines(course.folder(GROUNDED), prompt),
        final_model=course.folder(GROUNDED),
        models={"model": course.named},
    )


if __name__ == "__main__":
    run(main, parse)
