"""Convert a checkpoint: a native one of transformers into hfllm, or an hfllm model into the equivalent native class.

    hfllm convert --model_name_or_path meta-llama/Llama-3.2-1B --output_dir llama
    hfllm convert --model_name_or_path outputs/rlhf --output_dir native
    accelerate launch recipes/convert.py                                  # the world's base model, to Llama

Weights keep their bits. Native models can be read by vLLM, llama.cpp and all that supports the class. What the
other side cannot express is refused by name, and a failed conversion leaves no folder.
"""

from collections.abc import Sequence
from pathlib import Path

from hfllm.runs.command_line import main_process, parse_recipe, run
from hfllm.runs.flags import trusts_code_if_asked
from hfllm.runs.lock import releases_folders
from hfllm.runs.recipes import Recipe
from hfllm.stages.convert import ConvertArguments

RECIPE = Recipe(makes="a model in another layout", needs={"model_name_or_path": "pretrain"})


def parse(argv: Sequence[str]) -> tuple[ConvertArguments]:
    """Read the flags."""
    return parse_recipe(argv, __doc__, ConvertArguments)


@releases_folders
@trusts_code_if_asked
def main(script_args: ConvertArguments) -> dict[str, float]:
    """Convert, compare, write the report. Return the metrics."""
    from hfllm.flags import check_flags
    from hfllm.models.conversion.convert import check_empty
    from hfllm.runs.models import whole_model
    from hfllm.runs.pipeline import chain_before
    from hfllm.runs.stage import Stage
    from hfllm.stages.convert import convert

    before = chain_before(
        "convert",
        script_args.output_dir,
        script_args.seed,
        script_args.world_seed,
        given_models={"pretrain": script_args.model_name_or_path},
        configs={"pretrain": script_args.pretrain_config},
    )
    stage = Stage("convert", script_args, before=before.parsed)
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    source, target = script_args.model_name_or_path, Path(script_args.output_dir)
    if source is None:
        # The output folder holds both.
        source, target = before.model("pretrain"), target / "native"
    check_flags(script_args)
    check_empty(target)
    stage.announce(f"{source} -> {target}")
    before.run()
    if not main_process():
        return {}
    # An adapter is merged into its base first.
    with whole_model(source, script_args.model_revision, target.parent) as (name, revision):
        location = {"revision": revision} | ({"gguf_file": script_args.gguf_file} if script_args.gguf_file else {})
        seed = script_args.seed if script_args.verify else None
        metrics = convert(name, location, target, script_args.native_type, script_args.max_shard_size, seed)
    return stage.finish(
        metrics,
        artifacts={"model": str(target.relative_to(script_args.output_dir))},
        next_steps=[f'AutoModelForCausalLM.from_pretrained("{target}")'],
    )


if __name__ == "__main__":
    run(main, parse)
