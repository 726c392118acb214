"""Store a model's linear layers in 8 or 4 bits, and report the loss of quality and the savings.

    hfllm quantize                                                       # the embedded world, from nothing
    hfllm quantize --model_name_or_path NAME --dataset_name texts.txt
    accelerate launch recipes/quantize.py --model_name_or_path NAME --schemes int8 nf4 --save_scheme nf4

Schemes are int8 (LLM.int8) and nf4 of bitsandbytes, nf4_double, and dynamic for serving on a CPU. Each is compared
with the model in full precision: bytes, perplexity, gold reward (on the world), greedy tokens, speed. A model that
sees takes rows with pictures, and is compared by the loss and the right answers. The model in --save_scheme is saved
under the output folder and loaded again; its layers are also quantized one at a time. Without `--model_name_or_path`
the world's fine-tuned model is made first.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from hfllm.runs.command_line import parse_recipe, run
from hfllm.runs.flags import trusts_code_if_asked
from hfllm.runs.lock import releases_folders
from hfllm.runs.recipes import Recipe
from hfllm.stages.quantize import QuantizeArguments

if TYPE_CHECKING:
    from trl import ModelConfig

RECIPE = Recipe(makes="a model in 8 or 4 bits", needs={"model_name_or_path": "sft"}, writes="model")


def parse(argv: Sequence[str]) -> tuple[QuantizeArguments, "ModelConfig"]:
    """Read the flags."""
    return parse_recipe(argv, __doc__, QuantizeArguments, ("trl.ModelConfig",))


@releases_folders
@trusts_code_if_asked
def main(script_args: QuantizeArguments, model_args: "ModelConfig") -> dict[str, float]:
    """Make what is missing, quantize, measure, save, report. Return the metrics."""
    from hfllm.compression.schemes import Scheme, default_device, quiet_bitsandbytes
    from hfllm.outputs.card import loading_lines
    from hfllm.runs.command_line import main_process
    from hfllm.runs.models import named_model, whole_model
    from hfllm.runs.pipeline import chain_before
    from hfllm.runs.stage import Stage
    from hfllm.stages import quantize
    from hfllm.stages.pretrain.flags import config_to_train
    from hfllm.stages.shared import files_changed, load_processing_class

    # Refuse what cannot work before anything is trained.
    quantize.check(script_args, model_args)
    source, seed, save_scheme = model_args.model_name_or_path, script_args.seed, script_args.save_scheme
    sees = quantize.sees(source, model_args.model_revision)
    names = (quantize.picture_schemes if sees else quantize.scheme_names)(script_args.schemes, save_scheme)
    chosen_args = replace(script_args, schemes=names)
    configs = {"pretrain": script_args.pretrain_config, "sft": script_args.sft_config}
    before = chain_before(
        "quantize", script_args.output_dir, seed, script_args.world_seed, {"sft": source}, configs=configs
    )
    files = files_changed(script_args, [source], model_args.model_revision)
    stage = Stage("quantize", chosen_args, model_args, before=before.parsed, also=files)
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    config = config_to_train(source, model_args.model_revision, before)
    quantize.check_model(chosen_args, model_args, config)
    if sees:
        processor = load_processing_class(source, model_args.model_revision, config)
        reading = script_args.image_reading()
        rows = quantize.questions_of(script_args.row_source, reading, script_args.num_eval_prompts, processor)
    else:
        rows = quantize.eval_texts(script_args, script_args.num_eval_texts, seed)
    stage.announce()

    # The stages before: a model in full precision.
    before.run()
    source = before.model("sft") or source
    if not main_process():
        return {}

    # Compare its quantized forms, save one of them, and quantize its parts one at a time.
    quiet_bitsandbytes()
    schemes = [script_args.scheme(name) for name in names]
    with whole_model(source, model_args.model_revision, stage.output_dir) as (name, revision):
        whole = replace(named_model(model_args), name=name, revision=revision)
        model, processing_class = quantize.load_whole(whole)
        measures, world = script_args.of_measures, script_args.world
        evaluation = quantize.make_evaluation(measures, world, model, processing_class, rows)
        model.to(default_device()).eval()
        load = partial(Scheme.load, name=name, **whole.kwargs)
        compared, difference = quantize.compare_schemes(
            schemes, save_scheme, load, model, evaluation, stage.output_dir
        )
    of_parts = script_args.sensitivity, script_args.scheme(save_scheme)
    swept = quantize.sensitivity_by_part(*of_parts, model, evaluation, script_args.num_sensitivity_texts)

    metrics = quantize.quantization_metrics(compared, save_scheme)
    return stage.finish(
        {**metrics, **evaluation.changes(save_scheme), "reload_difference": difference},
        summary=quantize.quantization_summary(metrics, save_scheme),
        tables=quantize.quantization_tables(compared, swept),
        curves=quantize.sensitivity_bars(swept),
        next_steps=loading_lines(stage.output_dir),
        models={"model": source},
    )


if __name__ == "__main__":
    run(main, parse)
