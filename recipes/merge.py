"""Merge an adapter into its base model, and write the whole model: nothing more needs PEFT, or the base.

    hfllm merge --model_name_or_path outputs/sft --output_dir outputs/merged
    python recipes/merge.py --model_name_or_path me/my-adapter --output_dir merged

Adapters of language models and of reward models, whose head for scores is kept. The weights are summed in single
precision and stored in the base's own; both are compared on random tokens. A folder that holds something is refused.
"""

from collections.abc import Sequence
from pathlib import Path

from hfllm.runs.command_line import main_process, parse_recipe, run
from hfllm.runs.flags import trusts_code_if_asked
from hfllm.runs.lock import releases_folders
from hfllm.runs.recipes import Recipe
from hfllm.stages.convert import MergeArguments

RECIPE = Recipe(in_one_process=True)


def parse(argv: Sequence[str]) -> tuple[MergeArguments]:
    """Read the flags."""
    return parse_recipe(argv, __doc__, MergeArguments)


@releases_folders
@trusts_code_if_asked
def main(script_args: MergeArguments) -> dict[str, float]:
    """Merge, compare, save, write the report. Return the metrics."""
    from hfllm.outputs.card import loading_lines
    from hfllm.runs.stage import Stage
    from hfllm.stages.convert import adapter_to_merge, merge_into_base

    stage = Stage("merge", script_args)
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    target = Path(script_args.output_dir)
    adapter = adapter_to_merge(script_args.model_name_or_path, script_args.model_revision, target)
    stage.announce(f"{adapter.name} into {adapter.base} -> {script_args.output_dir}")
    if not main_process():
        return {}
    metrics = merge_into_base(adapter, target, script_args.max_shard_size, script_args.seed)
    return stage.finish(metrics, next_steps=loading_lines(script_args.output_dir, adapter.task))


if __name__ == "__main__":
    run(main, parse)
