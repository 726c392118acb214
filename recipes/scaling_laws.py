"""Fit a scaling law to runs, predict a larger one, and divide compute between model and data.

    hfllm scaling_laws --runs runs.csv                       # columns N, D, loss, under common names
    hfllm scaling_laws                                       # train a small grid on Python's documentation
    hfllm scaling_laws --dataset_name my_texts.jsonl
    hfllm scaling_laws --dataset_name world --probe true     # also: what the sizes can do
    accelerate launch recipes/scaling_laws.py --dataset_name my_texts.jsonl

Without `--runs` a grid of small models is trained (finished runs in runs.csv are reused), two laws are fitted, a
larger run is predicted by the better one, and then trained. docs/guides/scaling_laws.md explains all of it.
"""

from collections.abc import Sequence

from hfllm.runs.command_line import parse_recipe, run
from hfllm.runs.flags import trusts_code_if_asked
from hfllm.runs.lock import releases_folders
from hfllm.runs.recipes import Recipe
from hfllm.stages.scaling_laws.flags import ScalingArguments

RECIPE = Recipe()


def parse(argv: Sequence[str]) -> tuple[ScalingArguments]:
    """Read the flags."""
    return parse_recipe(argv, __doc__, ScalingArguments)


@releases_folders
@trusts_code_if_asked
def main(script_args: ScalingArguments) -> dict[str, float]:
    """Train the grid if there is no file of runs, fit, predict, write the report. Return the metrics."""
    from pathlib import Path

    from hfllm.stages.scaling_laws.flags import COUNTS, check
    from hfllm.stages.scaling_laws.report import ScalingStage, study_of

    check(script_args)
    stage = ScalingStage("scaling_laws", script_args, also=script_args.table_files())
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    stage.announce()

    grid, output_dir = None, script_args.output_dir
    if not script_args.runs:
        from hfllm.stages.scaling_laws.build import SmallGrid

        column, flags = COUNTS[script_args.count_parameters], script_args.pretrain_flags()
        grid = SmallGrid(script_args.grid, script_args.held_out_run, column, flags, output_dir)
    study = study_of(script_args, grid)
    metrics, tables, curves = study.metrics(), study.tables(script_args.budgets), study.plots()
    if grid is not None:
        tables |= {"Runs": grid.table()}
    if script_args.probe:
        from hfllm.data.world.world import World
        from hfllm.evaluation.emergence import make_probes

        world, questions, shots = World(script_args.world_seed), script_args.probe_questions, script_args.probe_shots
        probed = grid.probe(make_probes(world, questions, shots, script_args.seed))
        metrics, tables, curves = metrics | probed.metrics(), tables | probed.tables(), curves | probed.plots()

    runs = script_args.runs or str(Path(output_dir) / "runs.csv")
    return stage.finish(
        metrics,
        tables=tables,
        curves=curves,
        artifacts={"runs": runs},
        next_steps=[f"hfllm scaling_laws --runs {runs} --output_dir outputs/refit"],
    )


if __name__ == "__main__":
    run(main, parse)
