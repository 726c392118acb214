"""Judge models: how truthful, helpful, harmless, calibrated and able they are, side by side, with an error bar each.

    hfllm evaluate                                                # the world's models, before and after alignment
    hfllm evaluate --model_name_or_path A B --suites truthfulness --truthfulqa_file TruthfulQA.csv
    hfllm evaluate --model_name_or_path A --dataset_name rows.jsonl             # questions about pictures
    hfllm evaluate --model_name_or_path A B --fail_on_regression                # exit code 1 if B is worse
    accelerate launch recipes/evaluate.py --model_name_or_path A --suites refusals --xstest_file xstest.csv

Suites read local files, or ask about the embedded world, whose answers have exact gold. A run that was stopped resumes
item by item: give the same command again. docs/guides/evaluation.md says what each figure means and where it is weak.
"""

from collections.abc import Sequence
from contextlib import nullcontext

from hfllm.runs.command_line import parse_recipe, run
from hfllm.runs.flags import trusts_code_if_asked
from hfllm.runs.lock import releases_folders
from hfllm.stages.evaluate.flags import HOW_IT_ENDS, EvaluateArguments


def parse(argv: Sequence[str]) -> tuple[EvaluateArguments]:
    """Read the flags."""
    return parse_recipe(argv, __doc__, EvaluateArguments)


@releases_folders
@trusts_code_if_asked
def main(script_args: EvaluateArguments) -> dict[str, float]:
    """Make what is missing, judge, compare, report. Return the metrics."""
    from hfllm.evaluation.verdicts import fail_if_worse
    from hfllm.outputs.report import is_samples, markdown_table
    from hfllm.runs.command_line import main_process, say
    from hfllm.runs.stage import Stage
    from hfllm.stages.evaluate import build as evaluate
    from hfllm.stages.evaluate import flags as evaluate_flags
    from hfllm.stages.evaluate.build import SAMPLES, Samples, judge_all, report, suites_of, write_changes

    # Refuse what cannot work before anything is trained or loaded.
    evaluate.check(script_args)
    before = evaluate_flags.stages_before(script_args)
    models = evaluate_flags.models_of(script_args, before)
    files = evaluate.changed_files(script_args)
    stage = Stage("evaluate", script_args, before=before.parsed, also=files, without=HOW_IT_ENDS, is_spread=True)
    stage.check()
    first, *others = models
    if stage.is_finished:
        metrics = stage.reuse()
        if script_args.fail_on_regression:
            fail_if_worse(metrics, first, others)
        return metrics
    evaluate.check_models(script_args)
    stage.announce()

    # The world's models, if none is named.
    before.run()
    if not main_process():
        return {}

    # Judge each by each suite, as far as an earlier run has not.
    judge = script_args.judge_model_name_or_path
    samples = Samples(script_args.output_dir, stage.arguments)
    with evaluate_flags.loaded(script_args, "judge", judge) if judge else nullcontext() as judging:
        suites = suites_of(script_args, judging)
        records = judge_all(script_args, models, suites, samples)

    result = report(suites, list(models), records)
    changes = write_changes(script_args.output_dir, suites, list(models), records)
    for title, rows in result.tables.items():
        if not is_samples(rows):
            say("\n".join(["", title, *markdown_table(rows)]))
    metrics = stage.finish(
        result.metrics,
        summary=result.summary,
        tables=result.tables,
        curves=result.plots,
        artifacts={**{name: name for name in before.runs}, "samples": SAMPLES, **changes},
        models={label: name for label, name in models.items()},
    )
    if script_args.fail_on_regression:
        fail_if_worse(metrics, first, others)
    return metrics


if __name__ == "__main__":
    run(main, parse)
