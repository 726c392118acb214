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
from hfllm.runs.recipes import Recipe
from hfllm.stages.evaluate import flags
from hfllm.stages.evaluate.flags import EvaluateArguments

RECIPE = Recipe(makes="a report on a model", needs={"model_name_or_path": "rlhf"}, runs_own_chain=True)


def parse(argv: Sequence[str]) -> tuple[EvaluateArguments]:
    """Read the flags."""
    return parse_recipe(argv, __doc__, EvaluateArguments)


@releases_folders
@trusts_code_if_asked
def main(script_args: EvaluateArguments) -> dict[str, float]:
    """Make what is missing, judge, compare, report. Return the metrics."""
    # Refuse what cannot work before anything is trained or loaded, or a library imported.
    flags.check(script_args)
    from trl import ModelConfig

    from hfllm.evaluation.verdicts import fail_if_worse
    from hfllm.runs.command_line import main_process
    from hfllm.runs.models import named_model
    from hfllm.runs.stage import Stage
    from hfllm.stages.evaluate import build, report
    from hfllm.stages.shared import files_changed

    suites = build.suites_of(script_args)
    build.check_items(suites, script_args.write_answers)
    named, output_dir = script_args.model_name_or_path or [], script_args.output_dir
    configs = {name: getattr(script_args, f"{name}_config") for name in flags.CONFIGS}
    before = flags.stages_before(output_dir, script_args.seed, script_args.world_seed, named, configs)
    models = flags.models_of(named, before)
    files = {**build.changed_files(script_args.files), **files_changed(script_args, named)}
    stage = Stage("evaluate", script_args, before=before.parsed, also=files, without=flags.HOW_IT_ENDS, is_spread=True)
    stage.check()
    first, *others = labels = list(models)
    if stage.is_finished:
        metrics = stage.reuse()
        if script_args.fail_on_regression:
            fail_if_worse(metrics, first, others)
        return metrics
    judge = script_args.judge_model_name_or_path
    build.check_models(named, judge, bool(script_args.apply_chat_template), "pictures" in script_args.suites)
    stage.announce()

    # The world's models, if none is named.
    before.run()
    if not main_process():
        return {}

    # Judge each by each suite, as far as an earlier run has not.
    names = ("dtype", "attn_implementation", "load_in_8bit", "load_in_4bit")
    like = named_model(ModelConfig(**{name: getattr(script_args, name) for name in names}))
    loader = build.Loader(like.settings, script_args.batch_size, script_args.apply_chat_template)
    samples = build.Samples(output_dir, stage.arguments)
    with loader.load("judge", judge) if judge else nullcontext() as judging:
        if judging:
            build.add_judge(suites, judging)
        records = build.judge_all(loader, models, suites, samples)

    result = report.report(suites, labels, records)
    artifacts = {**{name: name for name in before.runs}, "samples": build.SAMPLES}
    if others:
        family = report.compared_figures(suites, labels, records)
        report.write_changes(output_dir, report.changes_of(labels, family, records))
        artifacts["changes"] = flags.CHANGES
    report.print_tables(result.tables)
    metrics = stage.finish(
        result.metrics,
        None,
        result.summary,
        result.tables,
        result.plots,
        artifacts=artifacts,
        models=models,
        claims=result.verdict or (),
    )
    if script_args.fail_on_regression:
        fail_if_worse(metrics, first, others)
    return metrics


if __name__ == "__main__":
    run(main, parse)
