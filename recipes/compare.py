"""Compare two evaluations item by item: is the second model better, worse or no different, by one corrected verdict.

    hfllm compare a.jsonl b.jsonl
    hfllm compare results/A results/B --metrics acc exact_match --pool mmlu --fail_on_regression
    python recipes/compare.py a.jsonl b.jsonl

Reads lm-eval's logs of items (--log_samples), or folders of them, and hfllm evaluate's samples.jsonl. Items are
paired, shares tested by McNemar's exact test and other figures by exchanges, and all figures together are adjusted by
Holm's method. No model is loaded. docs/guides/evaluation.md says more.
"""

from collections.abc import Sequence
from itertools import takewhile

from hfllm.runs.command_line import main_process, parse_recipe, run
from hfllm.runs.lock import lock, releases_folders
from hfllm.runs.recipes import Recipe
from hfllm.stages.compare import CompareArguments

RECIPE = Recipe(in_one_process=True)


def parse(argv: Sequence[str]) -> tuple[CompareArguments]:
    """Read the flags; words before the first one are the logs."""
    logs = list(takewhile(lambda word: not word.startswith("-"), argv))
    flags = list(argv[len(logs) :])
    return parse_recipe(["--logs", *logs, *flags] if logs else flags, __doc__, CompareArguments)


@releases_folders
def main(script_args: CompareArguments) -> dict[str, float]:
    """Read both logs, compare, report. Return the metrics."""
    from hfllm.evaluation.verdicts import fail_if_worse
    from hfllm.runs.stage import Stage
    from hfllm.stages import compare
    from hfllm.stages.evaluate.flags import CHANGES
    from hfllm.stages.evaluate.report import print_tables, write_changes

    # The same folder may be used again: earlier files are overwritten.
    compare.check(script_args)
    stage = Stage("compare", script_args)
    stage.refuse_foreign_files()
    if not main_process():
        return {}

    evaluations = compare.read_evaluations(script_args.logs, script_args.cluster_by, script_args.pool or ())
    family = compare.family_of(*evaluations, script_args.metrics or (), script_args.allow_missing)
    lock(script_args.output_dir)
    changes = compare.changes_of(evaluations, family)
    write_changes(script_args.output_dir, changes)
    result = compare.report(evaluations, family, changes, script_args.alpha)
    print_tables(result.tables)
    metrics = stage.finish(
        result.metrics,
        summary=result.summary,
        tables=result.tables,
        artifacts={"changes": CHANGES},
        claims=result.verdict or (),
    )
    if script_args.fail_on_regression:
        first, second = evaluations
        fail_if_worse(metrics, first.label, [second.label])
    return metrics


if __name__ == "__main__":
    run(main, parse)
