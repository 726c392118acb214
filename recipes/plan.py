"""Plan the training of a model: parameters, FLOPs, memory on each device, the layouts that fit, and days.

    hfllm plan                                                           # a trillion parameters on 1,024 H100
    hfllm plan --preset llama-2-7b --num_devices 8 --device a100-80gb --max_length 4096
    hfllm plan --config_path model/config.json --device cpu --num_devices 1 --precision fp32
    python recipes/plan.py --preset gpt3-175b --num_devices 1024 --tensor_parallel 8 --pipeline_parallel 16

Answers at once, by arithmetic only: nothing is allocated, and neither torch nor transformers is imported, except to
read a config.json of another family, of any that `hfllm convert` takes. Writes the files that launch the chosen layout
beside its report. docs/guides/planner.md explains every column and formula.
"""

from collections.abc import Sequence

from hfllm.flags import check_flags
from hfllm.runs.command_line import main_process, parse_recipe, run
from hfllm.runs.recipes import Recipe
from hfllm.stages.plan import PlanArguments

RECIPE = Recipe(in_one_process=True)


def parse(argv: Sequence[str]) -> tuple[PlanArguments]:
    """Read the flags."""
    return parse_recipe(argv, __doc__, PlanArguments)


def main(script_args: PlanArguments) -> dict[str, float]:
    """Plan, write report and launch files. Return the metrics."""
    from hfllm.runs.stage import Stage
    from hfllm.scaling.planner import choose, plan
    from hfllm.stages.plan import (
        launch_files,
        layout_row,
        listed,
        memory_bars,
        memory_row,
        metrics,
        model_shape,
        next_steps,
        parameter_rows,
        write_files,
    )

    # The same folder may be used again: earlier files are overwritten.
    stage = Stage("plan", script_args)
    stage.refuse_foreign_files()
    check_flags(script_args)
    named = (script_args.preset, script_args.config_path)
    name, shape, fields = model_shape(*named, script_args.images_per_row, script_args.loss_chunk_size)
    request = script_args.request(shape)
    plans = plan(request)
    chosen = choose(plans)
    files = launch_files(chosen, request, script_args.output_dir, fields)
    if main_process():
        write_files(script_args.output_dir, files)

    rows = listed(plans, chosen, script_args.top)
    devices = f"{request.num_devices} {request.device.name}"
    return stage.finish(
        metrics(request, plans, chosen),
        tables={
            f"{name}: parameters": parameter_rows(shape),
            f"Layouts on {devices} (* chosen, then the fastest)": [layout_row(one, one is chosen) for one in rows],
            "Memory of each device, GiB": [memory_row(one) for one in rows],
        },
        curves={"memory": memory_bars(chosen)} if script_args.plot else {},
        artifacts={file: file for file in files},
        next_steps=next_steps(chosen, plans, request, script_args.output_dir, script_args.target_days),
    )


if __name__ == "__main__":
    run(main, parse)
