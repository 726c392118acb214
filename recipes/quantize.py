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
from typing import TYPE_CHECKING

from hfllm.runs.command_line import parse_recipe, run
from hfllm.runs.flags import trusts_code_if_asked
from hfllm.runs.lock import releases_folders
from hfllm.stages.quantize import QuantizeArguments

if TYPE_CHECKING:
    from trl import ModelConfig


def parse(argv: Sequence[str]) -> tuple[QuantizeArguments, "ModelConfig"]:
    """Read the flags."""
    return parse_recipe(argv, __doc__, QuantizeArguments, ("trl.ModelConfig",))


@releases_folders
@trusts_code_if_asked
def main(script_args: QuantizeArguments, model_args: "ModelConfig") -> dict[str, float]:
    """Make what is missing, quantize, measure, save, report. Return the metrics."""
    from hfllm.compression.schemes import default_device, quiet_bitsandbytes
    from hfllm.outputs.card import loading_lines
    from hfllm.runs.command_line import main_process
    from hfllm.runs.models import load_policy, whole_model
    from hfllm.runs.stage import Stage
    from hfllm.stages import quantize
    from hfllm.stages.pretrain.flags import config_to_train
    from hfllm.stages.shared import files_changed, load_processing_class

    # Refuse what cannot work before anything is trained.
    quantize.check(script_args, model_args)
    sees = quantize.sees(model_args)
    schemes = (quantize.picture_schemes if sees else quantize.schemes_to_compare)(script_args)
    chosen_args = replace(script_args, schemes=schemes)
    before = quantize.stages_before(script_args, model_args)
    files = files_changed(script_args, [model_args.model_name_or_path], model_args.model_revision)
    stage = Stage("quantize", chosen_args, model_args, before=before.parsed, also=files)
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    config = config_to_train(model_args, before)
    if sees:
        quantize.check_pictures(chosen_args, model_args.model_name_or_path)
    quantize.check_model(chosen_args, model_args, config)
    if sees:
        location = (model_args.model_name_or_path, model_args.model_revision)
        rows = quantize.questions_of(chosen_args, load_processing_class(*location, config))
    else:
        rows = quantize.eval_texts(chosen_args)
    stage.announce()

    # The stages before: a model in full precision.
    before.run()
    source_args = replace(model_args, model_name_or_path=before.model("sft") or model_args.model_name_or_path)
    if not main_process():
        return {}

    # Compare its quantized forms, save one of them, and quantize its parts one at a time.
    quiet_bitsandbytes()
    with whole_model(source_args.model_name_or_path, source_args.model_revision, stage.output_dir) as (name, revision):
        whole_args = replace(source_args, model_name_or_path=name, model_revision=revision)
        if sees:
            model, processor = quantize.load(whole_args)
            evaluation = quantize.picture_evaluation(chosen_args, processor, rows)
        else:
            model, tokenizer = load_policy(whole_args)
            evaluation = quantize.make_evaluation(chosen_args, model, tokenizer, rows)
        model.to(default_device()).eval()
        compared, difference = quantize.compare_schemes(chosen_args, whole_args, model, evaluation)
    swept = quantize.sensitivity_by_part(chosen_args, model, evaluation)

    metrics = quantize.quantization_metrics(compared, chosen_args.save_scheme)
    return stage.finish(
        {**metrics, **evaluation.changes(chosen_args.save_scheme), "reload_difference": difference},
        tables=quantize.quantization_tables(compared, swept),
        curves=quantize.sensitivity_bars(swept),
        next_steps=loading_lines(stage.output_dir),
        models={"model": source_args.model_name_or_path},
    )


if __name__ == "__main__":
    run(main, parse)
