"""Fine-tune a model to classify texts, to tag words or to find answers in a text, and judge it beside two controls.

    hfllm classify                                                       # the embedded world, from nothing
    hfllm classify --task token-classification
    hfllm classify --model_name_or_path NAME --use_peft --dataset_name spam.tsv --column_mapping text=SMS label=Label
    hfllm classify --model_name_or_path NAME --task question-answering --dataset_name squad.jsonl
    accelerate launch recipes/classify.py --model_name_or_path NAME --dataset_name texts.jsonl

A head is put on any model: causal or bidirectional, of this family or another. Rows have text and label, words and
tags, or context, question and answers as in SQuAD. The controls learn from the same rows: the most frequent label, and
a logistic regression on words. docs/guides/classify.md tells more.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hfllm.runs.command_line import parse_recipe, run
from hfllm.runs.flags import trusts_code_if_asked
from hfllm.runs.lock import releases_folders
from hfllm.runs.recipes import Recipe
from hfllm.stages.classify import LIBRARY, ClassifyArguments, default_settings

if TYPE_CHECKING:
    from transformers import TrainingArguments
    from trl import ModelConfig

RECIPE = Recipe(makes="a classifier", needs={"model_name_or_path": "pretrain"}, minutes=1)


def parse(argv: Sequence[str]) -> tuple[ClassifyArguments, "TrainingArguments", "ModelConfig"]:
    """Read the flags; the defaults depend on whether a model is named, and whether an adapter is trained."""
    return parse_recipe(argv, __doc__, ClassifyArguments, LIBRARY, "outputs/classify", default_settings)


@releases_folders
@trusts_code_if_asked
def main(
    script_args: ClassifyArguments, training_args: "TrainingArguments", model_args: "ModelConfig"
) -> dict[str, float]:
    """Fine-tune, judge, save, write the report. Return the metrics."""
    from transformers import set_seed

    from hfllm.data.labelled import reader_of
    from hfllm.data.world.tasks import labelled_rows
    from hfllm.outputs.card import write_labels
    from hfllm.runs.command_line import main_process
    from hfllm.runs.models import check_trainable, fitting_length, named_model, peft_config
    from hfllm.runs.pipeline import chain_before
    from hfllm.runs.stage import Stage
    from hfllm.stages import classify
    from hfllm.stages.pretrain.flags import check_adapter
    from hfllm.stages.shared import user_rows
    from hfllm.trainers.learning_rate import scaled_learning_rate
    from hfllm.trainers.mixins import train
    from hfllm.trainers.run_record import final_train_loss

    classify.check(script_args, training_args, model_args)
    stage = Stage("classify", script_args, training_args, model_args)
    stage.check()
    if stage.is_finished:
        return stage.reuse()
    check_trainable(model_args)
    trainer_args, scaled = scaled_learning_rate(script_args, stage.training_args)
    seed, output_dir = training_args.seed, training_args.output_dir
    names, dataset_name = script_args.class_names, script_args.dataset_name
    if (world := script_args.world) is not None:
        sizes = (script_args.num_examples, script_args.num_eval_examples)
        train_rows, test_rows = labelled_rows(world, script_args.task, *sizes, seed)
    else:
        reader = reader_of(script_args.task, names)
        sizes = {"share": script_args.eval_share, "most": script_args.max_eval_samples}
        train_rows, test_rows = user_rows(script_args.row_sources, reader, seed, flaw_of=lambda row: None, **sizes)
    labels = classify.labels_of(script_args.task, train_rows, test_rows, names, dataset_name)
    task = classify.LabelTask(
        script_args.task, labels, script_args.doc_stride, script_args.label_token, script_args.max_answer_length
    )
    bases, configs = {"pretrain": model_args.model_name_or_path}, {"pretrain": script_args.pretrain_config}
    before = chain_before("classify", output_dir, seed, script_args.world_seed, bases, configs)
    check_adapter(model_args, before, classify.HEADS[task.name][1])

    stage.announce()
    before.run()
    base = replace(named_model(model_args), name=before.model("pretrain") or model_args.model_name_or_path)
    # The head is new, and so are the weights of an adapter.
    set_seed(seed)
    adapter = peft_config(model_args, classify.HEADS[task.name][1])
    model, tokenizer = classify.load_with_head(task.name, labels, base, adapter, output_dir)
    length = fitting_length(script_args.max_length, model)
    train_tokens, test_tokens = (
        classify.tokens_of(task, rows, tokenizer, length, title)
        for rows, title in ((train_rows, "training rows"), (test_rows, "held-out rows"))
    )
    trainer = classify.make_trainer(trainer_args, model, tokenizer, train_tokens, test_tokens)
    train(trainer, stage.checkpoint, stage.identity)
    trainer.save_model()
    predicted = classify.predictions(task, trainer, test_rows, test_tokens)
    result = classify.judge_held_out(task.name, predicted, train_rows, test_rows)

    metrics = {
        **result.metrics,
        "train_loss": final_train_loss(trainer),
        "train_rows": len(train_rows),
        "eval_examples": len(test_rows),
        **test_tokens.counts,
        **scaled,
    }
    if main_process() and labels:
        write_labels(output_dir, labels)
    lines = classify.next_lines(task.name, output_dir, test_rows[0], model_args.use_peft, labels)
    models = {"model": base.name}
    tables, plots = dict(result.tables), dict(result.plots)
    return stage.finish(
        metrics,
        trainer,
        result.summary,
        tables,
        plots,
        next_steps=lines,
        too_wide=["Samples"],
        models=models,
        claims=classify.claims_of(task.name),
    )


if __name__ == "__main__":
    run(main, parse)
