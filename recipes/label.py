"""Label preferences by people, as reward modeling begins: a page that shows a prompt and two answers.

    hfllm label outputs/sft --dataset_name prompts.csv
    hfllm label NAME --other_model_name_or_path OTHER --dataset_name prompts.jsonl --annotators anna ben
    hfllm label --dataset_name pairs.jsonl                     # rows that bring both answers
    python recipes/label.py --model_name_or_path NAME --dataset_name prompts.csv

The answers are two samples of the model, or one of each of two models; their sides are shuffled. Every label is on the
disk at once, and the same command resumes. labels.jsonl holds rows that `hfllm reward` reads, edits.jsonl answers that
people wrote, for `hfllm sft`. Ctrl-C ends, and the report says how far people agree. Needs the extra `label`.
"""

from collections.abc import Sequence
from pathlib import Path

from hfllm.runs.command_line import main_process, parse_recipe, run
from hfllm.runs.flags import trusts_code_if_asked
from hfllm.runs.lock import releases_folders
from hfllm.runs.recipes import Recipe
from hfllm.stages.label.flags import LabelArguments, check

RECIPE = Recipe(in_one_process=True)


def parse(argv: Sequence[str]) -> tuple[LabelArguments]:
    """Read the flags; a word before the first one is the model."""
    is_named = argv and not argv[0].startswith("-")
    return parse_recipe(["--model_name_or_path", *argv] if is_named else argv, __doc__, LabelArguments)


@releases_folders
@trusts_code_if_asked
def main(script_args: LabelArguments) -> dict[str, float]:
    """Make the pairs, serve the page, write the report. Return the metrics."""
    from hfllm.runs.local import listen
    from hfllm.stages.label import build

    check(script_args)
    stage = build.stage_of(script_args)
    folder = Path(script_args.output_dir)
    pairs = build.saved_pairs(folder, stage.arguments)
    rows = build.read_rows(script_args) if pairs is None else ()
    stage.announce()
    if not main_process():
        return {}
    listening = listen(script_args.host, script_args.port)

    # The answers: sampled once, then kept, so that votes are on the same ones.
    speakers = build.load_speakers(script_args)
    if pairs is None:
        pairs = build.sampled_pairs(rows, speakers, script_args) if speakers else build.pairs_of(rows)
        build.save_pairs(folder, pairs, stage.arguments)

    votes = build.votes_of(script_args, pairs)
    build.serve(votes, speakers, script_args.host, listening)
    result = build.report_of(votes)
    return stage.finish(
        result.metrics,
        summary=result.summary,
        tables=result.tables,
        artifacts=build.ARTIFACTS,
        claims=result.promises,
    )


if __name__ == "__main__":
    run(main, parse)
