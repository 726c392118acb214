"""Extend a model to texts several times longer than it was trained on, and judge it beside itself as it was.

    hfllm extend                                                          # the embedded world, from nothing
    hfllm extend --model_name_or_path NAME --dataset_name book.txt --rope_type yarn --factor 4
    hfllm extend --model_name_or_path NAME --dataset_name pydoc --rope_type ntk --factor 8 --max_steps 0
    accelerate launch recipes/extend.py --model_name_or_path NAME --dataset_name texts.jsonl

Any causal model with rotary positions: of this family or another. `--rope_type` is linear, ntk, dynamic, yarn or
llama3; a short training on rows of the new length follows, none with `--max_steps 0`. The report has bits per byte by
position and a needle test by depth and length; the control is the model as it was. docs/guides/context.md tells more.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hfllm.flags import check_flags
from hfllm.runs.command_line import parse_recipe, run
from hfllm.runs.flags import trusts_code_if_asked
from hfllm.runs.lock import releases_folders
from hfllm.runs.recipes import Recipe
from hfllm.stages.extend import LIBRARY, ExtendArguments, default_settings

if TYPE_CHECKING:
    from transformers import TrainingArguments
    from trl import ModelConfig

RECIPE = Recipe(makes="a model of longer texts", needs={"model_name_or_path": "pretrain"})


def parse(argv: Sequence[str]) -> tuple[ExtendArguments, "TrainingArguments", "ModelConfig"]:
    """Read the flags; the defaults depend on whether a model is named."""
    return parse_recipe(argv, __doc__, ExtendArguments, LIBRARY, "outputs/extend", default_settings)


@releases_folders
@trusts_code_if_asked
def main(
    script_args: ExtendArguments, training_args: "TrainingArguments", model_args: "ModelConfig"
) -> dict[str, float]:
    """Extend, train, judge, save, write the report. Return the metrics."""
    from transformers import set_seed

    from hfllm.data.world.world import World
    from hfllm.models.extension import extend_model, extended_config
    from hfllm.outputs.card import loading_lines
    from hfllm.runs.models import check_trainable, load_policy, named_model
    from hfllm.runs.pipeline import chain_before
    from hfllm.runs.recipes import settings_file
    from hfllm.runs.stage import Stage
    from hfllm.stages import extend
    from hfllm.stages.pretrain.flags import config_to_train
    from hfllm.trainers.mixins import train
    from hfllm.trainers.run_record import final_train_loss

    # Refuse what cannot work before anything is trained.
    check_flags(script_args, training_args, model_args)
    output_dir, seed, rope_type = training_args.output_dir, training_args.seed, script_args.rope_type
    name, revision = model_args.model_name_or_path, model_args.model_revision
    before = chain_before(
        *("extend", output_dir, seed, script_args.world_seed),
        given_models={"pretrain": name},
        configs={"pretrain": script_args.pretrain_config or str(settings_file("extend/base.yaml"))},
        more_flags={"pretrain": ["--dataset_name", str(Path(output_dir, extend.BASE_TEXTS))]},
    )
    stage = Stage("extend", script_args, training_args, model_args, before=before.parsed)
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    check_trainable(model_args, adapters=False)
    factor, original = script_args.factor, script_args.original_max_position_embeddings
    original, length = extend.lengths_of(config_to_train(name, revision, before), rope_type, factor, original)
    texts, world = extend.split_texts(script_args, seed), World(script_args.world_seed)
    stage.announce()

    # A small base model of a short context, where none is named.
    if before.runs:
        extend.write_base_texts(world, script_args.num_documents, seed, output_dir)
    before.run()
    base = replace(named_model(model_args), name=before.model("pretrain") or name)
    set_seed(seed)
    model, tokenizer = load_policy(base)
    counts = extend.Counts(script_args.num_train_texts, script_args.num_eval_texts, script_args.num_needles)
    rows = extend.long_rows_of(world, texts, counts, tokenizer, length, seed)

    # The model as it was, extended, and trained on long rows.
    model.to(training_args.device)
    settings = rope_type, counts.needles, script_args.world_seed
    evaluation = extend.ExtendEvaluation(tokenizer, rows, original, length, *settings)
    evaluation.judge(model, "before")
    extend_model(model, extended_config(model.config, rope_type, factor, original))
    tokenizer.model_max_length = length
    trainer, trained = extend.make_trainer(stage.training_args, model, tokenizer, rows.train), {}
    if training_args.max_steps != 0:
        evaluation.judge(model, "extended", needles=False)
        train(trainer, stage.checkpoint, stage.identity)
        trained = {"train_loss": final_train_loss(trainer)}
    trainer.save_model()
    evaluation.judge(model, "after")

    result = evaluation.results()
    metrics = {**result.metrics, "original_length": original, "length": length, "factor": factor, **trained}
    lines, models = loading_lines(output_dir), {"model": base.name}
    return stage.finish(
        metrics,
        trainer,
        result.summary,
        dict(result.tables),
        dict(result.plots),
        next_steps=lines,
        models=models,
        claims=extend.CLAIMS,
    )


if __name__ == "__main__":
    run(main, parse)
