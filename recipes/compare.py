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
from hfllm.stages.evaluate.compare import CompareArguments


def parse(argv: Sequence[str]) -> tuple[CompareArguments]:
    """Read the flags; words before the first one are the logs."""
    logs = list(takewhile(lambda word: not word.startswith("-"), argv))
    flags = list(argv[len(logs) :])
    return parse_recipe(["--logs", *logs, *flags] if logs else flags, __doc__, CompareArguments)


@releases_folders
def main(script_args: CompareArguments) -> dict[str, float]:
    """Read both logs, compare, report. Return the metrics."""
    from hfllm.evaluation.verdicts import fail_if_worse
    from hfllm.outputs.report import is_samples, markdown_table
    from hfllm.runs.command_line import say
    from hfllm.runs.stage import Stage
    from hfllm.stages.evaluate import compare

    # The same folder may be used again: earlier files are overwritten.
    compare.check(script_args)
    stage = Stage("compare", script_args)
    stage.refuse_foreign_files()
    if not main_process():
        return {}

    names = compare.labels(script_args)
    first, second = (compare.read_log(name, script_args) for name in script_args.logs)
    second = compare.renamed(first, second, script_args.logs)
    family = compare.family_of(script_args, first, second, names)
    lock(script_args.output_dir)
    result = compare.report(script_args, names, family, (first, second))
    for title, rows in result.tables.items():
        if not is_samples(rows):
            say("\n".join(["", title, *markdown_table(rows)]))
    metrics = stage.finish(
        result.metrics, summary=result.summary, tables=result.tables, artifacts={"changes": compare.CHANGES}
    )
    if script_args.fail_on_regression:
        fail_if_worse(metrics, *names[:1], names[1:])
    return metrics


if __name__ == "__main__":
    run(main, parse)
