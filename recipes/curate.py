"""Curate raw documents into training shards: filter, remove duplicates and evaluation sets, report every drop.

    hfllm curate                                                       # this Python's own documentation
    hfllm curate --dataset_name crawl/ --tasks 8 --workers 4
    hfllm curate --dataset_name books/ --config curate/books           # settings that came with hfllm
    python recipes/curate.py --dataset_name crawl/ --decontaminate gsm8k_test.jsonl mmlu.csv --toxic_words words.txt

Reads txt, jsonl, csv and tsv (each also gzipped), parquet and WARC files, folders of them, and datasets on the Hub.
Writes shards with the columns text, id and source to <output_dir>/data, for `hfllm pretrain --dataset_name`. Needs
`pip install 'hfllm[data]'`. --config takes your own YAML file, or curate/books, curate/pydoc or curate/web.
docs/guides/curation.md says what each filter does, and what it misses.
"""

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from hfllm.errors import InputError
from hfllm.runs.command_line import parse_recipe, run
from hfllm.runs.lock import join, owner_of, releases_folders
from hfllm.runs.recipes import Recipe
from hfllm.stages import curate
from hfllm.stages.curate import CurateArguments

RECIPE = Recipe(in_one_process=True, unfinished="unfinished")


def parse(argv: Sequence[str]) -> tuple[CurateArguments]:
    """Read the flags; without your own data the defaults are the settings for Python's documentation."""
    return parse_recipe(argv, __doc__, CurateArguments, settings=curate.settings)


@releases_folders
def main(script_args: CurateArguments) -> dict[str, float]:
    """Curate, write shards and report. Return the metrics."""
    from hfllm.runs.stage import Stage

    curate.check_installed()
    # How many tasks run at once does not change the result; an edited file does.
    state = {curate.STATE: curate.fingerprint(script_args.inputs)}
    stage = Stage("curate", script_args, also=state, without=curate.NOT_DECISIVE)
    if stage.is_finished:
        return stage.reuse()
    stage.announce(f"{script_args.dataset_name} -> {script_args.output_dir}")

    # These import datatrove.
    from hfllm.data.curation.inputs import ignored_files
    from hfllm.data.curation.pipeline import SHARDS, curation_stages, read_examples, read_statistics, run_stages

    folder = Path(script_args.output_dir)
    work = curate.new_attempt(folder)
    steps = curation_stages(script_args, work)
    ignored = ignored_files(script_args)
    if ignored:
        print(f"curate: {len(ignored)} files of other kinds are not read: {', '.join(ignored[:5])}", flush=True)
    curate.resume_or_clear(work, stage.arguments)
    workers_hold = partial(join, folder, owner_of(folder))
    run_stages(steps, work, script_args.workers, lambda line: print(line, flush=True), workers_hold)

    statistics = list(read_statistics(steps, work))
    try:
        curate.check_kept(script_args.dataset_name, statistics)
    except InputError:
        shutil.rmtree(work.parent)
        raise
    examples = read_examples(work / "examples")
    curate.hand_over(work, folder, SHARDS)
    metrics = stage.finish(
        curate.curation_metrics(statistics),
        tables=curate.curation_tables(script_args.dataset_name, statistics, examples),
        curves={"funnel": curate.funnel_bars(statistics)},
        artifacts={"data": SHARDS},
        next_steps=[f"hfllm pretrain --dataset_name {folder / SHARDS}"],
        too_wide=[curate.EXAMPLES],
    )
    shutil.rmtree(work.parent)
    return metrics


if __name__ == "__main__":
    run(main, parse)
